//! Creating, connecting to and looking after sandboxes, as E2B's SDKs do it.

use std::net::IpAddr;

use axum::extract::RawQuery;
use futures_util::StreamExt as _;
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use super::absent::not_here;
use crate::server::Context;
use crate::server::extract::{Json, Path};
use crate::types::{
    ChangeLifetime, ConnectRequest, Event, Limit, LogEntry, Logs, NetworkConfig, NewFork,
    NewSandbox, OnTimeout, Outcome, RefreshRequest, ResumeRequest, SandboxDetail,
    State as SandboxState, VerbResult,
};
use crate::{ApiError, Daemon, ErrorCode};

/// How long a sandbox runs that nobody gave a time, in seconds: what each version of the routes says. Those that have one
/// version are of the first.
const RUNS: i64 = 300;
const RUNS_V1: i64 = 15;
/// The least that a refresh gives.
const REFRESH_MIN: i64 = 15;
/// How many lines of a log there are if nothing is said, and at most.
const LOG_LINES: usize = 1000;

type Created = Result<(StatusCode, axum::Json<SandboxDetail>), ApiError>;

/// `POST /v2/sandboxes`: always with a token.
pub(in crate::server) async fn create(
    context: Context,
    Json(mut new): Json<NewSandbox>,
) -> Created {
    new.secure = None;
    ends_after(&mut new, RUNS);
    make(context, new).await
}

/// `POST /sandboxes`. On the socket a sandbox that nobody gave a time has none.
pub(in crate::server) async fn create_v1(
    context: Context,
    Json(mut new): Json<NewSandbox>,
) -> Created {
    if !context.caller.is_administrator() {
        ends_after(&mut new, RUNS_V1);
    }
    make(context, new).await
}

async fn make(context: Context, new: NewSandbox) -> Created {
    check(&new)?;
    let made = context
        .run_verb(|daemon| async move { daemon.create(new).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(context.shown(made))))
}

fn ends_after(new: &mut NewSandbox, seconds: i64) {
    if new.lifetime.idle_timeout.is_none() {
        new.lifetime.timeout.get_or_insert(Limit::Seconds(seconds));
    }
}

/// Refuses what makes no sense, and what there is no such thing of here.
fn check(new: &NewSandbox) -> Result<(), ApiError> {
    let invalid = |message: &str| Err(ApiError::new(ErrorCode::Invalid, message));
    if new.auto_pause_memory == Some(false) {
        if new.auto_pause != Some(true) {
            return invalid("autoPauseMemory is about autoPause, which is not asked for");
        }
        if new.lifetime.auto_resume.is_some_and(|it| it.enabled) {
            return invalid("a sandbox that is paused without its memory cannot resume by itself");
        }
    }
    if let Some(network) = &new.network {
        check_network(network)?;
        if network.allow_public_traffic == Some(false) && new.secure == Some(false) {
            return invalid("ports that ask for a token need a sandbox that does: `secure`");
        }
    }
    let foreign = [
        (new.mcp.is_some(), "MCP servers"),
        (new.iam.is_some(), "workload identities"),
        (!new.volume_mounts.is_empty(), "volumes"),
    ];
    match foreign.iter().find(|(wanted, _)| *wanted) {
        Some((_, what)) => Err(not_here(what)),
        None => Ok(()),
    }
}

fn check_network(network: &NetworkConfig) -> Result<(), ApiError> {
    let invalid = |message: String| Err(ApiError::new(ErrorCode::Invalid, message));
    if let Some(wrong) = network.deny_out.iter().find(|it| !is_network(it)) {
        return invalid(format!(
            "denyOut has {wrong:?}, which is no address or network"
        ));
    }
    let denies_all = network.denies_everything();
    if let Some(domain) = network.allow_out.iter().find(|it| !is_network(it))
        && !denies_all
    {
        return invalid(format!(
            "allowOut has the domain {domain:?}, which needs denyOut to have {}",
            NetworkConfig::EVERYTHING[0]
        ));
    }
    let is_rule = !network.allow_out.is_empty()
        || network.denies_something_else()
        || !network.dns_servers.is_empty()
        || network.rules.as_ref().is_some_and(says_something)
        || network.egress_proxy.as_ref().is_some_and(says_something)
        || network.mask_request_host.is_some()
        || !network.https_ports.is_empty();
    match is_rule {
        true => Err(not_here("rules for what a sandbox may reach")),
        false => Ok(()),
    }
}

fn says_something(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null => false,
        serde_json::Value::Object(entries) => !entries.is_empty(),
        serde_json::Value::Array(entries) => !entries.is_empty(),
        _ => true,
    }
}

