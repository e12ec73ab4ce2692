//! Processes: INV-39 above all.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use connectrpc::ErrorCode;
use icebox_agent_api::{
    client::{AgentClient, Command, Event, Output, TerminalSize},
    exit::Exit,
    proto::process::Signal,
};

use crate::support::{Server, TIMEOUT};

fn sh(script: &str) -> Command {
    Command::new("/bin/sh").args(["-c", script])
}

/// Whether a process is there and not a zombie.
fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit_once(')')
            .unwrap()
            .1
            .trim_start()
            .starts_with('Z')
    })
}

async fn run(client: &AgentClient, script: &str) -> Output {
    client.run(sh(script)).await.unwrap()
}

#[tokio::test]
async fn inv_39_a_thousand_quick_commands_are_all_right() {
    let server = Server::start();
    let client = server.client();
    for batch in 0..125_i32 {
        let commands = (0..8).map(|n| {
            let (client, n) = (client.clone(), batch * 8 + n);
            tokio::spawn(async move {
                let script = format!("echo out {n}; echo err {n} >&2; exit {}", n % 256);
                (n, client.run(sh(&script)).await)
            })
        });
        for command in commands.collect::<Vec<_>>() {
            let (n, output) = command.await.unwrap();
            let output = output.unwrap();
            assert_eq!(output.exit, Exit::Code(n % 256));
            assert_eq!(output.stdout, format!("out {n}\n").into_bytes());
            assert_eq!(output.stderr, format!("err {n}\n").into_bytes());
        }
    }
}

