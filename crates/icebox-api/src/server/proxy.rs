//! The way to ports inside sandboxes: a streaming reverse proxy that understands nothing it carries. What comes by HTTP/2
//! goes on by HTTP/1.1, as servers in sandboxes have it.
//!
//! Every request has its own connection to the guest: nothing is pooled, so no connection can outlive the sandbox
//! whose slot address it was made to. When a sandbox pauses or goes, what is in flight is cut *without* a proper end:
//! E2B's SDKs tell a killed sandbox from a finished command by that. With HTTP/2 this is the reset of the stream, and
//! others on its connection go on.
//!
//! A sandbox that pauses waits for requests to be answered and not for streams, so what is known to be one is said to be:
//! what follows a command in the agent, an upgraded connection, and events that a server sends (`text/event-stream`).

mod destination;
mod dial;
mod signed;

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, StatusCode, Version};
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::connections::Place;
use super::{Context, cors};
use crate::key::KeyHash;
use crate::{
    ACCESS_TOKEN_HEADER, AGENT_PORT, API_KEY_HEADER, ApiError, ErrorCode, Pass, Route, TEAM_HEADER,
    TRAFFIC_TOKEN_HEADER,
};
use destination::{is_host_only, require_id};

pub(super) use destination::{Destination, destination};
pub(super) use signed::{forward_signed, is_signed};

/// How long one side of an upgraded connection may be silent when the other has ended its half.
const HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// What is carried of an upgraded connection at a time, each way.
const TUNNEL_CHUNK: usize = 16 << 10;

/// Where an agent says that it answers.
const HEALTH: &str = "/health";

/// How the content types of streams begin.
const STREAMS: [&[u8]; 2] = [b"application/connect+", b"text/event-stream"];

/// Headers that concern one connection, not the message (RFC 9110, 7.6.1), and those that are for us alone.
const NOT_FORWARDED: [&str; 12] = [
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
    API_KEY_HEADER,
    TEAM_HEADER,
    TRAFFIC_TOKEN_HEADER,
];

/// E2B's form of a refusal: the SDKs look for these words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NotReachable<'a> {
    sandbox_id: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
}

/// A refusal. Pages may read it, as they may what the sandbox itself would have said.
fn refusal(status: StatusCode, sandbox_id: &str, message: &str, port: Option<u16>) -> Response {
    let body = NotReachable {
        sandbox_id,
        message,
        port,
        code: status.as_u16(),
    };
    cors::allow((status, axum::Json(body)).into_response())
}

fn not_found(sandbox: &str) -> Response {
    let message = "The sandbox was not found";
    refusal(StatusCode::BAD_GATEWAY, sandbox, message, None)
}

fn not_open(sandbox: &str, port: u16) -> Response {
    let message = "The sandbox is running but port is not open";
    refusal(StatusCode::BAD_GATEWAY, sandbox, message, Some(port))
}

/// Whether a request may pass to the ports of a sandbox that are not the agent's. What is compared are hashes, so timing
/// tells nothing about the token.
fn admits(route: &Route, headers: &HeaderMap) -> bool {
    let Some(wanted) = &route.traffic_token else {
        return true;
    };
    let presented = headers.get(TRAFFIC_TOKEN_HEADER);
    presented.is_some_and(|it| KeyHash::of(it.as_bytes()) == KeyHash::of(wanted.as_bytes()))
}

fn not_admitted(sandbox: &str) -> Response {
    let message = "The sandbox asks for its traffic access token, which is missing or another's";
    refusal(StatusCode::FORBIDDEN, sandbox, message, None)
}

/// Carries one request to a sandbox, and its answer back.
pub(super) async fn forward(
    context: &Context,
    destination: Destination,
    mut request: Request,
) -> Response {
    let Destination { sandbox, port } = destination;
    if request.method() == Method::CONNECT {
        let message =
            "CONNECT is for proxies that lead anywhere; this one leads to ports of sandboxes";
        return ApiError::new(ErrorCode::Invalid, message)
            .status(StatusCode::METHOD_NOT_ALLOWED)
            .hint("ask for an upgrade, or for the port itself at the sandbox's address")
            .into_response();
    }
    if port == AGENT_PORT && is_host_only(request.uri().path()) {
        return ApiError::new(
            ErrorCode::NotFound,
            format!("there is nothing at {}", request.uri().path()),
        )
        .into_response();
    }
    let is_administrator = context.caller.is_administrator();
    // Whether it runs must be a question that does not change the answer: E2B's SDKs ask it when a stream was cut.
    let wake = !(port == AGENT_PORT && request.uri().path() == HEALTH);
    let route = if is_administrator {
        context.daemon.route(&sandbox, false, wake).await
    } else {
        // Older clients append a node name to the id.
        let id = sandbox.split('-').next().unwrap_or_default();
        if let Err(error) = require_id(id) {
            return cors::allow(error.into_response());
        }
        context.daemon.route(id, true, wake).await
    };
    let route = match route {
        Ok(route) => route,
        // An administrator is told why.
        Err(error) if is_administrator => return error.into_response(),
        Err(_) => return not_found(&sandbox),
    };
    if port != AGENT_PORT && !is_administrator && !admits(&route, request.headers()) {
        return not_admitted(&route.sandbox_id);
    }
    if port == AGENT_PORT && (is_administrator || route.agent_is_open) {
        match HeaderValue::from_str(&route.token) {
            Ok(mut token) => {
                token.set_sensitive(true);
                request.headers_mut().insert(ACCESS_TOKEN_HEADER, token);
            }
            Err(error) => {
                return ApiError::from_error(ErrorCode::Internal, &error).into_response();
            }
        }
    }
    carry(route, port, request).await
}

