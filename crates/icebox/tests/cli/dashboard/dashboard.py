"""Every action of the dashboard, clicked in Chromium, against a daemon whose host is simulated: it has the template `base`,
and a sandbox `web` at whose address an agent answers."""

import json
import re
import time
import urllib.request
from pathlib import Path

from page import KEY, PATIENCE_MS, URL, expect, run


def a_key_is_needed_and_kept_for_the_tab_alone(it):
    it.expected.append("401")
    it.page.goto(f"{URL}/test")
    it.heading("Sign in")
    assert it.page.url.startswith(f"{URL}/ui/"), it.page.url
    it.picture("sign-in")
    it.page.get_by_label("API key").fill("e2b_00")
    it.page.keyboard.press("Enter")
    expect(it.page.get_by_role("alert")).to_contain_text("not known here")
    it.page.get_by_label("API key").fill(KEY)
    it.page.keyboard.press("Enter")
    it.heading("Sandboxes")
    it.page.reload()
    it.heading("Sandboxes")
    other = it.context.new_page()
    other.goto(f"{URL}/ui/")
    expect(other.get_by_role("heading", name="Sign in")).to_be_visible()
    assert KEY not in it.page.content() and it.context.cookies() == []
    assert it.page.evaluate("localStorage.length") == 0
    it.click("Sign out")
    it.heading("Sign in")
    assert it.page.evaluate("sessionStorage.length") == 0


def a_sandbox_is_created_and_taken_through_its_verbs(it):
    it.sign_in()
    it.click("New sandbox")
    dialog = it.dialog()
    it.picture("new-sandbox")
    dialog.get_by_label("Name").fill("no/name")
    it.expected.append("400")
    it.click("Create", dialog)
    expect(dialog.get_by_role("alert")).not_to_be_empty()
    dialog.get_by_label("Name").fill("box")
    dialog.get_by_label("CPUs").fill("2")
    dialog.get_by_label("Labels").fill("purpose=<b>trial</b>")
    it.click("Create", dialog)
    it.heading("box")
    it.state("running")
    it.click("Pause")
    it.state("paused")
    it.click("Resume")
    it.state("running")
    it.click("Stop")
    it.state("stopped")
    it.click("Start")
    it.state("running")
    it.click("Save point")
    it.said("A point to go back to was saved in box.")
    # What others say is text, whatever it looks like.
    expect(it.page.get_by_text("<b>trial</b>")).to_be_visible()
    it.click("Snapshot")
    it.dialog().get_by_label("Name").fill("warm")
    it.click("Snapshot", it.dialog())
    it.said("warm is a template now.")
    it.click("Flatten")
    it.dialog().get_by_label("Name").fill("flat")
    it.click("Flatten", it.dialog())
    it.said("flat is a template now.")
    it.click("Fork")
    it.dialog().get_by_label("How many").fill("2")
    it.click("Fork", it.dialog())
    it.said("2 forks of box made.")
    it.click("Time limit")
    it.dialog().get_by_label("Ends by itself").select_option("Destroyed after 1 h")
    it.click("Set", it.dialog())
    expect(it.page.get_by_text(re.compile("ends \\d"))).to_be_visible()
    it.link("Events", it.page.get_by_role("navigation", name="Parts"))
    expect(it.page.get_by_text("sandbox.checkpointed").first).to_be_visible()
    it.link("Console")
    expect(it.page.get_by_label("Console")).not_to_have_text("Loading…")
    it.link("Overview")
    expect(it.page.get_by_role("img", name="Memory: on the host")).to_be_visible()
    it.picture("sandbox")
    it.click("2 h")
    # Destroying asks first, and what is asked can be declined.
    it.click("Destroy")
    it.picture("destroy")
    it.page.keyboard.press("Escape")
    expect(it.dialog()).to_have_count(0)
    it.state("running")
    # Its charts may be asked for at that moment.
    it.expected.append("404")
    it.click("Destroy")
    it.click("Destroy", it.dialog())
    it.state("gone")


