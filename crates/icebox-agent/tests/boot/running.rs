//! What only a guest can show: identity, orphans, control groups, stale connections.

use std::{
    net::{Ipv4Addr, TcpListener},
    time::{Duration, Instant},
};

use bytes::Bytes;
use connectrpc::ErrorCode;
use icebox_agent_api::{
    Token,
    client::{AgentClient, Command, Event, TerminalSize},
    control::{Clock, Origin, Prepare, StepOutcome},
    exit::Exit,
};

use crate::guest::{BOOT_TOKEN, CALL, Guest, HOST, TOKEN, init, now_ns, sh, text};

#[tokio::test]
async fn inv_37_a_guest_becomes_the_sandbox_it_is_told_to_be() {
    let guest = Guest::start(&crate::guest::Options::default());
    let boot = guest.booted().await;
    let report = boot.init(&init("guest-1", 1), CALL).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    // Without a clock of its own, a guest starts in 1970.
    assert!(report.clock_step_ns > 0);
    let client = boot.clone().with_token(&Token::new(TOKEN));

    assert_eq!(
        text(&client, "id -un; pwd; echo $GREETING; echo $E2B_SANDBOX_ID").await,
        "user\n/home/user\nhello there\ni1"
    );
    assert_eq!(
        text(&client, "hostname; cat /etc/hostname").await,
        "guest-1\nguest-1"
    );
    assert_eq!(
        text(&client, "getent hosts guest-1 | head -c 9").await,
        "127.0.1.1"
    );
    assert_eq!(
        text(&client, "cat /etc/machine-id").await,
        format!("{:032x}", 1)
    );
    assert_eq!(
        text(&client, "cat /etc/resolv.conf").await,
        "nameserver 192.0.2.53"
    );
    assert_eq!(
        text(&client, "cat /proc/sys/kernel/random/boot_id").await,
        report.boot_id
    );
    let clock: u64 = text(&client, "date +%s%N").await.parse().unwrap();
    assert!(
        now_ns().abs_diff(clock) < 5_000_000_000,
        "the clock is {clock}"
    );
    let hour = Clock {
        step_ns: 3_600_000_000_000,
    };
    let moved = client.clock(hour, CALL).await.unwrap().unix_ns;
    let shown: u64 = text(&client, "date +%s%N").await.parse().unwrap();
    assert!(moved - clock >= hour.step_ns.cast_unsigned() && shown >= moved);
    let root = client.clone().with_user("root");
    // The tokens are root's business, and in no one's environment.
    assert_eq!(sh(&client, "ls /run/icebox").await.exit.shell_code(), 2);
    assert_eq!(
        text(&root, "stat -c %a /run/icebox/state.json").await,
        "600"
    );
    assert_eq!(text(&root, "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c 'sandbox-toke[n]' || true").await, "0");

    let mut command = Command::new("/bin/bash").args([
        "-c",
        "tty; stty size; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj",
    ]);
    command.terminal = Some(TerminalSize {
        columns: 90,
        rows: 20,
    });
    let terminal = client.run(command).await.unwrap();
    assert_eq!(
        String::from_utf8(terminal.stdout).unwrap(),
        "/dev/pts/0\r\n20 90\r\n1024\r\n524288\r\n0\r\n"
    );

    // As a fork: another name, another id, another token, and the old one is worth nothing.
    let mut fork = init("guest-2", 2);
    fork.origin = Origin::Fork;
    fork.access_token = Some(Token::new("forked"));
    client.init(&fork, CALL).await.unwrap();
    assert_eq!(
        client.run(Command::new("true")).await.unwrap_err().code(),
        Some(ErrorCode::Unauthenticated)
    );
    assert_eq!(
        boot.init(&fork, CALL).await.unwrap_err().status(),
        Some(401)
    );
    let client = client.with_token(&Token::new("forked"));
    assert_eq!(
        text(&client, "hostname; cat /etc/machine-id").await,
        format!("guest-2\n{:032x}", 2)
    );
    assert_eq!(text(&client, "grep -c 127.0.1.1 /etc/hosts").await, "1");

    // A full disk does not make two machines out of one.
    text(&client.clone().with_user("root"), "fallocate -l $(($(df --output=avail -B1 / | tail -1) - 65536)) /full; ! dd if=/dev/zero of=/full2 bs=1k 2>/dev/null").await;
    let mut full = init("guest-3", 3);
    full.access_token = Some(Token::new("full"));
    client.init(&full, CALL).await.unwrap();
    let client = client.with_token(&Token::new("full"));
    assert_eq!(
        text(&client, "hostname; cat /etc/machine-id").await,
        format!("guest-3\n{:032x}", 3)
    );
}

#[tokio::test]
async fn inv_39_orphans_are_reaped_and_statuses_kept() {
    let (_guest, client) = Guest::ready().await;
    // Every one of these leaves an orphan that ends while others are being waited for.
    for batch in 0..10 {
        let commands = (0..5).map(|n| {
            let (client, code) = (client.clone(), batch * 5 + n);
            tokio::spawn(async move {
                let script = format!("(sh -c 'sleep 0.05; exit 9' >/dev/null 2>&1 &); exit {code}");
                assert_eq!(sh(&client, &script).await.exit, Exit::Code(code));
            })
        });
        for command in commands.collect::<Vec<_>>() {
            command.await.unwrap();
        }
    }
    let zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    let mut left = text(&client, zombies).await;
    for _ in 0..50 {
        if left == "0" {
            break;
        }
        left = text(&client, zombies).await;
    }
    assert_eq!(left, "0");
    // Their control groups are gone with them, but for the one of the command that looks.
    let groups = text(
        &client.clone().with_user("root"),
        "ls -d /sys/fs/cgroup/icebox/*/ | wc -l",
    )
    .await;
    assert!(
        groups.parse::<u32>().unwrap() <= 2,
        "{groups} control groups are left"
    );
}

