"""Every action of the dashboard, clicked in Chromium, against a daemon whose host is simulated: it has the template `base`,
and a sandbox `web` at whose address an agent answers."""

from page import KEY, URL, expect, run


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
    expect(it.page.get_by_text("A point to go back to was saved in box.")).to_be_visible()
    # What others say is text, whatever it looks like.
    expect(it.page.get_by_text("<b>trial</b>")).to_be_visible()
    it.click("Snapshot")
    it.dialog().get_by_label("Name").fill("warm")
    it.click("Snapshot", it.dialog())
    expect(it.page.get_by_text("warm is a template now.")).to_be_visible()
    it.click("Flatten")
    it.dialog().get_by_label("Name").fill("flat")
    it.click("Flatten", it.dialog())
    expect(it.page.get_by_text("flat is a template now.")).to_be_visible()
    it.click("Fork")
    it.dialog().get_by_label("How many").fill("2")
    it.click("Fork", it.dialog())
    expect(it.page.get_by_text("2 forks of box made.")).to_be_visible()
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


STORIES = [
    a_key_is_needed_and_kept_for_the_tab_alone,
    a_sandbox_is_created_and_taken_through_its_verbs,
    the_list_follows_what_others_do,
]

if __name__ == "__main__":
    run(*STORIES)
