//! `/templates` and `/builds`.

use axum::response::Response;
use http::StatusCode;

use super::Context;
use super::extract::{self, Json, Path};
use crate::types::{BuildSource, ChangeTemplate, NewBuild, Template, TemplateAlias, Warm};
use crate::{ApiError, ErrorCode};

pub(super) async fn list(context: Context) -> Result<axum::Json<Vec<Template>>, ApiError> {
    context.daemon.templates().await.map(axum::Json)
}

pub(super) async fn inspect(
    context: Context,
    Path(id): Path<String>,
) -> Result<axum::Json<Template>, ApiError> {
    context.daemon.template(&id).await.map(axum::Json)
}

/// What a name leads to, for those who want to know whether it is taken.
pub(super) async fn alias(
    context: Context,
    Path(alias): Path<String>,
) -> Result<axum::Json<TemplateAlias>, ApiError> {
    context.daemon.template_alias(&alias).await.map(axum::Json)
}

/// One that is in use is 400: E2B's answer.
pub(super) async fn remove(
    context: Context,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.remove_template(&id).await })
        .await
        .map_err(|error| match error.body().error_code {
            Some(ErrorCode::InUse) => error.status(StatusCode::BAD_REQUEST),
            _ => error,
        })?;
    Ok(StatusCode::NO_CONTENT)
}

/// A public template is what everybody's sandboxes are made from, so it is the administrator who says which are.
pub(super) async fn change(
    context: Context,
    Path(id): Path<String>,
    Json(change): Json<ChangeTemplate>,
) -> Result<axum::Json<Template>, ApiError> {
    context.only_for_admin("publishing a template")?;
    context
        .run_verb(|daemon| async move { daemon.publish_template(&id, change.public).await })
        .await
        .map(axum::Json)
}

pub(super) async fn warm(
    context: Context,
    Path(id): Path<String>,
    Json(warm): Json<Warm>,
) -> Result<axum::Json<Template>, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.warm_template(&id, warm.count).await })
        .await
        .map(axum::Json)
}

/// Not run to the end: a client that goes away cancels its build.
pub(super) async fn build(
    context: Context,
    Json(new): Json<NewBuild>,
) -> Result<Response, ApiError> {
    if !matches!(new.source, BuildSource::Debian { .. }) {
        context.only_for_admin("a build from a path of the host")?;
    }
    context.daemon.build(new).await.map(extract::lines)
}
