//! HTTP/2: many requests on one connection, each as if it were alone there.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use icebox_api::server::{Limits, STREAMS_MAX};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::script::{ID, KEY, Script};
use crate::served::{DOUBT, PATIENCE, SILENT_STREAM, Served, guest_port, rest};

/// What a client begins with (RFC 9113, 3.4), and its settings, of which it has none.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

type Client = SendRequest<Empty<Bytes>>;

/// A connection that speaks HTTP/2 from its first byte on, and what drives it.
async fn connect(to: SocketAddr) -> (Client, tokio::task::JoinHandle<hyper::Result<()>>) {
    let stream = TcpStream::connect(to).await.expect("connect");
    let connected = Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream));
    let (client, connection) = connected.await.expect("a handshake");
    (client, tokio::spawn(connection))
}

fn get(address: &str) -> http::request::Builder {
    Request::get(address).header("x-api-key", KEY)
}

async fn ask(client: &Client, request: http::request::Builder) -> Response<Incoming> {
    let request = request.body(Empty::new()).expect("a request");
    let answer = tokio::time::timeout(PATIENCE, client.clone().send_request(request));
    answer.await.expect("in time").expect("an answer")
}

async fn text(answer: Response<Incoming>) -> String {
    let body = tokio::time::timeout(PATIENCE, answer.into_body().collect());
    let body = body.await.expect("in time").expect("a body").to_bytes();
    String::from_utf8(body.to_vec()).expect("text")
}

/// The next piece of a body that does not end.
async fn piece(answer: &mut Response<Incoming>) -> hyper::Result<Bytes> {
    let frame = tokio::time::timeout(PATIENCE, answer.body_mut().frame());
    let frame = frame.await.expect("in time").expect("no end")?;
    Ok(frame.into_data().expect("data"))
}

#[tokio::test]
async fn both_edges_and_the_ports_of_sandboxes_are_served() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (client, _connection) = connect(served.public).await;
    let listed = ask(&client, get("http://h/v2/sandboxes")).await;
    assert_eq!(
        (listed.status(), listed.version()),
        (StatusCode::OK, Version::HTTP_2)
    );
    assert!(text(listed).await.contains(ID));
    let nobody = ask(&client, Request::get("http://h/sandboxes")).await;
    assert_eq!(nobody.status(), StatusCode::UNAUTHORIZED);
    let refused = ask(&client, Request::connect("h:80")).await;
    assert!(refused.status().is_client_error(), "{refused:?}");
    let hash = "0".repeat(64);
    let files = get(&format!(
        "http://icebox.test:8443/templates/t1/files/{hash}"
    ));
    let files = text(ask(&client, files).await).await;
    assert!(
        files.contains("http://icebox.test:8443/uploads/the-way"),
        "{files}"
    );

    let (port, mut heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    for (address, routing) in [
        ("localhost:3000".to_owned(), true),
        (format!("{port}-{ID}.example.org:8443"), false),
    ] {
        let mut request = get(&format!("http://{address}/a%2Fb?c=d"))
            .header(header::COOKIE, "a=1")
            .header(header::COOKIE, "b=2");
        if routing {
            request = request
                .header("e2b-sandbox-id", ID)
                .header("e2b-sandbox-port", port);
        }
        assert_eq!(text(ask(&client, request).await).await, "hi");
        let head = heads.recv().await.expect("the guest was asked");
        assert!(head.starts_with("GET /a%2Fb?c=d HTTP/1.1\r\n"), "{head}");
        assert!(head.contains(&format!("host: {address}\r\n")), "{head}");
        assert!(head.contains("cookie: a=1; b=2\r\n"), "{head}");
        assert!(!head.contains(KEY), "{head}");
    }
    // What the address says counts, not the header beside it.
    let (closed, _) = guest_port("").await;
    let request = get(&format!("http://{port}-{ID}.example.org/"))
        .header(header::HOST, format!("{closed}-inothing.example.org"));
    assert_eq!(ask(&client, request).await.status(), StatusCode::OK);

    let socket = tokio::net::UnixStream::connect(served.socket())
        .await
        .expect("connect");
    let connected = Builder::new(TokioExecutor::new()).handshake(TokioIo::new(socket));
    let (client, connection) = connected.await.expect("a handshake");
    tokio::spawn(connection);
    let stats = ask(&client, Request::get("http://h/stats")).await;
    assert_eq!(stats.status(), StatusCode::OK, "who has the socket");
}

#[tokio::test]
async fn a_kill_resets_the_streams_of_its_sandbox_and_no_others() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (client, _connection) = connect(served.public).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let request = || get(&format!("http://{port}-{ID}.example.org/"));
    let mut cut = join_all([ask(&client, request()), ask(&client, request())]).await;
    for answer in &mut cut {
        assert_eq!(piece(answer).await.expect("it lives"), "hello");
    }
    script.holds(2).await;
    let mut events = ask(&client, get("http://h/events?follow=true")).await;
    script.running.send_replace(false);
    for answer in &mut cut {
        let error = piece(answer).await.expect_err("it is cut");
        assert!(
            !error.is_closed() && !error.is_canceled(),
            "a reset: {error:?}"
        );
    }
    script.holds(0).await;
    let gone = ask(&client, request()).await;
    assert_eq!(gone.status(), StatusCode::BAD_GATEWAY);
    assert!(text(gone).await.contains("The sandbox was not found"));
    let event = piece(&mut events).await.expect("another stream goes on");
    assert!(event.starts_with(b"{"), "{event:?}");
}

