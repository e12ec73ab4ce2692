"""Sandboxes: made, found, paused, copied and ended."""

import inspect
import json
import re
import threading
import urllib.parse
from datetime import datetime, timedelta, timezone

from e2b import NotFoundException, Sandbox, SandboxQuery, SandboxState, TimeoutException

from common import API, ODD, RUN, api, ask, paused, raises, row, until


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
    Sandbox.connect(box.sandbox_id, timeout=7200)
    assert box.get_info().end_at > before + timedelta(seconds=300)
    for path in [f"/sandboxes/{box.sandbox_id}/connect", f"/v2/sandboxes/{box.sandbox_id}/connect"]:
        status, _, body = api("POST", path, {"timeout": 60})
        assert status == 200 and body["sandboxID"] == box.sandbox_id, (status, body)
        assert body["envdAccessToken"] and body["clientID"] and body["templateID"]


@row
def a_timeout_may_be_shortened(box):
    box.set_timeout(700)
    before = box.get_info().end_at
    assert before - datetime.now(timezone.utc) <= timedelta(seconds=700)
    assert api("POST", f"/sandboxes/{box.sandbox_id}/refreshes", {"duration": 60})[0] == 204
    assert box.get_info().end_at == before
    # The others need it, however long they take.
    box.set_timeout(3600)


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
    until("its time is over", lambda: not short.is_running())
    now = Sandbox.create("base", timeout=300)
    now.set_timeout(0)
    until("no time is left", lambda: not now.is_running())


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
    by_mode = "mode" in inspect.signature(other.pause).parameters
    assert paused(other, **({"mode": "filesystem"} if by_mode else {"keep_memory": False})) is True
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
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    other = Sandbox.create("base", timeout=3, lifecycle=lifecycle, metadata={"run": RUN + "a"})
    path = f"/sandboxes/{other.sandbox_id}"
    until("it is paused", lambda: api("GET", path)[2]["state"] == "paused")
    lifecycle = api("GET", path)[2]["lifecycle"]
    assert lifecycle["autoResume"] is True and lifecycle["onTimeout"] == "pause", lifecycle
    assert other.commands.run("echo resumed").stdout == "resumed\n"
    info = other.get_info()
    assert info.state == SandboxState.RUNNING
    left = info.end_at - datetime.now(timezone.utc)
    assert left > timedelta(seconds=200), left
    # Without that, who comes while it is paused is told that it is not there.
    assert api("POST", path + "/timeout", {"timeout": 300, "autoResume": {"enabled": False}})[0] == 204
    paused(other)
    assert not other.is_running() and api("GET", path)[2]["state"] == "paused"
    # A paused one is killed like any other.
    assert other.kill() is True and other.kill() is False


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
    by_name = Sandbox.list_snapshots(name=f"named-{RUN}").next_items()
    assert [it.snapshot_id for it in by_name] == [named.snapshot_id], by_name
    assert not Sandbox.list_snapshots(name="nobody-has-this").next_items()
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
    begun = box.get_info().started_at
    assert not box.get_metrics(start=begun - timedelta(hours=2), end=begun - timedelta(hours=1))
    assert all(it.timestamp >= box.get_info().started_at - timedelta(seconds=2) for it in samples)
    status, _, body = api("GET", f"/v2/sandboxes/{box.sandbox_id}/logs?limit=5")
    assert status == 200 and body["logs"], body
    assert set(body["logs"][0]) == {"timestamp", "message", "level", "fields"}


@row
def what_a_sandbox_may_reach_is_all_or_nothing(_):
    body = {"templateID": "base", "timeout": 300, "allow_internet_access": False}
    status, _, made = api("POST", "/v2/sandboxes", body)
    assert status == 201, made
    path = f"/sandboxes/{made['sandboxID']}"
    assert api("GET", path)[2]["allowInternetAccess"] is False
    # To say again what is so is no change. Rules are not there yet, and that is said.
    assert api("PUT", path + "/network", {"allow_internet_access": False})[0] == 204
    rules = {"allowOut": ["1.1.1.1/32"], "denyOut": ["0.0.0.0/0"]}
    status, _, refused = api("PUT", path + "/network", rules)
    assert (status, refused["code"]) == (501, 501), refused
    assert api("PUT", "/sandboxes/nonexistingsandbox/network", rules)[0] == 404
    assert api("DELETE", path)[0] == 204


@row
def pages_of_other_places_may_ask(box):
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for more in ({}, {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49983"}):
        status, allowed, _ = ask("OPTIONS", API + "/sandboxes", {**headers, **more})
        assert status in (200, 204) and allowed["Access-Control-Allow-Origin"] == "*", (status, more)
