//! One started process: its streams, its end, and who listens.
//!
//! ```text
//! stdout ─► pump ─┐                     ┌─► subscriber (bounded queue)
//! stderr ─► pump ─┼─► subscribers ──────┼─► subscriber
//! wait ───► end ──┘                     └─► …
//! ```
//!
//! The last of what was written is kept for who follows again after a break: [`super::history`].
//!
//! What a slow subscriber does to the process and to others is the business of [`super::subscribers`]. Output that
//! nobody subscribes to is read and discarded. A client that goes away takes nothing with it but its subscription.
//!
//! The end is told when the process has ended *and* its streams are read to the end. Streams that are still open
//! then belong to something it left in the background; for that we wait [`DRAIN`] altogether, not for ever. What
//! comes later is discarded, but read: nobody gets a broken pipe.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    pin::pin,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use icebox_agent_api::{exit::Exit, proto::process::ProcessConfig};
use rustix::{
    fs::OFlags,
    io::{Errno, FdFlags},
    process::{Pid, Signal},
    pty::OpenptFlags,
    termios::Winsize,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest, unix::AsyncFd},
    net::unix::pipe,
    process::{Child, Command},
    sync::{mpsc, watch},
    time::timeout,
};

use super::{history::Replay, subscribers::Subscribers};
use crate::{
    THIS_PROGRAM,
    cgroup::{Cgroups, Tree},
    launch::{Launch, LaunchError},
    sys,
    users::User,
};

/// Size of one piece of output, at most. Those of envd.
const PIPE_CHUNK: usize = 32 << 10;
const TERMINAL_CHUNK: usize = 16 << 10;
/// How long, in all, we wait for more output once the process has ended.
const DRAIN: Duration = Duration::from_millis(250);
/// A report of a launch is one short line.
const MAX_REPORT_BYTES: u64 = 64;

/// Which stream a piece of output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
    Terminal,
}

/// Something a process did.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Output(Stream, Bytes),
    End(End),
}

/// How and why a process ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) exit: Exit,
    /// It was killed because its time was up.
    pub(super) timed_out: bool,
}

/// What to start.
pub(super) struct Spec {
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) user: User,
    pub(super) env: BTreeMap<String, String>,
    pub(super) cwd: PathBuf,
    /// Columns and rows of its terminal, if it gets one.
    pub(super) terminal: Option<Winsize>,
    pub(super) stdin: bool,
    pub(super) deadline: Option<Instant>,
}

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error("failed to {operation}")]
    Host {
        operation: &'static str,
        source: io::Error,
    },
    #[error("failed to start the process")]
    Launch(#[source] LaunchError),
}

fn host<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> SpawnError {
    move |source| SpawnError::Host {
        operation,
        source: source.into(),
    }
}

/// Why input was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputError {
    #[error("the process has a terminal: it takes terminal input only")]
    IsTerminal,
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("the input of the process is closed")]
    Closed,
    #[error("failed to write to the process")]
    Write(#[source] io::Error),
}

/// Where input goes.
enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<AsyncFd<OwnedFd>>),
    Closed,
}

/// A process that was started. Lives on while anyone has it; the registry has it until some time after its end.
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    id: Pid,
    tree: Tree,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    input: tokio::sync::Mutex<Sink>,
    subscribers: Subscribers,
}

