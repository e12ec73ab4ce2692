//! Who may call, and as whom.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, header},
    middleware::Next,
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use icebox_agent_api::TOKEN_HEADER;

use super::{error::HttpError, state::Agent};
use crate::users::{UnknownUser, User};

/// SDKs show this text.
const UNAUTHORIZED: &str =
    "unauthorized access, please provide a valid access token or method signing if supported";

/// Lets a request through that carries the access token, or any if the sandbox has none.
pub(super) async fn require_access(
    State(agent): State<Arc<Agent>>,
    request: Request,
    next: Next,
) -> Result<Response, HttpError> {
    if agent.allows_access(presented_token(request.headers())) {
        Ok(next.run(request).await)
    } else {
        Err(unauthorized())
    }
}

pub(super) fn unauthorized() -> HttpError {
    HttpError::unauthorized(UNAUTHORIZED)
}

/// The token a request carries, if any.
pub(super) fn presented_token(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(TOKEN_HEADER).map(HeaderValue::as_bytes)
}

/// The user a request acts as: the one it names by Basic authentication (no password is looked at: whoever has the
/// token may be anyone in the sandbox), else the sandbox's default user.
pub(super) fn acting_user(agent: &Agent, headers: &HeaderMap) -> Result<User, UnknownUser> {
    let named = headers.get(header::AUTHORIZATION).and_then(|value| {
        let encoded = value.to_str().ok()?.strip_prefix("Basic ")?;
        let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let name = decoded
            .split_once(':')
            .map_or(decoded.as_str(), |(name, _)| name)
            .to_owned();
        Some(name).filter(|name| !name.is_empty())
    });
    User::find(&named.unwrap_or_else(|| agent.default_user()))
}
