//! The daemon's HTTP server: one file per resource, one for the way to sandboxes' own ports.
//!
//! Two edges serve the same routes. The *admin* edge is the Unix socket: who may open it may do everything, and the
//! daemon adds a sandbox's token to requests for its agent. The *public* edge is TCP: REST needs a team's key, which shows
//! what the team has, and a sandbox's ports need its full id.

mod access;
mod connections;
mod cors;
mod e2b;
mod events;
mod extract;
mod front;
mod host;
mod kernels;
mod path;
mod proxy;
mod sandboxes;
mod templates;
mod ui;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware;
use axum::routing::{delete, get, patch, post, put};
use axum::serve::Listener;
use http::StatusCode;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::Premises;
use crate::{ApiError, ErrorCode};

use front::{Context, Front, Peer};

pub use connections::{CONNECTIONS_MAX, FIRST_REQUEST_TIMEOUT, IDLE_TIMEOUT, Limits};

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
    Router::new()
        .route("/health", get(host::health))
        .route("/version", get(host::version))
        .route("/doctor", get(host::doctor))
        .route("/stats", get(host::stats))
        .route("/gc", post(host::gc))
        .route("/drain", post(host::drain))
        .route("/events", get(events::events))
        .route(
            "/sandboxes",
            get(sandboxes::list).post(e2b::sandboxes::create_v1),
        )
        .route(
            "/v2/sandboxes",
            get(e2b::list::list).post(e2b::sandboxes::create),
        )
        .route(
            "/sandboxes/{id}",
            get(sandboxes::inspect).delete(sandboxes::destroy),
        )
        .route("/sandboxes/{id}/pause", post(sandboxes::pause))
        .route("/sandboxes/{id}/resume", post(sandboxes::resume))
        .route("/sandboxes/{id}/stop", post(sandboxes::stop))
        .route("/sandboxes/{id}/start", post(sandboxes::start))
        .route("/sandboxes/{id}/checkpoints", post(sandboxes::checkpoint))
        .route("/sandboxes/{id}/rollback", post(sandboxes::rollback))
        .route("/sandboxes/{id}/history", get(sandboxes::history))
        .route("/sandboxes/{id}/history/{point}", delete(sandboxes::forget))
        .route("/sandboxes/{id}/snapshots", post(sandboxes::snapshot))
        .route("/sandboxes/{id}/fork", post(sandboxes::fork))
        .route("/sandboxes/{id}/flatten", post(sandboxes::flatten))
        .route("/sandboxes/{id}/timeout", post(sandboxes::set_lifetime))
        .route("/sandboxes/{id}/metrics", get(sandboxes::metrics))
        .route("/sandboxes/{id}/console", get(sandboxes::console))
        .route("/sandboxes/{id}/connect", post(e2b::sandboxes::connect_v1))
        .route("/v2/sandboxes/{id}/connect", post(e2b::sandboxes::connect))
        .route("/sandboxes/{id}/refreshes", post(e2b::sandboxes::refresh))
        .route("/sandboxes/{id}/network", put(e2b::sandboxes::network))
        .route("/sandboxes/{id}/logs", get(e2b::sandboxes::logs))
        .route("/v2/sandboxes/{id}/logs", get(e2b::sandboxes::logs))
        .route("/snapshots", get(e2b::snapshots::list))
        .merge(builds())
        .route("/templates/aliases/{alias}", get(templates::alias))
        .route("/templates", get(templates::list))
        .route("/templates/{id}", get(templates::inspect))
        .route(
            "/templates/{id}",
            delete(templates::remove).patch(templates::change),
        )
        .route("/teams", get(access::teams).post(access::create_team))
        .route(
            "/teams/{name}",
            patch(access::change_team).delete(access::remove_team),
        )
        .route("/api-keys", get(access::keys).post(access::create_key))
        .route("/api-keys/{id}", delete(access::remove_key))
        .route("/audit", get(access::audit))
        .route("/builds", post(templates::build))
        .route("/kernels", get(kernels::list).post(kernels::import))
        .merge(e2b::absent::routes())
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
}

/// Templates that are built by steps.
fn builds() -> Router {
    use e2b::builds;
    Router::new()
        .route("/v3/templates", post(builds::request))
        .route("/templates/{id}/files/{hash}", get(builds::files))
        .route("/uploads/{way}", put(builds::put_files))
        .route("/v2/templates/{id}/builds/{build}", post(builds::start))
        .route("/templates/{id}/builds/{build}/status", get(builds::status))
        .route(
            "/templates/tags",
            post(builds::assign_tags).delete(builds::remove_tags),
        )
        .route("/templates/{id}/tags", get(builds::tags))
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
