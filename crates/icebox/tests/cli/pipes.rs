//! What happens when nobody reads what a command prints, or hears what it says.

use std::io::{BufRead as _, BufReader, pipe};
use std::process::{Command, Stdio};

use crate::support::{Daemon, icebox};

/// The exit code and what was said of a command whose output has no reader.
fn unread(command: &mut Command) -> (Option<i32>, String) {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let output = command
        .stdin(Stdio::null())
        .stdout(writer)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), said)
}

#[test]
fn a_reader_that_has_gone_ends_a_command_without_a_word() {
    let daemon = Daemon::start();
    daemon.get(&["template", "build", "base", "--from", "debian:bookworm"]);
    daemon.get(&["create", "base", "--name", "web"]);
    for arguments in [
        &["ls"][..],
        &["ls", "--json"],
        &["inspect", "web"],
        &["template", "ls"],
        &["doctor"],
        &["events", "--since", "0"],
        &["events", "--since", "0", "--no-follow", "--json"],
        &["create", "base"],
    ] {
        let (code, said) = unread(&mut daemon.command(arguments));
        assert_eq!((code, said.as_str()), (Some(141), ""), "{arguments:?}");
    }
    let (code, said) = unread(icebox().args(["completions", "bash"]));
    assert_eq!((code, said.as_str()), (Some(141), ""));
}

#[test]
fn a_reader_that_has_had_enough_ends_what_would_go_on() {
    let daemon = Daemon::start();
    daemon.get(&["template", "build", "base", "--from", "debian:bookworm"]);
    daemon.get(&["create", "base", "--name", "web"]);
    let mut events = daemon
        .command(&["events", "--since", "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    // Dropped with what it has read ahead.
    BufReader::new(events.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("template.created"), "{line}");
    // It only finds out when there is something to print.
    daemon.get(&["pause", "web"]);
    let output = events.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(141));
}

#[test]
fn errors_that_nobody_hears_are_still_errors() {
    let daemon = Daemon::start();
    for arguments in [
        &["inspect", "nothing"][..],
        &["--json", "inspect", "nothing"],
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let status = daemon
            .command(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(writer)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
    }
}
