//! TLS on the TCP listener, with the operator's certificate or one of this host's own authority.
//!
//! The handshake is made when a connection is first read from, so in the connection's own task and within its time for the
//! first request: whoever dawdles over it keeps nobody else waiting. A certificate that is replaced on disk is used from
//! the next connection on.

use std::fs::Metadata;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use axum::serve::Listener;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::authority::Authority;
use crate::failure::Failure;

/// Why a certificate cannot be served.
#[derive(Debug, thiserror::Error)]
enum CertificateError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    #[error("{} has no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("the certificate and its key do not go together")]
    Unusable(#[from] rustls::Error),
    #[error("this host's authority cannot sign")]
    Unsigned(#[from] rcgen::Error),
}

/// How old a certificate of this host's own authority gets: far less than it may.
const RENEWED_AFTER: Duration = Duration::from_hours(30 * 24);

/// What connections are accepted with.
pub(super) struct Certificate {
    origin: Origin,
    config: Arc<ServerConfig>,
}

/// Where a certificate comes from.
enum Origin {
    Files {
        chain: PathBuf,
        key: PathBuf,
        loaded_at: Option<(SystemTime, SystemTime)>,
    },
    Authority {
        authority: Box<Authority>,
        signed_at: Instant,
    },
}

impl Certificate {
    /// Reads a certificate with those that it is signed by, and its key, both PEM. Blocks.
    ///
    /// # Errors
    /// They cannot be read, or do not go together.
    pub(super) fn load(chain: &Path, key: &Path) -> Result<Self, Failure> {
        let loaded_at = changed_at(chain, key);
        let config = config(chain, key).map_err(|error| {
            Failure::because("cannot serve TLS", &error).hint(
                "a certificate is PEM, its own first and then those that it is signed by; its key is PEM, without a password",
            )
        })?;
        let origin = Origin::Files {
            chain: chain.to_owned(),
            key: key.to_owned(),
            loaded_at,
        };
        Ok(Self { origin, config })
    }

    /// Has this host's own authority sign one.
    ///
    /// # Errors
    /// It cannot.
    pub(super) fn signed(authority: Authority) -> Result<Self, Failure> {
        let config =
            signed(&authority).map_err(|error| Failure::because("cannot serve TLS", &error))?;
        let origin = Origin::Authority {
            authority: Box::new(authority),
            signed_at: Instant::now(),
        };
        Ok(Self { origin, config })
    }

    /// What the next connection is accepted with.
    fn acceptor(&mut self) -> TlsAcceptor {
        let renewed = match &mut self.origin {
            Origin::Files {
                chain,
                key,
                loaded_at,
            } => {
                let changed_at = changed_at(chain, key);
                // Tried once for each change: half of it may be there yet.
                let changed = *loaded_at != changed_at;
                *loaded_at = changed_at;
                changed.then(|| config(chain, key))
            }
            Origin::Authority {
                authority,
                signed_at,
            } => (signed_at.elapsed() > RENEWED_AFTER).then(|| {
                *signed_at = Instant::now();
                signed(authority)
            }),
        };
        match renewed {
            Some(Ok(config)) => {
                self.config = config;
                tracing::info!("a new certificate is served");
            }
            Some(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    "the certificate was replaced and cannot be used; the one before is served"
                );
            }
            None => {}
        }
        TlsAcceptor::from(Arc::clone(&self.config))
    }
}

/// When certificate and key were changed. `None` while one is not there.
fn changed_at(chain: &Path, key: &Path) -> Option<(SystemTime, SystemTime)> {
    let at = |path: &Path| {
        let metadata = std::fs::metadata(path);
        metadata.and_then(|it: Metadata| it.modified()).ok()
    };
    Some((at(chain)?, at(key)?))
}

fn config(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::Read { path, source }
    };
    let certificates = CertificateDer::pem_file_iter(chain).map_err(read(chain))?;
    let certificates: Vec<_> = certificates
        .collect::<Result<_, _>>()
        .map_err(read(chain))?;
    if certificates.is_empty() {
        return Err(CertificateError::Empty {
            path: chain.to_owned(),
        });
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(read(key))?;
    serving(certificates, key)
}

fn signed(authority: &Authority) -> Result<Arc<ServerConfig>, CertificateError> {
    let signed = authority.sign()?;
    serving(signed.chain, signed.key)
}

fn serving(
    certificates: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, CertificateError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A TCP listener whose connections are encrypted.
pub(super) struct TlsListener {
    listener: TcpListener,
    certificate: Certificate,
}

impl TlsListener {
    pub(super) fn new(listener: TcpListener, certificate: Certificate) -> Self {
        Self {
            listener,
            certificate,
        }
    }
}

impl Listener for TlsListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, from) = Listener::accept(&mut self.listener).await;
        super::send_at_once(&stream);
        let handshake = self.certificate.acceptor().accept(stream);
        (Connection::Greeting(Box::new(handshake)), from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection, from its first byte on.
pub(super) enum Connection {
    Greeting(Box<tokio_rustls::Accept<TcpStream>>),
    Open(Box<TlsStream<TcpStream>>),
    /// The handshake failed.
    Refused,
}

impl Connection {
    fn open(&mut self, task: &mut Context<'_>) -> Poll<io::Result<Pin<&mut TlsStream<TcpStream>>>> {
        if let Self::Greeting(handshake) = self {
            *self = match ready!(Pin::new(handshake.as_mut()).poll(task)) {
                Ok(stream) => Self::Open(Box::new(stream)),
                Err(error) => {
                    *self = Self::Refused;
                    return Poll::Ready(Err(error));
                }
            };
        }
        Poll::Ready(match self {
            Self::Open(stream) => Ok(Pin::new(stream.as_mut())),
            Self::Greeting(_) | Self::Refused => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.get_mut().open(task))?.poll_read(task, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.get_mut().open(task))?.poll_write(task, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.get_mut().open(task))?.poll_flush(task)
    }

    fn poll_shutdown(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            // Nothing was agreed on, so there is nothing to take leave of.
            Self::Greeting(_) | Self::Refused => Poll::Ready(Ok(())),
            Self::Open(stream) => Pin::new(stream.as_mut()).poll_shutdown(task),
        }
    }
}
