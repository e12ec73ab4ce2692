//! `icebox serve`: the daemon.
//!
//! It is not in the data path of sandboxes' lives: they live in processes of their own, and a daemon that starts finds
//! them again. So stopping is simple: stop listening, let the verbs and answers under way end, leave. What then serves no
//! sandbox any more is taken off the host. Who wants them paused before says so: `icebox drain`, or `drain_on_stop`.
//!
//! ```text
//!   config -> log -> sockets -> host -> engine (recovers) -> READY -> serve … SIGTERM -> verbs end -> leave
//! ```
//! Sockets come before the engine, so that a second daemon is refused before it touches anything.

mod access;
mod authority;
mod build;
mod config;
mod daemon;
mod doctor;
mod lifetime;
mod listen;
mod log;
mod metrics;
mod real;
mod recipe;
mod sim;
mod sys;
mod tls;
mod translate;
mod workshop;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use icebox_api::server::{Edge, Server};
use icebox_api::types::Report;
use icebox_engine::host::Host;
use icebox_engine::id::Team;
use icebox_engine::layout::Layout;
use icebox_engine::unit::Geometry;
use icebox_engine::{Drained, Engine, Error};
use icebox_host::boxes::HostBoxes;
use icebox_host::network::NetworkSlots;
use rustix::process::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::commands::Ended;
use crate::failure::Failure;
use crate::output::Output;
use access::{Access, House};
use authority::Authority;
use config::{Config, Tls};
use daemon::Icebox;
use listen::SocketFile;
use recipe::Recipes;
use tls::{Certificate, TlsListener};
use workshop::Workshop;

pub(crate) use config::{Args, Settings};
pub(crate) use translate::host_error;

/// How long verbs under way may take to end when the daemon is told to. One that takes longer is finished, or undone,
/// by the next daemon.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long answers under way may take to be sent after that. Verbs have theirs by then; what takes longer is a stream
/// from a sandbox, and would never end by itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Looks at this machine, for when no daemon does.
///
/// # Errors
/// The settings are not understood.
pub(crate) async fn survey(settings: &Settings, socket: Option<&Path>) -> Result<Report, Failure> {
    let config = Config::of_machine(settings, socket)?;
    Ok(real::survey(&config).await)
}

/// Where a daemon with these settings keeps its data.
///
/// # Errors
/// The settings are not understood.
pub(crate) fn data_directory(settings: &Settings) -> Result<PathBuf, Failure> {
    Ok(Config::of_machine(settings, None)?.data_dir)
}

/// The certificate authority of a daemon with these settings.
///
/// # Errors
/// The settings are not understood, or it cannot be read or made.
pub(crate) fn authority(settings: &Settings) -> Result<Authority, Failure> {
    authority_of(&Config::of_machine(settings, None)?)
}

fn authority_of(config: &Config) -> Result<Authority, Failure> {
    let domain = config.domain.as_deref().unwrap_or(authority::DOMAIN);
    Authority::open(&config.data_dir, domain)
}

/// What the daemon runs on: this machine, or a simulation.
struct Ground {
    host: Host,
    workshop: Arc<dyn Workshop>,
    /// What to ask to take off the host what only a daemon needs. A simulation leaves nothing.
    fixtures: Option<Fixtures>,
}

/// What a daemon has on the host whether or not sandboxes run.
#[derive(Clone)]
struct Fixtures {
    network: Arc<NetworkSlots>,
    boxes: Arc<HostBoxes>,
}

impl Fixtures {
    /// Takes off the host what serves no sandbox.
    async fn remove(&self) {
        self.boxes.cgroups().remove_parents();
        if let Err(error) = self.network.close().await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "rules stay on the host"
            );
        }
    }
}

/// How serving ended.
enum Left {
    /// Nothing is under way.
    Clean,
    /// Verbs are, and may still set up what they need.
    VerbsUnderWay,
}

