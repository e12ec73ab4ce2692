//! Connections to the daemon: how many there may be, how long one may keep us waiting, and how serving ends.
//!
//! ```text
//!   a place is free ─► accept ─► first request in time ─► requests … ─► idle too long, or we leave
//! ```
//!
//! A connection speaks HTTP/1.1, or HTTP/2 from its first byte on. With HTTP/2 it carries many requests at once, each of
//! which may take as much as a connection does otherwise: so these have places, too. A client that does not answer pings
//! is gone.
//!
//! Whoever reaches a listener can hold a connection without a key, so both its number and its patience are bounded.
//! Each listener has places of its own: what happens on TCP does not keep an administrator from the socket.
//!
//! What this does not bound is a request that is being answered: a verb takes as long as it takes, and a stream from a
//! sandbox may be silent for hours.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::serve::Listener;
use http::{Request, Response, Version};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::front::Peer;

/// The most connections of one listener. Above several clients' pools of 200 (E2B's SDKs), and far below what
/// descriptors allow: a connection that is carried to a guest takes two. Who comes when it is reached waits in the
/// listener's queue until another one goes.
pub const CONNECTIONS_MAX: usize = 2048;

/// How long a new connection may take to have sent the head of its first request.
pub const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may take from one request to having sent the head of the next. E2B's Python SDK keeps idle
/// connections for 300 seconds, and one that we close first is one that it may be about to use.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(320);

/// How many requests one HTTP/2 connection may have under way. E2B's SDKs have up to 200 connections where they speak
/// HTTP/1.1, and open a second one when the first is full.
pub const STREAMS_MAX: u32 = 200;

/// How often an HTTP/2 client is asked whether it is there, and how long it may take to say so.
pub const PING_INTERVAL: Duration = Duration::from_secs(30);

/// The most bytes of headers of a request by HTTP/2, as RFC 9113 counts them. What more there is gets the status 431.
const HEADERS_MAX: u32 = 64 << 10;

/// What is kept of an answer by HTTP/2 that its client does not take: each of many may have so much.
const UNSENT_MAX: usize = 64 << 10;

/// What bounds the connections of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// See [`CONNECTIONS_MAX`].
    pub connections: usize,
    /// How many requests by HTTP/2 are answered at once, of all connections. Who comes when it is reached waits.
    pub streams: usize,
    /// See [`FIRST_REQUEST_TIMEOUT`].
    pub first_request: Duration,
    /// See [`IDLE_TIMEOUT`].
    pub idle: Duration,
    /// See [`PING_INTERVAL`].
    pub ping: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS_MAX,
            streams: CONNECTIONS_MAX,
            first_request: FIRST_REQUEST_TIMEOUT,
            idle: IDLE_TIMEOUT,
            ping: PING_INTERVAL,
        }
    }
}

