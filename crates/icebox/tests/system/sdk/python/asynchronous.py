"""The same rows as asynchronous programs have them: many at once, with waits that are awaited."""

import asyncio
import inspect
import shutil
import tempfile
from datetime import datetime, timedelta, timezone

from e2b import (
    AsyncSandbox,
    AsyncTemplate,
    BuildException,
    CommandExitException,
    NotFoundException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import PtySize

from code_interpreter import interpreter, serve
from common import RUN, ask, row

LABELS = {"run": RUN + "async"}


async def raises(kind, awaitable, *words):
    try:
        await awaitable
    except kind as error:
        for word in words:
            assert word in str(error), f"{error!r} does not say {word!r}"
        return
    raise AssertionError(f"{kind} was not raised")


async def until(what, condition, seconds=120):
    for _ in range(seconds * 10):
        if found := await condition():
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


async def items(pages):
    found = []
    while pages.has_next:
        found += await pages.next_items()
    return found


@row
def programs_may_be_asynchronous(_):
    asyncio.run(program())


async def program():
    async with await AsyncSandbox.create("base", timeout=600, envs={"SET": "set"}, metadata=LABELS) as box:
        assert await box.is_running()
        together = (commands, terminals, files, changes, addresses, git, metrics, code)
        await asyncio.gather(*(work(box) for work in together))
        # These are about the sandbox as a whole, or begin others of their own.
        await sandboxes(box)
        await asyncio.gather(copies(box), killed(), paused(), built())
    assert not await box.is_running()


async def sandboxes(box):
    info = await box.get_info()
    assert (info.sandbox_id, info.metadata, info.state) == (box.sandbox_id, LABELS, SandboxState.RUNNING)
    again = await AsyncSandbox.connect(box.sandbox_id, timeout=60)
    assert (await again.commands.run("echo connected")).stdout == "connected\n"
    assert (await box.get_info()).end_at == info.end_at
    await box.set_timeout(700)
    left = (await box.get_info()).end_at - datetime.now(timezone.utc)
    assert timedelta(seconds=600) < left <= timedelta(seconds=700), left
    found = await items(AsyncSandbox.list(query=SandboxQuery(metadata=LABELS), limit=1))
    assert [it.sandbox_id for it in found] == [box.sandbox_id]
    await raises(NotFoundException, AsyncSandbox.connect("nonexistingsandbox"))
    assert await AsyncSandbox.kill("nonexistingsandbox") is False


async def commands(box):
    results = await asyncio.gather(*(box.commands.run(f"echo $SET {n}") for n in range(3)))
    assert [it.stdout for it in results] == ["set 0\n", "set 1\n", "set 2\n"]
    said = []
    await box.commands.run("echo out; echo err >&2", on_stdout=said.append, on_stderr=said.append)
    assert sorted(said) == ["err\n", "out\n"], said
    await raises(CommandExitException, box.commands.run("exit 3"), "3")
    await raises(TimeoutException, box.commands.run("sleep 600", timeout=2))
    assert (await box.commands.run("whoami", user="root")).stdout == "root\n"
    fed = await box.commands.run("head -n 1", background=True, stdin=True)
    assert fed.pid in [it.pid for it in await box.commands.list()]
    await box.commands.send_stdin(fed.pid, "hello\n")
    assert (await fed.wait()).stdout == "hello\n"
    handle = await box.commands.run("sleep 600", background=True)
    again = await box.commands.connect(handle.pid)
    assert await handle.kill() is True
    await raises(CommandExitException, again.wait())
    assert await box.commands.kill(handle.pid) is False


async def terminals(box):
    said = bytearray()
    terminal = await box.pty.create(PtySize(rows=24, cols=80), on_data=said.extend)
    await box.pty.resize(terminal.pid, PtySize(rows=33, cols=101))
    await box.pty.send_stdin(terminal.pid, b"stty size; exit\n")
    assert (await terminal.wait()).exit_code == 0
    assert b"33 101" in said, said


async def files(box):
    raw = bytes(range(256)) * 1000
    info = await box.files.write("async/raw", raw)
    assert info.path == "/home/user/async/raw"
    assert bytes(await box.files.read("async/raw", format="bytes")) == raw
    pieces = await box.files.read("async/raw", format="stream")
    assert b"".join([it async for it in pieces]) == raw
    await box.files.write_files([{"path": f"async/{n}", "data": str(n)} for n in range(3)])
    assert {it.name for it in await box.files.list("async")} == {"raw", "0", "1", "2"}
    assert await box.files.make_dir("async/new") is True
    assert await box.files.make_dir("async/new") is False
    assert (await box.files.rename("async/0", "async/new/0")).path == "/home/user/async/new/0"
    assert (await box.files.get_info("async/new/0")).size == 1
    if "metadata" in inspect.signature(box.files.write).parameters:
        await box.files.write("async/1", "1", metadata={"colour": "blue"})
        assert (await box.files.get_info("async/1")).metadata == {"colour": "blue"}
    await box.files.remove("async")
    assert not await box.files.exists("async")
    await raises(NotFoundException, box.files.read("async/raw"), "does not exist")


async def changes(box):
    seen = []
    await box.files.make_dir("watched")
    watch = await box.files.watch_dir("watched", on_event=lambda it: seen.append((it.type.value, it.name)), recursive=True)
    await box.files.write("watched/deep/b", "x")

    async def told():
        return ("create", "deep/b") in seen

    await until("the change", told)
    await watch.stop()


async def addresses(box):
    await box.files.write("addressed", "signed")
    url = box.download_url("addressed", user="user", use_signature_expiration=60)
    status, _, body = await asyncio.to_thread(ask, "GET", url)
    assert (status, body) == (200, b"signed"), body
    assert box.get_host(8000).startswith(f"8000-{box.sandbox_id}.")


async def git(box):
    await box.git.configure_user("Somebody", "somebody@example.org")
    await box.git.init("/home/user/async-project", initial_branch="main")
    await box.files.write("async-project/file", "one\n")
    await box.git.add("/home/user/async-project")
    await box.git.commit("/home/user/async-project", "the first")
    assert (await box.git.status("/home/user/async-project")).is_clean


async def metrics(box):
    samples = await until("a sample", box.get_metrics)
    assert samples[-1].mem_total > 0


async def code(_):
    if not interpreter:
        return
    box = await interpreter.AsyncSandbox.create("base", timeout=300, metadata=LABELS | {"n": "code"})
    await asyncio.to_thread(serve, interpreter.Sandbox.connect(box.sandbox_id))
    said = []
    done = await box.run_code("x = 20; print('said'); x + 1", on_stdout=lambda it: said.append(it.line))
    assert (done.text, "".join(said)) == ("21", "said\n"), (done, said)
    context = await box.create_code_context(cwd="/tmp")
    assert (await box.run_code("import os; os.getcwd()", context=context)).text == "'/tmp'"
    await box.kill()


async def copies(box):
    await box.files.write("copied", RUN)
    snapshot = await box.create_snapshot(name=f"async-{RUN}")
    listed = await items(AsyncSandbox.list_snapshots(sandbox_id=box.sandbox_id))
    assert snapshot.snapshot_id in [it.snapshot_id for it in listed]
    [fork] = await box.fork(timeout=120)
    other = await AsyncSandbox.create(snapshot.snapshot_id, timeout=120)
    for one in (fork, other):
        assert await one.files.read("copied") == RUN
        assert await one.kill() is True
    assert await AsyncSandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert await AsyncSandbox.delete_snapshot(snapshot.snapshot_id) is False


async def killed():
    other = await AsyncSandbox.create("base", timeout=300)
    handle = await other.commands.run("sleep 600", background=True)
    waiting = asyncio.create_task(handle.wait())
    assert await other.kill() is True
    await raises(TimeoutException, waiting, "sandbox")
    assert not await other.is_running()
    short = await AsyncSandbox.create("base", timeout=300)
    await short.set_timeout(0)

    async def gone():
        return not await short.is_running()

    await until("no time is left", gone)


async def paused():
    other = await AsyncSandbox.create("base", timeout=300, envs={"KEPT": "kept"})
    handle = await other.commands.run("sleep 600", background=True)
    await (getattr(other, "pause", None) or other.beta_pause)()
    assert not await other.is_running()
    again = await AsyncSandbox.connect(other.sandbox_id, timeout=300)
    assert (await again.commands.run("echo $KEPT")).stdout == "kept\n"
    assert handle.pid in [it.pid for it in await again.commands.list()]
    assert await again.kill() is True


async def built():
    name, context = f"async-built-{RUN}", tempfile.mkdtemp()
    with open(f"{context}/one.txt", "w") as file:
        file.write("one")
    begin = AsyncTemplate(file_context_path=context).from_template("base")
    options = {"cpu_count": 1, "memory_mb": 256}
    try:
        template = begin.copy("one.txt", "/home/user/one.txt").run_cmd("echo made > made")
        await AsyncTemplate.build(template, name, **options)
        async with await AsyncSandbox.create(name, timeout=120) as box:
            assert (await box.commands.run("cat one.txt made")).stdout == "onemade\n"
        failing = AsyncTemplate().from_template("base").run_cmd("exit 3")
        await raises(BuildException, AsyncTemplate.build(failing, name, **options), "failed to run command 'exit 3'")
    finally:
        assert await AsyncSandbox.delete_snapshot(name) is True
        shutil.rmtree(context)
