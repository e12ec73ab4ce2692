//! The service `process.Process`: starts processes and finds them again.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest,
    ServiceResult, ServiceStream,
};
use futures_util::{StreamExt as _, stream};
use icebox_agent_api::proto::process::{
    self as proto, CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse,
    ListRequest, ListResponse, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector,
    SendInputRequest, SendInputResponse, SendSignalRequest, SendSignalResponse, StartRequest,
    StartResponse, StreamInputRequest, StreamInputResponse, UpdateRequest, UpdateResponse,
    process_event, process_input, process_selector, stream_input_request,
};
use rustix::{io::Errno, process::Signal, termios::Winsize};
use tokio::sync::mpsc;

use super::{
    auth::acting_user,
    child::{End, Event, InputError, Process, SpawnError, Spec, Stream},
    keepalive_of, paths,
    state::Agent,
};
use crate::{
    chain,
    launch::{LaunchError, Step},
    users::User,
};

/// Where programs are looked for unless the sandbox or the request says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long the end of a process can still be asked for.
const END_RETENTION: Duration = Duration::from_secs(30);

/// The processes that were started, by pid, until some time after their end.
#[derive(Default)]
pub(super) struct Registry(Mutex<HashMap<u32, Arc<Process>>>);

impl Registry {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Arc<Process>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a process, unless its pid has become another's meanwhile.
    fn forget(&self, process: &Arc<Process>) {
        let mut all = self.all();
        if all
            .get(&process.pid)
            .is_some_and(|current| Arc::ptr_eq(current, process))
        {
            all.remove(&process.pid);
        }
    }

    fn find(&self, selector: Option<&ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let all = self.all();
        match selector.and_then(|selector| selector.selector.as_ref()) {
            None => Err(ConnectError::invalid_argument("no process is selected")),
            Some(process_selector::Selector::Pid(pid)) => all.get(pid).cloned().ok_or_else(|| {
                ConnectError::not_found(format!("process with pid {pid} not found"))
            }),
            Some(process_selector::Selector::Tag(tag)) => all
                .values()
                .filter(|process| process.tag.as_ref() == Some(tag))
                .min_by_key(|process| process.has_ended())
                .cloned()
                .ok_or_else(|| {
                    ConnectError::not_found(format!("process with tag {tag} not found"))
                }),
        }
    }

    /// As [`Registry::find`], but only what still runs.
    fn find_running(
        &self,
        selector: Option<&ProcessSelector>,
    ) -> Result<Arc<Process>, ConnectError> {
        let process = self.find(selector)?;
        if process.has_ended() {
            return Err(ConnectError::not_found(format!(
                "process with pid {} not found",
                process.pid
            )));
        }
        Ok(process)
    }
}

/// The service.
pub(super) struct Service {
    agent: Arc<Agent>,
}

impl Service {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn spec(&self, ctx: &RequestContext, request: StartRequest) -> Result<Spec, ConnectError> {
        let user = acting_user(&self.agent, ctx.headers())
            .map_err(|unknown| ConnectError::unauthenticated(unknown.to_string()))?;
        let config = Option::<proto::ProcessConfig>::from(request.process)
            .ok_or_else(|| ConnectError::invalid_argument("no process is given"))?;
        if config.cmd.is_empty() {
            return Err(ConnectError::invalid_argument("no command is given"));
        }
        let strings = config
            .args
            .iter()
            .chain(config.envs.iter().flat_map(|(name, value)| [name, value]));
        if strings.chain([&config.cmd]).any(|text| text.contains('\0')) {
            return Err(ConnectError::invalid_argument(
                "a command, argument or variable contains a zero byte",
            ));
        }
        let cwd = self.cwd(&user, config.cwd.as_deref())?;
        let env = self.env(&user, &config);
        let terminal = Option::<proto::PTY>::from(request.pty).map(|pty| winsize(&pty));
        Ok(Spec {
            tag: request.tag,
            user,
            env,
            cwd,
            terminal,
            stdin: request.stdin.unwrap_or(true),
            deadline: ctx.deadline(),
            config,
        })
    }

