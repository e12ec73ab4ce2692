"""Programs against E2B's own Python SDK, as people write them: every row of what it can ask for that needs no cloud.

Run by ../../sdk.rs with the four variables set, once for each release of the SDK. Rows share a sandbox where they need none
of their own. A row that a release cannot ask for is left out by what it lacks, never by its number.
"""

import sys
import time
import traceback

from e2b import Sandbox

from common import ODD, ROWS, RUN

# In this order, which is that of the rows.
import sandboxes  # noqa: F401, E402
import commands  # noqa: F401, E402
import files  # noqa: F401, E402
import ports  # noqa: F401, E402
import code_interpreter  # noqa: F401, E402
import templates  # noqa: F401, E402
import asynchronous  # noqa: F401, E402


def main():
    wanted = sys.argv[1:]
    failed = []
    box = Sandbox.create("base", timeout=3600, metadata=ODD, envs={"SET": "set"})
    try:
        for check in ROWS:
            if wanted and not any(word in check.__name__ for word in wanted):
                continue
            begun = time.monotonic()
            try:
                check(box)
                outcome = "ok"
            except Exception:
                traceback.print_exc()
                failed.append(check.__name__)
                outcome = "FAILED"
            print(f"  {check.__name__}: {outcome}, {time.monotonic() - begun:.1f} s", flush=True)
    finally:
        pages = Sandbox.list()
        while pages.has_next:
            for left in pages.next_items():
                if left.metadata.get("run", "").startswith(RUN) or failed:
                    Sandbox.kill(left.sandbox_id)
        box.kill()
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


main()
