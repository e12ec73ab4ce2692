//! Who may do what: the agent's part of INV-42.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use connectrpc::ErrorCode;
use icebox_agent_api::{
    Token,
    client::{AgentClient, Command},
    control::{Clock, Prepare, StepOutcome},
};

use crate::support::{BOOT_TOKEN, Server, TIMEOUT, init};

const PREPARE: Prepare = Prepare {
    sync: true,
    drop_caches: true,
    trim: false,
    timeout_ms: 5000,
};

/// Moves nothing.
const READ: Clock = Clock { step_ns: 0 };

async fn may_run(client: &AgentClient) -> bool {
    match client.run(Command::new("true")).await {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.code(), Some(ErrorCode::Unauthenticated), "{error}");
            false
        }
    }
}

#[tokio::test]
async fn inv_42_nothing_but_health_is_answered_without_the_token() {
    let server = Server::start();
    for client in [
        AgentClient::tcp(server.address),
        AgentClient::tcp(server.address).with_token(&Token::new("wrong")),
        AgentClient::tcp(server.address).with_token(&Token::new("")),
    ] {
        client.health(TIMEOUT).await.unwrap();
        assert!(!may_run(&client).await);
        assert_eq!(
            client.metrics(TIMEOUT).await.unwrap_err().status(),
            Some(401)
        );
        assert_eq!(
            client
                .init(&init(Some("mine")), TIMEOUT)
                .await
                .unwrap_err()
                .status(),
            Some(401)
        );
        assert_eq!(
            client
                .prepare(&PREPARE, TIMEOUT)
                .await
                .unwrap_err()
                .status(),
            Some(401)
        );
        assert_eq!(
            client.clock(READ, TIMEOUT).await.unwrap_err().status(),
            Some(401)
        );
    }
    assert!(may_run(&server.client()).await);
}

#[tokio::test]
async fn inv_42_init_replaces_the_token_for_good() {
    let mut server = Server::start();
    let boot = server.client();
    boot.init(&init(Some("first")), TIMEOUT).await.unwrap();
    for round in ["running", "restarted"] {
        let at = |token| AgentClient::tcp(server.address).with_token(&Token::new(token));
        assert!(!may_run(&at(BOOT_TOKEN)).await, "{round}");
        assert_eq!(
            at(BOOT_TOKEN)
                .init(&init(Some("x")), TIMEOUT)
                .await
                .unwrap_err()
                .status(),
            Some(401)
        );
        assert!(may_run(&at("first")).await, "{round}");
        server.restart();
    }
    let first = AgentClient::tcp(server.address).with_token(&Token::new("first"));
    first.init(&init(Some("second")), TIMEOUT).await.unwrap();
    assert!(!may_run(&first).await);
    assert!(may_run(&first.with_token(&Token::new("second"))).await);
}

#[tokio::test]
async fn a_sandbox_without_a_token_is_open_but_for_the_host() {
    let server = Server::start();
    server.client().init(&init(None), TIMEOUT).await.unwrap();
    let anyone = AgentClient::tcp(server.address);
    assert!(may_run(&anyone).await);
    assert_eq!(
        anyone
            .init(&init(None), TIMEOUT)
            .await
            .unwrap_err()
            .status(),
        Some(401)
    );
    assert_eq!(
        anyone
            .prepare(&PREPARE, TIMEOUT)
            .await
            .unwrap_err()
            .status(),
        Some(401)
    );
    server
        .client()
        .init(&init(Some("closed")), TIMEOUT)
        .await
        .unwrap();
    assert!(!may_run(&anyone).await);
}

#[tokio::test]
async fn an_init_that_makes_no_sense_changes_nothing() {
    let server = Server::start();
    let host = server.client();
    let mut long_name = init(Some("x"));
    long_name.identity.hostname = "a".repeat(65);
    let mut bad_name = init(Some("x"));
    bad_name.identity.hostname = "a/b".into();
    let mut bad_id = init(Some("x"));
    bad_id.identity.machine_id = "Z".repeat(32);
    let mut little = init(Some("x"));
    little.entropy.truncate(31);
    for invalid in [long_name, bad_name, bad_id, little] {
        assert_eq!(
            host.init(&invalid, TIMEOUT).await.unwrap_err().status(),
            Some(400)
        );
    }
    assert!(may_run(&host).await);
}

#[tokio::test]
async fn the_clock_is_read_and_one_that_is_not_a_guest_s_is_not_moved() {
    let server = Server::start();
    let host = server.client();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let begun = now();
    let day = Clock {
        step_ns: 86_400_000_000_000,
    };
    for clock in [READ, day, READ] {
        let read = host.clock(clock, TIMEOUT).await.unwrap();
        let read = Duration::from_nanos(read.unix_ns);
        assert!((begun..=now()).contains(&read), "{read:?} after {begun:?}");
    }
}

#[tokio::test]
async fn prepare_reports_each_step() {
    let server = Server::start();
    let report = server.client().prepare(&PREPARE, TIMEOUT).await.unwrap();
    assert!(matches!(report.sync, StepOutcome::Done { .. }));
    assert!(matches!(report.drop_caches, StepOutcome::Done { .. }));
    assert_eq!(report.trim, StepOutcome::Skipped);
    let no_time = Prepare {
        timeout_ms: 0,
        ..PREPARE
    };
    assert_eq!(
        server
            .client()
            .prepare(&no_time, TIMEOUT)
            .await
            .unwrap()
            .sync,
        StepOutcome::Skipped
    );
}

#[tokio::test]
async fn metrics_are_those_of_the_machine() {
    let server = Server::start();
    let metrics = server.client().metrics(TIMEOUT).await.unwrap();
    assert!(metrics.cpu_count > 0 && metrics.mem_total > metrics.mem_used && metrics.ts > 0);
}

#[tokio::test]
async fn a_proxy_on_a_socket_is_told_which_sandbox_is_meant() {
    use icebox_agent_api::{SANDBOX_ID_HEADER, SANDBOX_PORT_HEADER};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};

    let server = Server::start();
    let socket = server.directory.path().join("proxy");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let address = server.address;
    let proxy = tokio::spawn(async move {
        // One request to look at, and the connection to pass on.
        let (mut client, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            client.read_buf(&mut head).await.unwrap();
        }
        let mut agent = tokio::net::TcpStream::connect(address).await.unwrap();
        agent.write_all(&head).await.unwrap();
        copy_bidirectional(&mut client, &mut agent).await.ok();
        String::from_utf8_lossy(&head).into_owned()
    });
    let client = AgentClient::unix(&socket)
        .with_header(SANDBOX_ID_HEADER.parse().unwrap(), "i1".parse().unwrap())
        .with_header(
            SANDBOX_PORT_HEADER.parse().unwrap(),
            "49983".parse().unwrap(),
        )
        .with_token(&Token::new(BOOT_TOKEN));
    let output = client
        .run(Command::new("echo").args(["through"]))
        .await
        .unwrap();
    assert_eq!(output.stdout, b"through\n");
    let head = proxy.await.unwrap();
    for line in [
        "POST /process.Process/Start HTTP/1.1",
        "host: localhost",
        "e2b-sandbox-id: i1",
        "e2b-sandbox-port: 49983",
    ] {
        assert!(head.lines().any(|found| found == line), "{line} in {head}");
    }
    assert!(
        AgentClient::unix(socket.with_extension("none"))
            .health(TIMEOUT)
            .await
            .is_err()
    );
}
