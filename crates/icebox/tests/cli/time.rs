//! What happens by itself: lifetimes, drains, samples; and commands that are left to themselves.

use crate::support::{Daemon, request};

#[test]
fn lifetimes_are_said_and_changed() {
    let daemon = Daemon::start().with_template();
    daemon.get(&[
        "create",
        "base",
        "--name",
        "web",
        "--timeout",
        "10m",
        "--auto-resume",
    ]);
    let said = |arguments: &[&str]| {
        let output = daemon.run(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said)
    };
    let page = daemon.get(&["inspect", "web"]);
    let lifetime = "pause after 10m idle; resumed by whoever asks for it";
    assert!(page.contains(lifetime), "{page}");
    let changed = said(&["timeout", "web", "90"]);
    let idle = "web: pause after 90s idle; resumed by whoever asks for it\n";
    assert_eq!(changed, (0, idle.to_owned()));
    let (code, ends) = said(&[
        "timeout",
        "web",
        "--ends-after",
        "1h30m",
        "--on-timeout",
        "kill",
    ]);
    let both = "web: kill after 90s idle; kill after 90m of running, at ";
    assert!(code == 0 && ends.starts_with(both), "{ends}");
    let never = [
        "timeout",
        "web",
        "never",
        "--ends-after",
        "never",
        "--auto-resume",
        "false",
    ];
    let forever = "web: runs until it is told otherwise\n";
    assert_eq!(said(&never), (0, forever.to_owned()));

    for (arguments, code, why) in [
        (&["timeout", "web"][..], 1, "there is nothing to change"),
        (&["timeout", "web", "soon"], 2, "expected a length of time"),
        (
            &["timeout", "web", "0"],
            1,
            "cannot be idle for less than a second",
        ),
        (&["timeout", "nobody", "5m"], 1, "no sandbox is called"),
        (&["create", "base", "--ends-after", "0"], 1, "cannot be 0 s"),
    ] {
        let (exit, said) = said(arguments);
        assert!(
            exit == code && said.contains(why),
            "{arguments:?}: {exit} {said}"
        );
    }
}

#[test]
fn e2b_says_when_a_sandbox_ends() {
    let daemon = Daemon::start().with_template();
    let key = format!("x-api-key: {}\r\n", daemon.api_key());
    let ask = |line: &str, body: &str| request(&daemon.address(), line, &key, body);
    let made = ask(
        "POST /v2/sandboxes",
        r#"{"templateID": "base", "timeout": 300}"#,
    );
    assert!(made.starts_with("HTTP/1.1 201 "), "{made}");
    let (_, made) = made.split_once("\r\n\r\n").unwrap();
    let made: serde_json::Value = serde_json::from_str(made).unwrap();
    let id = made["sandboxID"].as_str().unwrap();
    assert!(
        made["endAt"].as_str() > made["startedAt"].as_str(),
        "{made}"
    );
    assert_eq!(made["lifecycle"]["onTimeout"], "kill", "{made}");
    let set = ask(
        &format!("POST /sandboxes/{id}/timeout"),
        r#"{"timeout": 600}"#,
    );
    assert!(set.starts_with("HTTP/1.1 204 "), "{set}");
    let metrics = ask(&format!("GET /sandboxes/{id}/metrics?start=0&end=1"), "");
    assert!(metrics.ends_with("\r\n\r\n[]"), "{metrics}");
    let drain = ask("POST /drain", "");
    assert!(drain.starts_with("HTTP/1.1 403 "), "{drain}");
}

#[test]
fn inv_34_a_drained_daemon_leaves() {
    let daemon = Daemon::start().with_template();
    for name in ["one", "two"] {
        daemon.get(&["create", "base", "--name", name]);
    }
    daemon.get(&["pause", "two"]);
    let output = daemon.run(&["drain"]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "paused one\ndrained; the daemon leaves\n");
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("daemon.drained"), "{log}");
}

#[test]
fn inv_34_a_daemon_that_is_told_to_drains_when_it_is_stopped() {
    let settings = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(settings.path(), "drain_on_stop = true\n").unwrap();
    let daemon =
        Daemon::start_with(&["--config", settings.path().to_str().unwrap()]).with_template();
    daemon.get(&["create", "base", "--name", "one"]);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    let (paused, drained) = (log.find("sandbox.paused"), log.find("daemon.drained"));
    assert!(paused.is_some() && paused < drained, "{log}");
}

#[test]
fn a_command_is_left_to_itself_and_found_again() {
    let daemon = Daemon::start().with_guest();
    let script = "echo one; echo two >&2; echo three; exit 3";
    let pid = daemon.get(&[
        "exec", "--detach", "--tag", "job", "web", "--", "sh", "-c", script,
    ]);
    for which in ["job", &pid] {
        let output = daemon.run(&["attach", "-n", "web", which]);
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stdout, b"one\nthree\n");
        assert_eq!(output.stderr, b"two\n");
    }
    // Of both outputs, in the order in which they came, which is not certain between the two.
    let script = "echo one; echo two; echo three";
    let other = daemon.get(&["exec", "--detach", "web", "--", "sh", "-c", script]);
    let output = daemon.run(&["attach", "-n", "--from", "8", "web", &other]);
    assert_eq!(output.stdout, b"three\n");
    let unknown = daemon.run(&["attach", "-n", "web", "nothing"]);
    assert_eq!(unknown.status.code(), Some(125));

    let waiting = [
        "exec", "--detach", "--tag", "waits", "web", "--", "sleep", "600",
    ];
    let pid = daemon.get(&waiting);
    let listed: serde_json::Value =
        serde_json::from_str(&daemon.get(&["--json", "ps", "web"])).unwrap();
    let tagged = |it: &&serde_json::Value| it["tag"] == "waits";
    let waits = listed.as_array().unwrap().iter().find(tagged).unwrap();
    assert_eq!(waits["pid"].to_string(), pid);
    assert_eq!(waits["args"], serde_json::json!(["600"]));
    let table = daemon.get(&["ps", "web"]);
    assert!(
        table.starts_with("PID") && table.contains("waits  sleep 600"),
        "{table}"
    );
}

#[test]
fn a_paused_sandbox_is_resumed_for_a_command() {
    let daemon = Daemon::start().with_guest();
    daemon.get(&["pause", "web"]);
    let refused = daemon.run(&["exec", "-n", "web", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125));
    assert_eq!(
        daemon.get(&["exec", "-n", "--resume", "web", "--", "echo", "hello"]),
        "hello"
    );
    daemon.get(&["timeout", "web", "--auto-resume", "true"]);
    daemon.get(&["pause", "web"]);
    assert_eq!(
        daemon.get(&["exec", "-n", "web", "--", "echo", "again"]),
        "again"
    );
}
