//! Clients that mean no good, or cannot do better, and many that mean well.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Daemon, request};

/// Sends bytes, and returns what comes back before the other side ends.
fn answer(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    // It may be closed before it has taken everything, and has said why by then.
    stream.write_all(bytes).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn requests_that_are_none_are_refused_and_never_a_failure_of_ours() {
    let daemon = Daemon::start();
    let (address, key) = (daemon.address(), daemon.api_key());
    let keyed = format!("host: h\r\nconnection: close\r\nx-api-key: {key}\r\n");
    let long = "x".repeat(500_000);
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    for (bytes, wanted) in [
        (format!("GET /sandboxes HTTP/1.1\r\nx-long: {long}\r\n\r\n"), "431"),
        (format!("GET /sandboxes HTTP/1.1\r\n{many}\r\n"), "431"),
        (format!("GET /{long} HTTP/1.1\r\nhost: h\r\n\r\n"), "4"),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), "4"),
        ("\u{0}\u{1}\u{2}\r\n\r\n".to_owned(), "400"),
        (
            "POST /sandboxes HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
            "400",
        ),
        (format!("GET /sandboxes/%ff%00%2e%2e HTTP/1.1\r\n{keyed}\r\n"), "4"),
        (format!("POST /sandboxes HTTP/1.1\r\n{keyed}content-length: 9\r\n\r\n{{\"a\":[[[["), "400"),
        (
            format!("POST /sandboxes HTTP/1.1\r\n{keyed}content-length: 1500000\r\n\r\n{long}{long}{long}"),
            "400",
        ),
        (format!("GET /sandboxes?space=perhaps HTTP/1.1\r\n{keyed}\r\n"), "400"),
        (format!("BREW /sandboxes HTTP/1.1\r\n{keyed}\r\n"), "405"),
    ] {
        let said = answer(&address, bytes.as_bytes());
        let shown: String = bytes.chars().take(60).collect();
        let status = said.get(9..12).unwrap_or("no answer");
        assert!(status.starts_with(wanted), "{shown:?}: {said}");
    }
    let said = request(
        &address,
        "GET /sandboxes",
        &format!("x-api-key: {key}\r\n"),
        "",
    );
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
}

#[test]
fn clients_that_dawdle_keep_nobody_else_waiting() {
    /// Each takes a place, and there are 2048.
    const DAWDLERS: usize = 500;
    let daemon = Daemon::start();
    let (address, key) = (daemon.address(), daemon.api_key());
    let mut dawdlers: Vec<_> = (0..DAWDLERS)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    let head = format!("GET /sandboxes HTTP/1.1\r\nhost: h\r\nx-api-key: {key}\r\n");
    let (begun, _) = head.split_at(40);
    for dawdler in &mut dawdlers {
        dawdler.write_all(begun.as_bytes()).unwrap();
    }
    let said = request(
        &address,
        "GET /sandboxes",
        &format!("x-api-key: {key}\r\n"),
        "",
    );
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
    daemon.get(&["ls"]);
    // One of them goes on, and is served like anybody.
    let mut late = dawdlers.pop().unwrap();
    let (_, rest) = head.split_at(40);
    late.write_all(format!("{rest}connection: close\r\n\r\n").as_bytes())
        .unwrap();
    let mut said = String::new();
    late.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
}

#[test]
fn two_hundred_sandboxes_made_at_once_are_all_there() {
    const CLIENTS: usize = 20;
    const EACH: usize = 10;
    let daemon = Daemon::start().with_template();
    let (address, key) = (daemon.address(), daemon.api_key());
    let header = format!("x-api-key: {key}\r\n");
    let body = r#"{"templateID":"base"}"#;
    let mut made: Vec<String> = thread::scope(|scope| {
        let client = || {
            let create = |_| {
                let said = request(&address, "POST /v2/sandboxes", &header, body);
                let (head, body) = said.split_once("\r\n\r\n").unwrap();
                assert!(head.starts_with("HTTP/1.1 201 "), "{said}");
                let made: Value = serde_json::from_str(body).unwrap();
                made["sandboxID"].as_str().unwrap().to_owned()
            };
            (0..EACH).map(create).collect::<Vec<_>>()
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .flat_map(|it| it.join().unwrap())
            .collect()
    });
    made.sort();
    let listed = daemon.get(&["ls", "--quiet"]);
    let mut listed: Vec<_> = listed.lines().map(ToOwned::to_owned).collect();
    listed.sort();
    assert_eq!(listed, made);
    lists_are_quick(&address, &header, made.len());
}

/// A list of all of them is answered at once; or, where everything takes long, in not much more than it takes to read the
/// answer and to write it again.
fn lists_are_quick(address: &str, header: &str, count: usize) {
    const ROUNDS: usize = 200;
    const AT_ONCE: Duration = Duration::from_millis(10);
    const NOT_MUCH: u32 = 3;
    let (mut lists, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let said = request(address, "GET /sandboxes", header, "");
        lists.push(begun.elapsed());
        let (_, body) = said.split_once("\r\n\r\n").unwrap();
        let begun = Instant::now();
        let all: Vec<Value> = serde_json::from_str(body).unwrap();
        assert_eq!(serde_json::to_string(&all).unwrap().len(), body.len());
        floors.push(begun.elapsed());
        assert_eq!(all.len(), count);
    }
    lists.sort();
    floors.sort();
    let (slowest, usual, floor) = (
        lists[ROUNDS * 99 / 100],
        lists[ROUNDS / 2],
        floors[ROUNDS / 2],
    );
    println!(
        "lists of {count}: p50 {usual:?}, p99 {slowest:?}; reading and writing one: {floor:?}"
    );
    assert!(
        slowest < AT_ONCE || usual < NOT_MUCH * floor,
        "p99 {slowest:?}, p50 {usual:?}, beside {floor:?}"
    );
}

#[test]
fn every_request_that_was_begun_is_answered_when_the_daemon_is_restarted() {
    const CLIENTS: usize = 20;
    const BEFORE: usize = 60;
    let daemon = Daemon::start().with_template();
    let (address, key) = (daemon.address(), daemon.api_key());
    let body = r#"{"templateID":"base"}"#;
    let create = format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-api-key: {key}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    // Asks for sandboxes until nobody is there to ask. Who is not let in has begun nothing.
    let client = |made: mpsc::Sender<String>| {
        while let Ok(mut stream) = TcpStream::connect(&address) {
            stream.write_all(create.as_bytes()).ok();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).ok();
            if answer.is_empty() {
                return;
            }
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let body: Value =
                serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
            made.send(body["sandboxID"].as_str().unwrap().to_owned())
                .ok();
        }
    };
    let ((status, log), told) = thread::scope(|scope| {
        let (made, answers) = mpsc::channel();
        for _ in 0..CLIENTS {
            let (client, made) = (&client, made.clone());
            scope.spawn(move || client(made));
        }
        drop(made);
        let mut told: BTreeSet<_> = (0..BEFORE).map(|_| answers.recv().unwrap()).collect();
        let stopped = daemon.stop();
        told.extend(answers);
        (stopped, told)
    });
    assert!(status.success(), "{log}");
    assert!(!log.contains("cut connections"), "{log}");
    // What was made was told, and what was told was made: an event is announced once it is written down.
    let made = log.lines().filter_map(|line| {
        let event = line.split_once("sandbox.created")?.1;
        let id = event.split_once("sandbox=")?.1;
        Some(id.split_whitespace().next()?.to_owned())
    });
    assert_eq!(made.collect::<BTreeSet<_>>(), told);
}
