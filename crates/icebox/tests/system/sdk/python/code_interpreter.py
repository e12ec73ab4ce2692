"""E2B's code interpreter, where there is one for the release."""

import os

from e2b import NotFoundException, TimeoutException

from common import API, ask, raises, row, until

try:
    import e2b_code_interpreter as interpreter
except ImportError:
    # Of one release there is none here.
    interpreter = None


def serve(box):
    """Has it listen in a sandbox."""
    with open(os.path.join(os.path.dirname(__file__), "..", "interpreter.py")) as source:
        box.files.write("/home/user/interpreter.py", source.read())
    box.commands.run("python3 interpreter.py", background=True)
    headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49999"}
    until("it listens", lambda: ask("GET", API + "/contexts", headers)[0] == 200)


@row
def code_runs_in_contexts(_):
    if not interpreter:
        return
    box = interpreter.Sandbox.create("base", timeout=300)
    serve(box)
    code_is_run(box, interpreter)


def code_is_run(box, interpreter):
    first = box.run_code("import sys; x = 20; print('said'); print('warned', file=sys.stderr); x + 1")
    assert first.text == "21" and first.execution_count == 1, first
    assert "".join(first.logs.stdout) == "said\n" and "".join(first.logs.stderr) == "warned\n", first.logs
    assert box.run_code("x * 2").text == "40"
    # What is said comes when it is, not when all is said: the code ends only after it was heard.
    said = []
    beside = interpreter.Sandbox.connect(box.sandbox_id)

    def heard(it):
        said.append(str(it))
        beside.files.write("/tmp/heard", "")

    waiting = "import os, time\nprint('said')\nwhile not os.path.exists('/tmp/heard'):\n    time.sleep(0.05)"
    assert not box.run_code(waiting, on_stdout=heard).error
    assert said
    failed = box.run_code("1 / 0").error
    assert failed.name == "ZeroDivisionError" and "<cell>" in failed.traceback, failed
    assert box.run_code("import os; os.environ['GIVEN']", envs={"GIVEN": "given"}).text == "'given'"
    context = box.create_code_context(cwd="/tmp")
    assert context.cwd == "/tmp" and context.id in [it.id for it in box.list_code_contexts()]
    assert box.run_code("import os; os.getcwd()", context=context).text == "'/tmp'"
    assert box.run_code("x", context=context).error.name == "NameError"
    box.run_code("x = 1", context=context)
    box.restart_code_context(context)
    assert box.run_code("x", context=context).error.name == "NameError"
    box.remove_code_context(context)
    raises(NotFoundException, lambda: box.run_code("x", context=context))
    large = box.run_code("print('x' * 1_000_000)").logs.stdout
    assert sum(map(len, large)) == 1_000_001
    raises(TimeoutException, lambda: box.run_code("import time; time.sleep(30)", timeout=1), "timed out")
    # A sandbox that is killed is told from code that has ended.
    endless = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    other = box.create_code_context()
    killed = lambda: box.run_code(endless, context=other, on_stdout=lambda _: beside.kill())
    raises(TimeoutException, killed, "killed")
