"""Programs against E2B's own Python SDK, as people write them: every row of what it can ask for that needs no cloud.

Run by ../sdk.rs with the four variables set, once for each release of the SDK. Rows share a sandbox where they need none of
their own. A row that a release cannot ask for is left out by what it lacks, never by its number.
"""

import asyncio
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime, timedelta, timezone

from e2b import (
    AsyncSandbox,
    BuildException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    Sandbox,
    SandboxQuery,
    SandboxState,
    Template,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import PtySize

try:
    import e2b_code_interpreter as interpreter
except ImportError:
    # Of one release there is none here.
    interpreter = None

API = os.environ["E2B_API_URL"]
KEY = os.environ["E2B_API_KEY"]
RUN = os.environ["ICEBOX_SDK_RUN"]
ODD = {"run": RUN, "odd key & more": "a=b&c d%20+ü"}

ROWS = []


def row(function):
    ROWS.append(function)
    return function


def ask(method, url, headers=None, body=None):
    """Status, headers and body of a request of our own."""
    request = urllib.request.Request(url, method=method, headers=headers or {}, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def api(method, path, body=None):
    headers = {"X-API-KEY": KEY, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    status, headers, text = ask(method, API + path, headers, data)
    return status, headers, json.loads(text) if text else None


def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        for word in words:
            assert word in str(error), f"{error!r} does not say {word!r}"
        return error
    raise AssertionError(f"{kind} was not raised")


def until(what, condition, seconds=30):
    """Waits for what happens outside of this program, where nobody tells it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return found


def paused(box, **options):
    pause = getattr(box, "pause", None) or box.beta_pause
    return pause(**options)


# Sandboxes.


@row
def a_sandbox_is_there_when_create_returns(box):
    assert re.fullmatch("i[a-z0-9]{20}", box.sandbox_id), box.sandbox_id
    assert box.is_running()
    info = box.get_info()
    assert info.sandbox_id == box.sandbox_id and info.metadata == ODD
    assert info.state == SandboxState.RUNNING and info.envd_version == "0.6.13"
    assert info.name == "base" and info.cpu_count >= 1 and info.memory_mb >= 128
    assert info.end_at - datetime.now(timezone.utc) > timedelta(seconds=500)
    assert box.get_info().end_at == info.end_at


@row
def connecting_never_shortens(box):
    before = box.get_info().end_at
    again = Sandbox.connect(box.sandbox_id, timeout=60)
    assert again.commands.run("echo connected").stdout == "connected\n"
    assert box.get_info().end_at == before
    Sandbox.connect(box.sandbox_id, timeout=1200)
    assert box.get_info().end_at > before + timedelta(seconds=300)
    for path in [f"/sandboxes/{box.sandbox_id}/connect", f"/v2/sandboxes/{box.sandbox_id}/connect"]:
        status, _, body = api("POST", path, {"timeout": 60})
        assert status == 200 and body["sandboxID"] == box.sandbox_id, (status, body)
        assert body["envdAccessToken"] and body["clientID"] and body["templateID"]


@row
def a_timeout_may_be_shortened(box):
    box.set_timeout(700)
    assert box.get_info().end_at - datetime.now(timezone.utc) <= timedelta(seconds=700)


@row
def lists_are_filtered_and_come_in_pages(box):
    others = [Sandbox.create("base", timeout=300, metadata={"run": RUN, "n": str(n)}) for n in range(2)]
    try:
        query = SandboxQuery(metadata={"run": RUN})
        pages, found = Sandbox.list(query=query, limit=2), []
        while pages.has_next:
            page = pages.next_items()
            assert len(page) <= 2
            found += page
        ids = [it.sandbox_id for it in found]
        assert ids == [others[1].sandbox_id, others[0].sandbox_id, box.sandbox_id], ids
        # Exactly full, and the last.
        pages = Sandbox.list(query=query, limit=3)
        assert len(pages.next_items()) == 3 and not pages.has_next
        one = Sandbox.list(query=SandboxQuery(metadata=ODD)).next_items()
        assert [it.sandbox_id for it in one] == [box.sandbox_id]
        assert one[0].metadata == ODD
        none = SandboxQuery(metadata={"run": RUN}, state=[SandboxState.PAUSED])
        assert Sandbox.list(query=none).next_items() == []
        wanted = urllib.parse.quote(urllib.parse.urlencode({"run": RUN}))
        status, headers, body = api("GET", f"/v2/sandboxes?metadata={wanted}&order=asc&limit=1")
        assert status == 200 and headers["X-Next-Token"], (status, headers)
        assert [it["sandboxID"] for it in body] == [box.sandbox_id]
        assert api("GET", "/v2/sandboxes?limit=0")[0] == 400
    finally:
        for other in others:
            other.kill()


@row
def what_is_not_there_is_404_and_what_makes_no_sense_400(box):
    missing = "nonexistingsandbox"
    for method, path in [
        ("GET", f"/sandboxes/{missing}"),
        ("DELETE", f"/sandboxes/{missing}"),
        ("POST", f"/sandboxes/{missing}/pause"),
        ("POST", f"/v2/sandboxes/{missing}/connect"),
        ("POST", f"/sandboxes/{missing}/fork"),
        ("POST", f"/sandboxes/{missing}/snapshots"),
        ("GET", f"/sandboxes/{missing}/metrics"),
        ("GET", f"/v2/sandboxes/{missing}/logs"),
        ("DELETE", f"/templates/{missing}"),
        ("GET", f"/templates/aliases/{missing}"),
    ]:
        status, _, body = api(method, path, None if method != "POST" else {})
        assert status == 404 and body["code"] == 404 and body["message"], (method, path, status, body)
    status, _, body = api("POST", "/sandboxes/" + missing + "/timeout", {"timeout": 5})
    assert status == 404, body
    assert api("POST", "/v2/sandboxes", {"templateID": "nonexistent"})[0] == 404
    assert api("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 0})[0] == 400
    raises(NotFoundException, lambda: Sandbox.connect(missing))
    assert Sandbox.kill(missing) is False
    status, _, body = ask("GET", API + "/v2/sandboxes", {"X-API-KEY": "e2b_00"})
    assert status == 401 and json.loads(body)["code"] == 401, body
    for path in ["/volumes", "/secrets", "/volumes/some"]:
        status, _, body = api("GET", path)
        assert status == 501 and body["code"] == 501, (path, status, body)


@row
def a_killed_sandbox_is_gone_and_its_streams_are_cut(_):
    other = Sandbox.create("base", timeout=300)
    handle = other.commands.run("sleep 600", background=True)
    ended = []

    def wait():
        try:
            handle.wait()
            ended.append(None)
        except Exception as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert other.kill() is True
    waiting.join(30)
    assert ended and isinstance(ended[0], TimeoutException), ended
    assert "sandbox" in str(ended[0]).lower(), ended
    assert other.kill() is False and not other.is_running()
    raises(Exception, lambda: other.commands.run("true"))
    raises(NotFoundException, other.get_info)
    headers = {"E2b-Sandbox-Id": other.sandbox_id, "E2b-Sandbox-Port": "49983"}
    status, _, body = ask("GET", API + "/health", headers)
    expected = {"sandboxId": other.sandbox_id, "message": "The sandbox was not found", "code": 502}
    assert (status, json.loads(body)) == (502, expected)


@row
def time_runs_out(_):
    short = Sandbox.create("base", timeout=3)
    until("its time is over", lambda: not short.is_running(), 20)
    now = Sandbox.create("base", timeout=300)
    now.set_timeout(0)
    until("no time is left", lambda: not now.is_running(), 20)


@row
def a_paused_sandbox_goes_on_where_it_was(box):
    other = Sandbox.create("base", timeout=300, envs={"KEPT": "kept"}, metadata={"run": RUN + "p"})
    other.files.write("/home/user/kept", "kept")
    boot = other.files.read("/proc/sys/kernel/random/boot_id")
    background = other.commands.run("sleep 600", background=True)
    assert paused(other) in (True, other.sandbox_id, None)
    assert not other.is_running()
    status, _, body = api("POST", f"/sandboxes/{other.sandbox_id}/pause", {})
    assert (status, body["code"]) == (409, 409), body
    status, _, body = api("POST", f"/sandboxes/{other.sandbox_id}/fork", {})
    assert (status, body["code"]) == (409, 409), body
    info = Sandbox.get_info(other.sandbox_id) if inspect.isfunction(Sandbox.get_info) else None
    query = SandboxQuery(metadata={"run": RUN + "p"}, state=[SandboxState.PAUSED])
    assert [it.sandbox_id for it in Sandbox.list(query=query).next_items()] == [other.sandbox_id]
    again = Sandbox.connect(other.sandbox_id, timeout=300)
    assert again.is_running() and again.sandbox_id == other.sandbox_id
    # The handle from before has the same token.
    assert other.files.read("/home/user/kept") == "kept"
    assert other.files.read("/proc/sys/kernel/random/boot_id") == boot
    assert other.commands.run("echo $KEPT").stdout == "kept\n"
    assert background.pid in [it.pid for it in other.commands.list()]
    status, _, body = api("POST", f"/sandboxes/{other.sandbox_id}/resume", {"timeout": 60})
    assert (status, body["code"]) == (409, 409), body
    other.kill()


@row
def a_sandbox_paused_without_memory_boots_again(_):
    other = Sandbox.create("base", timeout=300)
    other.files.write("/home/user/kept", "kept")
    boot = other.files.read("/proc/sys/kernel/random/boot_id")
    status, _, body = api("POST", f"/sandboxes/{other.sandbox_id}/pause", {"memory": False})
    assert status == 204, body
    assert not other.is_running()
    status, _, body = api("GET", f"/sandboxes/{other.sandbox_id}")
    assert (body["state"], body["pauseMode"]) == ("paused", "filesystem"), body
    status, _, body = api("POST", f"/v2/sandboxes/{other.sandbox_id}/connect", {"timeout": 300})
    assert status == 201, body
    assert other.files.read("/home/user/kept") == "kept"
    assert other.files.read("/proc/sys/kernel/random/boot_id") != boot
    other.kill()


@row
def time_that_is_over_pauses_and_a_request_resumes(_):
    body = {
        "templateID": "base",
        "timeout": 3,
        "autoPause": True,
        "autoResume": {"enabled": True},
        "metadata": {"run": RUN + "a"},
        "secure": True,
    }
    status, _, made = api("POST", "/v2/sandboxes", body)
    assert status == 201, made
    path = f"/sandboxes/{made['sandboxID']}"
    until("it is paused", lambda: api("GET", path)[2]["state"] == "paused", 30)
    lifecycle = api("GET", path)[2]["lifecycle"]
    assert lifecycle["autoResume"] is True and lifecycle["onTimeout"] == "pause", lifecycle
    headers = {
        "E2b-Sandbox-Id": made["sandboxID"],
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": made["envdAccessToken"],
    }
    assert ask("GET", API + "/health", headers)[0] == 204
    detail = api("GET", path)[2]
    assert detail["state"] == "running"
    left = datetime.fromisoformat(detail["endAt"][:19] + "+00:00") - datetime.now(timezone.utc)
    assert left > timedelta(seconds=200), left
    assert api("DELETE", path)[0] == 204


@row
def snapshots_are_made_listed_used_and_deleted(box):
    box.files.write("/home/user/snapped", RUN)
    unnamed = box.create_snapshot()
    named = box.create_snapshot(name=f"named-{RUN}")
    assert unnamed.snapshot_id and named.names and named.names[0].startswith(f"named-{RUN}"), named
    assert box.is_running()
    found, pages = [], Sandbox.list_snapshots(sandbox_id=box.sandbox_id, limit=1)
    while pages.has_next:
        found += pages.next_items()
    assert [it.snapshot_id for it in found] == [named.snapshot_id, unnamed.snapshot_id], found
    assert not Sandbox.list_snapshots(sandbox_id="i" + "0" * 20).next_items()
    for snapshot in (unnamed.snapshot_id, f"named-{RUN}"):
        other = Sandbox.create(snapshot, timeout=300)
        assert other.files.read("/home/user/snapped") == RUN
        assert other.sandbox_id != box.sandbox_id
        other.kill()
    assert Sandbox.delete_snapshot(unnamed.snapshot_id) is True
    assert Sandbox.delete_snapshot(unnamed.snapshot_id) is False
    assert Sandbox.delete_snapshot(named.snapshot_id) is True


@row
def forks_begin_where_their_sandbox_is(box):
    box.files.write("/home/user/forked", RUN)
    before = box.get_info().end_at
    forks = box.fork(count=2, timeout=120)
    try:
        assert len({it.sandbox_id for it in forks} | {box.sandbox_id}) == 3
        for fork in forks:
            assert fork.files.read("/home/user/forked") == RUN
            left = fork.get_info().end_at - datetime.now(timezone.utc)
            assert timedelta(seconds=60) < left <= timedelta(seconds=120), left
            ids = fork.commands.run("echo $E2B_SANDBOX_ID").stdout.strip()
            assert ids == fork.sandbox_id
        # What opens one of them opens no other, and what is signed with it is its own.
        token = api("GET", f"/sandboxes/{box.sandbox_id}")[2]["envdAccessToken"]
        for opened, id in [(True, box.sandbox_id), (False, forks[0].sandbox_id), (False, forks[1].sandbox_id)]:
            headers = {"E2b-Sandbox-Id": id, "E2b-Sandbox-Port": "49983", "X-Access-Token": token}
            status = ask("GET", API + "/files?path=/home/user/forked", headers)[0]
            assert status == (200 if opened else 401), (id, status)
        forks[0].files.write("/home/user/forked", "other")
        assert ask("GET", box.download_url("forked"))[2].decode() == RUN
        assert ask("GET", forks[0].download_url("forked"))[2] == b"other"
        assert box.files.read("/home/user/forked") == RUN
        assert box.get_info().end_at == before
    finally:
        for fork in forks:
            fork.kill()


@row
def metrics_and_logs_are_there(box):
    samples = until("a sample", box.get_metrics)
    sample = samples[-1]
    assert sample.cpu_count == box.get_info().cpu_count and sample.mem_total > 0 and sample.disk_total > 0
    assert all(it.timestamp >= box.get_info().started_at - timedelta(seconds=2) for it in samples)
    status, _, body = api("GET", f"/v2/sandboxes/{box.sandbox_id}/logs?limit=5")
    assert status == 200 and body["logs"], body
    assert set(body["logs"][0]) == {"timestamp", "message", "level", "fields"}


# Commands.


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
    raises(TimeoutException, lambda: box.commands.run("echo $$ >/tmp/slow; sleep 600", timeout=2))
    until(
        "it is gone",
        lambda: box.commands.run("kill -0 $(cat /tmp/slow) 2>/dev/null; echo $?", user="root").stdout == "1\n",
    )


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


# Files.


@row
def files_are_written_and_read_in_every_way(box):
    info = box.files.write("deep/er/text.txt", "hello")
    assert (info.path, info.name) == ("/home/user/deep/er/text.txt", "text.txt")
    assert box.files.read("deep/er/text.txt") == "hello"
    raw = bytes(range(256)) * 1000
    box.files.write("/tmp/raw", raw)
    assert bytes(box.files.read("/tmp/raw", format="bytes")) == raw
    assert b"".join(box.files.read("/tmp/raw", format="stream")) == raw
    written = box.files.write_files([{"path": f"/tmp/many/{n}", "data": f"{n}"} for n in range(3)])
    assert [it.path for it in written] == ["/tmp/many/0", "/tmp/many/1", "/tmp/many/2"]
    assert box.files.write_files([]) == []
    box.files.write("/tmp/stream", io.BytesIO(raw))
    assert box.commands.run("sha256sum < /tmp/raw; sha256sum < /tmp/stream").stdout.split()[::2] == [
        __import__("hashlib").sha256(raw).hexdigest()
    ] * 2
    if "gzip" in inspect.signature(box.files.write).parameters:
        box.files.write("/tmp/packed", "packed" * 1000, gzip=True)
        assert box.files.read("/tmp/packed", gzip=True) == "packed" * 1000
    box.files.write("deep/er/text.txt", "")
    assert box.files.read("deep/er/text.txt") == ""
    assert len(box.files.read("/proc/sys/kernel/random/boot_id")) == 37
    raises(NotFoundException, lambda: box.files.read("/not/there"), "does not exist")
    raises(InvalidArgumentException, lambda: box.files.read("/tmp"))
    root = box.files.write("/root/secret", "x", user="root")
    assert root.path == "/root/secret"
    assert box.commands.run("stat -c '%U %a' /root/secret", user="root").stdout == "root 644\n"
    assert box.commands.run("stat -c '%U %G %a' /home/user/deep/er/text.txt").stdout == "user user 644\n"


@row
def files_have_metadata(box):
    if "metadata" not in inspect.signature(box.files.write).parameters:
        return
    box.files.write("/home/user/labelled", "x", metadata={"Colour": "blue", "n": "1"})
    assert box.files.get_info("/home/user/labelled").metadata == {"colour": "blue", "n": "1"}
    box.files.write("/home/user/labelled", "x", metadata={"n": "2"})
    assert box.files.get_info("/home/user/labelled").metadata == {"n": "2"}


@row
def directories_are_listed_made_moved_and_removed(box):
    files = box.files
    assert files.make_dir("/home/user/tree/a/b") is True
    assert files.make_dir("/home/user/tree/a/b") is False
    files.write("/home/user/tree/a/file", "1234")
    box.commands.run("ln -s a/file tree/link && chmod 750 tree/a")
    top = {it.name: it for it in files.list("/home/user/tree")}
    assert set(top) == {"a", "link"}
    assert top["a"].permissions == "drwxr-x---" and top["a"].mode == 0o750
    assert top["a"].owner == top["a"].group == "user"
    assert top["link"].symlink_target == "/home/user/tree/a/file"
    names = [it.path for it in files.list("/home/user/tree", depth=3)]
    assert names == [f"/home/user/tree/{it}" for it in ("a", "a/b", "a/file", "link")], names
    info = files.get_info("/home/user/tree/a/file")
    assert info.size == 4 and info.permissions == "-rw-r--r--" and info.type.value == "file"
    moved = files.rename("/home/user/tree/a/file", "/home/user/tree/new/file")
    assert moved.path == "/home/user/tree/new/file"
    assert not files.exists("/home/user/tree/a/file") and files.exists("/home/user/tree/new/file")
    files.remove("/home/user/tree")
    assert not files.exists("/home/user/tree")
    files.remove("/home/user/tree")
    raises(NotFoundException, lambda: files.rename("/not/there", "/home/user/x"))
    raises(NotFoundException, lambda: files.get_info("/not/there"))
    raises(NotFoundException, lambda: files.list("/not/there"))
    raises(InvalidArgumentException, lambda: files.list("/home/user/.bashrc"))


@row
def changes_are_seen(box):
    box.files.make_dir("/home/user/seen/deep")
    watch = box.files.watch_dir("/home/user/seen", recursive=True)
    box.files.write("/home/user/seen/deep/file", "x")
    events = [(it.type.value, it.name) for it in watch.get_new_events()]
    assert ("create", "deep/file") in events and ("write", "deep/file") in events, events
    box.files.rename("/home/user/seen/deep/file", "/home/user/seen/other")
    box.files.remove("/home/user/seen/other")
    kinds = {it.type.value for it in watch.get_new_events()}
    assert {"rename", "remove"} <= kinds, kinds
    watch.stop()
    raises(NotFoundException, lambda: box.files.watch_dir("/not/there"))


@row
def signed_urls_need_nothing_else(box):
    box.files.write("/home/user/signed file", "signed")
    url = box.download_url("/home/user/signed file", user="user")
    status, _, body = ask("GET", url)
    assert (status, body) == (200, b"signed"), body
    url = box.download_url("/home/user/signed file", user="user", use_signature_expiration=60)
    assert ask("GET", url)[2] == b"signed"
    late = box.download_url("/home/user/signed file", user="user", use_signature_expiration=-60)
    status, _, body = ask("GET", late)
    assert (status, json.loads(body)["message"]) == (401, "signature is already expired")
    for wrong, why in [
        (re.sub("signature=[^&]*", "signature=v1_no", url), "invalid signature"),
        (url.replace("signed+file", "other").replace("signed%20file", "other"), "invalid signature"),
        (API + "/files?path=%2Fetc%2Fpasswd", "missing signature query parameter"),
    ]:
        status, _, body = ask("GET", wrong)
        assert (status, json.loads(body)["message"]) == (401, why), (wrong, body)
    upload = box.upload_url("/home/user/uploaded", user="user")
    boundary = "----boundary"
    form = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nsent\r\n--{boundary}--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, _, body = ask("POST", upload, headers, form.encode())
    assert status == 200 and json.loads(body)[0]["path"] == "/home/user/uploaded", body
    assert box.files.read("/home/user/uploaded") == "sent"


# Ports.


@row
def ports_are_reached_by_header_and_by_name(box):
    serve = "python3 -m http.server {} --bind {} --directory /home/user"
    for port, bind in [(8000, "0.0.0.0"), (8001, "127.0.0.1")]:
        box.commands.run(serve.format(port, bind), background=True)
    box.files.write("/home/user/served", RUN)
    host = box.get_host(8000)
    assert host.startswith(f"8000-{box.sandbox_id}."), host
    for port in (8000, 8001):
        headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": str(port)}
        until(f"port {port}", lambda: ask("GET", API + "/served", headers)[0] == 200)
        assert ask("GET", API + "/served", headers)[2].decode() == RUN
        by_name = {"Host": f"{port}-{box.sandbox_id}.{host.split('.', 1)[1]}"}
        assert ask("GET", API + "/served", by_name)[2].decode() == RUN
    headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "8999"}
    status, _, body = ask("GET", API + "/", headers)
    expected = {
        "sandboxId": box.sandbox_id,
        "message": "The sandbox is running but port is not open",
        "port": 8999,
        "code": 502,
    }
    assert (status, json.loads(body)) == (502, expected), body
    one = {"E2b-Sandbox-Id": box.sandbox_id}
    assert ask("GET", API + "/health", one)[0] == 400


@row
def the_agent_keeps_to_who_has_its_token(box):
    headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49983"}
    body = b'{"path": "/"}'
    rpc = {**headers, "Content-Type": "application/json", "Connect-Protocol-Version": "1"}
    status, _, answer = ask("POST", API + "/filesystem.Filesystem/ListDir", rpc, body)
    assert status == 401 and json.loads(answer)["code"] == 401, answer
    for path in ("/init", "/freeze", "/dial?port=22", "/%69nit"):
        assert ask("POST", API + path, headers, b"{}")[0] == 404, path


@row
def ports_may_ask_for_a_token(_):
    body = {"templateID": "base", "timeout": 300, "network": {"allowPublicTraffic": False}}
    status, _, made = api("POST", "/v2/sandboxes", body)
    assert status == 201 and made["trafficAccessToken"], made
    headers = {"E2b-Sandbox-Id": made["sandboxID"], "E2b-Sandbox-Port": "8000"}
    assert ask("GET", API + "/", headers)[0] == 403
    token = {"E2b-Traffic-Access-Token": made["trafficAccessToken"]}
    # It may pass, and nobody listens.
    assert ask("GET", API + "/", {**headers, **token})[0] == 502
    api("DELETE", f"/sandboxes/{made['sandboxID']}")


@row
def an_open_sandbox_has_no_token(_):
    status, _, made = api("POST", "/sandboxes", {"templateID": "base", "timeout": 300, "secure": False})
    assert status == 201 and "envdAccessToken" not in made, made
    headers = {"E2b-Sandbox-Id": made["sandboxID"], "E2b-Sandbox-Port": "49983"}
    status, _, body = ask("GET", API + "/files?path=/etc/hostname", headers)
    assert status == 200 and body, (status, body)
    api("DELETE", f"/sandboxes/{made['sandboxID']}")


@row
def code_runs_in_contexts(_):
    if not interpreter:
        return
    box = interpreter.Sandbox.create("base", timeout=300)
    with open(os.path.join(os.path.dirname(__file__), "interpreter.py")) as source:
        box.files.write("/home/user/interpreter.py", source.read())
    box.commands.run("python3 interpreter.py", background=True)
    headers = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49999"}
    until("it listens", lambda: ask("GET", API + "/contexts", headers)[0] == 200)
    code_is_run(box, interpreter)


def code_is_run(box, interpreter):
    first = box.run_code("import sys; x = 20; print('said'); print('warned', file=sys.stderr); x + 1")
    assert first.text == "21" and first.execution_count == 1, first
    assert "".join(first.logs.stdout) == "said\n" and "".join(first.logs.stderr) == "warned\n", first.logs
    assert box.run_code("x * 2").text == "40"
    # What is said comes when it is, not when all is said.
    said = []
    begun = time.monotonic()
    slow = "import time\nfor n in range(3):\n    print(n)\n    time.sleep(1)"
    box.run_code(slow, on_stdout=lambda it: said.append(time.monotonic() - begun))
    ended = time.monotonic() - begun
    assert said and ended - said[0] > 1.5, (said, ended)
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
    killer = interpreter.Sandbox.connect(box.sandbox_id)
    other = box.create_code_context()
    killed = lambda: box.run_code(endless, context=other, on_stdout=lambda _: killer.kill())
    raises(TimeoutException, killed, "killed")


@row
def programs_may_be_asynchronous(_):
    async def program():
        async with await AsyncSandbox.create("base", timeout=300, envs={"SET": "set"}) as box:
            assert await box.is_running()
            results = await asyncio.gather(*(box.commands.run(f"echo $SET {n}") for n in range(3)))
            assert [it.stdout for it in results] == ["set 0\n", "set 1\n", "set 2\n"]
            await box.files.write("a", "async")
            assert await box.files.read("a") == "async"
            seen = []
            watch = await box.files.watch_dir("/home/user", on_event=lambda it: seen.append(it.name))
            await box.files.write("b", "x")
            for _ in range(100):
                if "b" in seen:
                    break
                await asyncio.sleep(0.1)
            assert "b" in seen, seen
            await watch.stop()
            handle = await box.commands.run("sleep 600", background=True)
            assert await handle.kill() is True
        assert not await box.is_running()

    asyncio.run(program())


@row
def templates_are_built_by_steps(_):
    name, context = f"built-{RUN}", tempfile.mkdtemp()
    os.makedirs(f"{context}/app/sub")
    for path in ("one.txt", "app/main.py", "app/sub/deep"):
        with open(f"{context}/{path}", "w") as file:
            file.write(path)
    template = (
        Template(file_context_path=context)
        .from_template("base")
        .copy("one.txt", "/home/user/one.txt")
        .copy("app", "/opt/app/", user="root", mode=0o755)
        .set_envs({"COLOUR": "blue"})
        .set_workdir("/home/user/work")
        .run_cmd("echo $COLOUR > made; whoami")
        .run_cmd("touch /rooted", user="root")
        .set_start_cmd("python3 -m http.server 8080", "grep -q :1F90 /proc/net/tcp")
    )
    lines = []
    try:
        build = {"cpu_count": 1, "memory_mb": 256}
        Template.build(template, name, on_build_logs=lambda it: lines.append(it.message), **build)
        assert "user" in lines, lines
        built = Sandbox.create(name, timeout=300)
        seen = built.commands.run("pwd; cat made ../one.txt; echo; stat -c '%U %a' /opt/app/main.py /rooted; echo $COLOUR")
        assert seen.stdout == "/home/user/work\nblue\none.txt\nroot 755\nroot 644\nblue\n", seen.stdout
        fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080').status)"
        assert built.commands.run(f'python3 -c "{fetch}"').stdout == "200\n"
        built.kill()
        wrong = Template(file_context_path=context).from_base_image().run_cmd("true").run_cmd("exit 3")
        raises(BuildException, lambda: Template.build(wrong, name, **build), "failed to run command 'exit 3'")
        assert api("GET", f"/templates/aliases/{name}")[0] == 200
        assert api("POST", "/templates/tags", {"target": name, "tags": ["v1"]})[0] == 201
        tags = {it["tag"]: it["buildID"] for it in api("GET", f"/templates/{name}/tags")[2]}
        assert tags["v1"] == tags["default"], tags
        Sandbox.create(f"{name}:v1", timeout=60).kill()
        assert api("DELETE", "/templates/tags", {"name": name, "tags": ["default"]})[0] == 400
        assert api("DELETE", "/templates/tags", {"name": name, "tags": ["v1"]})[0] == 204
    finally:
        api("DELETE", f"/templates/{name}")
        shutil.rmtree(context)
    assert api("GET", f"/templates/aliases/{name}")[0] == 404


def main():
    wanted = sys.argv[1:]
    failed = []
    box = Sandbox.create("base", timeout=900, metadata=ODD, envs={"SET": "set"})
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
