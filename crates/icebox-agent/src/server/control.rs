//! The host's calls: `/init` after every boot and restore, `/clock` if that took long, `/prepare` before
//! every capture.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::Bytes,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode},
};
use icebox_agent_api::control::{
    Clock, ClockReport, Init, InitReport, Prepare, PrepareReport, StepOutcome,
};
use serde::de::DeserializeOwned;

use super::{
    auth::{presented_token, unauthorized},
    error::HttpError,
    machine::{self, MachineError},
    state::Agent,
};
use crate::chain;

pub(super) async fn init(
    State(agent): State<Arc<Agent>>,
    ConnectInfo(caller): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<InitReport>, HttpError> {
    let _one_at_a_time = agent.init.lock().await;
    let init: Init = authorised(&agent, &headers, &body)?;
    machine::validate(&init).map_err(|problem| HttpError::bad_request(problem.to_string()))?;
    let applied = tokio::task::spawn_blocking({
        let (machine, init) = (agent.machine, init.clone());
        move || machine.apply(&init, caller)
    });
    let report = applied
        .await
        .map_err(|error| HttpError::internal(error.to_string()))?
        .map_err(|error: MachineError| HttpError::internal(chain(&error)))?;
    agent
        .adopt(&init)
        .map_err(|error| HttpError::internal(chain(&error)))?;
    Ok(Json(report))
}

pub(super) async fn clock(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<ClockReport>, HttpError> {
    let clock: Clock = authorised(&agent, &headers, &body)?;
    let unix_ns = agent
        .machine
        .move_clock(clock.step_ns)
        .map_err(|error| HttpError::internal(format!("move the clock: {error}")))?;
    Ok(Json(ClockReport { unix_ns }))
}

pub(super) async fn prepare(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<PrepareReport>, HttpError> {
    let prepare: Prepare = authorised(&agent, &headers, &body)?;
    let machine = agent.machine;
    let deadline = Instant::now() + Duration::from_millis(prepare.timeout_ms.into());
    let (sync, _) = step(prepare.sync, deadline, move || machine.sync()).await;
    // Only clean pages can be dropped, and only what is synced is clean; the disk is told last.
    let (drop_caches, _) = step(prepare.drop_caches, deadline, move || machine.drop_caches()).await;
    let (trim, trimmed) = step(prepare.trim, deadline, move || machine.trim()).await;
    Ok(Json(PrepareReport {
        sync,
        drop_caches,
        trim,
        trimmed_bytes: trimmed.unwrap_or(0),
    }))
}

/// Reads a request of the host, after looking at its token.
fn authorised<Q: DeserializeOwned>(
    agent: &Agent,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Q, HttpError> {
    if !agent.is_host(presented_token(headers)) {
        return Err(unauthorized());
    }
    serde_json::from_slice(body).map_err(|error| {
        HttpError::new(StatusCode::BAD_REQUEST, format!("invalid request: {error}"))
    })
}

/// Runs one step for as long as time is left. One that overruns finishes by itself: a sync cannot be called off.
async fn step<T: Send + 'static>(
    wanted: bool,
    deadline: Instant,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> (StepOutcome, Option<T>) {
    if !wanted || deadline <= Instant::now() {
        return (StepOutcome::Skipped, None);
    }
    let started = Instant::now();
    let result = tokio::time::timeout_at(deadline.into(), tokio::task::spawn_blocking(work)).await;
    let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    match result {
        Err(_) => (StepOutcome::TimedOut, None),
        Ok(Err(error)) => (
            StepOutcome::Failed {
                micros,
                error: error.to_string(),
            },
            None,
        ),
        Ok(Ok(Err(error))) => (
            StepOutcome::Failed {
                micros,
                error: error.to_string(),
            },
            None,
        ),
        Ok(Ok(Ok(value))) => (StepOutcome::Done { micros }, Some(value)),
    }
}