def the_list_follows_what_others_do(it):
    it.sign_in()
    row = it.row("web")
    expect(row).to_contain_text("running")
    asked = it.page.request.post(f"{URL}/sandboxes/web/pause", headers={"X-API-Key": KEY})
    assert asked.ok, asked.text()
    expect(row).to_contain_text("paused")
    button = row.get_by_role("button", name="Resume web")
    button.focus()
    it.page.keyboard.press("Enter")
    expect(row).to_contain_text("running")
    # Whoever works with the keyboard is not thrown back to the beginning.
    assert it.page.evaluate("document.activeElement.tagName") == "BUTTON"
    it.page.get_by_label("Filter sandboxes").fill("nothing like this")
    expect(it.page.get_by_text("None matches.")).to_be_visible()
    it.page.get_by_label("Filter sandboxes").fill("")
    it.picture("sandboxes")
    it.link("Events", it.page.get_by_role("navigation", name="Main"))
    expect(it.page.get_by_text("sandbox.paused").first).to_be_visible()
    it.page.get_by_text("steps").first.click()
    it.picture("events")


def the_stream_of_events_is_taken_up_where_it_broke(it):
    asked = []
    event = '{"sequence":1,"time":"2026-01-01T00:00:00Z","event":"sandbox.created","detail":"said before it broke"}\n'

    def answer(route):
        asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(content_type="application/x-ndjson", body=event)
        else:
            route.continue_()

    it.page.route("**/events?follow=true*", answer)
    with it.page.expect_response(lambda response: response.url.endswith("&since=1")):
        it.sign_in()
    assert len(asked) == 2, asked


def templates_are_built_and_removed(it):
    it.sign_in()
    it.link("Templates")
    it.heading("Templates")
    it.click("Build from packages")
    it.dialog().get_by_label("Name").fill("tools")
    it.dialog().get_by_label("Packages").fill("python3 git")
    it.picture("build")
    it.click("Build", it.dialog())
    log = it.page.get_by_label("Log of the build of tools")
    expect(log).to_contain_text("simulating a root image")
    expect(it.page.get_by_role("article").locator(".pill")).to_have_text("ready")
    # A name that is taken is refused, in the log as in the API.
    it.expected.append("409")
    it.click("Build from packages")
    it.dialog().get_by_label("Name").fill("tools")
    it.click("Build", it.dialog())
    expect(it.page.get_by_role("article").first.locator(".pill")).to_have_text("error")
    # A dialog offers the templates that are known when it opens.
    expect(it.page.get_by_role("button", name="Create a sandbox from tools")).to_be_visible()
    it.click("Build on a template")
    it.dialog().get_by_label("Name").fill("steps")
    it.dialog().get_by_label("Begins as").select_option("tools")
    it.dialog().get_by_label("Steps").fill("ENV COLOUR=blue\nmake")
    it.click("Cancel", it.dialog())
    it.picture("templates")
    it.click("Create a sandbox from tools")
    it.dialog().get_by_label("Name").fill("fresh")
    it.click("Create", it.dialog())
    it.heading("fresh")
    it.link("Templates")
    it.expected.append("400")
    it.click("Remove tools")
    it.click("Remove", it.dialog())
    expect(it.dialog().get_by_role("alert")).to_contain_text("fresh")
    it.click("Cancel", it.dialog())
    it.link("Sandboxes")
    it.click("Destroy fresh")
    it.click("Destroy", it.dialog())
    expect(it.row("fresh")).to_have_count(0)
    it.link("Templates")
    it.click("Remove tools")
    it.click("Remove", it.dialog())
    expect(it.row("tools")).to_have_count(0)


def a_sandbox_goes_back_to_a_point_of_its_past(it):
    it.sign_in()
    it.click("New sandbox")
    it.dialog().get_by_label("Name").fill("past")
    it.click("Create", it.dialog())
    it.heading("past")
    it.link("History")
    expect(it.page.get_by_text("Nothing to go back to yet")).to_be_visible()
    it.click("Save point")
    expect(it.row("generation 1")).to_contain_text("checkpoint")
    it.click("Pause")
    it.state("paused")
    expect(it.row("generation 2")).to_contain_text("here")
    it.click("Resume")
    it.state("running")
    it.click("Go back to generation 1")
    it.click("Go back", it.dialog())
    it.said("past is back at generation 1.")
    expect(it.page.get_by_text("on from generation 1")).to_be_visible()
    it.picture("history")
    it.click("Forget generation 2")
    it.click("Forget", it.dialog())
    expect(it.row("generation 2")).to_have_count(0)


