//! `/sandboxes`: create, list, inspect and the verbs.

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;

use super::extract::{Json, Path, Query, WantsSandbox};
use super::{Context, e2b};
use crate::types::{
    ChangeLifetime, Forked, History, MetricsRange, NewFork, NewSnapshot, Outcome, PauseRequest,
    ResumeRequest, RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, Template, VerbResult,
};
use crate::{ApiError, ErrorCode};

#[derive(serde::Deserialize, schemars::JsonSchema)]
pub(super) struct Wanted {
    /// With what they occupy, which takes a look at files.
    #[serde(default)]
    space: bool,
}

pub(super) async fn list(
    context: Context,
    Query(wanted): Query<Wanted>,
) -> Result<axum::Json<Vec<SandboxDetail>>, ApiError> {
    let all = context.daemon.list(wanted.space).await?;
    let shown = all.into_iter().map(|sandbox| SandboxDetail {
        // E2B's lists have none.
        envd_access_token: None,
        traffic_access_token: None,
        ..context.shown(sandbox)
    });
    Ok(axum::Json(shown.collect()))
}

pub(super) async fn inspect(
    context: Context,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<axum::Json<SandboxDetail>, ApiError> {
    let sandbox = context.daemon.inspect(&id, wanted.space).await?;
    Ok(axum::Json(context.shown(sandbox)))
}

pub(super) async fn destroy(
    context: Context,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.destroy(&id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn pause(
    context: Context,
    Path(id): Path<String>,
    WantsSandbox(wants): WantsSandbox,
    Json(how): Json<PauseRequest>,
) -> Result<Response, ApiError> {
    let keeps_memory = how.memory != Some(false);
    let result = context
        .run_verb(move |daemon| async move {
            match keeps_memory {
                true => daemon.pause(&id).await,
                false => e2b::sandboxes::pause_disk(&*daemon, &id).await,
            }
        })
        .await?;
    e2b_answer(&context, result, wants, |_| {
        StatusCode::NO_CONTENT.into_response()
    })
}

pub(super) async fn resume(
    context: Context,
    Path(id): Path<String>,
    WantsSandbox(wants): WantsSandbox,
    Json(how): Json<ResumeRequest>,
) -> Result<Response, ApiError> {
    if !wants && !context.caller.is_administrator() {
        let resumed = e2b::sandboxes::resume(context, id, how).await?;
        return Ok(resumed.into_response());
    }
    let result = context
        .run_verb(|daemon| async move { daemon.resume(&id, how).await })
        .await?;
    e2b_answer(&context, result, wants, |sandbox| {
        (StatusCode::CREATED, axum::Json(sandbox)).into_response()
    })
}

/// E2B has a conflict where a verb found nothing to do; our clients ask for the result instead.
fn e2b_answer(
    context: &Context,
    result: VerbResult,
    wants_sandbox: bool,
    changed: impl FnOnce(SandboxDetail) -> Response,
) -> Result<Response, ApiError> {
    let result = shown(context, result);
    if wants_sandbox {
        let applied = [("preference-applied", "return=representation")];
        return Ok((applied, axum::Json(result)).into_response());
    }
    match result.outcome {
        Outcome::Changed => Ok(changed(result.sandbox)),
        Outcome::AlreadyThere => Err(e2b::sandboxes::already_there(&result.sandbox)),
    }
}

fn shown(context: &Context, result: VerbResult) -> VerbResult {
    VerbResult {
        outcome: result.outcome,
        sandbox: context.shown(result.sandbox),
        hint: result.hint,
    }
}

pub(super) async fn stop(
    context: Context,
    Path(id): Path<String>,
) -> Result<axum::Json<VerbResult>, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.stop(&id).await })
        .await
        .map(|result| axum::Json(shown(&context, result)))
}

pub(super) async fn start(
    context: Context,
    Path(id): Path<String>,
) -> Result<axum::Json<VerbResult>, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.start(&id).await })
        .await
        .map(|result| axum::Json(shown(&context, result)))
}

pub(super) async fn checkpoint(
    context: Context,
    Path(id): Path<String>,
) -> Result<axum::Json<VerbResult>, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.checkpoint(&id).await })
        .await
        .map(|result| axum::Json(shown(&context, result)))
}

pub(super) async fn rollback(
    context: Context,
    Path(id): Path<String>,
    Json(how): Json<RollbackRequest>,
) -> Result<axum::Json<VerbResult>, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.rollback(&id, how).await })
        .await
        .map(|result| axum::Json(shown(&context, result)))
}

pub(super) async fn history(
    context: Context,
    Path(id): Path<String>,
) -> Result<axum::Json<History>, ApiError> {
    context.daemon.history(&id).await.map(axum::Json)
}

pub(super) async fn forget(
    context: Context,
    Path((id, point)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.forget(&id, &point).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn snapshot(
    context: Context,
    Path(id): Path<String>,
    Json(new): Json<NewSnapshot>,
) -> Result<(StatusCode, axum::Json<Snapshot>), ApiError> {
    let mut taken = context
        .run_verb(|daemon| async move { daemon.snapshot(&id, new).await })
        .await?;
    if !context.caller.is_administrator() {
        e2b::snapshots::put(&mut taken);
    }
    Ok((StatusCode::CREATED, axum::Json(taken)))
}

pub(super) async fn fork(
    context: Context,
    Path(id): Path<String>,
    WantsSandbox(wants): WantsSandbox,
    Json(mut new): Json<NewFork>,
) -> Result<(StatusCode, axum::Json<Vec<Forked>>), ApiError> {
    if !wants && !context.caller.is_administrator() {
        e2b::sandboxes::check_fork(&context, &id, &mut new).await?;
    }
    let forks = context
        .run_verb(|daemon| async move { daemon.fork(&id, new).await })
        .await?;
    let forks = forks
        .into_iter()
        .map(|fork| match fork {
            Forked::Sandbox(sandbox) => Forked::Sandbox(Box::new(context.shown(*sandbox))),
            error @ Forked::Error(_) => error,
        })
        .collect();
    Ok((StatusCode::CREATED, axum::Json(forks)))
}

pub(super) async fn flatten(
    context: Context,
    Path(id): Path<String>,
    Json(new): Json<NewSnapshot>,
) -> Result<(StatusCode, axum::Json<Template>), ApiError> {
    let flat = context
        .run_verb(|daemon| async move { daemon.flatten(&id, new).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(flat)))
}

pub(super) async fn set_lifetime(
    context: Context,
    Path(id): Path<String>,
    WantsSandbox(wants): WantsSandbox,
    Json(change): Json<ChangeLifetime>,
) -> Result<Response, ApiError> {
    if change == ChangeLifetime::default() {
        return Err(ApiError::new(ErrorCode::Invalid, "timeout is missing")
            .hint("ask for whole seconds, or `never`"));
    }
    let sandbox = context
        .run_verb(move |daemon| async move { daemon.set_lifetime(&id, change).await })
        .await?;
    if !wants {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let applied = [("preference-applied", "return=representation")];
    Ok((applied, axum::Json(context.shown(sandbox))).into_response())
}

pub(super) async fn metrics(
    context: Context,
    Path(id): Path<String>,
    Query(range): Query<MetricsRange>,
) -> Result<axum::Json<Vec<SandboxMetric>>, ApiError> {
    context.daemon.metrics(&id, range).await.map(axum::Json)
}

pub(super) async fn console(
    context: Context,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let log = context.daemon.console(&id).await?;
    Ok((
        [(CONTENT_TYPE, "application/octet-stream")],
        Body::from_stream(log),
    )
        .into_response())
}
