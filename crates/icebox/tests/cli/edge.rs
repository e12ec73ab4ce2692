//! Clients that mean no good, or cannot do better, and many that mean well.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread;

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
}
