"""Commands, terminals, and git."""

from e2b import CommandExitException, InvalidArgumentException, NotFoundException, TimeoutException
from e2b.sandbox.commands.command_handle import PtySize

from common import raises, row, until


@row
def commands_run_and_end(box):
    result = box.commands.run("echo out; echo err >&2; exit 0")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    error = raises(CommandExitException, lambda: box.commands.run("echo gone; exit 3"))
    assert error.exit_code == 3 and error.stdout == "gone\n"
    out = []
    box.commands.run("echo one; echo two", on_stdout=out.append)
    assert "".join(out) == "one\ntwo\n"
    large = box.commands.run("head -c 300000 /dev/zero | tr '\\0' x").stdout
    assert large == "x" * 300000
    assert box.commands.run("printf 'a\\377b\\n'").stdout == "a\ufffdb\n"


@row
def commands_run_as_whom_where_and_with_what(box):
    who = box.commands.run("whoami; pwd; id -gn; echo $HOME $USER").stdout
    assert who == "user\n/home/user\nuser\n/home/user user\n", who
    assert box.commands.run("whoami; pwd", user="root").stdout == "root\n/root\n"
    assert box.commands.run("sudo -n whoami").stdout == "root\n"
    assert box.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    raises(InvalidArgumentException, lambda: box.commands.run("pwd", cwd="/not/there"), "does not exist")
    raises(Exception, lambda: box.commands.run("true", user="nobody-there"), "nobody-there")
    env = box.commands.run("echo $SET $HERE $E2B_SANDBOX $E2B_SANDBOX_ID", envs={"HERE": "here"}).stdout
    assert env == f"set here true {box.sandbox_id}\n", env
    assert box.commands.run("echo $HERE").stdout == "\n"
    assert box.commands.run("cat; echo end").stdout == "end\n"


@row
def commands_in_the_background_are_found_fed_and_killed(box):
    handle = box.commands.run("cat", background=True, stdin=True)
    assert handle.pid in [it.pid for it in box.commands.list()]
    box.commands.send_stdin(handle.pid, "hello\n")
    (box.commands.close_stdin(handle.pid) if hasattr(box.commands, "close_stdin") else handle.kill())
    if hasattr(box.commands, "close_stdin"):
        assert handle.wait().stdout == "hello\n"
    sleeping = box.commands.run("sleep 600", background=True)
    again = box.commands.connect(sleeping.pid)
    assert box.commands.kill(sleeping.pid) is True
    raises(CommandExitException, again.wait)
    raises(CommandExitException, sleeping.wait)
    assert box.commands.kill(sleeping.pid) is False
    # The client goes, the command stays.
    stays = box.commands.run("sleep 600", background=True)
    stays.disconnect()
    assert stays.pid in [it.pid for it in box.commands.list()]
    box.commands.kill(stays.pid)


@row
def a_command_that_takes_too_long_is_killed(box):
    # Beyond the greatest pid, should it have been killed before it said its own.
    box.files.write("/tmp/slow", "4194305")
    raises(TimeoutException, lambda: box.commands.run("echo $$ >/tmp/slow; sleep 600", timeout=2))
    until(
        "it is gone",
        lambda: box.commands.run("kill -0 $(cat /tmp/slow) 2>/dev/null; echo $?", user="root").stdout == "1\n",
    )


@row
def who_connects_to_a_command_hears_what_it_says_from_then_on(box):
    said = box.commands.run("echo before; read line; echo heard $line", background=True, stdin=True)
    again = box.commands.connect(said.pid)
    box.commands.send_stdin(said.pid, "this\n")
    assert "heard this\n" in again.wait().stdout
    assert said.wait().stdout == "before\nheard this\n"
    # How it ended is told for some time after.
    assert box.commands.connect(said.pid).wait().exit_code == 0
    raises(NotFoundException, lambda: box.commands.connect(999_999))


@row
def a_stream_of_input_is_fed_to_a_command(box):
    if not hasattr(box.commands, "stream_input"):
        return
    counting = box.commands.run("wc -c", background=True, stdin=True)
    box.commands.stream_input(counting.pid, (b"x" * 100_000 for _ in range(10)))
    box.commands.close_stdin(counting.pid)
    assert counting.wait().stdout == "1000000\n"


@row
def terminals_talk_and_change_their_size(box):
    said = bytearray()
    terminal = box.pty.create(PtySize(rows=24, cols=80), envs={"ABC": "123"})
    box.pty.resize(terminal.pid, PtySize(rows=33, cols=101))
    box.pty.send_stdin(terminal.pid, b"stty size; echo $ABC-$TERM; exit\n")
    result = terminal.wait(on_pty=said.extend)
    text = said.decode()
    assert "33 101" in text and "123-xterm-256color" in text, text
    assert result.exit_code == 0
    other = box.pty.create(PtySize(rows=24, cols=80), cwd="/tmp", user="root")
    assert box.pty.kill(other.pid) is True
    raises(CommandExitException, other.wait)
    assert box.pty.kill(other.pid) is False


@row
def git_works_in_a_guest(box):
    git, here = box.git, "/home/user/project"
    box.commands.run("git init -q --bare -b main origin.git")
    git.configure_user("Somebody", "somebody@example.org")
    git.init(here, initial_branch="main")
    box.files.write(here + "/file", "one\n")
    assert [it.name for it in git.status(here).file_status] == ["file"]
    git.add(here)
    git.commit(here, "the first")
    assert git.status(here).is_clean
    git.remote_add(here, "origin", "file:///home/user/origin.git")
    git.push(here, remote="origin", branch="main")
    git.clone("file:///home/user/origin.git", path="/home/user/copy")
    assert box.files.read("/home/user/copy/file") == "one\n"
    assert git.branches("/home/user/copy").current_branch == "main"