#[tokio::test]
async fn inv_39_ten_megabytes_then_exit_lose_nothing() {
    const BYTES: usize = 10 << 20;
    let server = Server::start();
    // A pattern in which a lost or doubled piece shows.
    let script = format!("yes 0123456789abcde | head -c {BYTES}; exit 5");
    let mut process = server.client().start(sh(&script)).await.unwrap();
    let mut received = 0;
    loop {
        match process.next().await.unwrap() {
            Event::Stdout(bytes) => {
                for byte in &bytes {
                    assert_eq!(*byte, b"0123456789abcde\n"[received % 16]);
                    received += 1;
                }
            }
            Event::Exited(exit) => {
                assert_eq!(exit, Exit::Code(5));
                break;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(received, BYTES);
}

#[tokio::test]
async fn inv_39_output_waits_for_a_reader_that_is_slower_than_the_process() {
    const BYTES: usize = 64 << 10;
    let server = Server::start();
    // All of it fits in queues and pipes: the process has ended long before anyone reads.
    let script = format!("head -c {BYTES} /dev/zero");
    let mut process = server.client().start(sh(&script)).await.unwrap();
    while is_alive(process.pid()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut received = 0;
    loop {
        match process.next().await.unwrap() {
            Event::Stdout(bytes) => received += bytes.len(),
            Event::Exited(exit) => {
                assert_eq!(exit, Exit::Code(0));
                break;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(received, BYTES);
}

#[tokio::test]
async fn inv_39_a_timeout_kills_the_tree() {
    let server = Server::start();
    let mut command = sh("sleep 1000 & echo $!; sh -c 'sleep 1000 & echo $!; wait' & wait");
    command.timeout = Some(Duration::from_secs(4));
    let mut process = server.client().start(command).await.unwrap();
    let mut printed = Vec::new();
    let error = loop {
        match process.next().await {
            Ok(Event::Stdout(bytes)) => printed.extend_from_slice(&bytes),
            Ok(other) => panic!("unexpected {other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Some(ErrorCode::DeadlineExceeded));
    let pids: Vec<u32> = String::from_utf8(printed)
        .unwrap()
        .lines()
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    // The client's own deadline may have come first by a moment.
    tokio::time::timeout(Duration::from_secs(30), async {
        while pids
            .iter()
            .chain([&process.pid()])
            .any(|pid| is_alive(*pid))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn inv_39_a_kill_takes_the_tree_and_is_reported() {
    let server = Server::start();
    let mut process = server
        .client()
        .start(sh("sleep 1000 & echo $!; wait"))
        .await
        .unwrap();
    let Event::Stdout(line) = process.next().await.unwrap() else {
        panic!("no output")
    };
    let child: u32 = String::from_utf8(line.to_vec())
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    process.signal(Signal::SIGNAL_SIGKILL).await.unwrap();
    assert_eq!(
        process.next().await.unwrap(),
        Event::Exited(Exit::Signal(9))
    );
    // Its output may be closed a moment before it has ended.
    tokio::time::timeout(TIMEOUT, async {
        while is_alive(child) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let gone = process.signal(Signal::SIGNAL_SIGKILL).await.unwrap_err();
    assert_eq!(gone.code(), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn a_signal_reaches_the_process_group() {
    let server = Server::start();
    let mut process = server
        .client()
        .start(sh(
            "trap 'echo got it; exit 7' TERM; echo ready; sleep 1000 & wait",
        ))
        .await
        .unwrap();
    assert_eq!(
        process.next().await.unwrap(),
        Event::Stdout(Bytes::from_static(b"ready\n"))
    );
    process.signal(Signal::SIGNAL_SIGTERM).await.unwrap();
    assert_eq!(
        process.next().await.unwrap(),
        Event::Stdout(Bytes::from_static(b"got it\n"))
    );
    assert_eq!(process.next().await.unwrap(), Event::Exited(Exit::Code(7)));
}

#[tokio::test]
async fn what_a_process_leaves_behind_does_not_hold_up_its_end() {
    let server = Server::start();
    let output = run(&server.client(), "sleep 1000 & echo $!").await;
    assert_eq!(output.exit, Exit::Code(0));
    let child: i32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_alive(child.cast_unsigned()));
    let child = rustix::process::Pid::from_raw(child).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn missing_and_unexecutable_programs_are_told_apart() {
    let server = Server::start();
    let client = server.client();
    let code = async |program: &str| {
        client
            .run(Command::new(program))
            .await
            .unwrap_err()
            .code()
            .unwrap()
    };
    assert_eq!(code("/no/such/program").await, ErrorCode::NotFound);
    assert_eq!(code("no-such-program").await, ErrorCode::NotFound);
    assert_eq!(code("/etc/passwd").await, ErrorCode::PermissionDenied);
    assert_eq!(code("/etc").await, ErrorCode::PermissionDenied);
    assert_eq!(code("").await, ErrorCode::InvalidArgument);
    let mut command = sh("true");
    command.cwd = Some("/no/such/directory".into());
    let error = client.run(command).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument));
    assert!(
        error
            .to_string()
            .contains("cwd '/no/such/directory' does not exist"),
        "{error}"
    );
}

#[tokio::test]
async fn input_is_written_in_order_and_closed() {
    const CHUNKS: usize = 300;
    let server = Server::start();
    let mut command = Command::new("md5sum");
    command.stdin = true;
    let mut process = server.client().start(command).await.unwrap();
    let mut input = process.input();
    let mut digest = Vec::new();
    let feed = async {
        for n in 0..CHUNKS {
            let chunk = vec![u8::try_from(n % 251).unwrap(); 10_000];
            input.send(chunk.into()).await.unwrap();
        }
        input.finish().await.unwrap();
    };
    let read = async {
        loop {
            match process.next().await.unwrap() {
                Event::Stdout(bytes) => digest.extend_from_slice(&bytes),
                Event::Exited(exit) => break exit,
                other => panic!("unexpected {other:?}"),
            }
        }
    };
    let ((), exit) = tokio::join!(feed, read);
    assert_eq!(exit, Exit::Code(0));
    let script = "python3 -c \"import sys; [sys.stdout.buffer.write(bytes([n % 251]) * 10000) for n in range(300)]\"";
    let expected = std::process::Command::new("sh")
        .args(["-c", &format!("{script} | md5sum")])
        .output()
        .unwrap();
    assert_eq!(digest, expected.stdout);
}

#[tokio::test]
async fn without_stdin_a_process_reads_nothing() {
    let server = Server::start();
    assert_eq!(
        run(&server.client(), "cat; echo end").await.stdout,
        b"end\n"
    );
}

#[tokio::test]
async fn input_to_a_process_that_ended_is_refused() {
    let server = Server::start();
    let mut command = sh("exec 0<&-; echo closed; sleep 1000");
    command.stdin = true;
    let mut process = server.client().start(command).await.unwrap();
    assert_eq!(
        process.next().await.unwrap(),
        Event::Stdout(Bytes::from_static(b"closed\n"))
    );
    let mut input = process.input();
    let error = loop {
        if let Err(error) = input.send(Bytes::from_static(b"x")).await {
            break error;
        }
    };
    assert_eq!(error.code(), Some(ErrorCode::FailedPrecondition));
    process.signal(Signal::SIGNAL_SIGKILL).await.unwrap();
    process.next().await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_a_size_that_changes_and_echoes() {
    let server = Server::start();
    let mut command = sh("tty; stty size; read -r line; stty size; echo \"<$line>\"; cat");
    command.terminal = Some(TerminalSize {
        columns: 100,
        rows: 30,
    });
    command.env = BTreeMap::from([("TERM".into(), "dumb".into())]);
    let mut process = server.client().start(command).await.unwrap();
    let mut seen = String::new();
    let mut until = async |process: &mut icebox_agent_api::client::Process, text: &str| {
        while !seen.contains(text) {
            match process.next().await.unwrap() {
                Event::Terminal(bytes) => seen.push_str(std::str::from_utf8(&bytes).unwrap()),
                other => panic!("unexpected {other:?} after {seen:?}"),
            }
        }
    };
    until(&mut process, "30 100").await;
    process
        .resize(TerminalSize {
            columns: 132,
            rows: 43,
        })
        .await
        .unwrap();
    let mut input = process.input();
    input.send(Bytes::from_static(b"hello\n")).await.unwrap();
    until(&mut process, "43 132").await;
    until(&mut process, "<hello>").await;
    input.finish().await.unwrap();
    let exit = loop {
        if let Event::Exited(exit) = process.next().await.unwrap() {
            break exit;
        }
    };
    assert_eq!(exit, Exit::Code(0));
}

#[tokio::test]
async fn a_client_that_goes_away_takes_nothing_with_it() {
    let server = Server::start();
    let client = server.client();
    let mut process = client
        .start(sh("echo one; sleep 0.2; exit 4"))
        .await
        .unwrap();
    let pid = process.pid();
    assert_eq!(
        process.next().await.unwrap(),
        Event::Stdout(Bytes::from_static(b"one\n"))
    );
    drop(process);
    // It may have ended already: its end is kept.
    let mut process = client.attach(pid, false).await.unwrap();
    let exit = loop {
        if let Event::Exited(exit) = process.next().await.unwrap() {
            break exit;
        }
    };
    assert_eq!(exit, Exit::Code(4));
    let unknown = client.attach(u32::MAX, false).await.err().unwrap();
    assert_eq!(unknown.code(), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn a_terminal_can_be_left_and_taken_up_again() {
    let server = Server::start();
    let client = server.client();
    let mut command = sh("stty -echo; echo ready; read -r line; echo \"<$line>\"");
    command.terminal = Some(TerminalSize {
        columns: 80,
        rows: 24,
    });
    let mut process = client.start(command).await.unwrap();
    // It may come in pieces.
    let line = async |process: &mut icebox_agent_api::client::Process| {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            match process.next().await.unwrap() {
                Event::Terminal(bytes) => line.extend_from_slice(&bytes),
                other => panic!("unexpected {other:?} after {line:?}"),
            }
        }
        line
    };
    assert_eq!(line(&mut process).await, b"ready\r\n");
    let pid = process.pid();
    drop(process);
    let mut process = client.attach(pid, true).await.unwrap();
    let mut input = process.input();
    input.send(Bytes::from_static(b"back\n")).await.unwrap();
    assert_eq!(line(&mut process).await, b"<back>\r\n");
    assert_eq!(process.next().await.unwrap(), Event::Exited(Exit::Code(0)));
}

#[tokio::test]
async fn processes_are_listed_while_they_run() {
    use icebox_agent_api::proto::process::ListRequest;
    let server = Server::start();
    let client = server.client();
    let mut command = sh("sleep 1000");
    command.tag = Some("sleeper".into());
    let mut process = client.start(command).await.unwrap();
    let list = async || {
        let list = client
            .processes()
            .list(ListRequest::default())
            .await
            .unwrap()
            .into_owned();
        list.processes
            .into_iter()
            .map(|process| (process.pid, process.tag))
            .collect::<Vec<_>>()
    };
    assert_eq!(list().await, [(process.pid(), Some("sleeper".to_owned()))]);
    process.signal(Signal::SIGNAL_SIGKILL).await.unwrap();
    process.next().await.unwrap();
    assert_eq!(list().await, []);
}

#[tokio::test]
async fn the_environment_is_ours_alone() {
    let server = Server::start();
    let client = server.client();
    client
        .init(&crate::support::init(Some("t")), TIMEOUT)
        .await
        .unwrap();
    let client = client.with_token(&icebox_agent_api::Token::new("t"));
    let mut command = Command::new("env");
    command.env = BTreeMap::from([("MINE".into(), "a b=c".into())]);
    let output = client.run(command).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut names: Vec<&str> = text
        .lines()
        .map(|line| line.split_once('=').unwrap().0)
        .collect();
    names.sort_unstable();
    let expected = [
        "E2B_SANDBOX",
        "E2B_SANDBOX_ID",
        "E2B_TEMPLATE_ID",
        "FROM_SANDBOX",
        "HOME",
        "LOGNAME",
        "MINE",
        "PATH",
        "USER",
    ];
    assert_eq!(names, expected);
    assert!(text.contains("MINE=a b=c\n"));
}

#[tokio::test]
async fn a_process_runs_as_the_user_that_is_named() {
    let server = Server::start();
    let output = run(
        &server.client().with_user("daemon"),
        "id -u; id -G; umask; cat /proc/self/status",
    )
    .await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("1\n1\n0022\n"), "{text}");
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    // The C library ignores its own two signals, 32 and 33, in what it spawns.
    let ignored = text
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:\t"))
        .unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & !(3 << 31), 0);
    assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
    let unknown = server
        .client()
        .with_user("no-such-user")
        .run(sh("true"))
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Some(ErrorCode::Unauthenticated));
    assert!(
        unknown
            .to_string()
            .contains("invalid username: 'no-such-user'"),
        "{unknown}"
    );
}

#[tokio::test]
async fn no_descriptor_leaks_into_a_process() {
    let server = Server::start();
    let client = server.client();
    // Another process with pipes of its own, so that there is something to leak.
    let mut other = sh("sleep 1000");
    other.stdin = true;
    let mut other = client.start(other).await.unwrap();
    let output = run(
        &client,
        "for fd in /proc/self/fd/*; do readlink $fd || true; done",
    )
    .await;
    let open = String::from_utf8(output.stdout).unwrap();
    // Whoever ran the test may have left descriptors open for everybody: those are not the server's.
    let inherited: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| {
            Some(
                std::fs::read_link(fd.ok()?.path())
                    .ok()?
                    .display()
                    .to_string(),
            )
        })
        .collect();
    let open = open
        .lines()
        .filter(|target| !inherited.iter().any(|other| other == target));
    let open: Vec<&str> = open.collect();
    // Standard output and error, and nothing of the server's or of the other process.
    let pipes = open.iter().filter(|target| target.starts_with("pipe:"));
    assert_eq!(pipes.count(), 2, "{open:?}");
    let leaks = open
        .iter()
        .filter(|t| t.starts_with("socket:") || t.starts_with("anon_inode:"));
    assert_eq!(leaks.count(), 0, "{open:?}");
    other.signal(Signal::SIGNAL_SIGKILL).await.unwrap();
    other.next().await.unwrap();
}
