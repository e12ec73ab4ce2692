//! Parts of E2B's API that there is nothing behind here: they answer so, and nothing is half done.

use axum::Router;
use axum::extract::Request;
use axum::routing::any;
use http::StatusCode;

use crate::{ApiError, ErrorCode};

/// Where each of them is, and what it is called.
const ABSENT: [(&str, &str); 3] = [
    ("/volumes", "volumes"),
    ("/volumecontent", "volumes"),
    ("/secrets", "secrets"),
];

pub(in crate::server) fn routes() -> Router {
    ABSENT
        .into_iter()
        .fold(Router::new(), |router, (path, what)| {
            let answer = move |_: Request| async move { not_here(what) };
            router
                .route(path, any(answer))
                .route(&format!("{path}/{{*rest}}"), any(answer))
        })
}

/// The answer to a request for something that this does not have.
pub(in crate::server) fn not_here(what: &str) -> ApiError {
    ApiError::new(ErrorCode::Unsupported, format!("there are no {what} here"))
        .status(StatusCode::NOT_IMPLEMENTED)
        .hint("docs/e2b.md says what of E2B's API there is")
}
