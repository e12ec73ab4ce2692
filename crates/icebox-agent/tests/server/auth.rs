//! Who may do what: the agent's part of INV-42.

use connectrpc::ErrorCode;
use icebox_agent_api::{
    Token,
    client::{AgentClient, Command},
    control::{Prepare, StepOutcome},
};

use crate::support::{BOOT_TOKEN, Server, TIMEOUT, init};

const PREPARE: Prepare = Prepare {
    sync: true,
    drop_caches: true,
    trim: false,
    timeout_ms: 5000,
};

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
