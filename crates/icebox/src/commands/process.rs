//! A command in a sandbox, wired to this terminal: what `exec` and `shell` share.

use std::io::Read as _;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use icebox_agent_api::client::{
    AgentClient, AgentError, Command, Event, Input, Process, Selector, TerminalSize,
};
use icebox_agent_api::proto::process::Signal;
use icebox_agent_api::{AGENT_PORT, SANDBOX_ID_HEADER, SANDBOX_PORT_HEADER};
use icebox_api::client::ClientError;
use icebox_api::types::{ResumeRequest, SandboxDetail, State};
use tokio::io::{AsyncWriteExt as _, stderr, stdout};
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Context, Ended, verb};
use crate::failure::{Failure, NOT_EXECUTABLE, NOT_FOUND, OURS, TIMED_OUT};
use crate::terminal::{self, RawMode};

/// How long a guest may take to accept a signal. A wedged one must not keep who presses Ctrl-C from leaving.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The size of a terminal that is shown on none.
const TERMINAL: TerminalSize = TerminalSize {
    columns: 80,
    rows: 24,
};

/// How long a daemon may be away while a command is followed.
const COME_BACK: Duration = Duration::from_secs(30);

/// Between two attempts to find a command again.
const AGAIN: Duration = Duration::from_millis(100);

/// What one read of stdin takes at most.
const CHUNK: usize = 32 << 10;