/// A connection's place among those that are served. What it is upgraded to outlives the connection, and has its place on.
#[derive(Clone, Debug)]
pub(super) struct Place {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// Accepts connections until `leaving`. Each is a task of `tasks`.
pub(super) async fn accept<L: Listener>(
    mut listener: L,
    peer: fn(&L::Io) -> Peer,
    router: Router,
    limits: Limits,
    leaving: CancellationToken,
    tasks: TaskTracker,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let streams = Arc::new(Semaphore::new(limits.streams));
    loop {
        let accepted = async {
            let place = free_place(&places).await?;
            let (stream, _from) = listener.accept().await;
            Some((stream, place))
        };
        let (stream, place) = tokio::select! {
            accepted = accepted => match accepted {
                Some(accepted) => accepted,
                None => return,
            },
            () = leaving.cancelled() => return,
        };
        let doorway = Doorway {
            routes: TowerToHyperService::new(router.clone()),
            peer: peer(&stream),
            place,
            streams: Arc::clone(&streams),
            under_way: watch::Sender::new(0),
        };
        tasks.spawn(serve(stream, doorway, limits, leaving.clone()));
    }
}

/// Waits for a place. `None` never happens: nobody closes the semaphore.
async fn free_place(places: &Arc<Semaphore>) -> Option<Place> {
    if places.available_permits() == 0 {
        tracing::warn!("as many connections as are served at once; the next one waits");
    }
    let permit = Arc::clone(places).acquire_owned().await.ok()?;
    Some(Place {
        _permit: Arc::new(permit),
    })
}

/// What every request of a connection comes through.
struct Doorway {
    routes: TowerToHyperService<Router>,
    peer: Peer,
    place: Place,
    streams: Arc<Semaphore>,
    /// How many requests have come by HTTP/2 and are not answered to the end. One that comes by HTTP/1.1 counts for good:
    /// hyper knows when such a connection is idle.
    under_way: watch::Sender<u32>,
}

impl Doorway {
    fn enter(
        &self,
        mut request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Answer>, Infallible>> + use<> {
        let is_stream = request.version() == Version::HTTP_2;
        let under_way = UnderWay::begin(&self.under_way, is_stream);
        let streams = is_stream.then(|| Arc::clone(&self.streams));
        request.extensions_mut().insert(self.peer);
        request.extensions_mut().insert(self.place.clone());
        let routes = self.routes.clone();
        async move {
            let place = match streams {
                Some(streams) => streams.acquire_owned().await.ok(),
                None => None,
            };
            let answer = routes.call(request).await?;
            Ok(answer.map(|body| Answer {
                body,
                _under_way: under_way,
                _place: place,
            }))
        }
    }
}

/// A request, from its head to the end of its answer.
struct UnderWay {
    count: watch::Sender<u32>,
    ends: bool,
}

impl UnderWay {
    fn begin(count: &watch::Sender<u32>, ends: bool) -> Self {
        count.send_modify(|requests| *requests += 1);
        Self {
            count: count.clone(),
            ends,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if self.ends {
            self.count.send_modify(|requests| *requests -= 1);
        }
    }
}

/// An answer's body, with what its request holds until it has gone.
struct Answer {
    body: Body,
    _under_way: UnderWay,
    _place: Option<OwnedSemaphorePermit>,
}

impl HttpBody for Answer {
    type Data = <Body as HttpBody>::Data;
    type Error = <Body as HttpBody>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(task)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves one connection to its end. When we leave, the requests that are being answered are its last.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    doorway: Doorway,
    limits: Limits,
    leaving: CancellationToken,
) {
    let mut requests = doorway.under_way.subscribe();
    let service = service_fn(move |request| doorway.enter(request));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // hyper counts the time of idling and that of reading a head as one.
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.ping)
        .keep_alive_timeout(limits.ping)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADERS_MAX)
        .max_send_buf_size(UNSENT_MAX);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        ended = connection.as_mut() => return log(ended),
        first = tokio::time::timeout(limits.first_request, requests.changed()) => {
            if first.is_err() {
                tracing::debug!("a connection sent no request in time");
                return;
            }
        }
        // It has nothing under way.
        () = leaving.cancelled() => return,
    }
    tokio::select! {
        ended = connection.as_mut() => return log(ended),
        () = idle(requests, limits.idle) => {
            // Whoever asks something just now is told to ask on another connection.
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(limits.ping, connection).await {
                Ok(ended) => log(ended),
                Err(_) => tracing::debug!("a connection that was idle is cut"),
            }
            return;
        }
        () = leaving.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    log(connection.await);
}

/// Waits until no request has been under way for as long as `limit`.
async fn idle(mut requests: watch::Receiver<u32>, limit: Duration) {
    loop {
        let under_way = *requests.borrow_and_update();
        let changed = match under_way {
            0 => tokio::time::timeout(limit, requests.changed()).await,
            _ => Ok(requests.changed().await),
        };
        // With whoever counts them goes the connection, which ends this wait.
        if !matches!(changed, Ok(Ok(()))) {
            return;
        }
    }
}

fn log(ended: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}
