//! `/teams`, `/api-keys` and `/audit`: the administrator's alone.

use http::StatusCode;

use super::Context;
use super::extract::{Json, Path, Query};
use crate::ApiError;
use crate::types::{AuditEntry, AuditRange, ChangeTeam, Key, MadeKey, NewKey, NewTeam, Team};

const KEYS: &str = "managing keys";
const TEAMS: &str = "managing teams";

pub(super) async fn teams(context: Context) -> Result<axum::Json<Vec<Team>>, ApiError> {
    context.only_for_admin(TEAMS)?;
    context.daemon.teams().await.map(axum::Json)
}

pub(super) async fn create_team(
    context: Context,
    Json(new): Json<NewTeam>,
) -> Result<(StatusCode, axum::Json<Team>), ApiError> {
    context.only_for_admin(TEAMS)?;
    let team = context
        .run_verb(|daemon| async move { daemon.create_team(new).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(team)))
}

pub(super) async fn change_team(
    context: Context,
    Path(name): Path<String>,
    Json(change): Json<ChangeTeam>,
) -> Result<axum::Json<Team>, ApiError> {
    context.only_for_admin(TEAMS)?;
    context
        .run_verb(|daemon| async move { daemon.change_team(&name, change).await })
        .await
        .map(axum::Json)
}

pub(super) async fn remove_team(
    context: Context,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    context.only_for_admin(TEAMS)?;
    context
        .run_verb(|daemon| async move { daemon.remove_team(&name).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn keys(context: Context) -> Result<axum::Json<Vec<Key>>, ApiError> {
    context.only_for_admin(KEYS)?;
    context.daemon.keys().await.map(axum::Json)
}

pub(super) async fn create_key(
    context: Context,
    Json(new): Json<NewKey>,
) -> Result<(StatusCode, axum::Json<MadeKey>), ApiError> {
    context.only_for_admin(KEYS)?;
    let made = context
        .run_verb(|daemon| async move { daemon.create_key(new).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(made)))
}

pub(super) async fn remove_key(
    context: Context,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    context.only_for_admin(KEYS)?;
    context
        .run_verb(|daemon| async move { daemon.remove_key(&id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn audit(
    context: Context,
    Query(range): Query<AuditRange>,
) -> Result<axum::Json<Vec<AuditEntry>>, ApiError> {
    context.only_for_admin("reading the audit log")?;
    context.daemon.audit(range).await.map(axum::Json)
}
