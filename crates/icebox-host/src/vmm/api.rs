//! The API of one VMM: HTTP over a socket that may be silent, hostile or gone.
//!
//! A connection for each request: what went wrong with one is no other's trouble, and a daemon that did not start this VMM
//! needs nothing of the one that did. Every request has its deadline, and what comes back is bounded. A tap travels with
//! a request as ancillary data, which is why no finished client serves.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use icebox_engine::host::{ErrorKind, HostError};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use crate::vmm::watched::TalkError;

/// Longest answer that is accepted. The longest real one, `vm.info`, has some kilobytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// How much of a refusal's words is shown.
const REASON_CHARACTERS_MAX: usize = 1000;
/// Between looks at whether a VMM that makes its socket itself has done so.
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// How long it may take to answer anything that only looks at or flips a state.
pub(crate) const QUICK: Duration = Duration::from_secs(3);

/// How one kind of VMM is talked to.
#[derive(Debug)]
pub(crate) struct Dialect {
    /// What kind of VMM it is, in words.
    pub(crate) name: &'static str,
    /// What the path of every request begins with.
    pub(crate) prefix: &'static str,
    /// The words of a refusal, from its body, if they can be told.
    pub(crate) reason: fn(&[u8]) -> Option<String>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// It understood, and refused.
    #[error("{vmm} refused {request}: {reason}")]
    Refused {
        /// What kind of VMM it is, in words.
        vmm: &'static str,
        /// The request.
        request: &'static str,
        /// Its own words, the innermost reason last.
        reason: String,
    },
    /// No answer in time.
    #[error("{vmm} did not answer {request} within {after:?}")]
    Timeout {
        /// What kind of VMM it is, in words.
        vmm: &'static str,
        /// The request.
        request: &'static str,
        /// Its deadline.
        after: Duration,
    },
    /// An answer that is none.
    #[error("{vmm}'s answer to {request} makes no sense: {what}")]
    Unclear {
        /// What kind of VMM it is, in words.
        vmm: &'static str,
        /// The request.
        request: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The connection failed.
    #[error("{vmm}'s API is gone ({request})")]
    Gone {
        /// What kind of VMM it is, in words.
        vmm: &'static str,
        /// The request.
        request: &'static str,
        /// What happened to the socket.
        source: io::Error,
    },
}

impl TalkError for ApiError {
    fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

impl From<ApiError> for HostError {
    fn from(error: ApiError) -> Self {
        let kind = match &error {
            ApiError::Refused { reason, .. } if reason.contains("os error 28") => {
                ErrorKind::Exhausted
            }
            ApiError::Refused { .. } | ApiError::Unclear { .. } => ErrorKind::Other,
            ApiError::Timeout { .. } => ErrorKind::Timeout,
            ApiError::Gone { .. } => ErrorKind::Gone,
        };
        let message = error.to_string();
        match error {
            ApiError::Gone { source, .. } => HostError::new(kind, message).caused_by(source),
            _ => HostError::new(kind, message),
        }
    }
}

/// The API of one VMM.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    dialect: &'static Dialect,
    socket: PathBuf,
}

impl Api {
    /// `socket` is where it listens. A guest that has taken its VMM over must not be able to put another socket there.
    pub(crate) fn new(dialect: &'static Dialect, socket: PathBuf) -> Self {
        Self { dialect, socket }
    }

    /// What kind of VMM it is, in words.
    pub(crate) fn vmm(&self) -> &'static str {
        self.dialect.name
    }

