//! The host's side of the agent: used by the daemon, the command line and the tests.
//!
//! A client is a way to connect ([`Connector`]) plus headers that every request carries. The daemon connects to the
//! sandbox's own address; the command line connects to the daemon's socket and names the sandbox in headers, and the
//! daemon passes the bytes on. Every call makes its own connection: a pooled one would outlive a pause and fail on
//! its next use, and connecting costs little next to what a call does.
//!
//! Nothing here retries. Calls without a `timeout` argument last as long as what they wait for; drop the future (or
//! the handle it gave) to end them. A process goes on when its handle is dropped.

mod connector;
mod error;
mod files;
mod process;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use connectrpc::client::ClientConfig;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::{Serialize, de::DeserializeOwned};

use self::{connector::HttpTransport, error::failure_of};
pub use self::{
    connector::{Connector, IoStream, TcpConnector, UnixConnector},
    error::AgentError,
    files::{FileReader, Upload},
    process::{Command, Event, Input, Output, Process, Running, Selector, TerminalSize},
};
use crate::{
    CLOCK_PATH, HEALTH_PATH, INIT_PATH, METRICS_PATH, PREPARE_PATH, TOKEN_HEADER, Token,
    control::{Clock, ClockReport, Init, InitReport, Metrics, Prepare, PrepareReport},
    proto::{filesystem::FilesystemClient, process::ProcessClient},
};

/// The generated client of the process service, over this crate's transport.
pub type ProcessService = ProcessClient<HttpTransport>;
/// The generated client of the filesystem service, over this crate's transport.
pub type FilesystemService = FilesystemClient<HttpTransport>;

/// Any answer that is read whole fits in this; what does not comes from something that is no agent.
const MAX_REPLY_BYTES: usize = 1 << 20;

/// Speaks to one sandbox's agent. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AgentClient {
    transport: HttpTransport,
    headers: HeaderMap,
}

impl AgentClient {
    /// A client over any kind of connection.
    pub fn new(connector: impl Connector) -> Self {
        Self {
            transport: HttpTransport::new(Arc::new(connector)),
            headers: HeaderMap::new(),
        }
    }