/// Serves until told to stop.
pub(crate) fn run(args: &Args, socket: Option<&Path>, output: Output) -> Ended {
    let config = Config::load(args, socket)?;
    log::start(&config.log_filter, config.log_format)?;
    sys::bound_malloc();
    // Two threads, however many CPUs there are: the daemon waits for others most of the time, and every thread costs.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start the async runtime", &error))?;
    let ended = runtime.block_on(serve(config, args, output));
    // A blocking call that hangs must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn serve(config: Config, args: &Args, output: Output) -> Ended {
    raise_file_limit();
    let (unix, socket_file) = listen::unix(&config.socket).await?;
    let tcp = match config.listen {
        Some(address) => Some(listen::tcp(address).await?),
        None => None,
    };
    let certificate = match &config.tls {
        Some(Tls::Files { chain, key }) => Some(Certificate::load(chain, key)?),
        Some(Tls::Local) => Some(Certificate::signed(authority_of(&config)?)?),
        None => None,
    };
    let layout = Layout::new(&config.data_dir, &config.run_dir);
    let mut ground = if args.sim {
        sim::ground(args.sim_guests)
    } else {
        real::ground(&config, &layout).await?
    };
    ground.host = icebox_sim::fault::conducted(ground.host);
    let fixtures = ground.fixtures.clone();
    let sockets = (unix, tcp.map(|tcp| (tcp, certificate)), socket_file);
    let left = attend(ground, layout, &config, args.sim, sockets, output).await;
    match (&left, fixtures) {
        // What a verb under way sets up would be without its rules.
        (Ok(Left::VerbsUnderWay), _) | (_, None) => {}
        (Ok(Left::Clean) | Err(_), Some(fixtures)) => fixtures.remove().await,
    }
    left.map(|_| ExitCode::SUCCESS)
}

/// Where the daemon is reached, each place taken already.
type Sockets = (
    UnixListener,
    Option<(TcpListener, Option<Certificate>)>,
    SocketFile,
);

