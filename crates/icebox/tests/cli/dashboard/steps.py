"""A template that is built by steps from the dashboard, against a daemon whose guests are real: it has the template `base`."""

import re

from page import expect, run


def build(it, name, steps):
    it.click("Build on a template")
    dialog = it.dialog()
    dialog.get_by_label("Name").fill(name)
    dialog.get_by_label("Begins as").select_option("base")
    dialog.get_by_label("Steps").fill("\n".join(steps))
    it.click("Build", dialog)
    return it.page.get_by_label(f"Log of the build of {name}"), it.page.get_by_role("article").filter(has_text=name)


def a_template_is_built_by_steps_and_used(it):
    it.sign_in()
    it.link("Templates")
    it.heading("Templates")
    log, card = build(it, "stepped", ["ENV COLOUR=blue", "echo $COLOUR is the colour", "USER root", "whoami"])
    expect(log).to_contain_text("blue is the colour\n")
    expect(log).to_contain_text("\nroot\n")
    expect(card.locator(".pill")).to_have_text("ready")
    log, card = build(it, "failing", ["exit 3"])
    expect(log).to_contain_text("failed to run command 'exit 3'")
    expect(card.locator(".pill")).to_have_text("error")
    it.picture("built-by-steps")
    it.click("Create a sandbox from stepped", exact=False)
    it.dialog().get_by_label("Name").fill("from-steps")
    it.click("Create", it.dialog())
    it.heading("from-steps")
    it.link("Run")
    it.page.get_by_label("Command").fill("echo $COLOUR; whoami")
    it.click("Run")
    expect(it.page.locator(".output .stdout")).to_have_text("blue\nroot\n")
    # Its charts may be asked for at that moment.
    it.expected.append("404")
    it.click("Destroy")
    it.click("Destroy", it.dialog())
    it.state("gone")
    it.link("Templates")
    it.click("Remove stepped", exact=False)
    it.click("Remove", it.dialog())
    expect(it.row(re.compile("^stepped"))).to_have_count(0)


if __name__ == "__main__":
    run(a_template_is_built_by_steps_and_used)
