//! Every verb on its good way.

use crate::support::{Daemon, Transcript};

#[test]
fn a_sandbox_from_create_to_rm() {
    let daemon = Daemon::start();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("template build python --from debian:bookworm --include python3,git --memory 256")
        .run("create python --name web --env COLOR=blue --metadata team=red --internet")
        .run("ls")
        .run("inspect web")
        .run("pause web")
        .run("pause web")
        .run("ls")
        .run("resume web")
        .run("resume web")
        .run("stop web")
        .run("stop web")
        .run("start web")
        .run("inspect web")
        .run("logs web")
        .run("rm web")
        .run("ls");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn snapshots_forks_and_flat_copies() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --name web")
        .run("snapshot web --name warm")
        .run("create warm --name second")
        .run("fork web -n 2")
        .run("flatten web --name cold")
        .run("template ls")
        .run("template inspect warm")
        .run("template inspect cold")
        .run("gc --dry-run")
        .run("gc")
        .run("rm web second")
        .run("template rm cold")
        .run("ls --quiet")
        .run("template ls --quiet");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn going_back_to_a_generation_keeps_the_newest_disk_as_a_branch() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --name web")
        .run("pause web")
        .run("resume web")
        .run("stop web")
        .run("resume web")
        .run("resume web --generation 7")
        .run("resume web --generation 1")
        .run("inspect web");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_sandbox_goes_back_and_forth_in_its_history() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --name web --keep 5 --keep-for 30d --checkpoint-every 1h30m")
        .run("pause web")
        .run("resume web")
        .run("checkpoint web")
        .run("history web")
        .run("rollback web --to 1")
        .run("rollback web --to 1")
        .run("history web")
        .run("rollback web --to disk-4 --resume")
        .run("rollback web --to 9")
        .run("rollback web --to disk-9")
        .run("rollback web --to ../1")
        .run("history rm web 2 disk-4 disk-4")
        .run("history web")
        .run("--json history web")
        .run("pause web")
        .run("history rm web 3")
        .run("history web")
        .run("stop web")
        .run("resume web")
        .run("checkpoint web")
        .run("inspect web")
        .run("create base --keep 0")
        .run("create base --keep=-1")
        .run("create base --checkpoint-every 1s")
        .run("create base --keep-for soon");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn json_is_one_document_per_line() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("--json create base --name web")
        .run("--json pause web")
        .run("--json ls")
        .run("--json rm web nothing")
        .run("--json template ls")
        .run("--json gc")
        .run("--json kernel ls")
        .run("--json vmm ls")
        .run("--json events --since 0 --no-follow");
    insta::assert_snapshot!(scrub_steps(&transcript.text()));
}

/// Step times differ from run to run.
fn scrub_steps(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("\"micros\":") {
        let (before, number) = rest.split_at(at + "\"micros\":".len());
        result.push_str(before);
        result.push('0');
        rest = number.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    result + rest
}

#[test]
fn a_snapshot_template_comes_from_a_start_command() {
    // The build's own sandbox is the first.
    let daemon = Daemon::start().with_open_agent();
    let mut transcript = Transcript::new(&daemon);
    let flag = daemon.path("flag").display().to_string();
    transcript
        .run_arguments(&[
            "template",
            "build",
            "warm",
            "--from",
            "debian:bookworm",
            "--start-cmd",
            &format!("touch {flag}; exec sleep 60"),
            "--ready-cmd",
            &format!("test -e {flag}"),
        ])
        .run_arguments(&[
            "template",
            "build",
            "broken",
            "--from",
            "debian:bookworm",
            "--start-cmd",
            "echo no such port >&2; exit 3",
        ])
        .run("template ls")
        .run("ls");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn what_the_host_has() {
    let daemon = Daemon::start();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("doctor")
        .run("vmm ls")
        .run("kernel ls")
        .run("kernel import");
    insta::assert_snapshot!(transcript.text());
}

/// A template, as the daemon shows it once `waiting` sandboxes of it wait.
fn waiting(daemon: &Daemon, template: &str, waiting: u64) -> serde_json::Value {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        let shown = daemon.get(&["--json", "template", "inspect", template]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        if shown["waiting"] == waiting {
            return shown;
        }
        assert!(std::time::Instant::now() < deadline, "{shown}");
    }
}

#[test]
fn what_is_created_from_a_warm_template_was_there_before() {
    let daemon = Daemon::start().with_template();
    daemon.get(&["template", "warm", "base", "2"]);
    assert_eq!(waiting(&daemon, "base", 2)["warm"], 2);
    let shown = daemon.get(&["template", "inspect", "base"]);
    assert!(shown.contains("2, of which 2 wait"), "{shown}");
    assert_eq!(daemon.get(&["ls", "--quiet"]), "");
    daemon.get(&["create", "base", "--name", "web", "--env", "KEY=value"]);
    let said = daemon.get(&["--json", "events", "--since", "0", "--no-follow"]);
    assert!(said.contains("from base, warm"), "{said}");
    waiting(&daemon, "base", 2);
    daemon.get(&["rm", "web"]);
    let said = daemon.run(&["template", "warm", "base", "1000"]);
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("hint: ask for at most 64"), "{said}");
    daemon.get(&["template", "warm", "base", "0"]);
    assert_eq!(waiting(&daemon, "base", 0)["warm"], 0);
    daemon.get(&["template", "rm", "base"]);
}
