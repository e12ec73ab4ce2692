//! The daemon's side of a launch.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::process::{Ended, Process};
use super::{BoxSpec, LAUNCHER_ARGUMENT, Report};

/// A launch takes milliseconds; a launcher that has not answered by then is stuck on something (a dead network file
/// system) that will not get better.
const DEADLINE: Duration = Duration::from_secs(20);
/// Longest line that a launcher may send.
const REPORT_BYTES_MAX: u64 = 64 << 10;

/// Why a launch failed.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher could not be started.
    #[error("start launcher {}", .program.display())]
    Spawn {
        /// What was executed.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A step in the launcher failed.
    #[error("{step}")]
    Step {
        /// What it was doing, with the thing.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The launcher ended without a word.
    #[error("launcher ended without a report ({0:?})")]
    Died(Ended),
    /// The launcher did not answer.
    #[error("launcher did not answer within {DEADLINE:?}")]
    Timeout,
    /// The control socket failed.
    #[error("talk to launcher")]
    Control(#[source] io::Error),
}

impl From<LaunchError> for HostError {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Step { step, source } => HostError::io(format!("launch: {step}"), source),
            LaunchError::Timeout => HostError::new(ErrorKind::Timeout, error.to_string()),
            other => HostError::new(ErrorKind::Other, "launch").caused_by(other),
        }
    }
}

/// How to start a launcher.
#[derive(Clone, Debug)]
pub struct Launcher {
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Launcher {
    /// This very program, asked by [`LAUNCHER_ARGUMENT`]: also right when the file has been replaced by an upgrade.
    #[must_use]
    pub fn this_program() -> Self {
        Self::new("/proc/self/exe", [LAUNCHER_ARGUMENT])
    }

    /// A program whose `main` calls [`launcher_main`](super::launcher_main) for these arguments.
    pub fn new<A: Into<OsString>>(
        program: impl Into<PathBuf>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        Self {
            program: program.into(),
            arguments: arguments.into_iter().map(Into::into).collect(),
        }
    }

    /// Starts a VMM in its box. It is the VMM, no more the launcher, on return.
    ///
    /// On failure, and when this is cancelled before the VMM exists, no process remains.
    ///
    /// # Errors
    /// See [`LaunchError`].
    pub async fn launch(&self, spec: &BoxSpec) -> Result<Process, LaunchError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(LaunchError::Control)?;
        ours.set_nonblocking(true).map_err(LaunchError::Control)?;
        let spawn_error = |source| LaunchError::Spawn {
            program: self.program.clone(),
            source,
        };
        // Nothing here that would turn posix_spawn into fork. The child is reaped through its pidfd.
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(spawn_error)?;
        let process = Process::watch_child(child).map_err(spawn_error)?;

        let outcome = match tokio::time::timeout(DEADLINE, converse(ours, spec)).await {
            Ok(Ok(true)) => return Ok(process),
            Ok(Ok(false)) => None,
            Ok(Err(error)) => Some(error),
            Err(_elapsed) => Some(LaunchError::Timeout),
        };
        process.kill().map_err(LaunchError::Control)?;
        let ended = process.ended().await;
        Err(outcome.unwrap_or(LaunchError::Died(ended)))
    }
}

/// Hands over the spec, lets the launcher go on, and waits until it has become the VMM. `false` if it ended silently.
async fn converse(socket: StdUnixStream, spec: &BoxSpec) -> Result<bool, LaunchError> {
    talk(socket, spec)
        .await
        .unwrap_or_else(|error| match error.kind() {
            // Its end of the socket is closed: it is dead, whatever we were doing.
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Ok(false),
            _ => Err(LaunchError::Control(error)),
        })
}

async fn talk(socket: StdUnixStream, spec: &BoxSpec) -> io::Result<Result<bool, LaunchError>> {
    let mut socket = UnixStream::from_std(socket)?;
    let json = serde_json::to_vec(spec)?;
    let length = u32::try_from(json.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "spec is too long"))?;
    let mut message = length.to_le_bytes().to_vec();
    message.extend(json);
    socket.write_all(&message).await?;

    let (reader, mut writer) = socket.split();
    let mut reports = BufReader::new(reader.take(REPORT_BYTES_MAX));
    match next(&mut reports).await? {
        Some(Report::Ready) => {}
        Some(Report::Failed { step, errno, error }) => return Ok(Err(failed(step, errno, error))),
        None => return Ok(Ok(false)),
    }
    writer.write_all(b"g").await?;
    match next(&mut reports).await? {
        Some(Report::Failed { step, errno, error }) => Ok(Err(failed(step, errno, error))),
        Some(Report::Ready) => Err(io::ErrorKind::InvalidData.into()),
        None => Ok(Ok(true)),
    }
}

async fn next(reports: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<Report>> {
    let mut line = Vec::new();
    if reports.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

fn failed(step: String, errno: Option<i32>, error: String) -> LaunchError {
    LaunchError::Step {
        step,
        source: match errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(error),
        },
    }
}
