//! One QEMU's monitor: commands with deadlines over a socket that may be wedged, hostile or gone.
//!
//! QEMU serves one client at a time and keeps listening, so a daemon that did not start it can take over. The
//! connection is made when it is needed and dropped as soon as anything about it is doubtful (a deadline that
//! passed, a malformed answer): the next command makes a new one. Descriptors travel with commands as ancillary data.
//!
//! What QEMU sends is bounded: no line longer than [`LINE_BYTES_MAX`] is collected.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::{Sink, StreamExt};
use icebox_engine::host::{ErrorKind, HostError};
use qapi::futures::{QapiEvents, QapiService, QmpStreamTokio};
use qapi::qmp::{self, MigrationStatus, QmpCommand, ShutdownCause};
use qapi::{Command, Execute, ExecuteError};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// Longest message that is accepted. The largest real ones (block nodes of a long chain) are a few hundred KiB.
const LINE_BYTES_MAX: usize = 8 << 20;

/// Between attempts to get into QEMU's queue of clients: the system does not tell when there is room.
const QUEUE_PAUSE: Duration = Duration::from_millis(2);

/// How long QEMU may take to answer anything that only looks at or flips a state.
pub(super) const QUICK: Duration = Duration::from_secs(3);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// QEMU understood, and refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's own words.
        reason: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} within {after:?}")]
    Timeout {
        /// The command.
        command: &'static str,
        /// Its deadline.
        after: Duration,
    },
    /// The connection failed.
    #[error("QEMU's monitor is gone ({command})")]
    Gone {
        /// The command.
        command: &'static str,
        /// What happened to the socket.
        source: io::Error,
    },
}

impl From<QmpError> for HostError {
    fn from(error: QmpError) -> Self {
        let kind = match &error {
            QmpError::Refused { .. } => ErrorKind::Other,
            QmpError::Timeout { .. } => ErrorKind::Timeout,
            QmpError::Gone { .. } => ErrorKind::Gone,
        };
        let message = error.to_string();
        match error {
            QmpError::Gone { source, .. } => HostError::new(kind, message).caused_by(source),
            _ => HostError::new(kind, message),
        }
    }
}

/// `blockdev-add`, with its options as JSON: the library's types cannot express `"backing": null`, without which QEMU
/// would open what the file's header names.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
pub(super) struct BlockdevAdd(pub(super) serde_json::Value);

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    const ALLOW_OOB: bool = false;
    type Ok = qapi::Empty;
}

impl QmpCommand for BlockdevAdd {}

/// What QEMU has said unasked.
#[derive(Debug)]
pub(super) struct Announced {
    /// What the guest asked for, which was the end: poweroff, reboot or panic.
    guest_ended: OnceLock<ShutdownCause>,
    /// How far the loading of device state is.
    incoming: watch::Sender<Option<MigrationStatus>>,
    /// Whether the vCPUs stand still, by us or by QEMU, as far as was heard.
    stands: watch::Sender<bool>,
    /// Open connections: what is announced may still be on its way while there is one.
    connections: watch::Sender<usize>,
}

/// The monitor of one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    path: PathBuf,
    connection: tokio::sync::Mutex<Option<Connection>>,
    announced: Arc<Announced>,
}

struct Connection {
    service: QapiService<QmpStreamTokio<Half>>,
    outgoing: Arc<Mutex<Vec<OwnedFd>>>,
    events: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.events.abort();
    }
}

impl Announced {
    /// What for, if QEMU said that the guest asked for its end. Reads what it said last: call it when the process has ended.
    pub(super) async fn guest_ended(&self) -> Option<ShutdownCause> {
        // The socket of a dead process ends, so this takes no longer than reading what is left in it.
        let mut connections = self.connections.subscribe();
        let _drained_or_timeout =
            tokio::time::timeout(QUICK, connections.wait_for(|open| *open == 0)).await;
        self.guest_ended.get().copied()
    }
}

impl Announced {
    /// The vCPUs were found standing still, which may have been announced when nobody listened.
    pub(super) fn found_standing(&self) {
        self.stands.send_replace(true);
    }

    /// Whether the vCPUs stand still, whoever stopped them.
    pub(super) fn stands(&self) -> watch::Receiver<bool> {
        self.stands.subscribe()
    }

    /// Completes when there is no connection: what QEMU announces then, nobody hears.
    pub(super) async fn deaf(&self) {
        let mut connections = self.connections.subscribe();
        // Cannot fail: the sender lives in `self`.
        connections
            .wait_for(|open| *open == 0)
            .await
            .map(drop)
            .unwrap_or_default();
    }
}

