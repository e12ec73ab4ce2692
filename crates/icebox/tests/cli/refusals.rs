//! Bad input gets a clear error and changes nothing.

use crate::support::{Daemon, Transcript};

#[test]
fn unknown_and_ambiguous_things() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create nothing")
        .run("create base --driver zfs")
        .run("create base --vmm firecracker")
        .run("inspect nothing")
        .run("pause nothing")
        .run("exec nothing -- true")
        .run("logs nothing")
        .run("template inspect nothing")
        .run("template rm nothing")
        .run("create base --name one")
        .run("create base --name two")
        .run("pause nothing one")
        .run("ls");
    insta::assert_snapshot!(transcript.text());
    // Which ids begin alike is chance, but every id begins with an i.
    let ambiguous = daemon.run(&["pause", "i"]);
    let said = String::from_utf8(ambiguous.stderr).unwrap();
    assert!(
        said.contains("could be") && said.contains("one (i") && said.contains("two (i"),
        "{said}"
    );
    assert_eq!(ambiguous.status.code(), Some(1));
}

#[test]
fn inv_41_names_that_are_none() {
    let daemon = Daemon::start().with_template();
    let long = "a".repeat(300);
    let mut transcript = Transcript::new(&daemon);
    for name in ["", "..", "a/b", "a..b", "-a", "Web", "é", "a b", &long] {
        transcript.run_arguments(&["create", "base", &format!("--name={name}")]);
    }
    for name in ["..", "../../etc/passwd", "a/b", &long] {
        transcript.run_arguments(&["inspect", name]);
    }
    transcript
        .run_arguments(&["inspect", ""])
        .run_arguments(&["template", "build", "../x", "--from", "debian:bookworm"])
        .run_arguments(&["snapshot", "web", "--name", ""])
        .run("ls")
        .run("template ls --quiet");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn inv_22_names_that_exist() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --name web")
        .run("create base --name web")
        .run("snapshot web --name base")
        .run("flatten web --name base")
        .run("template build base --from debian:bookworm")
        .run("template rm base");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn sizes_that_make_no_sense() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --memory 0")
        .run("create base --memory -512")
        .run("create base --memory 1023T")
        .run("create base --memory much")
        .run("create base --cpus 0")
        .run("create base --cpus -1")
        .run("create base --cpus 1000")
        .run("create base --disk 1")
        .run("create base --disk 0")
        .run("create base --disk -1")
        .run("create base --env NOVALUE")
        .run("create base --env =x")
        .run("create base --name web")
        .run("fork web -n 0")
        .run("fork web -n -1")
        .run("fork web -n 1000")
        .run("ls --quiet");
    let text = transcript.text();
    // What this machine has is not the same everywhere.
    let text = text
        .lines()
        .map(|line| match line.split_once("ask for 64 to ") {
            Some((before, _)) => format!("{before}ask for 64 to [MEMORY]"),
            None => line.to_owned(),
        })
        .collect::<Vec<_>>()
        .join("\n");
    insta::assert_snapshot!(text);
}

#[test]
fn verbs_in_the_wrong_phase() {
    let daemon = Daemon::start().with_template();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("create base --name web")
        .run("start web")
        .run("pause web")
        .run("start web")
        .run("exec web -- true")
        .run("shell web")
        .run("stop web")
        .run("resume web")
        .run("pause web")
        .run("fork web")
        .run("snapshot web --name warm")
        .run("exec web -- true")
        .run("cp web:/etc/hostname -");
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn command_lines_that_are_none() {
    let daemon = Daemon::start();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("frobnicate")
        .run("create")
        .run("exec web")
        .run("template build x")
        .run("template build x --from bookworm")
        .run("template build x --from debian:bookworm --from-tar x.tar")
        .run("template build x --from-tar x.tar --include git")
        .run("template build x --from debian:bookworm --ready-cmd true")
        .run("cp a b")
        .run("cp a:x b:y")
        .run("cp :x y")
        .run("--json shell web");
    insta::assert_snapshot!(transcript.text());
}