/// A fork as E2B has it: it runs for a while, and is of what runs. One that is paused in this moment is forked all the
/// same, which harms nobody.
pub(in crate::server) async fn check_fork(
    context: &Context,
    id: &str,
    new: &mut NewFork,
) -> Result<(), ApiError> {
    new.timeout.get_or_insert(RUNS_V1);
    let found = context.daemon.inspect(id, false).await?;
    if found.listed.state == SandboxState::Running {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::WrongPhase,
        format!("sandbox {id:?} does not run, and only one that runs is forked"),
    )
    .hint("connect to it first"))
}

fn is_network(text: &str) -> bool {
    let (address, length) = text
        .split_once('/')
        .map_or((text, None), |(a, l)| (a, Some(l)));
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    length.is_none_or(|length| length.parse::<u8>().is_ok_and(|length| length <= longest))
}

/// `PUT /sandboxes/{id}/network`: replaces everything by what is said. What a sandbox may reach is decided when it is
/// created, so this accepts what is so already.
pub(in crate::server) async fn network(
    context: Context,
    Path(id): Path<String>,
    Json(network): Json<NetworkConfig>,
) -> Result<StatusCode, ApiError> {
    let sandbox = context.daemon.inspect(&id, false).await?;
    check_network(&network)?;
    let wanted = network.internet().unwrap_or(true);
    match wanted == sandbox.allow_internet_access {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(not_here("ways to change what a sandbox may reach")),
    }
}

/// `POST /sandboxes/{id}/connect`, whose clients always say for how long.
pub(in crate::server) async fn connect_v1(
    context: Context,
    id: Path<String>,
    Json(how): Json<ConnectRequest>,
) -> Created {
    if how.timeout.is_none() {
        return Err(ApiError::new(ErrorCode::Invalid, "timeout is missing")
            .hint("ask for whole seconds, or use /v2, where there is a default"));
    }
    connect(context, id, Json(how)).await
}

/// `POST /v2/sandboxes/{id}/connect` and its predecessor: 200 for one that runs, which then runs at least so long; 201 for
/// one that was paused, which is resumed.
pub(in crate::server) async fn connect(
    context: Context,
    Path(id): Path<String>,
    Json(how): Json<ConnectRequest>,
) -> Created {
    let (sandbox, resumed) = context
        .run_verb(|daemon| async move { bring(&*daemon, &id, how).await })
        .await?;
    let status = match resumed {
        true => StatusCode::CREATED,
        false => StatusCode::OK,
    };
    Ok((status, axum::Json(context.shown(sandbox))))
}

async fn bring(
    daemon: &dyn Daemon,
    id: &str,
    how: ConnectRequest,
) -> Result<(SandboxDetail, bool), ApiError> {
    let seconds = how.timeout.unwrap_or(RUNS);
    require_time(seconds)?;
    let found = daemon.inspect(id, false).await?;
    if is_awake(&found) {
        return Ok((run_at_least(daemon, found, seconds).await?, false));
    }
    let lifetime = ChangeLifetime {
        timeout: Some(Limit::Seconds(seconds)),
        ..ChangeLifetime::default()
    };
    let woken = wake(daemon, &found, lifetime, how.memory != Some(false)).await?;
    match woken.outcome {
        Outcome::Changed => Ok((woken.sandbox, true)),
        // Somebody else was faster.
        Outcome::AlreadyThere => Ok((run_at_least(daemon, woken.sandbox, seconds).await?, false)),
    }
}

/// Whether it runs, and is about to go on with that.
fn is_awake(sandbox: &SandboxDetail) -> bool {
    let is_leaving = matches!(sandbox.listed.verb.as_deref(), Some("pausing" | "stopping"));
    sandbox.listed.state == SandboxState::Running && !is_leaving
}

/// Has a sandbox run that rests, with its memory or without.
async fn wake(
    daemon: &dyn Daemon,
    found: &SandboxDetail,
    lifetime: ChangeLifetime,
    keeps_memory: bool,
) -> Result<VerbResult, ApiError> {
    // Whatever its name leads to by then.
    let id = &found.listed.sandbox_id;
    // Before it runs, since the time that it had may be over at once.
    let asleep = match found.lifecycle.is_none_or(|it| it.timeout.is_none()) {
        true => daemon.inspect(id, false).await?,
        false => daemon.set_lifetime(id, lifetime).await?,
    };
    match asleep.listed.state {
        SandboxState::Stopped => daemon.start(id).await,
        SandboxState::Paused if !keeps_memory => {
            daemon.stop(id).await?;
            daemon.start(id).await
        }
        _ => daemon.resume(id, ResumeRequest::default()).await,
    }
}

