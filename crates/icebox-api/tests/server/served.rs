//! A server of the script at both edges, and connections to it byte by byte.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use icebox_api::client::Client;
use icebox_api::server::{Edge, Limits, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::script::{House, Script};

/// For what must happen, and soon.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// For what must not happen, and would at once.
pub(crate) const DOUBT: Duration = Duration::from_millis(100);
/// A guest's answer that never ends, and says no more than this.
pub(crate) const SILENT_STREAM: &str =
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";

/// A daemon on a Unix socket and on TCP.
pub(crate) struct Served {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) public: std::net::SocketAddr,
    pub(crate) inside: Server,
    pub(crate) outside: Server,
}

impl Served {
    pub(crate) async fn new(script: &Arc<Script>) -> Self {
        Self::within(Limits::default(), script).await
    }

    pub(crate) async fn within(limits: Limits, script: &Arc<Script>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let unix = UnixListener::bind(directory.path().join("socket")).expect("bind");
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let public = tcp.local_addr().expect("an address");
        let house = Arc::new(House(script.clone()));
        let inside = Server::new(house.clone(), Edge::Admin).with_limits(limits);
        let outside = Server::new(house, Edge::Public { tls: false }).with_limits(limits);
        inside.listen_unix(unix);
        outside.listen(tcp);
        Self {
            directory,
            public,
            inside,
            outside,
        }
    }

    /// A connection from outside that stays.
    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.public).await.expect("connect")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Sends `request` with plain line ends to the public edge and returns everything that comes back.
    pub(crate) async fn ask(&self, request: &str) -> String {
        let stream = TcpStream::connect(self.public).await.expect("connect");
        exchange(stream, request).await
    }

    pub(crate) async fn ask_admin(&self, request: &str) -> String {
        let stream = UnixStream::connect(self.socket()).await.expect("connect");
        exchange(stream, request).await
    }
}

pub(crate) async fn exchange(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    request: &str,
) -> String {
    let request = format!(
        "{}\r\nconnection: close\r\n\r\n",
        request.replace('\n', "\r\n")
    );
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    answer
}

/// Sends a request on a connection that stays.
pub(crate) async fn send(stream: &mut (impl tokio::io::AsyncWrite + Unpin), request: &str) {
    let request = format!("{}\r\n\r\n", request.replace('\n', "\r\n"));
    stream.write_all(request.as_bytes()).await.expect("write");
}

/// Reads up to `end`.
pub(crate) async fn read_until(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    end: &str,
) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !read.ends_with(end.as_bytes()) {
            read.push(stream.read_u8().await.expect("more"));
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("in time");
    String::from_utf8(read).expect("text")
}

/// What still comes before the other side ends, however it does.
pub(crate) async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut rest = Vec::new();
    let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest));
    reading.await.expect("in time").ok();
    rest
}

pub(crate) fn status(answer: &str) -> &str {
    answer.get(9..12).unwrap_or("no status")
}

/// A port inside the sandbox: answers every connection's first request head with `answer`, and reports the head.
pub(crate) async fn guest_port(
    answer: &'static str,
) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    guest_port_at("127.0.0.1:0", answer).await
}

pub(crate) async fn guest_port_at(
    address: &str,
    answer: &'static str,
) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind(address).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let (heads, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let heads = heads.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.expect("a request head"));
                }
                heads.send(String::from_utf8_lossy(&head).into_owned()).ok();
                stream.write_all(answer.as_bytes()).await.expect("answer");
                // Echo what follows, until the other side has had enough.
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
        }
    });
    (port, seen)
}