    /// What the client asks for has to exist. What the sandbox or the user has as a default may not, on an image
    /// that nobody made for this; then it is the next best.
    fn cwd(&self, user: &User, asked: Option<&str>) -> Result<PathBuf, ConnectError> {
        if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
            let cwd = paths::resolve(&self.agent, user, asked);
            return if cwd.is_dir() {
                Ok(cwd)
            } else {
                Err(ConnectError::invalid_argument(format!(
                    "cwd '{}' does not exist",
                    cwd.display()
                )))
            };
        }
        let defaults = [self.agent.workdir(user), user.home.clone()];
        Ok(defaults
            .into_iter()
            .find(|cwd| cwd.is_dir())
            .unwrap_or_else(|| PathBuf::from("/")))
    }

    fn env(&self, user: &User, config: &proto::ProcessConfig) -> BTreeMap<String, String> {
        let mut env: BTreeMap<String, String> = [
            ("PATH", PATH.to_owned()),
            ("HOME", user.home.display().to_string()),
            ("USER", user.name.clone()),
            ("LOGNAME", user.name.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        env.extend(self.agent.env());
        env.extend(
            config
                .envs
                .iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        // A name that is empty or has a '=' cannot be passed on.
        env.retain(|name, _| !name.is_empty() && !name.contains('='));
        env
    }

    async fn input(
        &self,
        process: &Process,
        input: Option<ProcessInput>,
    ) -> Result<(), ConnectError> {
        match input.and_then(|input| input.input) {
            Some(process_input::Input::Stdin(bytes)) => process
                .write(&bytes, false)
                .await
                .map_err(|error| input_error(&error)),
            Some(process_input::Input::Pty(bytes)) => process
                .write(&bytes, true)
                .await
                .map_err(|error| input_error(&error)),
            None => Err(ConnectError::invalid_argument("no input is given")),
        }
    }
}

impl proto::Process for Service {
    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<StartResponse> + Send + use<>>> {
        let spec = self.spec(&ctx, request.to_owned_message())?;
        let command = spec.config.cmd.clone();
        // In a task of its own: a client that goes away in the middle leaves a process that is known.
        let started = tokio::spawn(begin(self.agent.clone(), spec)).await;
        let (process, events) = started
            .map_err(|error| ConnectError::internal(error.to_string()))?
            .map_err(|error| spawn_error(&command, &error))?;
        let start = start_of(process.pid);
        let events = events_of(start, Vec::new(), events, keepalive_of(&ctx), true);
        Ok(Response::stream(events.map(|event| {
            event.map(|event| StartResponse {
                event: event.into(),
                ..StartResponse::default()
            })
        })))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ConnectResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let process = self
            .agent
            .processes
            .find(Option::from(request.process).as_ref())?;
        let mut start = start_of(process.pid);
        let (missed, events) = match request.output_from {
            None => (Vec::new(), process.subscribe()),
            Some(from) => {
                let (replay, events) = process.subscribe_from(from);
                start.output_at = Some(replay.at);
                start.output_missed = Some(replay.missed);
                start.terminal = Some(process.has_terminal());
                (replay.events, events)
            }
        };
        let events = events_of(start, missed, events, keepalive_of(&ctx), false);
        Ok(Response::stream(events.map(|event| {
            event.map(|event| ConnectResponse {
                event: event.into(),
                ..ConnectResponse::default()
            })
        })))
    }

    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<impl Encodable<ListResponse> + Send + use<'a>> {
        let mut processes: Vec<ProcessInfo> = self
            .agent
            .processes
            .all()
            .values()
            .filter(|process| !process.has_ended())
            .map(|process| ProcessInfo {
                config: process.config.clone().into(),
                pid: process.pid,
                tag: process.tag.clone(),
                ..ProcessInfo::default()
            })
            .collect();
        processes.sort_by_key(|process| process.pid);
        Response::ok(ListResponse {
            processes,
            ..ListResponse::default()
        })
    }

    async fn update<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<impl Encodable<UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self
            .agent
            .processes
            .find_running(Option::from(request.process).as_ref())?;
        if let Some(pty) = Option::<proto::PTY>::from(request.pty) {
            process
                .resize(winsize(&pty))
                .map_err(|error| input_error(&error))?;
        }
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        _ctx: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<StreamInputResponse> + Send + use<'a>> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match (request?.to_owned_message().event, &process) {
                (Some(stream_input_request::Event::Start(start)), None) => {
                    let selector = Option::from(start.process);
                    process = Some(self.agent.processes.find_running(selector.as_ref())?);
                }
                (Some(stream_input_request::Event::Data(data)), Some(process)) => {
                    self.input(process, Option::from(data.input)).await?;
                }
                (Some(stream_input_request::Event::Start(_)), Some(_)) => {
                    return Err(ConnectError::invalid_argument("a second start event"));
                }
                (Some(stream_input_request::Event::Data(_)), None) => {
                    return Err(ConnectError::invalid_argument(
                        "the first event is not a start",
                    ));
                }
                (Some(stream_input_request::Event::Keepalive(_)) | None, _) => {}
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self
            .agent
            .processes
            .find_running(Option::from(request.process).as_ref())?;
        self.input(&process, Option::from(request.input)).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<SendSignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self
            .agent
            .processes
            .find_running(Option::from(request.process).as_ref())?;
        let number = request.signal.to_i32();
        let signal = Signal::from_named_raw(number)
            .ok_or_else(|| ConnectError::invalid_argument(format!("invalid signal {number}")))?;
        process.signal(signal).map_err(|error| {
            ConnectError::internal(format!("failed to send the signal: {error}"))
        })?;
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<CloseStdinResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self
            .agent
            .processes
            .find_running(Option::from(request.process).as_ref())?;
        process
            .close_input()
            .await
            .map_err(|error| input_error(&error))?;
        Response::ok(CloseStdinResponse::default())
    }
}

