"""Ports of sandboxes, and who may use them."""

import json

from common import API, RUN, api, ask, row, until


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