    /// Waits until it listens.
    pub(crate) async fn listens(&self, within: Duration) -> Result<(), ApiError> {
        let connects = async {
            loop {
                let Err(error) = UnixStream::connect(&self.socket).await else {
                    return Ok(());
                };
                match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        tokio::time::sleep(BETWEEN_LOOKS).await;
                    }
                    _ => {
                        return Err(ApiError::Gone {
                            vmm: self.vmm(),
                            request: "connect",
                            source: error,
                        });
                    }
                }
            }
        };
        let connected = tokio::time::timeout(within, connects).await;
        connected.unwrap_or(Err(ApiError::Timeout {
            vmm: self.vmm(),
            request: "connect",
            after: within,
        }))
    }

    /// Asks for something.
    pub(crate) async fn get(
        &self,
        request: &'static str,
        within: Duration,
    ) -> Result<Value, ApiError> {
        let answer = self
            .ask(Method::GET, request, Bytes::new(), Vec::new(), within)
            .await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Unclear {
            vmm: self.vmm(),
            request,
            what: error.to_string(),
        })
    }

    /// Has it do something.
    pub(crate) async fn put(
        &self,
        request: &'static str,
        body: Option<&Value>,
        within: Duration,
    ) -> Result<(), ApiError> {
        self.put_with(request, body, Vec::new(), within).await
    }

    /// Has it do something with descriptors, which are closed here whatever becomes of it.
    pub(crate) async fn put_with(
        &self,
        request: &'static str,
        body: Option<&Value>,
        descriptors: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<(), ApiError> {
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        self.ask(Method::PUT, request, body, descriptors, within)
            .await
            .map(drop)
    }

    /// Has it change what it has.
    pub(crate) async fn patch(
        &self,
        request: &'static str,
        body: &Value,
        within: Duration,
    ) -> Result<(), ApiError> {
        let body = body.to_string().into();
        self.ask(Method::PATCH, request, body, Vec::new(), within)
            .await
            .map(drop)
    }

    async fn ask(
        &self,
        method: Method,
        request: &'static str,
        body: Bytes,
        descriptors: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<Bytes, ApiError> {
        let asked = exchange(
            self.dialect,
            &self.socket,
            method,
            request,
            body,
            descriptors,
        );
        tokio::time::timeout(within, asked)
            .await
            .unwrap_or(Err(ApiError::Timeout {
                vmm: self.vmm(),
                request,
                after: within,
            }))
    }
}

async fn exchange(
    dialect: &'static Dialect,
    socket: &Path,
    method: Method,
    request: &'static str,
    body: Bytes,
    descriptors: Vec<OwnedFd>,
) -> Result<Bytes, ApiError> {
    let vmm = dialect.name;
    let gone = |source| ApiError::Gone {
        vmm,
        request,
        source,
    };
    let failed = |error: hyper::Error| {
        if error.is_parse() {
            let what = error.to_string();
            ApiError::Unclear { vmm, request, what }
        } else {
            gone(io::Error::other(error))
        }
    };
    let wire = Wire {
        stream: UnixStream::connect(socket).await.map_err(gone)?,
        outgoing: descriptors,
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(wire)).await.map_err(failed)?;
    let ask = async {
        let mut ask = Request::builder()
            .method(method)
            .uri(format!("{}{request}", dialect.prefix))
            .header(header::HOST, "localhost");
        if !body.is_empty() {
            ask = ask.header(header::CONTENT_TYPE, "application/json");
        }
        let ask = ask.body(Full::new(body));
        let ask = ask.map_err(|error| gone(io::Error::other(error)))?;
        let answer = sender.send_request(ask).await.map_err(failed)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
        let body =
            body.collect()
                .await
                .map_err(|error| match error.downcast::<hyper::Error>() {
                    Ok(error) => failed(*error),
                    Err(error) => ApiError::Unclear {
                        vmm,
                        request,
                        what: error.to_string(),
                    },
                })?;
        let body = body.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let words = (dialect.reason)(&body);
        let words = words.unwrap_or_else(|| String::from_utf8_lossy(&body).trim().to_owned());
        let words: String = words.chars().take(REASON_CHARACTERS_MAX).collect();
        Err(ApiError::Refused {
            vmm,
            request,
            reason: format!("{status}: {words}"),
        })
    };
    // The connection is this request's alone, and is closed with it.
    tokio::pin!(connection);
    tokio::pin!(ask);
    tokio::select! {
        biased;
        answer = &mut ask => answer,
        ended = &mut connection => match ended {
            // What it had to say is with the request.
            Ok(()) => ask.await,
            Err(error) => Err(failed(error)),
        },
    }
}

/// A socket whose first bytes carry descriptors.
struct Wire {
    stream: UnixStream,
    outgoing: Vec<OwnedFd>,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.outgoing.is_empty() {
            return Pin::new(&mut self.stream).poll_write(cx, bytes);
        }
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                send(&self.stream, bytes, &self.outgoing)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    self.outgoing.clear();
                    return Poll::Ready(Ok(count));
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors for one request"));
    }
    let count = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(count)
}