#[tokio::test]
async fn inv_07_a_stream_holds_its_pass_until_its_client_gives_it_up() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (client, _connection) = connect(served.public).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let request = || get(&format!("http://{port}-{ID}.example.org/"));
    let mut first = ask(&client, request()).await;
    let mut second = ask(&client, request()).await;
    for answer in [&mut first, &mut second] {
        piece(answer).await.expect("it lives");
    }
    script.holds(2).await;
    drop(first);
    script.holds(1).await;
    assert_eq!(
        ask(&client, get("http://h/v2/sandboxes")).await.status(),
        StatusCode::OK
    );
    // With its connection goes what is on it.
    drop((second, client));
    script.holds(0).await;
}

#[tokio::test]
async fn connections_that_say_nothing_or_do_not_answer_are_closed() {
    let script = Script::new();
    let limits = Limits {
        first_request: DOUBT,
        ping: 2 * DOUBT,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    // HEADERS of stream 1 without END_HEADERS: the block goes on, some time.
    let dawdling = [PREFACE, b"\0\0\x01\x01\x01\0\0\0\x01\x82"].concat();
    for begun in [&PREFACE[..10], PREFACE, &dawdling] {
        let mut stream = served.connect().await;
        stream.write_all(begun).await.expect("write");
        rest(&mut stream).await;
    }
    // It asks, is answered, and answers no ping: `:method GET`, `:scheme http`, `:path /health`, `:authority h`.
    let head = b"\0\0\x0e\x01\x05\0\0\0\x01\x82\x86\x44\x07/health\x41\x01h";
    let mut stream = served.connect().await;
    stream
        .write_all(&[PREFACE, head].concat())
        .await
        .expect("write");
    let said = rest(&mut stream).await;
    // A frame of type HEADERS, which ends stream 1: it was answered first.
    let answered = said.windows(6).any(|it| it == b"\x01\x05\0\0\0\x01");
    assert!(answered, "{said:?}");
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_that_waits_is_not() {
    let script = Script::new();
    let limits = Limits {
        idle: 3 * DOUBT,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    let (client, connection) = connect(served.public).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut silent = ask(&client, get(&format!("http://{port}-{ID}.example.org/"))).await;
    piece(&mut silent).await.expect("it lives");
    tokio::time::sleep(5 * DOUBT).await;
    assert!(!connection.is_finished(), "a stream is open");
    drop(silent);
    tokio::time::timeout(PATIENCE, connection)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("a proper end");
}

#[tokio::test]
async fn requests_have_places_and_headers_a_size() {
    let script = Script::new();
    let limits = Limits {
        streams: 1,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    let (client, _connection) = connect(served.public).await;
    let (other, _connection) = connect(served.public).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut silent = ask(&client, get(&format!("http://{port}-{ID}.example.org/"))).await;
    piece(&mut silent).await.expect("it lives");
    let mut waiting = std::pin::pin!(ask(&other, get("http://h/v2/sandboxes")));
    let too_early = tokio::time::timeout(DOUBT, waiting.as_mut()).await;
    assert!(too_early.is_err(), "there is no place for it");
    drop(silent);
    assert_eq!(waiting.await.status(), StatusCode::OK);
    let long = get("http://h/v2/sandboxes").header("x-long", "x".repeat(100_000));
    let refused = ask(&client, long).await;
    assert_eq!(
        refused.status(),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    );
    assert_eq!(
        ask(&client, get("http://h/v2/sandboxes")).await.status(),
        StatusCode::OK
    );
}

#[tokio::test]
async fn one_connection_carries_no_more_streams_than_it_may() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (client, _connection) = connect(served.public).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    // Settings have come with the first answer.
    ask(&client, get("http://h/v2/sandboxes")).await;
    let request = || get(&format!("http://{port}-{ID}.example.org/"));
    let streams = (0..STREAMS_MAX).map(|_| ask(&client, request()));
    let mut streams = join_all(streams).await;
    script.holds(STREAMS_MAX).await;
    let mut waiting = std::pin::pin!(ask(&client, request()));
    assert!(tokio::time::timeout(DOUBT, waiting.as_mut()).await.is_err());
    script.holds(STREAMS_MAX).await;
    streams.pop();
    waiting.await;
}

#[tokio::test]
async fn leaving_finishes_what_is_under_way_and_takes_nothing_more() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (client, connection) = connect(served.public).await;
    let pause = Request::post(format!("http://h/sandboxes/{ID}/pause")).header("x-api-key", KEY);
    let pausing = tokio::spawn({
        let client = client.clone();
        async move { ask(&client, pause).await.status() }
    });
    script.pausing.notified().await;
    let leaving = tokio::spawn(async move {
        let left = served.outside.leave(PATIENCE, PATIENCE).await;
        (left, served)
    });
    tokio::time::sleep(DOUBT).await;
    assert!(!leaving.is_finished(), "a verb is under way");
    script.may_pause.notify_one();
    assert_eq!(pausing.await.expect("no panic"), StatusCode::NO_CONTENT);
    let (left, _served) = leaving.await.expect("no panic");
    assert!(left);
    tokio::time::timeout(PATIENCE, connection)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("a proper end");
}