async fn carry(route: Route, port: u16, mut request: Request) -> Response {
    let Route {
        sandbox_id,
        address,
        pass,
        token,
        ..
    } = route;
    if is_stream(request.headers()) {
        pass.becomes_stream();
    }
    let upstream = tokio::select! {
        upstream = dial::connect(address, port, &token) => upstream,
        () = pass.revoked() => return not_found(&sandbox_id),
    };
    let Some(stream) = upstream else {
        return not_open(&sandbox_id, port);
    };
    let (mut sender, connection) = match http1::Builder::new()
        .preserve_header_case(true)
        .handshake::<_, Body>(TokioIo::new(stream))
        .await
    {
        Ok(pair) => pair,
        Err(error) => {
            tracing::debug!(%error, sandbox = sandbox_id, port, "no connection to a guest's port");
            return not_open(&sandbox_id, port);
        }
    };
    let cut = CancellationToken::new();
    let (switch, switched) = oneshot::channel();
    let place = request.extensions_mut().remove::<Place>();
    let holding = hold(
        Arc::clone(&pass),
        cut.clone(),
        connection.with_upgrades(),
        switched,
    );
    tokio::spawn(async move {
        holding.await;
        drop(place);
    });

    let upgrade = upgrade_of(request.headers());
    let client_side = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let answer = tokio::select! {
        // First, since a connection that is cut fails too.
        biased;
        () = cut.cancelled() => return not_found(&sandbox_id),
        answer = sender.send_request(to_guest(request, upgrade.as_ref())) => answer,
    };
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            tracing::debug!(%error, sandbox = sandbox_id, port, "a guest's port gave no answer");
            return not_open(&sandbox_id, port);
        }
    };
    let switches = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    if switches || is_stream(answer.headers()) {
        pass.becomes_stream();
    }
    if switches {
        let Some(client_side) = client_side else {
            return not_open(&sandbox_id, port);
        };
        let guest_side = hyper::upgrade::on(&mut answer);
        let protocol = upgrade_of(answer.headers());
        if switch.send((client_side, guest_side)).is_err() {
            return not_found(&sandbox_id);
        }
        return to_client(answer, protocol.as_ref(), |_| Body::empty());
    }
    to_client(answer, None, |body| Body::new(Carried { body, cut }))
}

/// Drives a connection to a guest, and has its pass for exactly as long as it lives: to the end of request and answer,
/// however slowly the client takes them, and through what it was upgraded to. When the pass is revoked, it closes the
/// connection, whether or not anybody waits for it just then.
async fn hold(
    pass: Arc<dyn Pass>,
    cut: CancellationToken,
    connection: impl Future<Output = hyper::Result<()>>,
    switched: oneshot::Receiver<(OnUpgrade, OnUpgrade)>,
) {
    let carried = async {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to a guest's port ended");
        }
        // Nobody sends where nothing was upgraded.
        if let Ok((client, guest)) = switched.await
            && let Err(error) = tunnel(client, guest).await
        {
            tracing::debug!(%error, "an upgraded connection ended");
        }
    };
    let revoked = async {
        pass.revoked().await;
        // Before the connection goes: what is read from it then looks like an end.
        cut.cancel();
    };
    tokio::select! {
        () = carried => {}
        () = revoked => {}
    }
}

/// Whether a message is of a stream, which lasts as long as somebody wants it to. Of the calls of Connect those have a content
/// type of their own; they are how commands are followed and fed.
fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.map_or(&b""[..], HeaderValue::as_bytes);
    STREAMS.iter().any(|it| {
        kind.get(..it.len())
            .is_some_and(|kind| kind.eq_ignore_ascii_case(it))
    })
}

/// The protocol that a message wants to switch to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    wanted
        .then(|| headers.get(header::UPGRADE).cloned())
        .flatten()
}

