//! The front door: every request is somebody's before any handler sees it.
//!
//! Handlers have no state but the [`Context`] of their request, and only [`enter`] makes one, of a caller that it knows. So
//! a handler sees the daemon as its caller does, or not at all.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Edge, cors, e2b, path, proxy, routes, ui, unread};
use crate::access::{Caller, Premises};
use crate::types::SandboxDetail;
use crate::{API_KEY_HEADER, ApiError, Daemon, ErrorCode, TEAM_HEADER};

/// The user on the other side of a Unix socket, where there is one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Peer(pub(super) Option<u32>);

/// What a listener leads to.
#[derive(Clone)]
pub(super) struct Front {
    premises: Arc<dyn Premises>,
    edge: Edge,
    verbs: TaskTracker,
    leaving: CancellationToken,
}

impl Front {
    pub(super) fn new(
        premises: Arc<dyn Premises>,
        edge: Edge,
        verbs: TaskTracker,
        leaving: CancellationToken,
    ) -> Self {
        Self {
            premises,
            edge,
            verbs,
            leaving,
        }
    }

    /// Who asks. `None`: nobody that we know.
    fn caller(&self, request: &Request) -> Result<Option<Caller>, ApiError> {
        let headers = request.headers();
        match self.edge {
            Edge::Admin => {
                let team = self.acted_for(headers)?;
                let Peer(uid) = request.extensions().get().copied().unwrap_or_default();
                Ok(Some(Caller::Administrator { uid, team }))
            }
            Edge::Public { .. } => Ok(headers
                .get(API_KEY_HEADER)
                .and_then(|key| self.premises.caller_of_key(key.as_bytes()))),
        }
    }

    /// The team that an administrator acts for.
    fn acted_for(&self, headers: &HeaderMap) -> Result<Option<String>, ApiError> {
        let Some(team) = headers.get(TEAM_HEADER) else {
            return Ok(None);
        };
        let team = team.to_str().map_err(|error| {
            ApiError::from_error(ErrorCode::Invalid, &error).hint("a team's name is plain text")
        })?;
        self.premises.require_team(team)?;
        Ok(Some(team.to_owned()))
    }

    fn context(&self, caller: Caller) -> Context {
        Context {
            daemon: self.premises.seen_by(&caller),
            caller,
            scheme: match self.edge {
                Edge::Public { tls: true } => "https",
                Edge::Public { tls: false } | Edge::Admin => "http",
            },
            verbs: self.verbs.clone(),
            leaving: self.leaving.clone(),
        }
    }
}

/// Lets a request in, and its answer out.
pub(super) async fn enter(State(front): State<Front>, request: Request, next: Next) -> Response {
    unread::answered(request, |request| decide(front, request, next)).await
}

/// Decides whose a request is, what it is for, and whether it may pass.
async fn decide(front: Front, mut request: Request, next: Next) -> Response {
    name_host(&mut request);
    let caller = match front.caller(&request) {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    match proxy::destination(request.headers()) {
        Ok(Some(destination)) => {
            // A sandbox's port is opened by its id. A key may come along, as it may be meant for the port; one that is a
            // team's leads to no other team's sandbox.
            let context = front.context(caller.unwrap_or(Caller::Anybody));
            return proxy::forward(&context, destination, request).await;
        }
        Ok(None) => {}
        Err(error) => return cors::allow(error.into_response()),
    }
    if let Some(page) = ui::answer(&request) {
        return page;
    }
    if cors::is_preflight(&request) {
        return cors::allow(StatusCode::NO_CONTENT.into_response());
    }
    if proxy::is_signed(&request) {
        // The signature is all that there is to show.
        let context = front.context(caller.unwrap_or(Caller::Anybody));
        return cors::allow(proxy::forward_signed(&context, request).await);
    }
    if let Some(plain) = path::plain(request.uri()) {
        *request.uri_mut() = plain;
    }
    let caller = match is_open(request.uri().path()) {
        true => Some(caller.unwrap_or(Caller::Anybody)),
        false => caller,
    };
    cors::allow(serve(front, caller, request, next).await)
}

/// Has the header `Host` say whom a request is for. Where its address does, as it always does with HTTP/2, that is what
/// counts (RFC 9112, 3.2.2; RFC 9113, 8.3.1).
fn name_host(request: &mut Request) {
    let Some(authority) = request.uri().authority() else {
        return;
    };
    let host = authority.as_str();
    let host = host.rsplit_once('@').map_or(host, |(_user, host)| host);
    // Of the characters that a header may have.
    if let Ok(host) = HeaderValue::from_str(host) {
        request.headers_mut().insert(header::HOST, host);
    }
}

/// What needs no key, since it tells nothing of anybody: [`Caller::Anybody`] sees the whole daemon, so nothing else that
/// looks at it may ever be among these. To where archives are put, whoever knows the way may go it.
fn is_open(path: &str) -> bool {
    routes::OPEN.contains(&path) || path.starts_with(e2b::builds::UPLOADS)
}

/// Serves a request that is for the daemon itself.
async fn serve(front: Front, caller: Option<Caller>, mut request: Request, next: Next) -> Response {
    let Some(caller) = caller else {
        return unknown(request.headers().contains_key(API_KEY_HEADER)).into_response();
    };
    let context = front.context(caller);
    request.extensions_mut().insert(context);
    next.run(request).await
}

fn unknown(presented: bool) -> ApiError {
    let message = match presented {
        true => "the API key is not known here, or has been removed",
        false => "no API key was given",
    };
    ApiError::new(ErrorCode::Unauthorized, message)
        .hint("send a key that `icebox key create` made as the header X-API-KEY")
}

/// What every handler has at hand: the daemon as its caller sees it.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) daemon: Arc<dyn Daemon>,
    pub(super) caller: Caller,
    /// What an address begins with that leads to where the request came to.
    pub(super) scheme: &'static str,
    verbs: TaskTracker,
    pub(super) leaving: CancellationToken,
}

impl<S: Send + Sync> FromRequestParts<S> for Context {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let entered = parts.extensions.get().cloned();
        entered.ok_or_else(|| {
            ApiError::new(ErrorCode::Internal, "the request came in by no door")
                .hint("this is a bug")
        })
    }
}

impl Context {
    /// A sandbox as this caller is shown it. Who has the socket needs no token, since the proxy adds it there: so none
    /// ends up in a terminal or a file (INV-43).
    pub(super) fn shown(&self, mut sandbox: SandboxDetail) -> SandboxDetail {
        match self.caller.is_administrator() {
            true => sandbox.envd_access_token = None,
            false => e2b::form::put(&mut sandbox),
        }
        sandbox
    }

    /// Refuses what only the host's own administrator may ask for: the daemon reads the host's files as root, and teams
    /// share the host.
    pub(super) fn only_for_admin(&self, what: &str) -> Result<(), ApiError> {
        if self.caller.is_administrator() {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::Unauthorized,
            format!("{what} is not possible with a key"),
        )
        .status(StatusCode::FORBIDDEN)
        .hint("ask for it on the host, through the daemon's socket"))
    }

    /// Runs a verb to its end, whether or not the client waits for it (INV-20): a handler is dropped with its
    /// connection, a task is not.
    pub(super) async fn run_verb<T: Send + 'static, F>(
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