/// The streams of a process on our side.
enum Streams {
    Pipes(pipe::Receiver, pipe::Receiver),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

/// A process that runs its program, and what has to be polled for it to be looked after.
pub(super) struct Started {
    pub(super) process: Arc<Process>,
    child: Child,
    streams: Streams,
    deadline: Option<Instant>,
}

impl Process {
    /// Starts a process; returns once its program runs, or with the reason why it does not.
    ///
    /// Not cancel-safe: a process whose start is dropped half-way runs unknown to everybody.
    pub(super) async fn start(
        cgroups: &Cgroups,
        spec: Spec,
    ) -> Result<(Started, mpsc::Receiver<Event>), SpawnError> {
        let tree = cgroups.create().map_err(host("make a control group"))?;
        let Spawned {
            child,
            id,
            streams,
            sink,
        } = match Self::spawn(&tree, &spec).await {
            Ok(spawned) => spawned,
            Err(error) => {
                cgroups.release(&tree);
                return Err(error);
            }
        };
        let terminal = match &streams {
            Streams::Terminal(master) => Some(master.clone()),
            Streams::Pipes(..) => None,
        };
        let (subscribers, events) = Subscribers::new();
        let process = Arc::new(Self {
            pid: id.as_raw_nonzero().get().cast_unsigned(),
            config: spec.config,
            tag: spec.tag,
            id,
            tree,
            terminal,
            input: tokio::sync::Mutex::new(sink),
            subscribers,
        });
        Ok((
            Started {
                process,
                child,
                streams,
                deadline: spec.deadline,
            },
            events,
        ))
    }

