//! `/templates` and `/builds`.

use axum::extract::{Path, State};
use axum::response::Response;
use http::StatusCode;

use super::Context;
use super::extract::{self, Json};
use crate::ApiError;
use crate::types::{BuildSource, NewBuild, Template};

pub(super) async fn list(
    State(context): State<Context>,
) -> Result<axum::Json<Vec<Template>>, ApiError> {
    context.daemon.templates().await.map(axum::Json)
}

pub(super) async fn inspect(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Result<axum::Json<Template>, ApiError> {
    context.daemon.template(&id).await.map(axum::Json)
}

pub(super) async fn remove(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.remove_template(&id).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Not run to the end: a client that goes away cancels its build.
pub(super) async fn build(
    State(context): State<Context>,
    Json(new): Json<NewBuild>,
) -> Result<Response, ApiError> {
    if !matches!(new.source, BuildSource::Debian { .. }) {
        context.only_for_admin("a build from a path of the host")?;
    }
    context.daemon.build(new).await.map(extract::lines)
}
