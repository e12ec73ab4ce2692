//! Processes: start one, read its events, feed it.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use connectrpc::client::{CallOptions, ServerStream};
use futures_util::stream;
use hyper::body::Incoming;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{AgentClient, AgentError, ProcessService, error::rpc};
use crate::{
    exit::Exit,
    proto::process::{
        CloseStdinRequest, ConnectRequest, ConnectResponseView, ListRequest, PTY, ProcessConfig,
        ProcessEvent, ProcessInput, ProcessSelector, SendSignalRequest, Signal, StartRequest,
        StartResponseView, StreamInputRequest, UpdateRequest, process_event, process_input,
        process_selector, pty, stream_input_request,
    },
};

/// Input on its way to a process, in messages of any size; what does not fit waits for the process to read.
const INPUT_QUEUE: usize = 4;

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

impl TerminalSize {
    fn message(self) -> PTY {
        let size = pty::Size {
            cols: self.columns.into(),
            rows: self.rows.into(),
            ..pty::Size::default()
        };
        PTY {
            size: size.into(),
            ..PTY::default()
        }
    }
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// Path, or a name that is looked up in the guest's `PATH`.
    pub program: String,
    pub args: Vec<String>,
    /// On top of the sandbox's environment.
    pub env: BTreeMap<String, String>,
    /// The default working directory when absent.
    pub cwd: Option<String>,
    /// With a terminal of this size, if any.
    pub terminal: Option<TerminalSize>,
    /// Whether input will be sent; the process reads `/dev/null` otherwise. A terminal always takes input.
    pub stdin: bool,
    /// A name to find the process by.
    pub tag: Option<String>,
    /// The guest kills the process and all it started after this long.
    pub timeout: Option<Duration>,
}

impl Command {
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            program: program.into(),
            ..Self::default()
        }
    }

    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}

/// Something a process did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Stdout(Bytes),
    Stderr(Bytes),
    /// Output of a terminal, both kinds in one.
    Terminal(Bytes),
    /// The last event.
    Exited(Exit),
}

/// Everything a finished process wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
}

/// Which process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By its process id.
    Pid(u32),
    /// By the name that it was given when it was started.
    Tag(String),
}

impl Selector {
    fn message(self) -> ProcessSelector {
        match self {
            Self::Pid(pid) => by_pid(pid),
            Self::Tag(tag) => ProcessSelector {
                selector: Some(process_selector::Selector::Tag(tag)),
                ..ProcessSelector::default()
            },
        }
    }
}

/// A process that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub pid: u32,
    /// What it was called when it was started.
    pub tag: Option<String>,
    pub program: String,
    pub args: Vec<String>,
    /// Where it was started, if that was asked for.
    pub cwd: Option<String>,
}

