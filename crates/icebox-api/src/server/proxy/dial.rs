//! Connections into a guest: to a port that it listens on for others, or else, through its agent, to one that it keeps to
//! itself. Many servers listen on 127.0.0.1 alone, and E2B's sandboxes make no difference.

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::{ACCESS_TOKEN_HEADER, AGENT_PORT};

/// How long a guest may take to accept a connection: far longer than a loaded one needs, short enough for a client.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where an agent connects to a port of its own machine. For us alone: it asks for the token.
const DIAL_PATH: &str = "/dial";
/// What the connection becomes then.
const PROTOCOL: &str = "icebox-port";

/// A connection to a guest's port.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Connects to a port of the guest at `address`. `None` if nobody listens there.
pub(super) async fn connect(address: Ipv4Addr, port: u16, token: &str) -> Option<Box<dyn Stream>> {
    let connected = async {
        match straight(address, port).await {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && port != AGENT_PORT =>
            {
                through_agent(address, port, token).await
            }
            connected => connected.map(|stream| Box::new(stream) as Box<dyn Stream>),
        }
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connected).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, %address, port, "a guest's port is not open");
            None
        }
        Err(_) => {
            tracing::debug!(%address, port, "a guest's port did not accept in time");
            None
        }
    }
}

async fn straight(address: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((address, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn through_agent(address: Ipv4Addr, port: u16, token: &str) -> io::Result<Box<dyn Stream>> {
    let agent = straight(address, AGENT_PORT).await?;
    let (mut sender, connection) = http1::Builder::new()
        .handshake::<_, Body>(TokioIo::new(agent))
        .await
        .map_err(io::Error::other)?;
    // Ends with the connection, whose other half is what we return.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "the connection to an agent ended");
        }
    });
    let request = Request::get(format!("{DIAL_PATH}?port={port}"))
        .header(header::HOST, "localhost")
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, PROTOCOL)
        .header(ACCESS_TOKEN_HEADER, token)
        .body(Body::empty())
        .map_err(io::Error::other)?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?;
    match answer.status() {
        StatusCode::SWITCHING_PROTOCOLS => {
            let stream = hyper::upgrade::on(answer).await.map_err(io::Error::other)?;
            Ok(Box::new(TokioIo::new(stream)))
        }
        status => Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("the agent answered {status}"),
        )),
    }
}