fn to_guest(request: Request, upgrade: Option<&HeaderValue>) -> http::Request<Body> {
    let (mut parts, body) = request.into_parts();
    if parts.headers.contains_key(header::TRANSFER_ENCODING) {
        // That is what its length is told by (RFC 9112, 6.3).
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    forwardable(&mut parts.headers, upgrade);
    // A server is asked with a path, whatever form the client used.
    parts.uri = parts
        .uri
        .path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
        .into();
    parts.version = Version::HTTP_11;
    join_cookies(&mut parts.headers);
    http::Request::from_parts(parts, body)
}

fn to_client(
    answer: http::Response<Incoming>,
    upgrade: Option<&HeaderValue>,
    body: impl FnOnce(Incoming) -> Body,
) -> Response {
    let (mut parts, incoming) = answer.into_parts();
    forwardable(&mut parts.headers, upgrade);
    Response::from_parts(parts, body(incoming))
}

/// Puts cookies into one header, which HTTP/2 may split and HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if cookies.len() < 2 {
        return;
    }
    // Of bytes that headers had.
    if let Ok(mut joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
        joined.set_sensitive(true);
        headers.insert(header::COOKIE, joined);
    }
}

/// Leaves what is for the other end.
fn forwardable(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in NOT_FORWARDED {
        headers.remove(name);
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
}

/// Carries an upgraded connection until both sides have ended it, or one has and the other says no more.
async fn tunnel(
    client: OnUpgrade,
    guest: OnUpgrade,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (client, guest) = tokio::try_join!(client, guest)?;
    Ok(relay(TokioIo::new(client), TokioIo::new(guest)).await?)
}

/// Carries bytes both ways. An end is passed on as one, and what comes the other way is still carried: but since whoever
/// has gone for good looks just like that, no longer than it takes to be silent for [`HALF_OPEN_TIMEOUT`].
async fn relay(
    left: impl AsyncRead + AsyncWrite,
    right: impl AsyncRead + AsyncWrite,
) -> io::Result<()> {
    let (left_reader, left_writer) = tokio::io::split(left);
    let (right_reader, right_writer) = tokio::io::split(right);
    let (left_ended, right_ended) = (CancellationToken::new(), CancellationToken::new());
    tokio::try_join!(
        pump(left_reader, right_writer, &left_ended, &right_ended),
        pump(right_reader, left_writer, &right_ended, &left_ended),
    )?;
    Ok(())
}

async fn pump(
    from: impl AsyncRead,
    to: impl AsyncWrite,
    ended: &CancellationToken,
    other_ended: &CancellationToken,
) -> io::Result<()> {
    let (mut from, mut to) = (pin!(from), pin!(to));
    let mut buffer = vec![0; TUNNEL_CHUNK];
    loop {
        let step = async {
            let length = from.read(&mut buffer).await?;
            to.write_all(&buffer[..length]).await?;
            to.flush().await?;
            io::Result::Ok(length)
        };
        let silence = async {
            other_ended.cancelled().await;
            tokio::time::sleep(HALF_OPEN_TIMEOUT).await;
        };
        let length = tokio::select! {
            length = step => length?,
            () = silence => return Ok(()),
        };
        if length == 0 {
            to.shutdown().await?;
            ended.cancel();
            return Ok(());
        }
    }
}

/// A guest's answer, cut when its pass is revoked.
struct Carried {
    body: Incoming,
    cut: CancellationToken,
}

/// Ends a body without a proper end: the server closes the connection on it, or resets the stream.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox is no longer running")]
struct Cut;

impl HttpBody for Carried {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        // What ends by being cut wakes us; whether it was is asked afterwards, since it is said before.
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(task));
        if this.cut.is_cancelled() {
            return Poll::Ready(Some(Err(Cut.into())));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the two sides of a relay see, and the relay.
    fn relayed() -> (
        tokio::io::DuplexStream,
        tokio::io::DuplexStream,
        tokio::task::JoinHandle<io::Result<()>>,
    ) {
        let (client, left) = tokio::io::duplex(64);
        let (right, guest) = tokio::io::duplex(64);
        (client, guest, tokio::spawn(relay(left, right)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_that_has_ended_leaves_the_other_open_until_it_is_silent() {
        let (mut client, mut guest, relay) = relayed();
        // An hour of silence ends nothing while both halves are open.
        tokio::time::sleep(Duration::from_secs(3600)).await;
        client.write_all(b"question").await.expect("write");
        client.shutdown().await.expect("end the half");
        let mut asked = String::new();
        guest.read_to_string(&mut asked).await.expect("read");
        assert_eq!(asked, "question");
        for _ in 0..10 {
            tokio::time::sleep(HALF_OPEN_TIMEOUT / 2).await;
            guest.write_all(b"answer").await.expect("write");
            let mut answer = [0; 6];
            client.read_exact(&mut answer).await.expect("an answer");
        }
        let silent = tokio::time::Instant::now();
        relay.await.expect("no panic").expect("no error");
        assert_eq!(silent.elapsed(), HALF_OPEN_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_ends_when_both_sides_have() {
        let (mut client, mut guest, relay) = relayed();
        let begun = tokio::time::Instant::now();
        client.shutdown().await.expect("end the half");
        guest.shutdown().await.expect("end the half");
        relay.await.expect("no panic").expect("no error");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[test]
    fn inv_43_the_api_key_and_connection_headers_stay_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            (API_KEY_HEADER, "e2b_00"),
            ("x-kept", "1"),
        ] {
            headers.insert(name, value.parse().expect("a header value"));
        }
        forwardable(&mut headers, None);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-kept"]);
    }
}