/// `POST /sandboxes/{id}/resume` as E2B has it: of whatever rests, for so many seconds, and a conflict if it runs.
pub(in crate::server) async fn resume(context: Context, id: String, how: ResumeRequest) -> Created {
    let seconds = how.timeout.unwrap_or(RUNS_V1);
    require_time(seconds)?;
    let lifetime = ChangeLifetime {
        timeout: Some(Limit::Seconds(seconds)),
        on_timeout: how.auto_pause.map(|pauses| match pauses {
            true => OnTimeout::Pause,
            false => OnTimeout::Kill,
        }),
        ..ChangeLifetime::default()
    };
    let keeps_memory = how.memory != Some(false);
    let woken = context
        .run_verb(move |daemon| async move {
            let found = daemon.inspect(&id, false).await?;
            match is_awake(&found) {
                true => Ok(VerbResult {
                    outcome: Outcome::AlreadyThere,
                    sandbox: found,
                    hint: None,
                }),
                false => wake(&*daemon, &found, lifetime, keeps_memory).await,
            }
        })
        .await?;
    match woken.outcome {
        Outcome::Changed => {
            let sandbox = context.shown(woken.sandbox);
            Ok((StatusCode::CREATED, axum::Json(sandbox)))
        }
        Outcome::AlreadyThere => Err(already_there(&woken.sandbox)),
    }
}

/// What E2B has a conflict for, and our own verbs a success.
pub(in crate::server) fn already_there(sandbox: &SandboxDetail) -> ApiError {
    let (id, state) = (&sandbox.listed.sandbox_id, sandbox.listed.state);
    ApiError::new(
        ErrorCode::AlreadyThere,
        format!("sandbox {id} is already {state}"),
    )
}

/// Pauses without the memory, which is a stop. What is paused has nothing to lose by being asked again: its memory stays.
pub(in crate::server) async fn pause_disk(
    daemon: &dyn Daemon,
    id: &str,
) -> Result<VerbResult, ApiError> {
    let found = daemon.inspect(id, false).await?;
    match found.listed.state {
        SandboxState::Paused => Ok(VerbResult {
            outcome: Outcome::AlreadyThere,
            sandbox: found,
            hint: None,
        }),
        _ => daemon.stop(id).await,
    }
}

/// Moves a running sandbox's end away, never nearer. One that has none keeps it.
async fn run_at_least(
    daemon: &dyn Daemon,
    sandbox: SandboxDetail,
    seconds: i64,
) -> Result<SandboxDetail, ApiError> {
    let until = Timestamp::now().saturating_add(SignedDuration::from_secs(seconds));
    match (sandbox.listed.end_at, until) {
        (Some(end), Ok(until)) if end < until => {
            let longer = ChangeLifetime {
                timeout: Some(Limit::Seconds(seconds)),
                ..ChangeLifetime::default()
            };
            daemon
                .set_lifetime(&sandbox.listed.sandbox_id, longer)
                .await
        }
        _ => Ok(sandbox),
    }
}

fn require_time(seconds: i64) -> Result<(), ApiError> {
    match seconds {
        0.. => Ok(()),
        _ => Err(ApiError::new(
            ErrorCode::Invalid,
            format!("a sandbox's time cannot be {seconds} s"),
        )),
    }
}

