"""Templates that are built by steps."""

import os
import shutil
import tempfile

from e2b import BuildException, Sandbox, Template

from common import RUN, api, raises, row, until


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
        assert Template.exists(name) and not Template.exists(name + "-none")
        Template.assign_tags(name, ["v1", "v2"])
        tags = {it.tag: it.build_id for it in Template.get_tags(name)}
        assert tags["v1"] == tags["v2"] == tags["default"], tags
        Sandbox.create(f"{name}:v1", timeout=60).kill()
        Template.remove_tags(name, ["v1"])
        assert {it.tag for it in Template.get_tags(name)} == {"v2", "default"}
        assert api("DELETE", "/templates/tags", {"name": name, "tags": ["default"]})[0] == 400
        # Every template has a tag, however it was built.
        assert [it.tag for it in Template.get_tags("base")] == ["default"]
        background_build_is_followed(name, build)
    finally:
        api("DELETE", f"/templates/{name}")
        shutil.rmtree(context)
    assert api("GET", f"/templates/aliases/{name}")[0] == 404


def background_build_is_followed(name, build):
    """A build that nobody waits for is asked how it is, and its lines are to be had in pieces."""
    begun = Template.build_in_background(Template().from_template("base").run_cmd("echo said"), f"{name}:later", **build)
    path = f"/templates/{begun.template_id}/builds/{begun.build_id}/status"
    until("it is built", lambda: api("GET", path)[2]["status"] == "ready", 120)
    every = api("GET", path)[2]["logEntries"]
    assert any(it["message"] == "said" for it in every), every
    one = api("GET", path + "?logsOffset=1&limit=1")[2]["logEntries"]
    assert one == every[1:2], one
    assert api("GET", path + f"?logsOffset={len(every)}")[2]["logEntries"] == []
    assert Template.get_build_status(begun).status.value == "ready"
