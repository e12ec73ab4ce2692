//! Templates that are built by steps: E2B's third version of builds.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use futures_util::{StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, StatusCode, header};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::server::Context;
use crate::server::extract::{Json, Path, Query};
use crate::types::{
    AssignTags, AssignedTags, BuildStatus, FilesUpload, NewRecipe, RemoveTags, RequestedBuild,
    StartBuild, TemplateTag,
};
use crate::{ApiError, ErrorCode};

/// Where archives are put. Whoever knows the rest of the way may: SDKs send no key there.
pub(in crate::server) const UPLOADS: &str = "/uploads/";
/// How long an archive may not go on coming.
const SILENCE: Duration = Duration::from_secs(60);
/// The most lines of a log in one answer.
const LINES: usize = 100;

pub(in crate::server) async fn request(
    context: Context,
    Json(new): Json<NewRecipe>,
) -> Result<(StatusCode, axum::Json<RequestedBuild>), ApiError> {
    let requested = context.daemon.request_build(new).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(requested)))
}

/// Whether an archive is there, and if not, where to put it: at the address that this request came to.
pub(in crate::server) async fn files(
    context: Context,
    Path((_template, hash)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<(StatusCode, axum::Json<FilesUpload>), ApiError> {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let host = host.ok_or_else(|| ApiError::new(ErrorCode::Invalid, "missing header host"))?;
    let way = context.daemon.admit_files(&hash).await?;
    let upload = FilesUpload {
        present: way.is_none(),
        url: way.map(|way| format!("{}://{host}{UPLOADS}{way}", context.scheme)),
    };
    Ok((StatusCode::CREATED, axum::Json(upload)))
}

pub(in crate::server) async fn put_files(
    context: Context,
    Path(way): Path<String>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let content = body.into_data_stream().map_err(std::io::Error::other);
    // As long as it comes at all: whoever knows the way may be far away.
    let content = tokio_stream::StreamExt::timeout(content, SILENCE).map(|piece| match piece {
        Ok(piece) => piece,
        Err(silence) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, silence)),
    });
    context.daemon.put_files(&way, content.boxed()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::server) async fn start(
    context: Context,
    Path((template, build)): Path<(String, String)>,
    Json(what): Json<StartBuild>,
) -> Result<Response, ApiError> {
    of_template(&template, context.daemon.build_status(&build, 0, 0).await?)?;
    context.daemon.start_build(&build, what).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::server) struct Lines {
    /// How many lines of its log to leave out.
    #[serde(default)]
    logs_offset: usize,
    /// How many lines to have at most, up to 100.
    limit: Option<usize>,
}

pub(in crate::server) async fn status(
    context: Context,
    Path((template, build)): Path<(String, String)>,
    Query(lines): Query<Lines>,
) -> Result<axum::Json<BuildStatus>, ApiError> {
    let limit = lines.limit.unwrap_or(LINES).min(LINES);
    let status = context
        .daemon
        .build_status(&build, lines.logs_offset, limit);
    of_template(&template, status.await?).map(axum::Json)
}

/// A build, if it is one of this template.
fn of_template(template: &str, build: BuildStatus) -> Result<BuildStatus, ApiError> {
    match build.template_id == template {
        true => Ok(build),
        false => Err(ApiError::new(
            ErrorCode::NotFound,
            format!("template {template:?} has no build {:?}", build.build_id),
        )),
    }
}

pub(in crate::server) async fn tags(
    context: Context,
    Path(template): Path<String>,
) -> Result<axum::Json<Vec<TemplateTag>>, ApiError> {
    let tags = context.daemon.template_tags(&template).await;
    tags.map(axum::Json)
}

pub(in crate::server) async fn assign_tags(
    context: Context,
    Json(asked): Json<AssignTags>,
) -> Result<(StatusCode, axum::Json<AssignedTags>), ApiError> {
    let assigned = context
        .run_verb(|daemon| async move { daemon.assign_tags(asked).await })
        .await?;
    Ok((StatusCode::CREATED, axum::Json(assigned)))
}

pub(in crate::server) async fn remove_tags(
    context: Context,
    Json(asked): Json<RemoveTags>,
) -> Result<StatusCode, ApiError> {
    context
        .run_verb(|daemon| async move { daemon.remove_tags(asked).await })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
