//! What an answer leaves unread of its request.
//!
//! With HTTP/1.1 a connection's next request begins where the body of the one before ends. Where that was not read, the server
//! answers, and closes the connection: clients that keep connections, as all of E2B's SDKs do, learn of it from their next
//! request, which fails though nobody has seen it. So a body that is short and on its way is read before its request is
//! answered; of any other, the answer says that the connection is closed.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::{Buf as _, Bytes};
use http::{HeaderValue, StatusCode, Version, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// The most that is read for nothing.
const BYTES_MAX: usize = 64 << 10;
/// How long it is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// A request's body, which may be asked for back.
#[derive(Debug)]
struct Owned {
    body: Body,
    has_ended: bool,
}

impl Owned {
    /// Whether there is nothing left to be read.
    fn is_read(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }
}

/// What the handler has of it.
#[derive(Debug)]
struct Lent(Arc<Mutex<Owned>>);

impl Lent {
    fn owned<T>(&self, look: impl FnOnce(&mut Owned) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.owned(|owned| {
            let polled = Pin::new(&mut owned.body).poll_frame(task);
            owned.has_ended |= matches!(polled, Poll::Ready(None | Some(Err(_))));
            polled
        })
    }

    fn is_end_stream(&self) -> bool {
        self.owned(|owned| owned.is_read())
    }

    fn size_hint(&self) -> SizeHint {
        self.owned(|owned| owned.body.size_hint())
    }
}

/// Answers a request by `handle`, and leaves its connection as the client takes it to be.
pub(super) async fn answered<F>(request: Request, handle: impl FnOnce(Request) -> F) -> Response
where
    F: Future<Output = Response>,
{
    if request.version() >= Version::HTTP_2 || request.body().is_end_stream() {
        return handle(request).await;
    }
    // It is sent once it is asked for, and nobody has.
    let is_withheld = request.headers().contains_key(header::EXPECT);
    let (parts, body) = request.into_parts();
    let owned = Arc::new(Mutex::new(Owned {
        body,
        has_ended: false,
    }));
    let lent = Body::new(Lent(Arc::clone(&owned)));
    let mut response = handle(Request::from_parts(parts, lent)).await;
    // Where it still belongs to somebody, it is on its way to a sandbox.
    let Some(owned) = Arc::into_inner(owned) else {
        return response;
    };
    let owned = owned.into_inner().unwrap_or_else(PoisonError::into_inner);
    let is_clean = owned.is_read() || (!is_withheld && read_rest(owned.body).await);
    if !is_clean && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

/// Whether what is left of a body could be read.
async fn read_rest(mut body: Body) -> bool {
    let read = async {
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            bytes += frame.data_ref().map_or(0, Bytes::remaining);
            if bytes > BYTES_MAX {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap_or(false)
}
