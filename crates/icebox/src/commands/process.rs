//! A command in a sandbox, wired to this terminal: what `exec` and `shell` share.

use std::io::Read as _;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use icebox_agent_api::client::{AgentClient, AgentError, Command, Event, Process, TerminalSize};
use icebox_agent_api::proto::process::Signal;
use icebox_agent_api::{AGENT_PORT, SANDBOX_ID_HEADER, SANDBOX_PORT_HEADER};
use icebox_api::types::{SandboxDetail, State};
use tokio::io::{AsyncWriteExt as _, stderr, stdout};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::mpsc;

use super::{Context, Ended, verb};
use crate::failure::{Failure, NOT_EXECUTABLE, NOT_FOUND, OURS, TIMED_OUT};
use crate::terminal::{self, RawMode};

/// How long a guest may take to accept a signal. A wedged one must not keep who presses Ctrl-C from leaving.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What one read of stdin takes at most.
const CHUNK: usize = 32 << 10;

/// Speaks to the agent of a running sandbox, through the daemon.
///
/// # Errors
/// There is no such sandbox, or it does not run.
pub(super) async fn agent(
    context: &Context,
    sandbox: &str,
) -> Result<(AgentClient, SandboxDetail), Failure> {
    let sandbox = context.client.inspect(sandbox, false).await?;
    let label = verb::label(&sandbox);
    let state = sandbox.listed.state;
    if state != State::Running {
        let failure = Failure::new(format!(
            "sandbox {label} is {state}, and nothing runs in it"
        ));
        return Err(match state {
            State::Paused => failure.hint(format!("continue it with `icebox resume {label}`")),
            State::Stopped => failure.hint(format!("boot it with `icebox start {label}`")),
            State::Broken | State::Running => failure.hint(format!("see `icebox inspect {label}`")),
        });
    }
    let id = HeaderValue::from_str(&sandbox.listed.sandbox_id)
        .map_err(|error| Failure::because("the daemon named a sandbox strangely", &error))?;
    let client = AgentClient::unix(context.client.socket())
        .with_header(http::HeaderName::from_static(SANDBOX_ID_HEADER), id)
        .with_header(
            http::HeaderName::from_static(SANDBOX_PORT_HEADER),
            HeaderValue::from(AGENT_PORT),
        );
    Ok((client, sandbox))
}

/// What the command is wired to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wiring {
    /// This process's streams.
    Streams,
    /// A terminal of its own, shown on this one.
    Terminal,
    /// Nothing: what it writes is printed as one JSON document at its end.
    Document,
}

/// Runs `command` to its end.
pub(super) async fn run(
    client: &AgentClient,
    mut command: Command,
    wiring: Wiring,
    context: &Context,
) -> Ended {
    let forward_input = command.stdin || wiring == Wiring::Terminal;
    if wiring == Wiring::Terminal {
        command.terminal = Some(terminal::size().unwrap_or(TerminalSize {
            columns: 80,
            rows: 24,
        }));
    }
    let program = command.program.clone();
    // Before the command starts: none may be missed.
    let mut interrupts = Interrupts::new()?;
    let process = client
        .start(command)
        .await
        .map_err(|error| not_started(&program, &error))?;
    // From here on the terminal passes everything through; the guard puts it back on every way out.
    let _raw = (wiring == Wiring::Terminal).then(RawMode::enter).flatten();
    let running = Running {
        process,
        input: forward_input.then(read_stdin),
        interrupts: &mut interrupts,
    };
    match wiring {
        Wiring::Document => running.collect(context).await,
        Wiring::Streams | Wiring::Terminal => running.stream().await,
    }
}

struct Running<'a> {
    process: Process,
    input: Option<mpsc::Receiver<Bytes>>,
    interrupts: &'a mut Interrupts,
}