def the_lineage_is_a_picture(it):
    it.sign_in()
    it.link("web")
    it.click("Snapshot")
    it.dialog().get_by_label("Name").fill("web-warm")
    it.click("Snapshot", it.dialog())
    it.said("web-warm is a template now.")
    it.click("Fork")
    it.dialog().get_by_label("How many").fill("2")
    it.click("Fork", it.dialog())
    it.said("2 forks of web made.")
    it.link("Templates")
    it.click("Create a sandbox from web-warm")
    it.dialog().get_by_label("Name").fill("grandchild")
    it.click("Create", it.dialog())
    it.heading("grandchild")
    it.link("Lineage")
    tree = it.page.get_by_label("Picture of the lineage")
    expect(tree.get_by_role("link", name="sandbox web, running")).to_have_count(1)
    expect(tree.get_by_role("link", name="fork of web")).to_have_count(2)
    expect(tree.get_by_role("link", name="snapshot template web-warm, snapshot")).to_have_attribute("aria-label", re.compile("of web$"))
    it.picture("lineage")
    grandchild = tree.get_by_role("link", name="sandbox grandchild")
    expect(grandchild).to_have_attribute("aria-label", re.compile("KiB, from web-warm$"))
    grandchild.focus()
    it.page.keyboard.press("Enter")
    it.heading("grandchild")


def files_are_listed_put_fetched_moved_and_removed(it):
    place = Path.cwd() / "files"
    place.mkdir()
    (place / "<i>name").write_text("text")
    it.sign_in()
    it.link("web")
    it.link("Files")
    it.page.get_by_label("Directory", exact=True).fill(str(place))
    it.click("Go")
    expect(it.row("<i>name")).to_contain_text("4 B")
    content = bytes(range(256)) * 4096
    it.page.get_by_label("Files to upload").set_input_files(
        {"name": "data.bin", "mimeType": "application/octet-stream", "buffer": content}
    )
    it.said("data.bin is uploaded.")
    expect(it.row("data.bin")).to_contain_text("1.0 MiB")
    assert (place / "data.bin").read_bytes() == content
    with it.page.expect_download() as download:
        it.click("Download data.bin")
    assert Path(download.value.path()).read_bytes() == content
    it.click("New directory")
    it.dialog().get_by_label("Name").fill("inner")
    it.click("Make", it.dialog())
    it.click("Move data.bin")
    it.dialog().get_by_label("To").fill(str(place / "inner/moved.bin"))
    it.click("Move", it.dialog())
    expect(it.row("data.bin")).to_have_count(0)
    it.picture("files")
    it.click("inner/")
    expect(it.row("moved.bin")).to_be_visible()
    it.click("Remove moved.bin")
    it.click("Remove", it.dialog())
    expect(it.row("moved.bin")).to_have_count(0)
    assert list((place / "inner").iterdir()) == []
    it.expected.append("404")
    it.page.get_by_label("Directory", exact=True).fill("/no/such/place")
    it.page.keyboard.press("Enter")
    expect(it.page.get_by_text("No such file or directory")).to_be_visible()


