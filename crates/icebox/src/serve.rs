//! `icebox serve`: the daemon.
//!
//! It is not in the data path of sandboxes' lives: they live in processes of their own, and a daemon that starts finds
//! them again. So stopping is simple: stop listening, let the verbs under way end, leave.
//!
//! ```text
//!   config -> log -> sockets -> host -> engine (recovers) -> READY -> serve … SIGTERM -> verbs end -> leave
//! ```
//! Sockets come before the engine, so that a second daemon is refused before it touches anything.

mod build;
mod config;
mod daemon;
mod doctor;
mod key;
mod listen;
mod log;
mod real;
mod sim;
mod sys;
mod translate;
mod workshop;

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use icebox_api::server::{Edge, router};
use icebox_api::types::Report;
use icebox_engine::host::Host;
use icebox_engine::layout::Layout;
use icebox_engine::unit::Geometry;
use icebox_engine::{Engine, Error};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::commands::Ended;
use crate::failure::Failure;
use crate::output::Output;
use config::Config;
use daemon::Icebox;
use workshop::Workshop;

pub(crate) use config::{Args, Settings};
pub(crate) use translate::host_error;

/// How long verbs under way may take to end when the daemon is told to. One that takes longer is finished, or undone,
/// by the next daemon.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Looks at this machine, for when no daemon does.
///
/// # Errors
/// The settings are not understood.
pub(crate) async fn survey(settings: &Settings, socket: Option<&Path>) -> Result<Report, Failure> {
    let config = Config::of_machine(settings, socket)?;
    Ok(real::survey(&config).await)
}

/// What the daemon runs on: this machine, or a simulation.
struct Ground {
    host: Host,
    workshop: Arc<dyn Workshop>,
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
    let (unix, socket_file) = listen::unix(&config.socket).await?;
    let tcp = match config.listen {
        Some(address) => Some(listen::tcp(address).await?),
        None => None,
    };
    let layout = Layout::new(&config.data_dir, &config.run_dir);
    let ground = if args.sim {
        sim::ground(args.sim_guests)
    } else {
        real::ground(&config, &layout).await?
    };
    let engine = Engine::open(ground.host, engine_config())
        .await
        .map_err(|error| opening_failed(&error))?;
    let daemon = Arc::new(Icebox {
        engine,
        layout,
        workshop: ground.workshop,
        domain: config.domain.clone(),
        geometry: Geometry {
            vcpus: config.cpus,
            mem_mib: config.memory_mib,
        },
        internet: config.internet,
    });

    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let (admin, verbs) = router(daemon.clone(), Edge::Admin);
    // Aborted when the daemon leaves: nothing new begins while verbs under way end.
    let mut accepting = JoinSet::new();
    accepting.spawn(async move { axum::serve(unix, admin).await });
    let mut trackers = vec![verbs];
    let mut places = config.socket.display().to_string();
    let mut url = None;
    if let Some(tcp) = tcp {
        if let Ok(address) = tcp.local_addr() {
            let address = format!("http://{address}");
            places.push_str(&format!(" and {address}"));
            url = Some(address);
        }
        trackers.push(public(tcp, daemon, &config, output, &mut accepting)?);
    }
    output.announce(
        format!("icebox {} is ready on {places}", env!("CARGO_PKG_VERSION")),
        &serde_json::json!({ "ready": { "socket": config.socket, "url": url } }),
    )?;
    notify(NotifyState::Ready);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("leaving; running sandboxes go on");
    notify(NotifyState::Stopping);
    drop(socket_file);
    accepting.abort_all();
    let ending = async {
        for verbs in &trackers {
            verbs.close();
            verbs.wait().await;
        }
    };
    if tokio::time::timeout(LEAVE_TIMEOUT, ending).await.is_err() {
        tracing::warn!("verbs are still under way; the next daemon finishes or undoes them");
    }
    Ok(ExitCode::SUCCESS)
}

/// Serves on TCP, for who has the key.
fn public(
    listener: TcpListener,
    daemon: Arc<Icebox>,
    config: &Config,
    output: Output,
    accepting: &mut JoinSet<io::Result<()>>,
) -> Result<TaskTracker, Failure> {
    let given = std::env::var(key::VARIABLE).ok();
    // Set by systemd.exec(5) where the output is connected to the journal.
    let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let key = key::load(&config.data_dir, given.as_deref(), in_journal)?;
    if let Some(made) = &key.made {
        output.announce(
            format!(
                "API key, shown this once: {made}\n(its hash is kept in {}; remove that file to have another made)",
                config.data_dir.join("api-key").display()
            ),
            &serde_json::json!({ "apiKey": made }),
        )?;
    }
    let (router, verbs) = router(daemon, Edge::Public { key: key.hash });
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        // Events are small and each of them matters when it happens.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
    });
    accepting.spawn(async move { axum::serve(listener, router).await });
    Ok(verbs)
}

fn engine_config() -> icebox_engine::Config {
    let total = rustix::system::sysinfo();
    let bytes = u128::from(total.totalram) * u128::from(total.mem_unit);
    icebox_engine::Config {
        max_mem_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
        ..icebox_engine::Config::default()
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
