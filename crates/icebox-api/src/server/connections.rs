//! Connections to the daemon: how many there may be, how long one may keep us waiting, and how serving ends.
//!
//! ```text
//!   a place is free ─► accept ─► first request in time ─► requests … ─► idle too long, or we leave
//! ```
//!
//! Whoever reaches a listener can hold a connection without a key, so both its number and its patience are bounded.
//! Each listener has places of its own: what happens on TCP does not keep an administrator from the socket.
//!
//! What this does not bound is a request that is being answered: a verb takes as long as it takes, and a stream from a
//! sandbox may be silent for hours.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
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

/// What bounds the connections of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// See [`CONNECTIONS_MAX`].
    pub connections: usize,
    /// See [`FIRST_REQUEST_TIMEOUT`].
    pub first_request: Duration,
    /// See [`IDLE_TIMEOUT`].
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS_MAX,
            first_request: FIRST_REQUEST_TIMEOUT,
            idle: IDLE_TIMEOUT,
        }
    }
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
        let peer = peer(&stream);
        let serving = serve(stream, peer, router.clone(), limits, leaving.clone());
        tasks.spawn(async move {
            serving.await;
            drop(place);
        });
    }
}

/// Waits for a place. `None` never happens: nobody closes the semaphore.
async fn free_place(places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    if places.available_permits() == 0 {
        tracing::warn!("as many connections as are served at once; the next one waits");
    }
    Arc::clone(places).acquire_owned().await.ok()
}

/// Serves one connection to its end. When we leave, the request that is being answered is its last.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    limits: Limits,
    leaving: CancellationToken,
) {
    let asked = Arc::new(Notify::new());
    let service = {
        let asked = Arc::clone(&asked);
        let routes = TowerToHyperService::new(router);
        service_fn(move |mut request: http::Request<Incoming>| {
            asked.notify_one();
            request.extensions_mut().insert(peer);
            routes.call(request)
        })
    };
    // hyper counts the time of idling and that of reading a head as one.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        ended = connection.as_mut() => return log(ended),
        first = tokio::time::timeout(limits.first_request, asked.notified()) => {
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
        () = leaving.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    log(connection.await);
}

fn log(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}
