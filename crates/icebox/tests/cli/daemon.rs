//! `icebox serve` itself: settings, sockets, keys, its end.

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;

use crate::support::{Daemon, Scrub, entry, finish, icebox, request, serve};

#[test]
fn settings_that_are_not_understood() {
    let directory = tempfile::tempdir().unwrap();
    let mut scrub = Scrub::default();
    scrub.replace(&directory.path().display().to_string(), "[DIR]");
    let file = directory.path().join("icebox.toml");
    let mut text = String::new();
    for settings in [
        "data_dri = \"/srv\"\n",
        "[network]\nprefix = 5\n",
        "listen = \"nowhere\"\n",
        "[",
    ] {
        std::fs::write(&file, settings).unwrap();
        let output = serve(directory.path())
            .args(["--sim", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        text.push_str(&entry(&["serve"], &output));
    }
    let output = serve(directory.path())
        .args(["--sim", "--config", "/nonexistent.toml"])
        .output()
        .unwrap();
    text.push_str(&entry(&["serve"], &output));
    let output = serve(directory.path())
        .args(["--sim", "--log", "icebox=loud"])
        .output()
        .unwrap();
    text.push_str(&entry(&["serve"], &output));
    insta::assert_snapshot!(scrub.text(&text));
    assert!(!directory.path().join("socket").exists());
}

#[test]
fn places_that_are_taken() {
    let daemon = Daemon::start();
    let mut scrub = Scrub::default();
    scrub.replace(&daemon.path("").display().to_string(), "[DIR]/");
    scrub.replace(&format!("(pid {})", daemon.pid()), "(pid [PID])");
    let second = serve(&daemon.path("")).arg("--sim").output().unwrap();
    let mut text = entry(&["serve"], &second);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    scrub.replace(&address, "127.0.0.1:[PORT]");
    let elsewhere = tempfile::tempdir().unwrap();
    let third = serve(elsewhere.path())
        .args(["--sim", "--listen", &address])
        .output()
        .unwrap();
    text.push_str(&entry(&["serve", "--listen"], &third));
    insta::assert_snapshot!(scrub.text(&text));
    assert_eq!(daemon.get(&["ls", "--quiet"]), "", "the first goes on");
    assert!(!elsewhere.path().join("socket").exists(), "nothing is left");
}

#[test]
fn the_socket_is_private_and_gone_in_the_end() {
    let daemon = Daemon::start();
    let socket = daemon.path("socket");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A daemon that was killed leaves its socket; the next one replaces it.
    let (status, _) = daemon.stop();
    assert!(status.success());
    assert!(!socket.exists());
}

#[test]
fn a_killed_daemons_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("socket")).unwrap());
    until_ready(serve(directory.path()).arg("--sim").spawn().unwrap());
}

/// What a daemon says until it serves; it is killed then.
fn until_ready(mut child: std::process::Child) -> String {
    let mut log = String::new();
    let mut stderr = child.stderr.take().unwrap();
    let mut byte = [0];
    while !log.contains("is ready on") && stderr.read(&mut byte).unwrap() == 1 {
        log.push(char::from(byte[0]));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(log.contains("is ready on"), "{log}");
    log
}

#[test]
fn tcp_needs_the_key_that_was_shown_once() {
    let daemon = Daemon::start();
    let address = daemon.address();
    let key = daemon.api_key();
    let ask = |header: &str| request(&address, "GET /sandboxes", header, "");
    assert!(ask("").starts_with("HTTP/1.1 401 "));
    assert!(ask("x-api-key: wrong\r\n").starts_with("HTTP/1.1 401 "));
    assert!(ask(&format!("x-api-key: {key}\r\n")).starts_with("HTTP/1.1 200 "));
}

#[test]
fn with_json_a_program_learns_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = serve(directory.path())
        .args(["--json", "--sim", "--listen", "127.0.0.1:0"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let mut next =
        || -> serde_json::Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert!(next()["apiKey"].as_str().unwrap().starts_with("e2b_"));
    let ready = next();
    assert!(
        ready["ready"]["url"]
            .as_str()
            .unwrap()
            .starts_with("http://127.0.0.1:"),
        "{ready}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn inv_43_no_key_is_made_into_the_systems_log() {
    let directory = tempfile::tempdir().unwrap();
    let child = serve(directory.path())
        .args(["--sim", "--listen", "127.0.0.1:0"])
        .env("JOURNAL_STREAM", "8:1234")
        .spawn()
        .unwrap();
    let stderr = until_ready(child);
    assert!(!stderr.contains("e2b_"), "{stderr}");
    assert!(stderr.contains("`icebox key create` makes one"), "{stderr}");
}

#[test]
fn a_weak_key_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let child = serve(directory.path())
        .args(["--sim", "--listen", "127.0.0.1:0"])
        .env("ICEBOX_API_KEY", "secret")
        .spawn()
        .unwrap();
    let (status, _, stderr) = finish(child);
    assert_eq!(status.code(), Some(1));
    assert!(
        stderr.contains("ICEBOX_API_KEY") && !stderr.contains("secret\n"),
        "{stderr}"
    );
}

#[test]
fn events_are_followed() {
    let daemon = Daemon::start().with_template();
    let mut child = daemon
        .command(&["--json", "events", "--since", "0"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let mut next =
        || -> serde_json::Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()["event"], "template.created");
    daemon.get(&["create", "base", "--name", "web"]);
    assert_eq!(next()["event"], "sandbox.created");
    daemon.get(&["pause", "web"]);
    let paused = next();
    assert_eq!(paused["event"], "sandbox.paused");
    assert_eq!(paused["sequence"], 3, "numbers have no holes");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_version_is_told() {
    let output = icebox().arg("--version").output().unwrap();
    let expected = format!("icebox {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}
