//! Commands in a sandbox. The guest is a real agent, run as a process of this machine.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::Stdio;

use crate::support::{Daemon, Transcript, finish, signal};

#[test]
fn exit_codes_and_streams() {
    let daemon = Daemon::start().with_guest();
    let plain = daemon.path("plain");
    std::fs::write(&plain, "no program").unwrap();
    let plain = plain.display().to_string();
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("exec web -- echo hello")
        .run_arguments(&["exec", "web", "sh", "-c", "echo out; echo err >&2; exit 3"])
        .run_arguments(&["exec", "web", "--", "sh", "-c", "kill -KILL $$"])
        .run_arguments(&["exec", "web", "--", "sh", "-c", "kill -TERM $$"])
        .run("exec web -- /no/such/program")
        .run("exec web -- no-such-program-anywhere")
        .run_arguments(&["exec", "web", "--", &plain])
        .run("exec -w /no/such/directory web -- true")
        .run("exec -u nosuchuser web -- true")
        .run_arguments(&[
            "exec",
            "-e",
            "COLOR=blue",
            "-w",
            "/",
            "web",
            "--",
            "sh",
            "-c",
            "echo $COLOR; pwd",
        ])
        .run("exec --timeout 0.2 web -- sleep 60")
        .run("exec --timeout 0.000001 web -- sleep 60")
        .run("exec --timeout 0 web -- true")
        .run_arguments(&[
            "--json",
            "exec",
            "web",
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 4",
        ]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn inv_39_ten_megabytes_arrive_whole() {
    let daemon = Daemon::start().with_guest();
    let output = daemon.run(&[
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "head -c 10485760 /dev/zero | tr '\\0' x; exit 5",
    ]);
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(output.stdout.len(), 10 << 20);
    assert!(output.stdout.iter().all(|byte| *byte == b'x'));
}

#[test]
fn what_running_sandboxes_use() {
    let daemon = Daemon::start().with_guest();
    let stats = daemon.get(&["--json", "stats"]);
    let (stats, installation) = stats.split_once('\n').unwrap();
    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    assert_eq!(stats["sandbox"], "web");
    assert!(stats["metrics"]["mem_total"].as_u64().unwrap() > 0);
    assert!(stats["allocatedBytes"].as_u64().unwrap() > 0);
    let installation: serde_json::Value = serde_json::from_str(installation).unwrap();
    let place = &installation["places"][0];
    assert!(place["freeBytes"].as_u64() > place["keepFreeBytes"].as_u64());
    let named = |one: &serde_json::Value| one["name"] == "sandbox web";
    assert!(installation["owners"].as_array().unwrap().iter().any(named));
    let table = daemon.get(&["stats", "web"]);
    assert!(
        table.starts_with("NAME") && table.contains("\nweb "),
        "{table}"
    );
    daemon.get(&["pause", "web"]);
    let table = daemon.get(&["stats", "web"]);
    assert!(table.contains("\nweb   -    -"), "no guest counts: {table}");
    assert_eq!(daemon.run(&["stats", "none"]).status.code(), Some(1));
    let all = daemon.get(&["stats"]);
    for word in [
        "\nweb ",
        "ON DISK",
        "memories",
        "PLACE",
        "NOTHING NEW BELOW",
    ] {
        assert!(all.contains(word), "{word}: {all}");
    }
}

#[test]
fn stdin_is_passed_on_to_its_end() {
    let daemon = Daemon::start().with_guest();
    let mut child = daemon
        .command(&["exec", "web", "--", "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let block = vec![b'a'; 1 << 20];
    for _ in 0..5 {
        stdin.write_all(&block).unwrap();
    }
    drop(stdin);
    let (status, stdout, _) = finish(child);
    assert!(status.success());
    let local = std::process::Command::new("sh")
        .args(["-c", "head -c 5242880 /dev/zero | tr '\\0' a | sha256sum"])
        .output()
        .unwrap();
    assert_eq!(stdout.as_bytes(), local.stdout);
}

#[test]
fn without_stdin_the_command_reads_nothing() {
    let daemon = Daemon::start().with_guest();
    let mut child = daemon
        .command(&["exec", "-n", "web", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Kept open: `cat` would wait for it.
    let stdin = child.stdin.take().unwrap();
    let (status, stdout, _) = finish(child);
    assert!(status.success());
    assert_eq!(stdout, "");
    drop(stdin);
}

#[test]
fn interrupts_are_passed_on() {
    let daemon = Daemon::start().with_guest();
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let mut child = daemon
            .command(&["exec", "web", "--", "sh", "-c", "echo ready; exec sleep 60"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        signal(child.id(), name);
        assert_eq!(child.wait().unwrap().code(), Some(code), "{name}");
    }
}

#[test]
fn a_sandbox_that_does_not_answer_can_be_left() {
    let daemon = Daemon::start().with_guest();
    let mut child = daemon
        .command(&["exec", "web", "--", "sh", "-c", "echo ready; exec sleep 60"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    for agent in daemon.agents() {
        signal(agent, "STOP");
    }
    signal(child.id(), "INT");
    let (status, _, said) = finish(child);
    for agent in daemon.agents() {
        signal(agent, "CONT");
    }
    assert_eq!(status.code(), Some(125));
    assert!(said.contains("the sandbox does not answer"), "{said}");
}

#[test]
fn a_terminal_is_a_terminal() {
    let daemon = Daemon::start().with_guest();
    let output = daemon.run(&[
        "exec",
        "-t",
        "web",
        "--",
        "sh",
        "-c",
        "test -t 0 && test -t 1 && echo $TERM",
    ]);
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim_end(),
        "xterm-256color"
    );
    let output = daemon.run(&["exec", "web", "--", "test", "-t", "1"]);
    assert_eq!(output.status.code(), Some(1), "without -t there is none");
}

#[test]
fn a_shell_does_what_it_is_told() {
    let daemon = Daemon::start().with_guest();
    let mut child = daemon
        .command(&["shell", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"echo $((6 * 7))\nexit 9\n").unwrap();
    let mut stdout = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut stdout)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
    assert!(stdout.contains("42"), "{stdout}");
}

#[test]
fn a_command_whose_sandbox_goes_is_lost_and_says_so() {
    let daemon = Daemon::start().with_guest();
    let mut child = daemon
        .command(&["exec", "web", "--", "sh", "-c", "echo ready; exec sleep 60"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    daemon.get(&["rm", "web"]);
    let (status, _, stderr) = finish(child);
    assert_eq!(status.code(), Some(125));
    assert!(stderr.contains("lost the command"), "{stderr}");
}
