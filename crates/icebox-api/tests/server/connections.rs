//! Connections: how many, how patient, and how they end.

use icebox_api::server::Limits;
use icebox_api::types::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::script::{ID, KEY, Script};
use crate::served::{
    DOUBT, PATIENCE, SILENT_STREAM, Served, guest_port, read_until, rest, send, status,
};

#[tokio::test]
async fn a_connection_that_does_not_ask_is_closed() {
    let script = Script::new();
    let limits = Limits {
        first_request: DOUBT,
        idle: 20 * DOUBT,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    for begun in [
        "",
        "GET /health HT",
        "GET /health HTTP/1.1\r\nhost: h\r\nx-slow: ",
    ] {
        let mut stream = served.connect().await;
        stream.write_all(begun.as_bytes()).await.expect("write");
        assert_eq!(rest(&mut stream).await, b"", "{begun:?}");
    }
    let mut idle = UnixStream::connect(served.socket()).await.expect("connect");
    for _ in 0..2 {
        send(&mut idle, "GET /health HTTP/1.1\nhost: h").await;
        read_until(&mut idle, "\r\n\r\n").await;
        // Longer than a first request may take.
        tokio::time::sleep(2 * DOUBT).await;
    }
    assert_eq!(rest(&mut idle).await, b"");
    // What is being answered may take as long as it takes.
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;
    tokio::time::sleep(5 * DOUBT).await;
    script.may_pause.notify_one();
    pausing.await.expect("no panic").expect("it is answered");
}

#[tokio::test]
async fn connections_beyond_the_most_wait_for_others_to_go() {
    let script = Script::new();
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    let request = format!("GET /health HTTP/1.1\nhost: h\nx-api-key: {KEY}");
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = served.connect().await;
        send(&mut stream, &request).await;
        streams.push(stream);
    }
    let mut waiting = streams.pop().expect("three");
    for stream in &mut streams {
        read_until(stream, "\r\n\r\n").await;
    }
    let too_early = tokio::time::timeout(DOUBT, waiting.read_u8()).await;
    assert!(too_early.is_err(), "it has no place yet");
    // The socket has places of its own.
    served.client().version().await.expect("an answer");
    drop(streams);
    let answer = read_until(&mut waiting, "\r\n\r\n").await;
    assert_eq!(status(&answer), "204");
}

#[tokio::test]
async fn what_a_connection_is_upgraded_to_keeps_its_place() {
    let script = Script::new();
    let limits = Limits {
        connections: 1,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    let (port, _heads) = guest_port(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    )
    .await;
    let mut upgraded = served.connect().await;
    send(
        &mut upgraded,
        &format!(
            "GET / HTTP/1.1\nhost: {port}-{ID}.example.org\nconnection: upgrade\nupgrade: echo"
        ),
    )
    .await;
    read_until(&mut upgraded, "\r\n\r\n").await;
    let mut waiting = served.connect().await;
    send(&mut waiting, "GET /health HTTP/1.1\nhost: h").await;
    let too_early = tokio::time::timeout(DOUBT, waiting.read_u8()).await;
    assert!(too_early.is_err(), "it has no place yet");
    drop(upgraded);
    let answer = read_until(&mut waiting, "\r\n\r\n").await;
    assert_eq!(status(&answer), "204");
}

#[tokio::test]
async fn a_refusal_leaves_its_connection_as_it_says() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let refused = |length: usize, more: &str| {
        format!("POST / HTTP/1.1\nhost: 80-inothing.example.org\ncontent-length: {length}{more}")
    };
    let next = "GET /health HTTP/1.1\nhost: h";

    // The body comes after the head, as from a client on a busy machine: then after the answer, if nobody waited for it.
    let mut stream = served.connect().await;
    for body in [5, 64 << 10] {
        send(&mut stream, &refused(body, "")).await;
        tokio::time::sleep(DOUBT / 10).await;
        stream.write_all(&vec![b'.'; body]).await.expect("write");
        let answer = read_until(&mut stream, "}").await;
        assert_eq!(status(&answer), "502");
        assert!(!answer.contains("connection: close"), "{answer}");
        send(&mut stream, next).await;
        assert_eq!(status(&read_until(&mut stream, "\r\n\r\n").await), "204");
    }
    // In pieces of which none says how many will come.
    send(
        &mut stream,
        "POST / HTTP/1.1\nhost: 80-inothing.example.org\ntransfer-encoding: chunked",
    )
    .await;
    tokio::time::sleep(DOUBT / 10).await;
    let chunks = b"3\r\nabc\r\n0\r\n\r\n";
    stream.write_all(chunks).await.expect("write");
    assert_eq!(status(&read_until(&mut stream, "}").await), "502");
    send(&mut stream, next).await;
    assert_eq!(status(&read_until(&mut stream, "\r\n\r\n").await), "204");

    // What is long, does not come, or waits to be asked for, is not waited for.
    for (request, body) in [
        (refused(1 << 20, ""), 128 << 10),
        (refused(5, ""), 0),
        (refused(5, "\nexpect: 100-continue"), 0),
    ] {
        let mut stream = served.connect().await;
        send(&mut stream, &request).await;
        stream.write_all(&vec![b'.'; body]).await.expect("write");
        let answer = read_until(&mut stream, "}").await;
        assert_eq!(status(&answer), "502");
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(rest(&mut stream).await, b"");
    }
}

#[tokio::test]
async fn leaving_refuses_what_is_new_and_finishes_what_is_under_way() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let mut idle = served.connect().await;
    send(
        &mut idle,
        &format!("GET /health HTTP/1.1\nhost: h\nx-api-key: {KEY}"),
    )
    .await;
    read_until(&mut idle, "\r\n\r\n").await;
    let mut silent = served.connect().await;
    let mut following = UnixStream::connect(served.socket()).await.expect("connect");
    send(&mut following, "GET /events?follow=true HTTP/1.1\nhost: h").await;
    read_until(&mut following, "}\n\r\n").await;
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;

    let (public, socket) = (served.public, served.socket());
    let leaving = tokio::spawn(async move {
        let left = tokio::join!(
            served.outside.leave(PATIENCE, PATIENCE),
            served.inside.leave(PATIENCE, PATIENCE),
        );
        // Its directory goes with it.
        (left, served)
    });
    assert_eq!(rest(&mut idle).await, b"");
    assert_eq!(rest(&mut silent).await, b"");
    let cut = rest(&mut following).await;
    assert!(!cut.ends_with(b"0\r\n\r\n"), "that would be an end");
    let refused = TcpStream::connect(public).await.map(drop);
    assert!(refused.is_err(), "nobody listens any more");
    assert!(UnixStream::connect(&socket).await.is_err());
    assert!(!leaving.is_finished(), "a verb is under way");
    script.may_pause.notify_one();
    let paused = pausing.await.expect("no panic").expect("an answer");
    assert_eq!(paused.outcome, Outcome::Changed);
    let (left, _served) = leaving.await.expect("no panic");
    assert_eq!(left, (true, true));
}

#[tokio::test]
async fn leaving_is_bounded() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    read_until(&mut stream, "hello\r\n").await;
    assert!(served.outside.leave(PATIENCE, DOUBT).await, "no verb");
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;
    assert!(
        !served.inside.leave(DOUBT, PATIENCE).await,
        "a verb does not end"
    );
    pausing.abort();
}