    async fn spawn(tree: &Tree, spec: &Spec) -> Result<Spawned, SpawnError> {
        let (status, status_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(host("make the launch's pipe"))?;
        let launch = Launch {
            cgroup: tree.directory().map(Path::as_os_str),
            uid: spec.user.uid,
            gid: spec.user.gid,
            groups: &spec.user.groups(),
            terminal: spec.terminal.is_some(),
            cwd: spec.cwd.as_os_str(),
            program: OsStr::new(&spec.config.cmd),
            args: &spec.config.args,
        };
        let mut command = Command::new(THIS_PROGRAM);
        command
            .arg0("icebox-agent")
            .args(launch.to_args(status_end.as_raw_fd()))
            .env_clear()
            .envs(&spec.env);

        let (streams, sink) = match spec.terminal {
            Some(size) => {
                let (master, user_end) = open_terminal(size).map_err(host("open a terminal"))?;
                let master = Arc::new(master);
                let copy = || {
                    user_end
                        .try_clone()
                        .map(Stdio::from)
                        .map_err(host("open a terminal"))
                };
                command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
                (Streams::Terminal(master.clone()), Sink::Terminal(master))
            }
            None => {
                let (stdout, stdout_end) = output_pipe().map_err(host("make a pipe"))?;
                let (stderr, stderr_end) = output_pipe().map_err(host("make a pipe"))?;
                command.stdout(stdout_end).stderr(stderr_end);
                let sink = if spec.stdin {
                    let (end, stdin) = input_pipe().map_err(host("make a pipe"))?;
                    command.stdin(end);
                    Sink::Pipe(stdin)
                } else {
                    command.stdin(Stdio::null());
                    Sink::Closed
                };
                (Streams::Pipes(stdout, stderr), sink)
            }
        };

        // Children are only ever started from this thread, so no other one inherits the pipe by accident.
        rustix::io::fcntl_setfd(&status_end, FdFlags::empty())
            .map_err(host("share the launch's pipe"))?;
        let child = command.spawn();
        // The command holds our copies of the child's ends of its streams.
        drop(command);
        drop(status_end);
        let mut child = child.map_err(host("start the launcher"))?;
        let id = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let id = id
            .ok_or(io::ErrorKind::NotFound)
            .map_err(host("start the launcher"))?;
        let mut report = String::new();
        let status = pipe::Receiver::from_owned_fd(status).map_err(host("watch the launch"))?;
        status
            .take(MAX_REPORT_BYTES)
            .read_to_string(&mut report)
            .await
            .map_err(host("watch the launch"))?;
        match LaunchError::from_report(&report) {
            None => Ok(Spawned {
                child,
                id,
                streams,
                sink,
            }),
            Some(error) => {
                child.wait().await.map_err(host("wait for the launcher"))?;
                Err(SpawnError::Launch(error))
            }
        }
    }

    /// Follows the process from now on. An ended one yields its end alone.
    pub(super) fn subscribe(&self) -> mpsc::Receiver<Event> {
        self.subscribers.subscribe()
    }

    /// Follows the process from now on, after what it wrote from a byte on, as far as that is kept.
    pub(super) fn subscribe_from(&self, from: u64) -> (Replay, mpsc::Receiver<Event>) {
        let (replay, events) = self.subscribers.subscribe_from(Some(from));
        let nothing = Replay {
            at: from,
            missed: 0,
            events: Vec::new(),
        };
        (replay.unwrap_or(nothing), events)
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.subscribers.have_ended()
    }

    /// Writes to the process's input, for as long as it takes the process to read.
    pub(super) async fn write(&self, bytes: &[u8], to_terminal: bool) -> Result<(), InputError> {
        match (&mut *self.input.lock().await, to_terminal) {
            (Sink::Pipe(pipe), false) => pipe.write_all(bytes).await.map_err(InputError::Write),
            (Sink::Terminal(master), true) => write_terminal(master, bytes)
                .await
                .map_err(InputError::Write),
            (Sink::Terminal(_), false) => Err(InputError::IsTerminal),
            (Sink::Pipe(_), true) => Err(InputError::NoTerminal),
            (Sink::Closed, _) => Err(InputError::Closed),
        }
    }

    /// Closes the process's input, after what is being written. Safe to repeat.
    pub(super) async fn close_input(&self) -> Result<(), InputError> {
        if self.terminal.is_some() {
            return Err(InputError::IsTerminal);
        }
        *self.input.lock().await = Sink::Closed;
        Ok(())
    }

    pub(super) fn resize(&self, size: Winsize) -> Result<(), InputError> {
        let terminal = self.terminal.as_ref().ok_or(InputError::NoTerminal)?;
        rustix::termios::tcsetwinsize(terminal.get_ref(), size)
            .map_err(|errno| InputError::Write(errno.into()))
    }

    /// Sends a signal: the one that cannot be refused to all the process started, any other to its process group.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        if signal == Signal::KILL {
            self.tree.kill(self.id);
            return Ok(());
        }
        // The launcher made the process the leader of a session, so of a group with its own number.
        match rustix::process::kill_process_group(self.id, signal) {
            // A group that is gone needs no signal.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

struct Spawned {
    child: Child,
    id: Pid,
    streams: Streams,
    sink: Sink,
}

impl Started {
    /// Looks after the process until it has ended and everybody knows, and then for as long as something it left
    /// behind holds its streams open. `ended` is called in between.
    pub(super) async fn attend(self, cgroups: &Cgroups, ended: impl FnOnce()) {
        let Self {
            process,
            mut child,
            streams,
            deadline,
        } = self;
        let (tell_ended, has_ended) = watch::channel(false);
        let (tell_drained, mut drained) = mpsc::channel::<()>(1);
        let pumps = async {
            match streams {
                Streams::Pipes(stdout, stderr) => {
                    tokio::join!(
                        pump(
                            &process,
                            Stream::Stdout,
                            stdout,
                            has_ended.clone(),
                            tell_drained.clone()
                        ),
                        pump(&process, Stream::Stderr, stderr, has_ended, tell_drained),
                    );
                }
                Streams::Terminal(master) => {
                    pump(
                        &process,
                        Stream::Terminal,
                        Terminal(master),
                        has_ended,
                        tell_drained,
                    )
                    .await;
                }
            }
        };
        let end = async {
            let (exit, timed_out) = wait(&process, &mut child, deadline).await;
            tell_ended.send_replace(true);
            // Every pump drops its sender when it has nothing more to tell.
            while drained.recv().await.is_some() {}
            let end = End { exit, timed_out };
            let telling = process.subscribers.end(end);
            cgroups.release(&process.tree);
            ended();
            telling.await;
        };
        tokio::join!(pumps, end);
    }
}

/// Waits for the process, and no longer than to its deadline before it is killed.
async fn wait(process: &Process, child: &mut Child, deadline: Option<Instant>) -> (Exit, bool) {
    let mut timed_out = false;
    let mut waiting = pin!(child.wait());
    let status = match deadline {
        None => waiting.await,
        Some(deadline) => match tokio::time::timeout_at(deadline.into(), &mut waiting).await {
            Ok(status) => status,
            Err(_) => {
                timed_out = true;
                process.tree.kill(process.id);
                waiting.await
            }
        },
    };
    use std::os::unix::process::ExitStatusExt as _;
    let exit = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(0)),
        },
        // Only possible if something else in this process waited for it, and nothing does.
        Err(_) => Exit::Signal(0),
    };
    (exit, timed_out)
}

