//! The daemon's HTTP server: one file per resource, one for the way to sandboxes' own ports.
//!
//! Two edges serve the same routes. The *admin* edge is the Unix socket: who may open it may do everything, and the
//! daemon adds a sandbox's token to requests for its agent. The *public* edge is TCP: REST needs the key, and a
//! sandbox's ports need its full id.

mod connections;
mod events;
mod extract;
mod host;
mod kernels;
mod proxy;
mod sandboxes;
mod templates;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::serve::Listener;
use http::StatusCode;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::key::KeyHash;
use crate::types::SandboxDetail;
use crate::{API_KEY_HEADER, ApiError, Daemon, ErrorCode};

pub use connections::{CONNECTIONS_MAX, FIRST_REQUEST_TIMEOUT, IDLE_TIMEOUT, Limits};

/// Who is on the other side of a listener.
#[derive(Clone, Debug)]
pub enum Edge {
    /// Whoever may open the Unix socket: trusted with everything.
    Admin,
    /// Anybody: REST only with the key.
    Public {
        /// The hash of that key.
        key: KeyHash,
    },
}

/// What every route has at hand.
#[derive(Clone)]
struct Context {
    daemon: Arc<dyn Daemon>,
    edge: Edge,
    verbs: TaskTracker,
    leaving: CancellationToken,
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
    /// All routes of `daemon`, as seen from `edge`.
    pub fn new(daemon: Arc<dyn Daemon>, edge: Edge) -> Self {
        let context = Context {
            daemon,
            edge,
            verbs: TaskTracker::new(),
            leaving: CancellationToken::new(),
        };
        Self {
            limits: Limits::default(),
            verbs: context.verbs.clone(),
            connections: TaskTracker::new(),
            leaving: context.leaving.clone(),
            router: router(context),
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
        self.connections.spawn(connections::accept(
            listener,
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

fn router(context: Context) -> Router {
    Router::new()
        .route("/health", get(host::health))
        .route("/version", get(host::version))
        .route("/doctor", get(host::doctor))
        .route("/stats", get(host::stats))
        .route("/gc", post(host::gc))
        .route("/drain", post(host::drain))
        .route("/events", get(events::events))
        .route("/sandboxes", get(sandboxes::list).post(sandboxes::create))
        .route(
            "/v2/sandboxes",
            get(sandboxes::list).post(sandboxes::create),
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
        .route("/templates", get(templates::list))
        .route("/templates/{id}", get(templates::inspect))
        .route("/templates/{id}", delete(templates::remove))
        .route("/builds", post(templates::build))
        .route("/kernels", get(kernels::list).post(kernels::import))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(context.clone())
        .layer(middleware::from_fn_with_state(context, enter))
}

/// Decides what a request is for, and whether it may pass.
async fn enter(State(context): State<Context>, request: Request, next: Next) -> Response {
    match proxy::destination(request.uri(), request.headers()) {
        Ok(Some(destination)) => return proxy::forward(&context, destination, request).await,
        Ok(None) => {}
        Err(error) => return error.into_response(),
    }
    if let Edge::Public { key } = &context.edge {
        let presented = request.headers().get(API_KEY_HEADER);
        if !presented.is_some_and(|presented| key.admits(presented.as_bytes())) {
            let message = if presented.is_some() {
                "the API key is not the one of this daemon"
            } else {
                "no API key was given"
            };
            return ApiError::new(ErrorCode::Unauthorized, message)
                .hint("send the key that `icebox serve --listen` showed when it was made as the header X-API-KEY")
                .into_response();
        }
    }
    next.run(request).await
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

impl Context {
    /// A sandbox as this edge shows it. Who has the socket needs no token, since the proxy adds it there: so none
    /// ends up in a terminal or a file (INV-43).
    fn shown(&self, mut sandbox: SandboxDetail) -> SandboxDetail {
        if matches!(self.edge, Edge::Admin) {
            sandbox.envd_access_token = None;
        }
        sandbox
    }

    /// Refuses what only the host's own administrator may ask for: the daemon reads the host's files as root.
    fn only_for_admin(&self, what: &str) -> Result<(), ApiError> {
        match self.edge {
            Edge::Admin => Ok(()),
            Edge::Public { .. } => Err(ApiError::new(
                ErrorCode::Unauthorized,
                format!("{what} is not possible with a key"),
            )
            .status(StatusCode::FORBIDDEN)
            .hint("ask for it on the host, through the daemon's socket")),
        }
    }

    /// Runs a verb to its end, whether or not the client waits for it (INV-20): a handler is dropped with its
    /// connection, a task is not.
    async fn run_verb<T: Send + 'static, F>(
        &self,
        verb: impl FnOnce(Arc<dyn Daemon>) -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let verb = self.verbs.spawn(verb(Arc::clone(&self.daemon)));
        verb.await.unwrap_or_else(|panic| {
            Err(ApiError::from_error(ErrorCode::Internal, &panic)
                .hint("this is a bug; the daemon's log has more"))
        })
    }
}
