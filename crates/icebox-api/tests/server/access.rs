//! Who may ask for what, and what they are told.

use icebox_api::ErrorCode;
use icebox_api::client::Client;
use icebox_api::types::*;

use crate::script::{ID, KEY, Script};
use crate::served::{Served, status};

#[tokio::test]
async fn tcp_needs_the_key_and_the_socket_none() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for headers in [
        "",
        "\nx-api-key: e2b_00",
        "\nx-api-key:",
        "\nauthorization: x",
    ] {
        let answer = served
            .ask(&format!("GET /sandboxes HTTP/1.1\nhost: h{headers}"))
            .await;
        assert_eq!(status(&answer), "401", "{headers:?}");
        assert!(answer.contains("hint"));
    }
    let answer = served.ask_admin("GET /sandboxes HTTP/1.1\nhost: h").await;
    assert_eq!(status(&answer), "200");
}

#[tokio::test]
async fn the_key_does_not_read_files_of_the_host() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for (path, body) in [
        ("/builds", r#"{"name":"x","source":{"directory":"/root"}}"#),
        ("/builds", r#"{"name":"x","source":{"image":"/dev/sda"}}"#),
        ("/kernels", r#"{"source":{"file":{"path":"/etc/shadow"}}}"#),
    ] {
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\nhost: h\nx-api-key: {KEY}\nconnection: close\ncontent-type: application/json\ncontent-length: {length}\n\n{body}"
        );
        let answer = served.ask(&request).await;
        assert_eq!(status(&answer), "403", "{path} {body}: {answer}");
    }
}

#[tokio::test]
async fn what_teams_share_is_the_administrators() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for request in [
        "GET /teams",
        "POST /teams",
        "DELETE /teams/acme",
        "GET /api-keys",
        "POST /api-keys",
        "DELETE /api-keys/k1",
        "GET /audit",
        "GET /stats",
        "GET /doctor",
        "POST /gc",
        "POST /drain",
        "POST /kernels",
    ] {
        let answer = served
            .ask(&format!("{request} HTTP/1.1\nhost: h\nx-api-key: {KEY}"))
            .await;
        assert!(
            matches!(status(&answer), "403" | "400"),
            "{request}: {answer}"
        );
        assert_ne!(
            status(
                &served
                    .ask_admin(&format!("{request} HTTP/1.1\nhost: h"))
                    .await
            ),
            "403"
        );
    }
}

#[tokio::test]
async fn the_kernel_says_who_has_the_socket_and_they_say_for_whom_they_act() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let uid = std::fs::metadata(served.socket()).expect("it is there");
    let uid = std::os::unix::fs::MetadataExt::uid(&uid);
    let seen_by = async |client: Client| {
        let entries = client.audit(AuditRange::default()).await.expect("entries");
        entries[0].actor.clone()
    };
    assert_eq!(seen_by(served.client()).await, format!("local:{uid} for -"));
    let for_team = |team: &str| served.client().for_team(Some(team.to_owned()));
    assert_eq!(
        seen_by(for_team("acme")).await,
        format!("local:{uid} for acme")
    );
    let refused = for_team("nobody").list(false).await.expect_err("no team");
    assert_eq!(refused.code(), Some(ErrorCode::NotFound));
    // From outside nobody chooses.
    let request = format!("GET /sandboxes HTTP/1.1\nhost: h\nx-api-key: {KEY}\nicebox-team: other");
    assert_eq!(status(&served.ask(&request).await), "200");
    assert_eq!(
        *script.caller.lock().expect("not poisoned"),
        "key:k1 for acme"
    );
}

#[tokio::test]
async fn inv_43_tokens_are_told_where_the_contract_has_them_and_not_on_the_socket() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for (request, told) in [
        (format!("GET /sandboxes/{ID} HTTP/1.1\nhost: h"), true),
        ("POST /sandboxes HTTP/1.1\nhost: h".to_owned(), true),
        ("GET /v2/sandboxes HTTP/1.1\nhost: h".to_owned(), false),
    ] {
        let answer = served.ask(&format!("{request}\nx-api-key: {KEY}")).await;
        assert_eq!(answer.contains("the-token"), told, "{answer}");
        let answer = served.ask_admin(&request).await;
        assert!(!answer.contains("the-token"), "{answer}");
    }
}
