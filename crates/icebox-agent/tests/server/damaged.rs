//! Requests that were right before they were damaged at random. Whatever arrives, the server refuses it or does it, says
//! nothing of an internal error, and goes on.
//!
//! The damage is the same in each run. Requests that name what would be removed or signalled are left out: the server of
//! these tests runs on the machine that the tests run on.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use fastrand::Rng;
use icebox_agent_api::TOKEN_HEADER;
use icebox_agent_api::client::Command;

use crate::support::{BOOT_TOKEN, Server, TIMEOUT};

const SEED: u64 = 0x1ceb_0c5e;
const ROUNDS: usize = 150;
/// How long a request without its end is left open. The server waits for more of it for longer than a test does.
const PATIENCE: Duration = Duration::from_millis(50);
/// KiB that damaged requests may make the server grow by.
const GROWTH: u64 = 16 << 10;
/// What parsers trip over.
const WORDS: [&[u8]; 12] = [
    b"\"",
    b"{",
    b"\0",
    b"\\u0000",
    b"\xff\xfe",
    b"-1",
    b"99999999999999999999999",
    b"1e999",
    b"../",
    b"\r\n\r\n",
    b"null",
    b"\xf0\x9f\xa7\x8a",
];
/// "hello" in lines, as gzip makes it.
const GZIPPED: [u8; 29] = [
    31, 139, 8, 0, 0, 0, 0, 0, 2, 255, 203, 72, 205, 201, 201, 231, 202, 160, 59, 9, 0, 76, 252,
    90, 102, 120, 0, 0, 0,
];

/// A request in parts that are damaged separately.
#[derive(Clone)]
struct Request {
    line: String,
    headers: Vec<u8>,
    /// With a flag and a length before it, as each message of a Connect stream has.
    enveloped: bool,
    body: Vec<u8>,
}

impl Request {
    fn new(line: &str, headers: &str, body: &[u8]) -> Self {
        Self {
            line: line.to_owned(),
            headers: headers.as_bytes().to_vec(),
            enveloped: headers.contains("connect+"),
            body: body.to_vec(),
        }
    }

    fn damage(&mut self, random: &mut Rng) {
        for _ in 0..random.usize(1..=3) {
            // Bodies are where the parsing is.
            if self.body.is_empty() || random.u8(0..5) == 0 {
                damage(&mut self.headers, random);
            } else {
                damage(&mut self.body, random);
            }
        }
    }

    /// As it goes over the wire, with lengths that are right, or wrong, too.
    fn encode(&self, random: &mut Rng) -> Vec<u8> {
        let off_by = if random.u8(0..8) == 0 {
            random.i64(-9..9)
        } else {
            0
        };
        let mut body = Vec::new();
        if self.enveloped {
            let length = i64::try_from(self.body.len()).unwrap() + off_by;
            body.push(if off_by == 0 { 0 } else { random.u8(..) });
            body.extend(u32::try_from(length.max(0)).unwrap().to_be_bytes());
        }
        body.extend(&self.body);
        let length = i64::try_from(body.len()).unwrap() + if self.enveloped { 0 } else { off_by };
        let mut encoded = format!(
            "{} HTTP/1.1\r\nhost: sandbox\r\nconnection: close\r\n{TOKEN_HEADER}: {BOOT_TOKEN}\r\ncontent-length: {length}\r\n",
            self.line
        )
        .into_bytes();
        encoded.extend(&self.headers);
        encoded.extend(b"\r\n\r\n");
        encoded.extend(body);
        encoded
    }
}

fn damage(bytes: &mut Vec<u8>, random: &mut Rng) {
    let at = random.usize(..=bytes.len());
    let some = random.usize(0..=8).min(bytes.len() - at);
    match random.u8(0..7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(0..8),
        1 if at < bytes.len() => bytes[at] = random.u8(..),
        2 => drop(bytes.drain(at..at + some)),
        3 => drop(bytes.splice(at..at, bytes[at..at + some].to_vec())),
        4 => bytes.truncate(at),
        5 => drop(bytes.splice(at..at, vec![*random.choice(b"[{\"A0").unwrap(); 20_000])),
        _ => drop(bytes.splice(at..at, random.choice(WORDS).unwrap().to_vec())),
    }
}