/// `POST /sandboxes/{id}/refreshes`.
pub(in crate::server) async fn refresh(
    context: Context,
    Path(id): Path<String>,
    Json(how): Json<RefreshRequest>,
) -> Result<StatusCode, ApiError> {
    let seconds = how.duration.unwrap_or(REFRESH_MIN);
    require_time(seconds)?;
    context
        .run_verb(move |daemon| async move {
            let sandbox = daemon.inspect(&id, false).await?;
            run_at_least(&*daemon, sandbox, seconds.max(REFRESH_MIN)).await
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /v2/sandboxes/{id}/logs`: what happened to the sandbox. What its guest says is its console's, `…/console`.
pub(in crate::server) async fn logs(
    context: Context,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<axum::Json<Logs>, ApiError> {
    let sandbox = context.daemon.inspect(&id, false).await?;
    let query = LogQuery::parse(query.as_deref().unwrap_or_default())?;
    let id = Some(sandbox.listed.sandbox_id);
    let events = context.daemon.events(Some(0), false).await?;
    let own = events.filter(|event| std::future::ready(event.sandbox_id == id));
    let mut logs: Vec<LogEntry> = own.map(entry).collect().await;
    logs.retain(|entry| query.fits(entry));
    if query.backward {
        logs.reverse();
    }
    logs.truncate(query.limit);
    Ok(axum::Json(Logs { logs }))
}

fn entry(event: Event) -> LogEntry {
    let level = match event.event.ends_with("failed") || event.event.ends_with("broken") {
        true => "error",
        false => "info",
    };
    let message = match event.detail.is_empty() {
        true => event.event.clone(),
        false => format!("{}: {}", event.event, event.detail),
    };
    LogEntry {
        timestamp: event.time,
        message,
        level: level.to_owned(),
        fields: [
            ("event".to_owned(), event.event),
            ("sequence".to_owned(), event.sequence.to_string()),
        ]
        .into(),
    }
}

struct LogQuery {
    cursor: Option<i64>,
    limit: usize,
    backward: bool,
    level: Option<String>,
    search: Option<String>,
}

impl LogQuery {
    fn parse(query: &str) -> Result<Self, ApiError> {
        let mut asked = Self {
            cursor: None,
            limit: LOG_LINES,
            backward: false,
            level: None,
            search: None,
        };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let invalid = || ApiError::new(ErrorCode::Invalid, format!("{name} is {value:?}"));
            match &*name {
                "cursor" => asked.cursor = Some(value.parse().map_err(|_| invalid())?),
                "limit" => {
                    let limit: usize = value.parse().map_err(|_| invalid())?;
                    asked.limit = limit.min(LOG_LINES);
                }
                "direction" => {
                    asked.backward = match &*value {
                        "forward" => false,
                        "backward" => true,
                        _ => return Err(invalid()),
                    };
                }
                "level" => asked.level = Some(value.into_owned()),
                "search" => asked.search = Some(value.into_owned()),
                _ => {}
            }
        }
        Ok(asked)
    }

    fn fits(&self, entry: &LogEntry) -> bool {
        let at = entry.timestamp.as_millisecond();
        let from = |cursor| {
            if self.backward {
                at <= cursor
            } else {
                at >= cursor
            }
        };
        // Ours are of two levels.
        let severe = self
            .level
            .as_deref()
            .is_none_or(|it| it != "error" || entry.level == it);
        let search = self.search.as_deref();
        self.cursor.is_none_or(from)
            && severe
            && search.is_none_or(|words| entry.message.contains(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> Option<u16> {
        let new: NewSandbox = serde_json::from_str(body).expect("a request");
        check(&new).err().map(|error| error.status_code().as_u16())
    }

    #[test]
    fn what_makes_no_sense_is_400_and_what_there_is_not_501() {
        for (body, status) in [
            ("{}", None),
            (r#"{"autoPauseMemory": false}"#, Some(400)),
            (r#"{"autoPause": true, "autoPauseMemory": false}"#, None),
            (
                r#"{"autoPause": true, "autoPauseMemory": false, "autoResume": {"enabled": true}}"#,
                Some(400),
            ),
            (r#"{"network": {"denyOut": ["example.org"]}}"#, Some(400)),
            (r#"{"network": {"denyOut": ["10.0.0.0/33"]}}"#, Some(400)),
            (r#"{"network": {"allowOut": ["example.org"]}}"#, Some(400)),
            (
                r#"{"network": {"allowOut": ["example.org"], "denyOut": ["0.0.0.0/0"]}}"#,
                Some(501),
            ),
            (r#"{"network": {"denyOut": ["0.0.0.0/0"]}}"#, None),
            (
                r#"{"network": {"rules": {}, "allowPublicTraffic": false}}"#,
                None,
            ),
            (
                r#"{"secure": false, "network": {"allowPublicTraffic": false}}"#,
                Some(400),
            ),
            (r#"{"mcp": {"a": {}}}"#, Some(501)),
            (
                r#"{"volumeMounts": [{"name": "v", "path": "/v"}]}"#,
                Some(501),
            ),
        ] {
            assert_eq!(refused(body), status, "{body}");
        }
    }

    #[test]
    fn there_are_three_ways_to_keep_a_sandbox_from_the_internet() {
        let internet = |body: &str| {
            let new: NewSandbox = serde_json::from_str(body).expect("a request");
            new.internet()
        };
        assert_eq!(internet("{}"), None);
        let no = Some(false);
        assert_eq!(internet(r#"{"allow_internet_access": false}"#), no);
        assert_eq!(
            internet(r#"{"network": {"denyOut": ["0.0.0.0/0"]}, "allow_internet_access": true}"#),
            no
        );
        assert_eq!(
            internet(r#"{"network": {"allow_internet_access": false}}"#),
            no
        );
        assert_eq!(
            internet(r#"{"network": {}, "allow_internet_access": true}"#),
            Some(true)
        );
    }
}
