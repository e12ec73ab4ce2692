//! Large files on their way through the daemon, to a guest's agent and back.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use crate::support::Daemon;

/// How much more memory a process may have had at once, KiB, however large a file is.
const GROWTH: u64 = 32 << 10;
const PIECE: usize = 1 << 20;

/// The most memory that a process has had, KiB.
fn peak(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// Sends so many pieces of a file through the daemon, and fetches them again.
fn carry(daemon: &Daemon, head: &str, pieces: usize) {
    let piece: Vec<u8> = (0..=250).cycle().take(PIECE).collect();
    let size = pieces * PIECE;
    let mut stream = TcpStream::connect(daemon.address()).unwrap();
    let upload = format!(
        "POST {head}content-type: application/octet-stream\r\ncontent-length: {size}\r\n\r\n"
    );
    stream.write_all(upload.as_bytes()).unwrap();
    for _ in 0..pieces {
        stream.write_all(&piece).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

    let mut stream = TcpStream::connect(daemon.address()).unwrap();
    stream
        // Of HTTP/1.0, since what comes without a length comes in chunks else.
        .write_all(format!("GET {}\r\n", head.replace("HTTP/1.1", "HTTP/1.0")).as_bytes())
        .unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    let seen = String::from_utf8(seen).unwrap();
    assert!(seen.starts_with("HTTP/1.0 200 "), "{seen}");
    let mut received = vec![0; PIECE];
    for at in 0..pieces {
        stream.read_exact(&mut received).unwrap();
        assert!(received == piece, "piece {at}");
    }
    assert_eq!(stream.read(&mut received).unwrap(), 0, "no more");
}

#[test]
fn inv_40_a_gibibyte_through_the_daemon_takes_no_memory_on_either_side() {
    let daemon = Daemon::start().with_guest();
    let shown: Value = serde_json::from_str(&daemon.get(&["inspect", "web", "--json"])).unwrap();
    let id = shown["sandboxID"].as_str().unwrap();
    let (path, token) = (daemon.path("large"), daemon.token_of("web"));
    let head = format!(
        "/files?path={} HTTP/1.1\r\nhost: 49983-{id}.icebox.test\r\nx-access-token: {token}\r\nconnection: close\r\n",
        path.display()
    );
    let processes: Vec<u32> = daemon.agents().chain([daemon.pid()]).collect();
    // What is there once for all is there then.
    carry(&daemon, &head, 1);
    let before: Vec<u64> = processes.iter().map(|it| peak(*it)).collect();
    carry(&daemon, &head, 1024);
    for (process, before) in processes.iter().zip(before) {
        let grown = peak(*process) - before;
        assert!(grown < GROWTH, "process {process} has grown by {grown} KiB");
    }
}
