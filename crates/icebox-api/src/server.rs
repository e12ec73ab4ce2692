//! The daemon's HTTP server: one file per resource, one for the way to sandboxes' own ports.
//!
//! Two edges serve the same routes. The *admin* edge is the Unix socket: who may open it may do everything, and the
//! daemon adds a sandbox's token to requests for its agent. The *public* edge is TCP: REST needs a team's key, which shows
//! what the team has, and a sandbox's ports need its full id.

mod access;
mod connections;
mod cors;
mod docs;
mod e2b;
mod events;
mod extract;
mod front;
mod host;
mod kernels;
mod openapi;
mod path;
mod proxy;
mod routes;
mod sandboxes;
mod templates;
mod ui;
mod unread;
mod vmms;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware;
use axum::serve::Listener;
use http::StatusCode;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::Premises;
use crate::{ApiError, ErrorCode};

use front::{Context, Front, Peer};

pub use connections::{
    CONNECTIONS_MAX, FIRST_REQUEST_TIMEOUT, IDLE_TIMEOUT, Limits, PING_INTERVAL, STREAMS_MAX,
};

/// Who is on the other side of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Whoever may open the Unix socket: trusted with everything.
    Admin,
    /// Anybody: REST only with a key.
    Public {
        /// What comes to the listener came through TLS.
        tls: bool,
    },
}

/// A daemon, served at one edge. Needs a tokio runtime.
pub struct Server {
    router: Router,
    limits: Limits,
    /// Verbs under way. Their clients may be gone long since, so connections tell nothing of them.
    verbs: TaskTracker,
    connections: TaskTracker,
    leaving: CancellationToken,
}

impl Server {
    /// All routes of a daemon, as seen from `edge`.
    pub fn new(premises: Arc<dyn Premises>, edge: Edge) -> Self {
        let (verbs, leaving) = (TaskTracker::new(), CancellationToken::new());
        let front = Front::new(premises, edge, verbs.clone(), leaving.clone());
        Self {
            limits: Limits::default(),
            verbs,
            connections: TaskTracker::new(),
            leaving,
            router: router(front),
        }
    }

    /// With other bounds on connections.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Serves whoever comes to `listener`, in the background, until [`leave`](Self::leave).
    pub fn listen<L: Listener>(&self, listener: L) {
        self.accept(listener, |_| Peer::default());
    }

    /// As [`listen`](Self::listen), where the kernel says which user is on the other side.
    pub fn listen_unix(&self, listener: UnixListener) {
        self.accept(listener, |stream| {
            let credentials = stream.peer_cred();
            Peer(credentials.ok().map(|peer| peer.uid()))
        });
    }

    fn accept<L: Listener>(&self, listener: L, peer: fn(&L::Io) -> Peer) {
        self.connections.spawn(connections::accept(
            listener,
            peer,
            self.router.clone(),
            self.limits,
            self.leaving.clone(),
            self.connections.clone(),
        ));
    }

    /// Closes the listeners at once, so that nothing new begins; waits up to `verbs` for the verbs under way to end, and
    /// up to `requests` more for the answers under way to be sent. What is still connected then is the caller's to cut,
    /// by ending the runtime. Returns whether all verbs have ended.
    #[must_use]
    pub async fn leave(&self, verbs: Duration, requests: Duration) -> bool {
        self.leaving.cancel();
        self.verbs.close();
        self.connections.close();
        if tokio::time::timeout(verbs, self.verbs.wait())
            .await
            .is_err()
        {
            return false;
        }
        let answered = tokio::time::timeout(requests, self.connections.wait()).await;
        if answered.is_err() {
            tracing::info!(
                cut = self.connections.len(),
                "cut connections that do not end"
            );
        }
        true
    }
}

/// The front door before the routes, which see what it lets in, as it writes it.
fn router(front: Front) -> Router {
    Router::new()
        .fallback_service(routes())
        .layer(middleware::from_fn_with_state(front, front::enter))
}

fn routes() -> Router {
    routes::all()
        .router
        .merge(e2b::absent::routes())
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
}

async fn no_such_route(request: Request) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("there is nothing at {}", request.uri().path()),
    )
}

async fn no_such_method(request: Request) -> ApiError {
    ApiError::new(
        ErrorCode::Invalid,
        format!(
            "{} does not take {}",
            request.uri().path(),
            request.method()
        ),
    )
    .status(StatusCode::METHOD_NOT_ALLOWED)
}
