//! What needs no daemon, and what is said when there is none.

use std::process::Stdio;

use crate::support::{entry, icebox};

#[test]
fn no_daemon() {
    let mut text = String::new();
    for arguments in [
        &["--socket", "/nonexistent/socket", "ls"][..],
        &["--socket", "/nonexistent/socket", "--json", "ls"],
        &["--socket", "/nonexistent/socket", "exec", "web", "true"],
    ] {
        let output = icebox().args(arguments).output().unwrap();
        text.push_str(&entry(arguments, &output));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn help_says_what_there_is() {
    let mut text = String::new();
    for arguments in [&["--help"][..], &["exec", "--help"], &["serve", "--help"]] {
        let output = icebox().args(arguments).output().unwrap();
        text.push_str(&entry(arguments, &output));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn every_shell_gets_completions() {
    for (shell, check) in [("bash", "bash"), ("zsh", ""), ("fish", "")] {
        let output = icebox().args(["completions", shell]).output().unwrap();
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["snapshot", "flatten", "template", "completions"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        assert!(
            !script.contains("worker"),
            "{shell}: hidden commands stay hidden"
        );
        if check.is_empty() {
            continue;
        }
        let mut syntax = std::process::Command::new(check)
            .arg("-n")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        use std::io::Write as _;
        syntax
            .stdin
            .take()
            .unwrap()
            .write_all(script.as_bytes())
            .unwrap();
        assert!(syntax.wait().unwrap().success());
    }
}