/// Brings the sandboxes back, and serves until told to stop.
async fn attend(
    ground: Ground,
    layout: Layout,
    config: &Config,
    is_simulation: bool,
    (unix, tcp, socket_file): Sockets,
    output: Output,
) -> Result<Left, Failure> {
    let engine = Engine::open(ground.host, config.engine())
        .await
        .map_err(|error| opening_failed(&error))?;
    let recipes = Recipes::open(&config.data_dir, config.egress());
    let recipes =
        recipes.map_err(|error| Failure::because("cannot read the names of templates", &error))?;
    let data = (!is_simulation).then(|| config.data_dir.clone());
    let daemon = Icebox {
        engine,
        access: Arc::new(open_access(data).await?),
        recipes: Arc::new(recipes),
        layout,
        workshop: ground.workshop,
        domain: config.domain.clone(),
        geometry: Geometry {
            vcpus: config.cpus,
            mem_mib: config.memory_mib,
        },
        internet: config.internet,
        leave: CancellationToken::new(),
    };
    daemon.limit_teams().await?;
    let (engine, leave) = (daemon.engine.clone(), daemon.leave.clone());
    let access = Arc::clone(&daemon.access);
    let house = Arc::new(House { icebox: daemon });

    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let admin = Server::new(house.clone(), Edge::Admin);
    admin.listen_unix(unix);
    let mut servers = vec![admin];
    let mut places = config.socket.display().to_string();
    let mut url = None;
    if let Some((tcp, certificate)) = tcp {
        if let Ok(address) = tcp.local_addr() {
            let scheme = match &certificate {
                Some(_) => "https",
                None => "http",
            };
            let address = format!("{scheme}://{address}");
            places.push_str(&format!(" and {address}"));
            url = Some(address);
        }
        let listener = (tcp, certificate);
        servers.push(public(listener, house, &access, output).await?);
    }
    output.announce(
        format!("icebox {} is ready on {places}", env!("CARGO_PKG_VERSION")),
        &serde_json::json!({ "ready": { "socket": config.socket, "url": url } }),
    )?;
    notify(NotifyState::Ready);

    let told = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let drained = tokio::select! {
        () = told => false,
        () = leave.cancelled() => true,
    };
    notify(NotifyState::Stopping);
    if config.drain_on_stop && !drained {
        // Whoever is in a hurry says so again.
        tokio::select! {
            drained = engine.drain() => report_drain(drained),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    tracing::info!("leaving; running sandboxes go on");
    drop(socket_file);
    let leaving = servers
        .iter()
        .map(|server| server.leave(LEAVE_TIMEOUT, ANSWER_TIMEOUT));
    let ended = futures_util::future::join_all(leaving).await;
    if ended.contains(&false) {
        tracing::warn!("verbs are still under way; the next daemon finishes or undoes them");
        return Ok(Left::VerbsUnderWay);
    }
    Ok(Left::Clean)
}

/// Says what a drain that nobody asked for by a command did.
fn report_drain(drained: Result<Drained, Error>) {
    match drained {
        Ok(drained) => {
            for (sandbox, error) in drained.failed {
                let error = &error as &dyn std::error::Error;
                tracing::error!(sandbox, error, "could not be paused, and runs on");
            }
        }
        Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "not drained"),
    }
}

/// Opens what is known of teams and keys.
async fn open_access(data: Option<PathBuf>) -> Result<Access, Failure> {
    let opened = tokio::task::spawn_blocking(move || Access::open(data.as_deref())).await;
    let opened = opened.map_err(|error| Failure::because("cannot open teams and keys", &error))?;
    opened.map_err(|error| {
        Failure::because("cannot open teams and keys", &error).hint(
            "nobody comes in while it is not known who may: restore the file, or move it away and make new keys",
        )
    })
}

/// Names a key of the default team; never an option, since everybody can read a process's arguments.
const KEY_VARIABLE: &str = "ICEBOX_API_KEY";

/// Too short to be a secret below this.
const KEY_MIN: usize = 16;

/// Serves on TCP, for who has a key.
async fn public(
    (listener, certificate): (TcpListener, Option<Certificate>),
    house: Arc<House>,
    access: &Access,
    output: Output,
) -> Result<Server, Failure> {
    if let Ok(given) = std::env::var(KEY_VARIABLE) {
        if given.len() < KEY_MIN || !given.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Failure::new(format!("the key in {KEY_VARIABLE} is not usable")).hint(format!(
                "a key has at least {KEY_MIN} printable characters; leave {KEY_VARIABLE} unset and use `icebox key create`"
            )));
        }
        access.give_key(&given).await?;
    } else if access.has_no_keys() {
        first_key(access, output).await?;
    }
    let tls = certificate.is_some();
    let server = Server::new(house, Edge::Public { tls });
    match certificate {
        Some(certificate) => server.listen(TlsListener::new(listener, certificate)),
        None => server.listen(axum::serve::ListenerExt::tap_io(listener, |stream| {
            send_at_once(stream);
        })),
    }
    Ok(server)
}

/// Events are small and each of them matters when it happens.
fn send_at_once(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
}

/// Makes a key for who tries it out.
async fn first_key(access: &Access, output: Output) -> Result<(), Failure> {
    // Set by systemd.exec(5) where the output is connected to the journal: what is shown there is kept, for many to read.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        tracing::warn!(
            "there is no API key yet, so nobody comes in by TCP: `icebox key create` makes one"
        );
        return Ok(());
    }
    let made = access.create_key(Team::DEFAULT, "first").await?;
    output.announce(
        format!(
            "API key, shown this once: {}\n(`icebox key rm {}` has it let nobody in any more, `icebox key create` makes another)",
            made.key, made.kept.id
        ),
        &serde_json::json!({ "apiKey": made.key }),
    )?;
    Ok(())
}

/// Allows as many descriptors as this process may have at all. Services are started with 1024 for the sake of programs
/// that use select(2); a connection that is carried to a sandbox takes two.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

fn opening_failed(error: &Error) -> Failure {
    let failure = Failure::because("cannot bring the data directory to life", error);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn signals(kind: SignalKind) -> Result<tokio::signal::unix::Signal, Failure> {
    signal(kind).map_err(|error| Failure::because("cannot listen for signals", &error))
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(false, &[state]) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}