/// Speaks to the agent of a running sandbox, through the daemon. One that is paused is resumed first if it is to be
/// resumed for whoever asks for it, or if `resume` says so.
///
/// # Errors
/// There is no such sandbox, or it does not run.
pub(super) async fn agent(
    context: &Context,
    sandbox: &str,
    resume: bool,
) -> Result<(AgentClient, SandboxDetail), Failure> {
    let mut sandbox = context.client.inspect(sandbox, false).await?;
    if resume && sandbox.listed.state == State::Paused {
        let how = ResumeRequest::default();
        let id = sandbox.listed.sandbox_id;
        sandbox = context.client.resume(&id, &how).await?.sandbox;
    }
    let label = verb::label(&sandbox);
    let state = sandbox.listed.state;
    let wakes = sandbox.lifecycle.is_some_and(|it| it.auto_resume);
    if state != State::Running && !(state == State::Paused && wakes) {
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

/// Where a command runs.
pub(super) struct Following<'a> {
    pub(super) context: &'a Context,
    pub(super) client: AgentClient,
    pub(super) sandbox: SandboxDetail,
}

/// Runs `command` to its end.
pub(super) async fn run(following: Following<'_>, mut command: Command, wiring: Wiring) -> Ended {
    let forward_input = command.stdin || wiring == Wiring::Terminal;
    if wiring == Wiring::Terminal {
        command.terminal = Some(terminal::size().unwrap_or(TERMINAL));
    }
    let program = command.program.clone();
    // Before the command starts: none may be missed.
    let interrupts = Interrupts::new()?;
    let process = following
        .client
        .start(command)
        .await
        .map_err(|error| not_started(&program, &error))?;
    wire(following, process, wiring, forward_input, interrupts).await
}

/// Starts `command` and prints its process id.
pub(super) async fn detach(
    context: &Context,
    client: &AgentClient,
    mut command: Command,
    tty: bool,
) -> Ended {
    if tty {
        command.terminal = Some(terminal::size().unwrap_or(TERMINAL));
    }
    let (program, tag) = (command.program.clone(), command.tag.clone());
    let process = client.start(command).await;
    let process = process.map_err(|error| not_started(&program, &error))?;
    if context.output.is_json() {
        let started = serde_json::json!({ "pid": process.pid(), "tag": tag });
        context.output.document(&started)?;
    } else {
        context.output.line(process.pid().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows a command to its end that runs already.
pub(super) async fn follow(
    following: Following<'_>,
    process: Process,
    wiring: Wiring,
    forward_input: bool,
) -> Ended {
    let interrupts = Interrupts::new()?;
    tell_missed(&following, &process);
    if let (Wiring::Terminal, Some(size)) = (wiring, terminal::size()) {
        // One that has just ended needs no size.
        process.resize(size).await.ok();
    }
    wire(following, process, wiring, forward_input, interrupts).await
}

/// Says how much of what it was to show is not kept any more.
fn tell_missed(following: &Following<'_>, process: &Process) {
    if process.missed() > 0 {
        let output = &following.context.output;
        output.say(format!(
            "{} bytes of earlier output are no longer kept",
            process.missed()
        ));
    }
}

async fn wire(
    following: Following<'_>,
    process: Process,
    wiring: Wiring,
    forward_input: bool,
    interrupts: Interrupts,
) -> Ended {
    let context = following.context;
    // From here on the terminal passes everything through; the guard puts it back on every way out.
    let _raw = (wiring == Wiring::Terminal).then(RawMode::enter).flatten();
    let running = Running {
        following,
        process,
        input: forward_input.then(read_stdin),
        inputs: None,
        interrupts,
    };
    match wiring {
        Wiring::Document => running.collect(context).await,
        Wiring::Streams | Wiring::Terminal => running.stream().await,
    }
}

struct Running<'a> {
    following: Following<'a>,
    process: Process,
    input: Option<mpsc::Receiver<Bytes>>,
    /// Takes the next way for input, when one has broken.
    inputs: Option<mpsc::UnboundedSender<Input>>,
    interrupts: Interrupts,
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
        let (inputs, mut next_input) = mpsc::unbounded_channel();
        self.inputs = Some(inputs);
        tokio::spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                // What was not taken is sent again; what was is on its way, or lost with it.
                while input.send(chunk.clone()).await.is_err() {
                    let Some(next) = next_input.recv().await else {
                        return;
                    };
                    input = next;
                }
            }
            // Fails if the process has ended: then there is nothing to close, and no next one.
            while input.finish().await.is_err() {
                let Some(next) = next_input.recv().await else {
                    return;
                };
                input = next;
            }
        });
    }

    /// The next event; signals and new window sizes are passed on meanwhile.
    async fn next(&mut self) -> Result<Event, Failure> {
        loop {
            // Cancel-safe: a message that has not been returned yet stays in the process's buffer.
            tokio::select! {
                event = self.process.next() => match event {
                    Ok(event) => return Ok(event),
                    Err(error) => self.follow_again(error).await?,
                },
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

/// What came of an attempt to follow a command again.
enum Again {
    Follows(Box<Process>),
    /// The daemon is not there, or not that far.
    NotYet,
    /// Its sandbox has been paused, and so has the command.
    Paused,
    /// Its sandbox does not run, or the command does not.
    Gone,
}

impl Running<'_> {
    /// Finds the command again after the connection to it broke: the daemon may have been restarted, and the command does
    /// not notice. What it wrote meanwhile comes next.
    async fn follow_again(&mut self, error: AgentError) -> Result<(), Failure> {
        use connectrpc::ErrorCode as Code;
        // These say something about the command, not about the way to it.
        let says = [
            Code::DeadlineExceeded,
            Code::ResourceExhausted,
            Code::NotFound,
        ];
        if error.code().is_some_and(|code| says.contains(&code)) {
            return Err(broken(&error));
        }
        let until = Instant::now() + COME_BACK;
        let process = loop {
            // Cancel-safe: following is all that is given up.
            let again = tokio::select! {
                again = Self::try_again(&self.following, &self.process) => again,
                interrupt = self.interrupts.next() => match interrupt {
                    Interrupt::Signal(_) => Again::Gone,
                    Interrupt::Resized => Again::NotYet,
                },
            };
            match again {
                Again::Follows(process) => break *process,
                Again::NotYet if Instant::now() < until => tokio::time::sleep(AGAIN).await,
                Again::Paused => return Err(self.paused()),
                Again::NotYet | Again::Gone => return Err(broken(&error)),
            }
        };
        tell_missed(&self.following, &process);
        if let Some(inputs) = &self.inputs {
            let said = "the connection broke, and the command was found again; input that was on its way may be lost";
            self.following.context.output.say(said);
            // The task that takes it ends with its input.
            inputs.send(process.input()).ok();
        }
        self.process = process;
        Ok(())
    }

    /// What became of a command whose sandbox was paused, and how to find it again.
    fn paused(&self) -> Failure {
        let label = verb::label(&self.following.sandbox);
        let (pid, from) = (self.process.pid(), self.process.position());
        Failure::new(format!(
            "sandbox {label} was paused, and its process {pid} with it"
        ))
        .hint(format!(
            "both go on with `icebox resume {label}`; `icebox attach {label} {pid} --from {from}` follows the command from here"
        ))
        .exit(OURS)
    }

    async fn try_again(following: &Following<'_>, process: &Process) -> Again {
        let Following {
            context,
            client,
            sandbox,
        } = following;
        let sandbox = match context
            .client
            .inspect(&sandbox.listed.sandbox_id, false)
            .await
        {
            Ok(sandbox) => sandbox,
            Err(ClientError::Refused(_)) => return Again::Gone,
            Err(_) => return Again::NotYet,
        };
        if sandbox.listed.verb.is_some() {
            // It is being paused, perhaps, and must not be resumed for this.
            return Again::NotYet;
        }
        match sandbox.listed.state {
            State::Running => {}
            State::Paused => return Again::Paused,
            State::Stopped | State::Broken => return Again::Gone,
        }
        let position = process.position();
        let which = Selector::Pid(process.pid());
        match client.attach_from(which, position).await {
            // Another process with its number has written less.
            Ok(process) if process.position() < position => Again::Gone,
            Ok(process) => Again::Follows(Box::new(process)),
            Err(error) if error.code() == Some(connectrpc::ErrorCode::NotFound) => Again::Gone,
            Err(_) => Again::NotYet,
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