/// Something to read output from.
trait Source {
    const CHUNK: usize;

    /// Reads at least one byte into `buffer`; 0 at the end. Cancel-safe: what is not returned was not read.
    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize>;
}

impl Source for pipe::Receiver {
    const CHUNK: usize = PIPE_CHUNK;

    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        self.read_buf(buffer).await
    }
}

/// Our side of a terminal.
struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Source for Terminal {
    const CHUNK: usize = TERMINAL_CHUNK;

    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let read = |fd: &OwnedFd| {
            Ok(rustix::io::read(
                fd,
                rustix::buffer::spare_capacity(buffer),
            )?)
        };
        match self.0.async_io(Interest::READABLE, read).await {
            // How a terminal says that nobody has its other side open any more.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(0),
            result => result,
        }
    }
}

/// Forwards a stream to its end. `drained` is dropped when nothing more will be told.
async fn pump<S: Source>(
    process: &Process,
    stream: Stream,
    mut source: S,
    mut ended: watch::Receiver<bool>,
    drained: mpsc::Sender<()>,
) {
    let mut buffer = Vec::new();
    let mut patience = DRAIN;
    loop {
        buffer.reserve(S::CHUNK);
        let read = if *ended.borrow() {
            let since = Instant::now();
            let Ok(read) = timeout(patience, source.read(&mut buffer)).await else {
                break;
            };
            patience = patience.saturating_sub(since.elapsed());
            read
        } else {
            tokio::select! {
                biased;
                read = source.read(&mut buffer) => read,
                // The sender outlives the pumps. What is there to be read is read in the next round.
                _ = ended.changed() => continue,
            }
        };
        match read {
            Ok(1..) => {
                let bytes = std::mem::take(&mut buffer).into();
                process
                    .subscribers
                    .publish(Event::Output(stream, bytes))
                    .await;
            }
            // A stream that cannot be read has nothing more to tell either.
            Ok(0) | Err(_) => return,
        }
    }
    drop(drained);
    loop {
        buffer.clear();
        buffer.reserve(S::CHUNK);
        if !matches!(source.read(&mut buffer).await, Ok(1..)) {
            return;
        }
    }
}

/// A pipe that the child writes to.
fn output_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((pipe::Receiver::from_owned_fd(ours)?, theirs))
}

/// A pipe that the child reads from.
fn input_pipe() -> io::Result<(OwnedFd, pipe::Sender)> {
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((theirs, pipe::Sender::from_owned_fd(ours)?))
}

/// A terminal: our side, and the one of the process.
fn open_terminal(size: Winsize) -> io::Result<(AsyncFd<OwnedFd>, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let user_end = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, size)?;
    let current = rustix::fs::fcntl_getfl(&master)?;
    rustix::fs::fcntl_setfl(&master, current | OFlags::NONBLOCK)?;
    Ok((sys::watch(master)?, user_end))
}

async fn write_terminal(master: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = master
            .async_io(Interest::WRITABLE, |fd| {
                Ok(rustix::io::write(fd.as_fd(), bytes)?)
            })
            .await?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}