/// Starts a process, registers it and has it looked after.
async fn begin(
    agent: Arc<Agent>,
    spec: Spec,
) -> Result<(Arc<Process>, mpsc::Receiver<Event>), SpawnError> {
    let (started, events) = Process::start(&agent.cgroups, spec).await?;
    let process = started.process.clone();
    agent.processes.all().insert(process.pid, process.clone());
    let registered = process.clone();
    tokio::spawn(async move {
        let ended = || {
            let agent = agent.clone();
            tokio::spawn(async move {
                tokio::time::sleep(END_RETENTION).await;
                agent.processes.forget(&registered);
            });
        };
        started.attend(&agent.cgroups, ended).await;
    });
    Ok((process, events))
}

fn winsize(pty: &proto::PTY) -> Winsize {
    let size = pty.size.clone();
    let clamp = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
    match Option::<proto::pty::Size>::from(size) {
        Some(size) => Winsize {
            ws_row: clamp(size.rows),
            ws_col: clamp(size.cols),
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
        None => Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    }
}

fn start_of(pid: u32) -> process_event::StartEvent {
    process_event::StartEvent {
        pid,
        ..process_event::StartEvent::default()
    }
}

/// The events of a process as a client sees them: its start, what it `missed` and what it does from now on, its end.
/// `owner` is who started it, and learns of a time-out as an error of the call that set it.
fn events_of(
    start: process_event::StartEvent,
    missed: Vec<Event>,
    events: mpsc::Receiver<Event>,
    keepalive: Duration,
    owner: bool,
) -> impl futures_util::Stream<Item = Result<ProcessEvent, ConnectError>> + Send + 'static {
    let missed = missed.into_iter().filter_map(|event| match event {
        Event::Output(stream, bytes) => Some(Ok(output(stream, bytes.into()))),
        Event::End(_) => None,
    });
    let rest = stream::unfold(Some(events), move |events| async move {
        let mut events = events?;
        let event = match tokio::time::timeout(keepalive, events.recv()).await {
            Err(_) => Ok(wire(process_event::KeepAlive::default())),
            Ok(Some(Event::Output(stream, bytes))) => Ok(output(stream, bytes.into())),
            Ok(Some(Event::End(End {
                timed_out: true, ..
            }))) if owner => {
                return Some((
                    Err(ConnectError::deadline_exceeded(
                        "the process was killed: its time was up",
                    )),
                    None,
                ));
            }
            Ok(Some(Event::End(end))) => return Some((Ok(wire(end.exit.to_event())), None)),
            Ok(None) => {
                return Some((
                    Err(ConnectError::resource_exhausted(
                        "this call took too little of the output for others who follow the process",
                    )),
                    None,
                ));
            }
        };
        Some((event, Some(events)))
    });
    stream::once(async move { Ok(wire(start)) })
        .chain(stream::iter(missed))
        .chain(rest)
}

fn wire(event: impl Into<process_event::Event>) -> ProcessEvent {
    ProcessEvent {
        event: Some(event.into()),
        ..ProcessEvent::default()
    }
}

fn output(stream: Stream, bytes: Vec<u8>) -> ProcessEvent {
    use process_event::data_event::Output;
    let output = match stream {
        Stream::Stdout => Output::Stdout(bytes),
        Stream::Stderr => Output::Stderr(bytes),
        Stream::Terminal => Output::Pty(bytes),
    };
    wire(process_event::DataEvent {
        output: Some(output),
        ..process_event::DataEvent::default()
    })
}

/// What a shell would say with 127 is `not_found`, with 126 `permission_denied`.
fn spawn_error(command: &str, error: &SpawnError) -> ConnectError {
    let SpawnError::Launch(LaunchError { step, source }) = error else {
        return ConnectError::internal(chain(error));
    };
    let errno = source.raw_os_error().map(Errno::from_raw_os_error);
    match (step, errno) {
        (Step::Program, Some(Errno::NOENT)) => {
            ConnectError::not_found(format!("'{command}': command not found"))
        }
        (
            Step::Program,
            Some(Errno::ACCESS | Errno::NOEXEC | Errno::ISDIR | Errno::NOTDIR | Errno::PERM),
        ) => ConnectError::permission_denied(format!("'{command}' cannot be run: {source}")),
        (Step::Program, Some(Errno::TOOBIG)) => {
            ConnectError::invalid_argument("the arguments and the environment are too long")
        }
        (Step::Directory, _) => {
            ConnectError::invalid_argument(format!("cannot change to the directory: {source}"))
        }
        _ => ConnectError::internal(chain(error)),
    }
}

fn input_error(error: &InputError) -> ConnectError {
    match error {
        InputError::IsTerminal | InputError::NoTerminal | InputError::Closed => {
            ConnectError::failed_precondition(error.to_string())
        }
        InputError::Write(source) if source.kind() == io::ErrorKind::BrokenPipe => {
            ConnectError::failed_precondition("the process has closed its input")
        }
        InputError::Write(_) => ConnectError::internal(chain(error)),
    }
}
