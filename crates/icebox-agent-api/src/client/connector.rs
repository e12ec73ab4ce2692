//! From "a way to connect" to "an HTTP request answered": one connection per request, whoever makes it.

use std::{fmt, io, net::SocketAddr, path::PathBuf, sync::Arc};

use bytes::Bytes;
use connectrpc::{
    ConnectError,
    client::{BoxFuture, ClientBody, ClientTransport},
};
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

/// Body of a request, whatever it is made of.
pub(super) type RequestBody = UnsyncBoxBody<Bytes, BoxError>;
pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A connection to an agent, or to a proxy in front of it.
pub trait IoStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> IoStream for T {}

/// A way to connect.
pub trait Connector: fmt::Debug + Send + Sync + 'static {
    /// Makes a new connection.
    fn connect(&self) -> BoxFuture<'_, io::Result<Box<dyn IoStream>>>;
}

/// Connects to a TCP address.
#[derive(Debug)]
pub struct TcpConnector(pub SocketAddr);

impl Connector for TcpConnector {
    fn connect(&self) -> BoxFuture<'_, io::Result<Box<dyn IoStream>>> {
        Box::pin(async {
            let stream = TcpStream::connect(self.0).await?;
            // Events are small and each of them matters when it happens.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn IoStream>)
        })
    }
}

/// Connects to a Unix socket.
#[derive(Debug)]
pub struct UnixConnector(pub PathBuf);

impl Connector for UnixConnector {
    fn connect(&self) -> BoxFuture<'_, io::Result<Box<dyn IoStream>>> {
        Box::pin(async { Ok(Box::new(UnixStream::connect(&self.0).await?) as Box<dyn IoStream>) })
    }
}

/// Sends HTTP/1.1 requests, each over a connection of its own.
#[derive(Clone, Debug)]
pub struct HttpTransport {
    connector: Arc<dyn Connector>,
}

impl HttpTransport {
    pub(super) fn new(connector: Arc<dyn Connector>) -> Self {
        Self { connector }
    }

    pub(super) async fn request(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, BoxError> {
        let stream = self.connector.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The task ends with the response's body: at its end, or when its reader drops it. An error of the
        // connection reaches that reader too, so nothing is lost with the task's result.
        drop(tokio::spawn(connection));
        Ok(sender.send_request(request).await?)
    }
}

impl ClientTransport for HttpTransport {
    type ResponseBody = Incoming;
    type Error = ConnectError;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Incoming>, ConnectError>> {
        let transport = self.clone();
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            // HTTP/1.1 wants the path in the request line and the authority in a header.
            let path = parts
                .uri
                .path_and_query()
                .map_or("/", http::uri::PathAndQuery::as_str)
                .to_owned();
            parts.uri = path.parse().map_err(|error| {
                ConnectError::internal("the procedure's path is no URI").with_source(error)
            })?;
            parts
                .headers
                .insert(header::HOST, HeaderValue::from_static("localhost"));
            let body = body
                .map_err(|error| Box::new(error) as BoxError)
                .boxed_unsync();
            transport
                .request(Request::from_parts(parts, body))
                .await
                .map_err(|error| {
                    ConnectError::unavailable(format!("the agent cannot be reached: {error}"))
                })
        })
    }
}
