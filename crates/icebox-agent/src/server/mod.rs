//! The server: HTTP/1.1 on one port, for SDKs, the command line and the host.
//!
//! ```text
//! /health                     anyone
//! /process.Process/…          access token ─► process.rs    (children in child.rs)
//! /filesystem.Filesystem/…    access token ─► filesystem.rs
//! /metrics                    access token ─► metrics.rs
//! /files                      access token or signature ─► files/
//! /init /prepare              the host's token ─► control.rs ─► machine.rs
//! /dial                       the host's token ─► dial.rs
//! ```
//!
//! One thread runs everything that waits for events; what blocks (files, the clock, a sync) runs on threads that come
//! and go. What must survive a crash of the server is in a file only root reads, see [`state`].

mod auth;
mod child;
mod connections;
mod control;
mod dial;
mod entry;
mod error;
mod files;
mod filesystem;
mod history;
mod machine;
mod metrics;
mod paths;
mod process;
mod state;
mod subscribers;
mod watch;

use std::{
    error::Error,
    ffi::OsString,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
    serve::ListenerExt as _,
};
use connectrpc::{ConnectRpcService, Limits, RequestContext};
use icebox_agent_api::{
    AGENT_PORT, CLOCK_PATH, DIAL_PATH, FILES_PATH, HEALTH_PATH, INIT_PATH, KEEPALIVE_HEADER,
    METRICS_PATH, PREPARE_PATH, cmdline,
    proto::{filesystem::FilesystemExt as _, process::ProcessExt as _},
};
use tokio::net::TcpListener;

use self::{machine::Machine, state::Agent};
use crate::{cgroup::Cgroups, init::KernelParameters};

/// Name of the role.
pub(crate) const ROLE: &str = "serve";

pub(crate) const USAGE: &str = "icebox-agent serve [--outside] [--listen ADDRESS] [--state FILE] [--cmdline FILE] [--cgroup DIRECTORY]";

/// Silence after which a stream carries a keepalive, unless the client wants another; envd's default.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// Input comes in messages that hold whatever an SDK was given in one piece.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Threads that blocking work ran on go after this long: their stacks are part of every snapshot.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// What the role is started with.
struct Options {
    listen: SocketAddr,
    state: PathBuf,
    cmdline: PathBuf,
    cgroup: PathBuf,
    /// The machine is not ours: `/init` and `/prepare` leave its clock, name, entropy, connections and disks alone.
    outside: bool,
}

impl Options {
    fn parse(args: &[OsString]) -> Result<Self, Box<dyn Error>> {
        let mut options = Self {
            listen: (Ipv4Addr::UNSPECIFIED, AGENT_PORT).into(),
            state: PathBuf::from("/run/icebox/state.json"),
            cmdline: PathBuf::from("/proc/cmdline"),
            cgroup: PathBuf::from("/sys/fs/cgroup"),
            outside: false,
        };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            if name == "--outside" {
                options.outside = true;
                continue;
            }
            let value = args.next().ok_or_else(|| format!("usage: {USAGE}"))?;
            match name.to_str() {
                Some("--listen") => {
                    options.listen = value.to_str().ok_or("invalid address")?.parse()?;
                }
                Some("--state") => options.state = value.into(),
                Some("--cmdline") => options.cmdline = value.into(),
                Some("--cgroup") => options.cgroup = value.into(),
                _ => return Err(format!("usage: {USAGE}").into()),
            }
        }
        Ok(options)
    }
}

/// Runs the role until the process is killed. Prints `listening on ADDRESS` to standard output once it serves.
pub(crate) fn run(args: &[OsString]) -> Result<(), Box<dyn Error>> {
    let options = Options::parse(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .map_err(|error| format!("failed to start the runtime: {error}"))?;
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> Result<(), Box<dyn Error>> {
    let parameters = KernelParameters::read(&options.cmdline)?;
    let machine = if options.outside {
        Machine::Foreign
    } else {
        Machine::Guest
    };
    let agent = Arc::new(Agent::open(
        machine,
        Cgroups::detect(&options.cgroup),
        options.state,
        parameters.get(cmdline::TOKEN),
    )?);
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| format!("failed to listen on {}: {error}", options.listen))?;
    println!("listening on {}", listener.local_addr()?);
    // Events are small and each of them matters when it happens. A connection that just broke needs no option.
    let listener = listener.tap_io(|stream| {
        stream.set_nodelay(true).ok();
    });
    let app = router(agent).into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, app).await?;
    Err(io::Error::other("the listener ended").into())
}

fn router(agent: Arc<Agent>) -> Router {
    let limits = Limits::default()
        .with_max_message_size(MAX_MESSAGE_BYTES)
        .with_max_request_body_size(MAX_MESSAGE_BYTES);
    let services =
        Arc::new(process::Service::new(agent.clone())).register(connectrpc::Router::new());
    let services = Arc::new(filesystem::Service::new(agent.clone())).register(services);
    let services = ConnectRpcService::new(services).with_limits(limits);

    Router::new()
        .route(METRICS_PATH, get(metrics::get))
        .fallback_service(services)
        .layer(middleware::from_fn_with_state(
            agent.clone(),
            auth::require_access,
        ))
        .route(FILES_PATH, get(files::download).post(files::upload))
        // A file has no size limit.
        .layer(DefaultBodyLimit::disable())
        .route(INIT_PATH, post(control::init))
        .route(CLOCK_PATH, post(control::clock))
        .route(PREPARE_PATH, post(control::prepare))
        .route(DIAL_PATH, get(dial::dial))
        .route(HEALTH_PATH, get(async || StatusCode::NO_CONTENT))
        .layer(middleware::from_fn_with_state((), allow_browsers))
        .with_state(agent)
}

/// SDKs also run in browsers, on pages of any origin: access is by token, never by who asks.
async fn allow_browsers(State(()): State<()>, request: Request, next: Next) -> Response {
    let preflight = request.method() == Method::OPTIONS;
    let mut response = if preflight {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderValue::from_static("*"),
    );
    if preflight {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, POST, OPTIONS"),
        );
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static("*, authorization"),
        );
        headers.insert(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static("7200"),
        );
    } else {
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("*"),
        );
    }
    response
}

/// How long a stream may be silent, by the request.
fn keepalive_of(ctx: &RequestContext) -> Duration {
    ctx.header(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|seconds| *seconds > 0)
        .map_or(KEEPALIVE, Duration::from_secs)
}