impl Qmp {
    /// The monitor that listens at `path`. Connects on first use.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            connection: tokio::sync::Mutex::new(None),
            announced: Arc::new(Announced {
                guest_ended: OnceLock::new(),
                incoming: watch::Sender::new(None),
                stands: watch::Sender::new(false),
                connections: watch::Sender::new(0),
            }),
        }
    }

    /// What QEMU says unasked while there is a connection.
    pub(super) fn announced(&self) -> Arc<Announced> {
        Arc::clone(&self.announced)
    }

    /// How far the loading of device state is, as QEMU tells without being asked.
    pub(super) fn incoming(&self) -> watch::Receiver<Option<MigrationStatus>> {
        self.announced.incoming.subscribe()
    }

    /// Connects if there is no connection yet, to hear what QEMU announces.
    pub(super) async fn connect(&self, within: Duration) -> Result<(), QmpError> {
        self.execute(qmp::query_version {}, within).await.map(drop)
    }

    /// Executes one command.
    pub(super) async fn execute<C>(&self, command: C, within: Duration) -> Result<C::Ok, QmpError>
    where
        C: QmpCommand,
        QmpStreamTokio<Half>: Sink<Execute<C, u32>, Error = io::Error>,
    {
        self.execute_with(command, Vec::new(), within).await
    }

    /// Executes one command and sends descriptors along.
    pub(super) async fn execute_with<C>(
        &self,
        command: C,
        descriptors: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<C::Ok, QmpError>
    where
        C: QmpCommand,
        QmpStreamTokio<Half>: Sink<Execute<C, u32>, Error = io::Error>,
    {
        let deadline = Instant::now() + within;
        let timeout = || QmpError::Timeout {
            command: C::NAME,
            after: within,
        };
        let gone = |source| QmpError::Gone {
            command: C::NAME,
            source,
        };
        let mut slot = timeout_at(deadline, self.connection.lock())
            .await
            .map_err(|_| timeout())?;
        // Taken out, and put back only if all is well: a cancelled command leaves no half-read connection behind.
        let connection = match slot.take() {
            Some(connection) if !connection.events.is_finished() => connection,
            _ => timeout_at(deadline, Connection::open(&self.path, &self.announced))
                .await
                .map_err(|_| timeout())?
                .map_err(gone)?,
        };
        lock(&connection.outgoing).extend(descriptors);
        match timeout_at(deadline, connection.service.execute(command)).await {
            Ok(Ok(answer)) => {
                *slot = Some(connection);
                Ok(answer)
            }
            Ok(Err(ExecuteError::Qapi(refusal))) => {
                *slot = Some(connection);
                Err(QmpError::Refused {
                    command: C::NAME,
                    reason: refusal.desc,
                })
            }
            Ok(Err(ExecuteError::Io(source))) => Err(gone(source)),
            Err(_elapsed) => Err(timeout()),
        }
    }
}

impl Connection {
    async fn open(path: &Path, announced: &Arc<Announced>) -> io::Result<Self> {
        let stream = Arc::new(connect(path).await?);
        let outgoing = Arc::new(Mutex::new(Vec::new()));
        let half = || Half {
            stream: Arc::clone(&stream),
            outgoing: Arc::clone(&outgoing),
            line: 0,
        };
        let negotiation = QmpStreamTokio::open_split(half(), half()).await?;
        let (service, events) = negotiation.negotiate().await?.into_parts();
        let announced = Arc::clone(announced);
        announced.connections.send_modify(|open| *open += 1);
        let events = tokio::spawn(listen(events, Open(announced)));
        Ok(Self {
            service,
            outgoing,
            events,
        })
    }
}

/// Connects; waits for room in QEMU's queue of clients, which has one place.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(QUEUE_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// Counts a connection as open for as long as its events are read.
struct Open(Arc<Announced>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.send_modify(|open| *open -= 1);
    }
}

async fn listen(mut events: QapiEvents<QmpStreamTokio<Half>>, open: Open) {
    while let Some(Ok(event)) = events.next().await {
        match event {
            qmp::Event::SHUTDOWN { data, .. } if data.guest => {
                // It asks once.
                open.0.guest_ended.get_or_init(|| data.reason);
            }
            qmp::Event::STOP { .. } => drop(open.0.stands.send_replace(true)),
            qmp::Event::RESUME { .. } => drop(open.0.stands.send_replace(false)),
            qmp::Event::MIGRATION { data, .. } => {
                open.0.incoming.send_replace(Some(data.status));
            }
            _ => {}
        }
    }
}

/// One direction of the socket, for a library that wants two.
#[derive(Debug)]
pub(super) struct Half {
    stream: Arc<UnixStream>,
    outgoing: Arc<Mutex<Vec<OwnedFd>>>,
    /// Bytes read since the last newline.
    line: usize,
}

impl AsyncRead for Half {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read(buffer.initialize_unfilled()) {
                Ok(count) => {
                    let new = &buffer.initialize_unfilled()[..count];
                    self.line = match new.iter().rposition(|byte| *byte == b'\n') {
                        Some(newline) => count - newline - 1,
                        None => self.line + count,
                    };
                    if self.line > LINE_BYTES_MAX {
                        return Poll::Ready(Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "message without end",
                        )));
                    }
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Half {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let mut outgoing = lock(&self.outgoing);
                let borrowed: Vec<_> = outgoing.iter().map(AsFd::as_fd).collect();
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !borrowed.is_empty()
                    && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed))
                {
                    return Err(io::Error::other("too many descriptors for one command"));
                }
                let count = sendmsg(
                    &self.stream,
                    &[IoSlice::new(bytes)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?;
                outgoing.clear();
                Ok(count)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A panic elsewhere cannot leave a list of descriptors half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