enum Events {
    Started(ServerStream<Incoming, StartResponseView<'static>>),
    Connected(ServerStream<Incoming, ConnectResponseView<'static>>),
}

/// A process in the guest. It goes on when this is dropped; nobody reads its output then.
pub struct Process {
    client: ProcessService,
    pid: u32,
    terminal: bool,
    position: u64,
    missed: u64,
    events: Events,
}

/// Feeds a process. Dropping it leaves the process's input open; [`Input::finish`] closes it.
pub struct Input {
    client: ProcessService,
    pid: u32,
    terminal: bool,
    queue: mpsc::Sender<Bytes>,
    call: JoinHandle<Result<(), AgentError>>,
}

impl AgentClient {
    /// Starts a process and waits until it runs its program.
    ///
    /// # Errors
    /// The code of [`AgentError::Rpc`] tells what is wrong with the command: `NotFound` no such program,
    /// `PermissionDenied` not executable for the user, `InvalidArgument` no such working directory,
    /// `Unauthenticated` no such user or a wrong token.
    pub async fn start(&self, command: Command) -> Result<Process, AgentError> {
        const OPERATION: &str = "start a process in the sandbox";
        let client = self.processes();
        let terminal = command.terminal.is_some();
        let config = ProcessConfig {
            cmd: command.program,
            args: command.args,
            envs: command.env.into_iter().collect(),
            cwd: command.cwd,
            ..ProcessConfig::default()
        };
        let request = StartRequest {
            process: config.into(),
            pty: command.terminal.map(TerminalSize::message).into(),
            tag: command.tag,
            stdin: Some(command.stdin),
            ..StartRequest::default()
        };
        let options = match command.timeout {
            Some(timeout) => CallOptions::default().with_timeout(timeout),
            None => CallOptions::default(),
        };
        let stream = client
            .start_with_options(request, options)
            .await
            .map_err(rpc(OPERATION))?;
        Process::begin(OPERATION, client, terminal, Events::Started(stream)).await
    }

    /// The processes that run and were started by somebody who asked the agent for it.
    ///
    /// # Errors
    /// Any.
    pub async fn list(&self, timeout: Duration) -> Result<Vec<Running>, AgentError> {
        const OPERATION: &str = "list the processes of the sandbox";
        let client = self.processes();
        let listed = client.list(ListRequest::default());
        let listed = tokio::time::timeout(timeout, listed).await;
        let listed = listed.map_err(|_| AgentError::TimedOut {
            operation: OPERATION,
            after: timeout,
        })?;
        let listed = listed.map_err(rpc(OPERATION))?.into_owned();
        let running = listed.processes.into_iter().map(|process| {
            let config = Option::<ProcessConfig>::from(process.config).unwrap_or_default();
            Running {
                pid: process.pid,
                tag: process.tag,
                program: config.cmd,
                args: config.args,
                cwd: config.cwd,
            }
        });
        Ok(running.collect())
    }

    /// Follows a process that already runs. What it wrote before is not repeated. `terminal` says whether it has one,
    /// which decides how it takes input.
    ///
    /// # Errors
    /// `NotFound` when it does not run and did not end within the last half minute.
    pub async fn attach(&self, pid: u32, terminal: bool) -> Result<Process, AgentError> {
        const OPERATION: &str = "attach to a process in the sandbox";
        let client = self.processes();
        let request = ConnectRequest {
            process: by_pid(pid).into(),
            ..ConnectRequest::default()
        };
        let stream = client.connect(request).await.map_err(rpc(OPERATION))?;
        Process::begin(OPERATION, client, terminal, Events::Connected(stream)).await
    }

    /// Follows a process that already runs, after what it wrote from byte `from` on, counted over all its streams. The
    /// guest keeps the last 256 KiB of that; [`Process::missed`] says what it does not keep any more.
    ///
    /// # Errors
    /// As [`AgentClient::attach`].
    pub async fn attach_from(&self, which: Selector, from: u64) -> Result<Process, AgentError> {
        const OPERATION: &str = "attach to a process in the sandbox";
        let client = self.processes();
        let request = ConnectRequest {
            process: which.message().into(),
            output_from: Some(from),
            ..ConnectRequest::default()
        };
        let stream = client.connect(request).await.map_err(rpc(OPERATION))?;
        Process::begin(OPERATION, client, false, Events::Connected(stream)).await
    }

    /// Runs a process to its end and collects what it writes, which has to fit in memory.
    ///
    /// # Errors
    /// As [`AgentClient::start`]; `DeadlineExceeded` when the command's time ran out.
    pub async fn run(&self, command: Command) -> Result<Output, AgentError> {
        self.run_keeping(command, usize::MAX).await
    }

    /// Runs a process to its end and keeps the first `most` bytes of each stream that it writes, for who does not trust it.
    ///
    /// # Errors
    /// As [`AgentClient::run`].
    pub async fn run_keeping(&self, command: Command, most: usize) -> Result<Output, AgentError> {
        let mut process = self.start(command).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let keep = |kept: &mut Vec<u8>, bytes: &[u8]| {
            let room = most.saturating_sub(kept.len());
            kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        };
        loop {
            match process.next().await? {
                Event::Stdout(bytes) | Event::Terminal(bytes) => keep(&mut stdout, &bytes),
                Event::Stderr(bytes) => keep(&mut stderr, &bytes),
                Event::Exited(exit) => {
                    return Ok(Output {
                        stdout,
                        stderr,
                        exit,
                    });
                }
            }
        }
    }
}

impl Process {
    async fn begin(
        operation: &'static str,
        client: ProcessService,
        terminal: bool,
        events: Events,
    ) -> Result<Self, AgentError> {
        let mut process = Self {
            client,
            pid: 0,
            terminal,
            position: 0,
            missed: 0,
            events,
        };
        match process.message(operation).await? {
            process_event::Event::Start(start) => {
                process.pid = start.pid;
                process.position = start.output_at.unwrap_or(0);
                process.missed = start.output_missed.unwrap_or(0);
                process.terminal = start.terminal.unwrap_or(terminal);
            }
            _ => {
                return Err(AgentError::Protocol {
                    operation,
                    message: "the first event is not a start".to_owned(),
                });
            }
        }
        Ok(process)
    }

    /// Its process id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has a terminal.
    #[must_use]
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// How many bytes of its output have been told, counted over all its streams from its start. Of one that was
    /// [attached](AgentClient::attach) to without a beginning, from then on.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// How many bytes that were asked for are not kept any more.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// The next event. After [`Event::Exited`] there is none: do not ask.
    ///
    /// # Errors
    /// `DeadlineExceeded` when the guest killed it for its time-out. Any other error means that the connection broke;
    /// the process itself goes on.
    pub async fn next(&mut self) -> Result<Event, AgentError> {
        const OPERATION: &str = "follow a process in the sandbox";
        use crate::proto::process::process_event::data_event::Output;
        loop {
            match self.message(OPERATION).await? {
                process_event::Event::Data(data) => {
                    let (event, bytes) = match data.output {
                        Some(Output::Stdout(bytes)) => (Event::Stdout as fn(Bytes) -> Event, bytes),
                        Some(Output::Stderr(bytes)) => (Event::Stderr as fn(Bytes) -> Event, bytes),
                        Some(Output::Pty(bytes)) => (Event::Terminal as fn(Bytes) -> Event, bytes),
                        None => continue,
                    };
                    self.position += bytes.len() as u64;
                    return Ok(event(bytes.into()));
                }
                process_event::Event::End(end) => return Ok(Event::Exited(Exit::from_event(&end))),
                process_event::Event::Start(_) | process_event::Event::Keepalive(_) => {}
            }
        }
    }

    async fn message(
        &mut self,
        operation: &'static str,
    ) -> Result<process_event::Event, AgentError> {
        let event = match &mut self.events {
            Events::Started(stream) => stream
                .message()
                .await
                .map_err(rpc(operation))?
                .map(|message| message.to_owned_message().event),
            Events::Connected(stream) => stream
                .message()
                .await
                .map_err(rpc(operation))?
                .map(|message| message.to_owned_message().event),
        };
        event
            .and_then(|event| Option::<ProcessEvent>::from(event)?.event)
            .ok_or_else(|| AgentError::Protocol {
                operation,
                message: "the stream of events ended before the process".to_owned(),
            })
    }

    /// Opens the input of a process that was started with [`Command::stdin`] or a terminal.
    #[must_use]
    pub fn input(&self) -> Input {
        const OPERATION: &str = "send input to a process in the sandbox";
        let (queue, receiver) = mpsc::channel::<Bytes>(INPUT_QUEUE);
        let (pid, terminal) = (self.pid, self.terminal);
        let start = stream_input_request::StartEvent {
            process: by_pid(pid).into(),
            ..stream_input_request::StartEvent::default()
        };
        let start = StreamInputRequest {
            event: Some(start.into()),
            ..StreamInputRequest::default()
        };
        let requests = stream::unfold(
            (Some(start), receiver),
            move |(start, mut receiver)| async move {
                let request = match start {
                    Some(start) => start,
                    None => data_request(receiver.recv().await?, terminal),
                };
                Some((request, (None, receiver)))
            },
        );
        let client = self.client.clone();
        let call = tokio::spawn(async move {
            client
                .stream_input(requests)
                .await
                .map_err(rpc(OPERATION))?;
            Ok(())
        });
        Input {
            client: self.client.clone(),
            pid,
            terminal,
            queue,
            call,
        }
    }

    /// Sends a signal: `SIGKILL` to everything the process started, any other to its process group.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn signal(&self, signal: Signal) -> Result<(), AgentError> {
        let request = SendSignalRequest {
            process: by_pid(self.pid).into(),
            signal: signal.into(),
            ..Default::default()
        };
        self.client
            .send_signal(request)
            .await
            .map_err(rpc("signal a process in the sandbox"))?;
        Ok(())
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// `FailedPrecondition` when it has none.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), AgentError> {
        let request = UpdateRequest {
            process: by_pid(self.pid).into(),
            pty: size.message().into(),
            ..Default::default()
        };
        self.client
            .update(request)
            .await
            .map_err(rpc("resize a terminal in the sandbox"))?;
        Ok(())
    }
}

impl Input {
    /// Sends bytes, waiting while the process does not read.
    ///
    /// # Errors
    /// When the process has ended or closed its input.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), AgentError> {
        if self.queue.send(bytes).await.is_ok() {
            return Ok(());
        }
        Err(self.failure().await)
    }

