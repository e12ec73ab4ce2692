//! Pages of any origin may ask: access is by key or token, never by who asks, and no cookie is ever looked at.

use axum::extract::Request;
use axum::response::Response;
use http::Method;
use http::header::{self, HeaderName, HeaderValue};

/// What every answer says.
const ALWAYS: [(HeaderName, HeaderValue); 5] = [
    (
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderValue::from_static("*"),
    ),
    (
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
    ),
    // A wildcard covers every header but this one.
    (
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("*, authorization"),
    ),
    (
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("*"),
    ),
    (
        header::ACCESS_CONTROL_MAX_AGE,
        HeaderValue::from_static("7200"),
    ),
];

/// Whether a browser asks if a page may ask.
pub(super) fn is_preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Says that every page may read the answer.
pub(super) fn allow(mut answer: Response) -> Response {
    answer.headers_mut().extend(ALWAYS);
    answer
}