impl Running<'_> {
    /// Passes everything on as it comes.
    async fn stream(mut self) -> Ended {
        self.feed();
        let (mut out, mut err) = (stdout(), stderr());
        loop {
            let written = match self.next().await? {
                Event::Stdout(bytes) | Event::Terminal(bytes) => {
                    out.write_all(&bytes).await.and(out.flush().await)
                }
                Event::Stderr(bytes) => err.write_all(&bytes).await.and(err.flush().await),
                Event::Exited(exit) => return Ok(code(exit.shell_code())),
            };
            if let Err(error) = written {
                // Nobody reads any more: what a pipe's reader does to its writer.
                if let Err(error) = self.process.signal(Signal::SIGNAL_SIGTERM).await {
                    return Err(broken(&error));
                }
                let failure = Failure::from(error);
                return Err(if failure.is_quiet() {
                    failure
                } else {
                    failure.exit(OURS)
                });
            }
        }
    }

    /// Keeps what it writes and prints it in the end.
    async fn collect(mut self, context: &Context) -> Ended {
        self.feed();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.next().await? {
                Event::Stdout(bytes) | Event::Terminal(bytes) => out.extend_from_slice(&bytes),
                Event::Stderr(bytes) => err.extend_from_slice(&bytes),
                Event::Exited(exit) => {
                    context.output.document(&serde_json::json!({
                        "exitCode": exit.shell_code(),
                        "stdout": String::from_utf8_lossy(&out),
                        "stderr": String::from_utf8_lossy(&err),
                    }))?;
                    return Ok(code(exit.shell_code()));
                }
            }
        }
    }

    /// Feeds stdin to the process beside everything else. The process decides when it has had enough.
    fn feed(&mut self) {
        let Some(mut chunks) = self.input.take() else {
            return;
        };
        let mut input = self.process.input();
        tokio::spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                if input.send(chunk).await.is_err() {
                    return;
                }
            }
            // Fails if the process has ended: then there is nothing to close.
            input.finish().await.ok();
        });
    }

    /// The next event; signals and new window sizes are passed on meanwhile.
    async fn next(&mut self) -> Result<Event, Failure> {
        loop {
            // Cancel-safe: a message that has not been returned yet stays in the process's buffer.
            tokio::select! {
                event = self.process.next() => return event.map_err(|error| broken(&error)),
                interrupt = self.interrupts.next() => {
                    let passing_on = async {
                        match interrupt {
                            Interrupt::Signal(signal) => self.process.signal(signal).await,
                            Interrupt::Resized => match terminal::size() {
                                Some(size) => self.process.resize(size).await,
                                None => Ok(()),
                            },
                        }
                    };
                    match tokio::time::timeout(SIGNAL_TIMEOUT, passing_on).await {
                        // An error says that the process has just ended: its last event is on its way.
                        Ok(_) => {}
                        Err(_) if matches!(interrupt, Interrupt::Resized) => {}
                        Err(_) => return Err(Failure::new(
                            "the sandbox does not answer: the command was not told to end, and may go on",
                        )
                        .hint("`icebox inspect` and `icebox logs` show how the sandbox is; `icebox stop` ends it")
                        .exit(OURS)),
                    }
                }
            }
        }
    }
}

enum Interrupt {
    Signal(Signal),
    Resized,
}

/// What arrives here and is meant for the guest's process.
struct Interrupts {
    interrupt: Signals,
    terminate: Signals,
    hang_up: Signals,
    window: Signals,
}

impl Interrupts {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind)
                .map_err(|error| Failure::because("cannot listen for signals", &error).exit(OURS))
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            window: listen(SignalKind::window_change())?,
        })
    }

    async fn next(&mut self) -> Interrupt {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupt::Signal(Signal::SIGNAL_SIGINT),
            _ = self.terminate.recv() => Interrupt::Signal(Signal::SIGNAL_SIGTERM),
            _ = self.hang_up.recv() => Interrupt::Signal(Signal::SIGNAL_SIGHUP),
            _ = self.window.recv() => Interrupt::Resized,
        }
    }
}

/// Reads stdin on a thread of its own: a read of a terminal cannot be given up, and must not keep this process from
/// ending. The channel holds one chunk, so a process that does not read holds the reader up, not this memory.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (chunks, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    let chunk = Bytes::copy_from_slice(&buffer[..read]);
                    if chunks.blocking_send(chunk).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

/// The guest's status as ours. Exit codes have eight bits here and there.
fn code(status: i32) -> ExitCode {
    ExitCode::from(u8::try_from(status & 0xff).unwrap_or(u8::MAX))
}

/// A command that could not be started. Codes as shells have them.
fn not_started(program: &str, error: &AgentError) -> Failure {
    use connectrpc::ErrorCode as Code;
    match error.code() {
        Some(Code::NotFound) => {
            Failure::new(format!("{program}: no such program in the sandbox")).exit(NOT_FOUND)
        }
        Some(Code::PermissionDenied) => {
            Failure::new(format!("{program}: not executable in the sandbox")).exit(NOT_EXECUTABLE)
        }
        Some(Code::DeadlineExceeded) => time_over(),
        _ => Failure::of(error).exit(OURS),
    }
}

/// A command that had not ended, or not even started, when the time that `--timeout` gave it was over.
fn time_over() -> Failure {
    Failure::new("the command's time is over; it was killed").exit(TIMED_OUT)
}

/// A command that was under way.
fn broken(error: &AgentError) -> Failure {
    if error.code() == Some(connectrpc::ErrorCode::DeadlineExceeded) {
        return time_over();
    }
    Failure::because(
        "lost the command: its sandbox paused, stopped or went away",
        error,
    )
    .hint("see `icebox ls`")
    .exit(OURS)
}

/// Tells the command what kind of terminal it has, unless it was told already.
pub(super) fn name_terminal(command: &mut Command) {
    let kind = std::env::var("TERM").unwrap_or_else(|_| "xterm-256color".to_owned());
    command.env.entry("TERM".to_owned()).or_insert(kind);
}
