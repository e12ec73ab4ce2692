//! What handlers take from requests, with refusals in our own form.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http_body_util::{BodyExt as _, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::{ApiError, ErrorCode};

/// The largest request body that a REST route reads. The largest legitimate one is a create with its environment.
const BODY_MAX: usize = 1 << 20;

/// How long such a body may take to come. Nothing is held meanwhile but a place among the connections.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON body. An empty one, or `null`, reads as `{}`, whatever its content type: clients send either.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = Limited::new(request.into_body(), BODY_MAX).collect();
        let body = tokio::time::timeout(BODY_TIMEOUT, body)
            .await
            .map_err(|_| {
                let seconds = BODY_TIMEOUT.as_secs();
                let message = format!("the request body did not come within {seconds} s");
                ApiError::new(ErrorCode::Timeout, message).status(StatusCode::REQUEST_TIMEOUT)
            })?
            .map_err(|error| {
                ApiError::from_error(ErrorCode::Invalid, error.as_ref())
                    .hint(format!("a request body has at most {BODY_MAX} bytes"))
            })?
            .to_bytes();
        let text: &[u8] = match &*body {
            b"" | b"null" => b"{}",
            text => text,
        };
        serde_json::from_slice(text)
            .map(Self)
            .map_err(|error| ApiError::new(ErrorCode::Invalid, format!("request body: {error}")))
    }
}

/// The variable parts of a path.
pub(super) struct Path<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(path)| Self(path))
            .map_err(|error| {
                // Ours to answer for if the route has other parts than its handler takes.
                let code = match error.status().is_client_error() {
                    true => ErrorCode::Invalid,
                    false => ErrorCode::Internal,
                };
                ApiError::new(code, error.body_text())
            })
    }
}

/// A query string.
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|error| ApiError::new(ErrorCode::Invalid, error.body_text()))
    }
}

/// Whether the client asked for the sandbox in the answer, `Prefer: return=representation` (RFC 7240): then a verb
/// that found nothing to do succeeds and says so, where E2B's answer is 409.
pub(super) struct WantsSandbox(pub(super) bool);

impl<S: Send + Sync> FromRequestParts<S> for WantsSandbox {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let wants = parts
            .headers
            .get_all("prefer")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|preference| preference.trim() == "return=representation");
        Ok(Self(wants))
    }
}

/// A response of JSON lines, sent as they come.
pub(super) fn lines<T: Serialize>(items: impl Stream<Item = T> + Send + 'static) -> Response {
    answer(items.map(|item| line(&item)))
}

/// As [`lines`], of items that may never end: cut, without a proper end, when the daemon leaves.
pub(super) fn lines_until<T: Serialize>(
    items: impl Stream<Item = T> + Send + 'static,
    leaving: CancellationToken,
) -> Response {
    let cut = {
        let leaving = leaving.clone();
        stream::once(async move {
            leaving
                .is_cancelled()
                .then(|| Err(axum::Error::new(Leaving)))
        })
    };
    let lines = items
        .map(|item| line(&item).map_err(axum::Error::new))
        .take_until(leaving.cancelled_owned());
    answer(lines.chain(cut.filter_map(std::future::ready)))
}

/// The client must not take what it has got for everything.
#[derive(Debug, thiserror::Error)]
#[error("the daemon is leaving")]
struct Leaving;

fn line(item: &impl Serialize) -> serde_json::Result<Bytes> {
    let mut line = serde_json::to_vec(item)?;
    line.push(b'\n');
    Ok(line.into())
}

fn answer<E: Into<axum::BoxError>>(
    lines: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
) -> Response {
    (
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(pieces: impl Stream<Item = &'static str> + Send + 'static) -> Result<u16, u16> {
        let body = Body::from_stream(pieces.map(Ok::<_, Infallible>));
        let read = Json::<u16>::from_request(Request::new(body), &()).await;
        read.map(|Json(read)| read)
            .map_err(|error| error.status_code().as_u16())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        assert_eq!(read(stream::iter(["1", "2"])).await, Ok(12));
        let begun = tokio::time::Instant::now();
        let dawdling = stream::iter(["1"]).chain(stream::pending());
        assert_eq!(read(dawdling).await, Err(408));
        assert_eq!(begun.elapsed(), BODY_TIMEOUT);
        // However often a little of it does.
        let dripping = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some((" ", ()))
        });
        assert_eq!(read(dripping).await, Err(408));
    }
}