#[tokio::test]
async fn inv_39_nothing_a_process_started_escapes_its_timeout() {
    let (_guest, client) = Guest::ready().await;
    let script = "import os, time\n\
        if os.fork(): os.wait()\n\
        else:\n os.setsid()\n if os.fork(): os._exit(0)\n open('/tmp/escaped', 'w').write(str(os.getpid()))\n time.sleep(1000)\n\
        time.sleep(1000)\n";
    // It takes as long as a guest of this machine takes to start Python.
    let begun = Instant::now();
    let started = client.run(Command::new("python3").args(["-c", "import os, time"]));
    started.await.unwrap();
    let mut command = Command::new("python3").args(["-c", script]);
    command.timeout = Some(Duration::from_secs(6) + 5 * begun.elapsed());
    let error = client.run(command).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::DeadlineExceeded));
    let gone = "pid=$(cat /tmp/escaped); for i in $(seq 100); do [ -d /proc/$pid ] || exit 0; sleep 0.1; done; exit 1";
    assert_eq!(sh(&client, gone).await.exit, Exit::Code(0));
}

#[tokio::test]
async fn inv_37_connections_to_the_outside_are_closed_and_those_inside_stay() {
    const SCRIPT: &str = "
import socket, sys
inner = socket.create_server(('127.0.0.1', 0))
near = socket.create_connection(inner.getsockname())
far_end = inner.accept()[0]
far = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print('connected', flush=True)
with open('/tmp/result', 'w') as result:
    try:
        print('outside:', far.recv(1), file=result)
    except OSError as error:
        print('outside:', type(error).__name__, file=result)
    near.sendall(b'x')
    print('inside:', far_end.recv(1), file=result)
";
    let (_guest, client) = Guest::ready().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let mut process = client
        .start(Command::new("python3").args(["-c", SCRIPT, HOST, &port]))
        .await
        .unwrap();
    let _peer = listener.accept().unwrap();
    let connected = Event::Stdout(Bytes::from_static(b"connected\n"));
    assert_eq!(process.next().await.unwrap(), connected);
    let pid = process.pid();

    let mut restored = init("guest-1", 1);
    restored.origin = Origin::Resume;
    let report = client.init(&restored, CALL).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    // The connection of the script, and the one on which its output came; and perhaps one more of ours, of a call before it,
    // that the guest has not heard the end of.
    assert!((2..=3).contains(&report.connections_closed), "{report:?}");
    process.next().await.unwrap_err();

    let mut process = client.attach(pid, false).await.unwrap();
    assert_eq!(process.next().await.unwrap(), Event::Exited(Exit::Code(0)));
    assert_eq!(
        text(&client, "cat /tmp/result").await,
        "outside: ConnectionAbortedError\ninside: b'x'"
    );
}

#[tokio::test]
async fn a_capture_can_be_prepared() {
    let (_guest, client) = Guest::ready().await;
    let root = client.clone().with_user("root");
    text(&root, "dd if=/dev/urandom of=/big bs=1M count=32 2>/dev/null; rm /big; dd if=/dev/urandom of=/kept bs=1M count=8 2>/dev/null").await;
    let prepare = Prepare {
        sync: true,
        drop_caches: true,
        trim: true,
        timeout_ms: 30_000,
    };
    let cached = async || client.metrics(CALL).await.unwrap().mem_cache;
    let before = cached().await;
    let report = client.prepare(&prepare, CALL).await.unwrap();
    for step in [&report.sync, &report.drop_caches, &report.trim] {
        assert!(matches!(step, StepOutcome::Done { .. }), "{report:?}");
    }
    assert!(report.trimmed_bytes >= 32 << 20, "{report:?}");
    let after = cached().await;
    assert!(
        after + (6 << 20) < before,
        "the cache went from {before} to {after} bytes"
    );
}

#[tokio::test]
async fn the_server_comes_back_under_its_token() {
    let (guest, client) = Guest::ready().await;
    let root = client.clone().with_user("root");
    let boot_id = text(&client, "cat /proc/sys/kernel/random/boot_id").await;
    // Its own connection breaks with it.
    let server = "grep -lz '^serve$' /proc/[0-9]*/cmdline | cut -d/ -f3 | grep -v self";
    let pid = text(&root, server).await;
    let killed = root
        .run(Command::new("/bin/sh").args(["-c", &format!("kill -9 {pid}")]))
        .await;
    assert_ne!(killed.unwrap_err().code(), Some(ErrorCode::NotFound));
    guest.booted().await;
    assert_eq!(
        text(&client, "cat /proc/sys/kernel/random/boot_id").await,
        boot_id
    );
    assert_ne!(text(&root, server).await, pid);
    assert_eq!(text(&client, "echo $GREETING").await, "hello there");
    let boot: AgentClient = client.with_token(&Token::new(BOOT_TOKEN));
    assert_eq!(
        boot.run(Command::new("true")).await.unwrap_err().code(),
        Some(ErrorCode::Unauthenticated)
    );
    assert!(guest.console().contains("the server ended"));
}
