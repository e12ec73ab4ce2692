//! What the routes answer, and the client that asks them.

use futures_util::StreamExt as _;
use icebox_api::ErrorCode;
use icebox_api::client::{Client, ClientError};
use icebox_api::types::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use crate::script::{ID, KEY, Script};
use crate::served::{Served, status};

#[tokio::test]
async fn statuses_are_the_ones_sdks_need() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let key = format!("x-api-key: {KEY}");
    for (request, wanted) in [
        ("GET /health HTTP/1.1\nhost: h", "204"),
        ("GET /v2/sandboxes HTTP/1.1\nhost: h", "200"),
        ("POST /v2/sandboxes HTTP/1.1\nhost: h", "201"),
        ("POST /sandboxes HTTP/1.1\nhost: h", "201"),
        ("GET /sandboxes/nonexistingsandbox HTTP/1.1\nhost: h", "404"),
        ("DELETE /sandboxes/web HTTP/1.1\nhost: h", "204"),
        ("DELETE /sandboxes/nothing HTTP/1.1\nhost: h", "404"),
        ("POST /sandboxes/web/stop HTTP/1.1\nhost: h", "500"),
        ("GET /templates/team%2Fsnap%3Av1 HTTP/1.1\nhost: h", "404"),
        ("GET /nothing HTTP/1.1\nhost: h", "404"),
        ("PATCH /sandboxes HTTP/1.1\nhost: h", "405"),
    ] {
        let answer = served.ask(&format!("{request}\n{key}")).await;
        assert_eq!(status(&answer), wanted, "{request}\n{answer}");
        if !wanted.starts_with('2') {
            let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
            let body: icebox_api::ErrorBody = serde_json::from_str(body).expect("our form");
            assert_eq!(body.code.to_string(), wanted, "the body repeats the status");
        }
    }
}

#[tokio::test]
async fn a_second_pause_is_a_conflict_for_sdks_and_a_success_for_us() {
    let script = Script::new();
    script.running.send_replace(false);
    let served = Served::new(&script).await;
    let request = format!("POST /sandboxes/{ID}/pause HTTP/1.1\nhost: h\nx-api-key: {KEY}");
    assert_eq!(status(&served.ask(&request).await), "409");
    let result = served.client().pause("web").await.expect("no error");
    assert_eq!(result.outcome, Outcome::AlreadyThere);
}

#[tokio::test]
async fn a_teams_limit_is_429_and_not_to_be_tried_again() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let answer = served
        .ask_admin("PATCH /teams/acme HTTP/1.1\nhost: h")
        .await;
    assert_eq!(status(&answer), "429", "{answer}");
    assert!(answer.contains("should-retry: false\r\n"), "{answer}");
    assert!(!answer.contains("retry-after"), "{answer}");
}

#[tokio::test]
async fn inv_20_a_verb_goes_on_when_its_client_has_gone() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let mut stream = UnixStream::connect(served.socket()).await.expect("connect");
    let head = format!("POST /sandboxes/{ID}/pause HTTP/1.1\r\nhost: h\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("write");
    script.pausing.notified().await;
    drop(stream);
    // A round trip on another connection: the server has seen the first one end.
    served.client().version().await.expect("an answer");
    script.may_pause.notify_one();
    script.paused.notified().await;
    assert_eq!(*script.pauses_done.lock().expect("not poisoned"), 1);
}

#[tokio::test]
async fn the_client_understands_every_form_of_answer() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let client = served.client();
    let sizes = |list: Vec<SandboxDetail>| {
        let sizes = list.into_iter().map(|one| one.allocated_bytes);
        sizes.collect::<Vec<_>>()
    };
    let list = client.list(false).await.expect("a list");
    assert_eq!(sizes(list), [None], "nobody asked for sizes");
    let list = client.list(true).await.expect("a list");
    assert_eq!(sizes(list), [Some(4096)]);
    let one = client.inspect("web", true).await.expect("it is there");
    assert_eq!(one.allocated_bytes, Some(4096));
    assert_eq!(client.stats().await.expect("sums").unneeded_bytes, 7);
    let refused = client
        .template("../x/?#")
        .await
        .expect_err("does not exist");
    assert_eq!(refused.code(), Some(ErrorCode::NotFound));
    assert_eq!(
        refused.to_string(),
        r#"template "../x/?#" does not exist"#,
        "what was typed stays one path segment"
    );
    let forks = client
        .fork(
            "web",
            &NewFork {
                count: 2,
                timeout: None,
            },
        )
        .await
        .expect("forks");
    assert!(matches!(forks[..], [Forked::Sandbox(_), Forked::Error(_)]));
    let events: Vec<_> = client
        .events(Some(7), false)
        .await
        .expect("events")
        .map(|event| event.expect("an event").sequence)
        .collect()
        .await;
    assert_eq!(events, [8, 9, 10]);
    let console: Vec<_> = client
        .console("web")
        .await
        .expect("a console")
        .map(|piece| piece.expect("a piece"))
        .collect()
        .await;
    assert_eq!(console.concat(), b"boot done");
    assert!(matches!(
        Client::new("/nonexistent/socket").list(false).await,
        Err(ClientError::Connect { .. })
    ));
}

#[tokio::test]
async fn a_panicking_verb_is_an_error_and_not_a_hung_client() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let error = served.client().stop("web").await.expect_err("it panics");
    assert_eq!(error.code(), Some(ErrorCode::Internal));
}
