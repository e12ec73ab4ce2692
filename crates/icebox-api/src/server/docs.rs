//! `/docs`: the document, to read. One page without anything from elsewhere, that asks for `/openapi.json` and shows it.

use axum::response::{Html, IntoResponse};
use http::header::{self, HeaderName};

/// It runs its own script alone, and asks this host alone.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn page() -> impl IntoResponse {
    let headers: [(HeaderName, &str); 3] = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, Html(include_str!("docs.html")))
}