    /// Connects to the agent itself.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self::new(TcpConnector(address))
    }

    /// Connects to a proxy on a Unix socket, which finds the sandbox by headers (see [`AgentClient::with_header`]).
    #[must_use]
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::new(UnixConnector(path.into()))
    }

    /// Adds a header to every request.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Authenticates every request by `token`.
    ///
    /// A token that cannot be a header value is left out; the agent then refuses what needs one.
    #[must_use]
    pub fn with_token(mut self, token: &Token) -> Self {
        if let Ok(mut value) = HeaderValue::from_str(token.expose()) {
            value.set_sensitive(true);
            self.headers.insert(TOKEN_HEADER, value);
        }
        self
    }

    /// Runs processes and owns files as `user` instead of the sandbox's default user.
    #[must_use]
    pub fn with_user(mut self, user: &str) -> Self {
        let credentials = format!("Basic {}", STANDARD.encode(format!("{user}:")));
        if let Ok(value) = HeaderValue::from_str(&credentials) {
            self.headers.insert(header::AUTHORIZATION, value);
        }
        self
    }

    /// Whether the agent answers, within `timeout`. One attempt.
    ///
    /// # Errors
    /// [`AgentError::Unreachable`] and [`AgentError::TimedOut`] are what a guest that still boots gives.
    pub async fn health(&self, timeout: Duration) -> Result<(), AgentError> {
        const OPERATION: &str = "check the agent's health";
        let call = async {
            let response = self
                .send(OPERATION, Method::GET, HEALTH_PATH, Bytes::new())
                .await?;
            if response.status() == StatusCode::NO_CONTENT {
                Ok(())
            } else {
                Err(failure_of(OPERATION, response).await)
            }
        };
        bounded(OPERATION, timeout, call).await
    }

    /// Makes the guest the sandbox it is to be; see [`Init`]. The client must carry the token in force *before*.
    ///
    /// # Errors
    /// Any; repeat it with the same client unless it was refused.
    pub async fn init(&self, init: &Init, timeout: Duration) -> Result<InitReport, AgentError> {
        self.control("initialise the guest", INIT_PATH, init, timeout)
            .await
    }

    /// Moves the guest's clock and reads it; see [`Clock`].
    ///
    /// # Errors
    /// Any. Of a call that timed out it is not known whether the clock was moved.
    pub async fn clock(&self, clock: Clock, timeout: Duration) -> Result<ClockReport, AgentError> {
        self.control("move the guest's clock", CLOCK_PATH, &clock, timeout)
            .await
    }

    /// Quiesces the guest before a capture; see [`Prepare`].
    ///
    /// # Errors
    /// Any; a capture goes on regardless. `timeout` bounds the call, `prepare.timeout_ms` the work in the guest.
    pub async fn prepare(
        &self,
        prepare: &Prepare,
        timeout: Duration,
    ) -> Result<PrepareReport, AgentError> {
        self.control(
            "prepare the guest for a capture",
            PREPARE_PATH,
            prepare,
            timeout,
        )
        .await
    }

    /// How much the guest uses.
    ///
    /// # Errors
    /// Any.
    pub async fn metrics(&self, timeout: Duration) -> Result<Metrics, AgentError> {
        const OPERATION: &str = "read the guest's metrics";
        let call = async {
            let response = self
                .send(OPERATION, Method::GET, METRICS_PATH, Bytes::new())
                .await?;
            read_json(OPERATION, response).await
        };
        bounded(OPERATION, timeout, call).await
    }

    /// The generated client of the process service, for what [`AgentClient::start`] does not cover.
    #[must_use]
    pub fn processes(&self) -> ProcessService {
        ProcessClient::new(self.transport.clone(), self.rpc_config())
    }

    /// The generated client of the filesystem service.
    #[must_use]
    pub fn filesystem(&self) -> FilesystemService {
        FilesystemClient::new(self.transport.clone(), self.rpc_config())
    }

    fn rpc_config(&self) -> ClientConfig {
        // The authority is what a proxy takes as "look at the headers"; the agent ignores it.
        ClientConfig::new(http::Uri::from_static("http://localhost"))
            .with_default_headers(self.headers.clone())
    }

    async fn control<Q: Serialize, A: DeserializeOwned>(
        &self,
        operation: &'static str,
        path: &str,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, AgentError> {
        let body = serde_json::to_vec(request).map_err(|error| AgentError::Protocol {
            operation,
            message: error.to_string(),
        })?;
        let call = async {
            let response = self
                .send(operation, Method::POST, path, body.into())
                .await?;
            read_json(operation, response).await
        };
        bounded(operation, timeout, call).await
    }

    async fn send(
        &self,
        operation: &'static str,
        method: Method,
        path_and_query: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, AgentError> {
        let body = http_body_util::Full::new(body)
            .map_err(|never| match never {})
            .boxed_unsync();
        self.send_body(operation, method, path_and_query, HeaderMap::new(), body)
            .await
    }

    async fn send_body(
        &self,
        operation: &'static str,
        method: Method,
        path_and_query: &str,
        more_headers: HeaderMap,
        body: connector::RequestBody,
    ) -> Result<Response<Incoming>, AgentError> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = path_and_query
            .parse()
            .map_err(|error: http::uri::InvalidUri| AgentError::Protocol {
                operation,
                message: error.to_string(),
            })?;
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().extend(more_headers);
        request
            .headers_mut()
            .insert(header::HOST, HeaderValue::from_static("localhost"));
        self.transport
            .request(request)
            .await
            .map_err(|source| AgentError::Unreachable { operation, source })
    }
}

async fn bounded<T>(
    operation: &'static str,
    after: Duration,
    call: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    tokio::time::timeout(after, call)
        .await
        .unwrap_or(Err(AgentError::TimedOut { operation, after }))
}

async fn read_json<A: DeserializeOwned>(
    operation: &'static str,
    response: Response<Incoming>,
) -> Result<A, AgentError> {
    if !response.status().is_success() {
        return Err(failure_of(operation, response).await);
    }
    let body = Limited::new(response.into_body(), MAX_REPLY_BYTES)
        .collect()
        .await
        .map_err(|error| AgentError::Protocol {
            operation,
            message: error.to_string(),
        })?
        .to_bytes();
    serde_json::from_slice(&body).map_err(|error| AgentError::Protocol {
        operation,
        message: error.to_string(),
    })
}
