//! The dashboard, at `/ui`: files that are the same for everybody, so they are served before anybody asks whose a request
//! is. What they show they get from the other routes, with their user's key.
//!
//! They show what guests say, so they are forbidden whatever could make that do something: scripts and styles that are
//! not files of ours, other hosts, frames.

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};

use crate::{ApiError, ErrorCode};

/// Where the page is. With the slash, since the page names its files relative to it.
const PAGE: &str = "/ui/";

/// What a browser is told of every file.
const ALWAYS: [(HeaderName, HeaderValue); 7] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ),
    (
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    ),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    // Asked about every time, and answered in a few bytes: a daemon that was upgraded is never shown by older pages.
    (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
];

/// The answer to a request for the dashboard. `None`: it is for something else.
pub(super) fn answer(request: &Request) -> Option<Response> {
    let path = request.uri().path();
    if path == "/ui" || path == "/test" {
        let there = [(header::LOCATION, PAGE)];
        return Some((StatusCode::TEMPORARY_REDIRECT, there).into_response());
    }
    let name = path.strip_prefix(PAGE)?;
    let method = request.method();
    if *method != Method::GET && *method != Method::HEAD {
        let message = format!("{path} does not take {method}");
        let error = ApiError::new(ErrorCode::Invalid, message);
        return Some(error.status(StatusCode::METHOD_NOT_ALLOWED).into_response());
    }
    let Some(file) = icebox_ui::file(name) else {
        let message = format!("there is nothing at {path}");
        return Some(ApiError::new(ErrorCode::NotFound, message).into_response());
    };
    let mut answer = match has(request.headers(), &file.etag) {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => {
            let kind = [(header::CONTENT_TYPE, file.content_type)];
            (kind, Body::from(file.content)).into_response()
        }
    };
    answer.headers_mut().extend(ALWAYS);
    if let Ok(tag) = HeaderValue::from_str(&file.etag) {
        answer.headers_mut().insert(header::ETAG, tag);
    }
    Some(answer)
}

/// Whether the client has the file with this tag already.
fn has(headers: &HeaderMap, tag: &str) -> bool {
    headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|known| known.trim().trim_start_matches("W/") == tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, path: &str, known: &str) -> Option<Response> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::IF_NONE_MATCH, known);
        answer(&request.body(Body::empty()).expect("a request"))
    }

    #[test]
    fn pages_are_served_once_and_say_what_they_may_not_do() {
        let page = asked("GET", "/ui/", "\"another\"").expect("the dashboard's");
        assert_eq!(page.status(), StatusCode::OK);
        let policy = &page.headers()[header::CONTENT_SECURITY_POLICY];
        let policy = policy.to_str().expect("text");
        assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"));
        assert_eq!(page.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        let tag = page.headers()[header::ETAG].to_str().expect("text");
        for known in [tag.to_owned(), format!("\"another\", W/{tag}")] {
            let again = asked("GET", "/ui/", &known).expect("the dashboard's");
            assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
            assert_eq!(again.headers()[header::ETAG], tag);
        }
    }

    #[test]
    fn what_is_not_the_dashboards_is_left_to_others() {
        for path in ["/", "/sandboxes", "/uivory", "/tests"] {
            assert!(asked("GET", path, "").is_none(), "{path}");
        }
        for path in ["/ui", "/test"] {
            let there = asked("GET", path, "").expect("the dashboard's");
            assert_eq!(there.headers()[header::LOCATION], "/ui/");
        }
        let missing = asked("GET", "/ui/../secret", "").expect("the dashboard's");
        assert_eq!(missing.status(), StatusCode::NOT_FOUND);
        let refused = asked("POST", "/ui/", "").expect("the dashboard's");
        assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