    /// Waits until everything is written and closes the process's input. A terminal gets an end-of-file character.
    ///
    /// # Errors
    /// When the process has ended before it read everything.
    pub async fn finish(mut self) -> Result<(), AgentError> {
        const OPERATION: &str = "close the input of a process in the sandbox";
        if self.terminal {
            self.send(Bytes::from_static(b"\x04")).await?;
        }
        let Self {
            client,
            pid,
            terminal,
            queue,
            call,
        } = self;
        drop(queue);
        call.await.map_err(|error| AgentError::Protocol {
            operation: OPERATION,
            message: error.to_string(),
        })??;
        if !terminal {
            let request = CloseStdinRequest {
                process: by_pid(pid).into(),
                ..Default::default()
            };
            client.close_stdin(request).await.map_err(rpc(OPERATION))?;
        }
        Ok(())
    }

    async fn failure(&mut self) -> AgentError {
        const OPERATION: &str = "send input to a process in the sandbox";
        match (&mut self.call).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) => AgentError::Protocol {
                operation: OPERATION,
                message: "the call ended early".to_owned(),
            },
            Err(error) => AgentError::Protocol {
                operation: OPERATION,
                message: error.to_string(),
            },
        }
    }
}

fn by_pid(pid: u32) -> ProcessSelector {
    ProcessSelector {
        selector: Some(process_selector::Selector::Pid(pid)),
        ..ProcessSelector::default()
    }
}

fn data_request(bytes: Bytes, terminal: bool) -> StreamInputRequest {
    let bytes = Vec::from(bytes);
    let input = if terminal {
        process_input::Input::Pty(bytes)
    } else {
        process_input::Input::Stdin(bytes)
    };
    let input = ProcessInput {
        input: Some(input),
        ..ProcessInput::default()
    };
    let data = stream_input_request::DataEvent {
        input: input.into(),
        ..stream_input_request::DataEvent::default()
    };
    StreamInputRequest {
        event: Some(data.into()),
        ..StreamInputRequest::default()
    }
}