def a_command_is_run(it):
    it.sign_in()
    it.link("web")
    it.link("Run")
    command = it.page.get_by_label("Command")
    command.fill("echo out; echo '<b>err</b>' >&2; exit 3")
    it.click("Run")
    expect(it.page.get_by_text("exit status 3")).to_be_visible()
    expect(it.page.locator(".output .stdout")).to_have_text("out\n")
    expect(it.page.locator(".output .stderr")).to_have_text("<b>err</b>\n")
    it.picture("run")
    command.fill("echo $HOME")
    it.click("Run")
    expect(it.page.locator(".output")).to_have_text(f"{Path.cwd()}/home\n")
    command.fill("sleep 1000")
    # While the last one has not ended to the end, nothing is run.
    expect(it.page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
    it.page.keyboard.press("Enter")
    it.click("End it")
    expect(it.page.get_by_text("signal: killed")).to_be_visible()


def processes(it):
    """What runs in the sandbox, as its agent says."""
    token = it.page.request.get(f"{URL}/sandboxes/web", headers={"X-API-Key": KEY}).json()
    headers = {
        "E2b-Sandbox-Id": token["sandboxID"],
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": token["envdAccessToken"],
    }
    listed = it.page.request.post(f"{URL}/process.Process/List", headers=headers, data={})
    return [it["config"]["cmd"] for it in listed.json().get("processes", [])]


def a_terminal_is_a_terminal(it):
    it.sign_in()
    it.link("web")
    it.link("Terminal")
    terminal = it.page.get_by_role("textbox", name="Terminal of web")
    expect(terminal).to_be_focused()
    screen = it.page.locator(".tty")

    def typed(text):
        # What is typed elsewhere is lost.
        expect(terminal).to_be_focused()
        it.page.keyboard.type(text + "\n")

    typed("PS1='> '; clear; echo $((6 * 7)) $TERM $COLUMNS")
    expect(screen).to_contain_text(re.compile(r"42 xterm-256color \d{2,3}\s"))
    typed("printf '\\e[1;31mred\\e[0m \\e[38;5;33mblue\\e[0m \\e[7mback\\e[0m <b>no</b>\\n'")
    expect(screen.locator(".bold.fg-1")).to_have_text("red")
    expect(screen.get_by_text("<b>no</b>").last).to_be_visible()
    typed("for i in $(seq 1 200); do echo line-$i; done")
    expect(screen.get_by_text("line-200", exact=True)).to_be_visible()
    expect(screen.get_by_text("line-7", exact=True)).to_have_count(1)
    typed("printf 'a\\tb\\rX\\n\\e[3Cy\\e[2Dz\\n'; printf '12345\\e[3D\\e[Kend\\n'")
    expect(screen).to_contain_text("12end")
    it.picture("terminal")
    # A program that takes the whole screen gives it back.
    typed("printf '\\e[?1049h\\e[2J\\e[5;5Hfull'; read; printf '\\e[?1049l'")
    expect(screen).to_contain_text("    full")
    expect(screen.locator(".lines").last.get_by_text("12end")).to_have_count(0)
    it.page.keyboard.press("Enter")
    expect(screen.locator(".lines").last.get_by_text("12end").last).to_be_visible()
    it.page.keyboard.press("Control+l")
    # Not sooner: it would be thrown away with what is typed ahead, or be the shell's own, which then starts what it was about to.
    typed("sh -c 'echo begun; exec cat'")
    expect(screen.get_by_text("begun", exact=True)).to_be_visible()
    it.page.keyboard.press("Control+c")
    typed("echo ended with $?")
    expect(screen).to_contain_text("ended with 130")
    # A shell outlives the view, and a pause.
    typed("KEPT=kept")
    it.link("Overview")
    it.link("Terminal")
    typed("echo it is $KEPT")
    expect(screen).to_contain_text("it is kept")
    # A pause cuts what is connected.
    it.expected += ["502", "ERR_INCOMPLETE_CHUNKED_ENCODING"]
    it.click("Pause")
    it.state("paused")
    expect(it.page.get_by_text("A terminal can be had while web runs.")).to_be_visible()
    it.click("Resume")
    it.state("running")
    expect(terminal).to_be_focused()
    typed("echo still $KEPT")
    expect(screen).to_contain_text("still kept")
    typed("exit 3")
    expect(it.page.get_by_text("The shell has ended: exit status 3")).to_be_visible()
    it.click("Connect again")
    expect(it.page.get_by_role("button", name="Connect again")).to_be_hidden()
    typed("echo another")
    expect(screen.get_by_text("another", exact=True)).to_be_visible()
    it.page.keyboard.press("Shift+Tab")
    expect(terminal).not_to_be_focused()
    # Shells end with the page that they were for.
    assert processes(it) == ["/bin/bash"]
    it.click("Sign out")
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while processes(it):
        assert time.monotonic() < deadline, "the shell goes on"


STORIES = [
    a_key_is_needed_and_kept_for_the_tab_alone,
    a_sandbox_is_created_and_taken_through_its_verbs,
    the_list_follows_what_others_do,
    the_stream_of_events_is_taken_up_where_it_broke,
    templates_are_built_and_removed,
    a_sandbox_goes_back_to_a_point_of_its_past,
    the_lineage_is_a_picture,
    files_are_listed_put_fetched_moved_and_removed,
    a_command_is_run,
    a_terminal_is_a_terminal,
]



def give_the_guest_a_home():
    """The agent runs on this host, so its shells would read the profile of whoever runs the tests, and what that
    starts would be killed with them half-way."""
    home = Path.cwd() / "home"
    home.mkdir()
    asked = urllib.request.Request(f"{URL}/sandboxes/web", headers={"X-API-Key": KEY})
    web = json.load(urllib.request.urlopen(asked))
    identity = {"sandbox_id": "web", "template_id": "base", "hostname": "web", "machine_id": "0" * 32}
    init = {
        "origin": "boot",
        "identity": identity,
        "access_token": web["envdAccessToken"],
        "env": {"HOME": str(home)},
        "clock_unix_ns": 0,
        "entropy": "A" * 64,
    }
    agent = f"http://{web['address']}:49983/init"
    headers = {"X-Access-Token": web["envdAccessToken"], "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(agent, json.dumps(init).encode(), headers)).close()


if __name__ == "__main__":
    give_the_guest_a_home()
    run(*STORIES)