/// The status that a request is answered with, if it is within `patience`.
fn ask(address: SocketAddr, request: &[u8], patience: Duration) -> Option<u16> {
    let mut stream = TcpStream::connect(address).unwrap();
    // It may be refused before all of it is sent.
    stream.write_all(request).ok();
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut answer = [0; 64];
    let mut length = 0;
    while let Ok(count @ 1..) = stream.read(&mut answer[length..]) {
        length += count;
    }
    let line = answer[..length].strip_prefix(b"HTTP/1.1 ")?;
    str::from_utf8(line.get(..3)?).ok()?.parse().ok()
}

#[tokio::test]
async fn damaged_requests_are_refused_and_harm_nothing() {
    let server = Server::start();
    let client = server.client();
    let path = server.directory.path().join("file");
    let files = format!("/files?path={}", path.display());
    client.run(Command::new("true")).await.unwrap();
    let before = server.peak_rss_kib();

    let json = "content-type: application/json\r\nconnect-protocol-version: 1";
    let stream = "content-type: application/connect+json\r\nconnect-protocol-version: 1";
    let part = "--edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"file\"\r\ncontent-type: text/plain\r\n\r\nhello\r\n--edge--\r\n";
    let requests = [
        Request::new(
            "POST /process.Process/Start",
            stream,
            br#"{"process":{"cmd":"/bin/true","args":["a","b"],"envs":{"A":"b"},"cwd":"/"},"pty":{"size":{"cols":80,"rows":24}},"tag":"t"}"#,
        ),
        Request::new("POST /process.Process/Connect", stream, br#"{"process":{"pid":1}}"#),
        Request::new("POST /process.Process/List", json, b"{}"),
        Request::new(
            "POST /process.Process/SendInput",
            json,
            br#"{"process":{"tag":"t"},"input":{"stdin":"aGVsbG8="}}"#,
        ),
        Request::new(
            "POST /filesystem.Filesystem/Stat",
            json,
            br#"{"path":"/etc/hostname"}"#,
        ),
        Request::new(
            "POST /filesystem.Filesystem/ListDir",
            json,
            br#"{"path":"/etc/default","depth":1}"#,
        ),
        Request::new(
            &format!("POST {files}"),
            "content-type: multipart/form-data; boundary=edge",
            part.as_bytes(),
        ),
        Request::new(
            &format!("POST {files}"),
            "content-type: application/octet-stream\r\ncontent-encoding: gzip",
            &GZIPPED,
        ),
        Request::new(
            &format!("GET {files}"),
            "range: bytes=0-3, 2-\r\naccept-encoding: gzip;q=0.5, identity",
            b"",
        ),
    ];
    // Undamaged, they are understood: what is damaged is worth it.
    for request in &requests[2..8] {
        let line = &request.line;
        let mut calm = Rng::with_seed(3);
        let mut sent = request.encode(&mut calm);
        while sent != request.encode(&mut calm) {
            sent = request.encode(&mut calm);
        }
        let status = ask(server.address, &sent, TIMEOUT);
        assert!(
            matches!(status, Some(200 | 204 | 404)),
            "{line}: {status:?}"
        );
    }
    let mut random = Rng::with_seed(SEED);
    let mut answered = 0;
    for round in 0..ROUNDS {
        for request in &requests {
            let mut damaged = request.clone();
            damaged.damage(&mut random);
            let sent = damaged.encode(&mut random);
            let status = ask(server.address, &sent, PATIENCE);
            answered += usize::from(status.is_some());
            assert!(
                !matches!(status, Some(500..)),
                "round {round}: {status:?} for {:?}",
                String::from_utf8_lossy(&sent[..sent.len().min(2000)])
            );
        }
    }
    assert!(
        answered > ROUNDS * requests.len() / 10,
        "{answered} answers"
    );
    client.health(TIMEOUT).await.unwrap();
    client.run(Command::new("true")).await.unwrap();
    let grown = server.peak_rss_kib() - before;
    assert!(grown < GROWTH, "the server grew by {grown} KiB");
}
