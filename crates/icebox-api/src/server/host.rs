//! What concerns the daemon and its host, not one sandbox.

use http::StatusCode;

use super::Context;
use super::extract::Json;
use crate::ApiError;
use crate::types::{DrainReport, GcReport, GcRequest, Report, Stats, Version};

pub(super) async fn health() -> StatusCode {
    StatusCode::NO_CONTENT
}

pub(super) async fn version() -> axum::Json<Version> {
    axum::Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    })
}

pub(super) async fn doctor(context: Context) -> Result<axum::Json<Report>, ApiError> {
    context.only_for_admin("looking at the host")?;
    context.daemon.doctor().await.map(axum::Json)
}

pub(super) async fn stats(context: Context) -> Result<axum::Json<Stats>, ApiError> {
    context.only_for_admin("looking at the host")?;
    context.daemon.stats().await.map(axum::Json)
}

/// The daemon leaves afterwards, so this is for the host's administrator.
pub(super) async fn drain(context: Context) -> Result<axum::Json<DrainReport>, ApiError> {
    context.only_for_admin("draining the daemon")?;
    context
        .run_verb(|daemon| async move { daemon.drain().await })
        .await
        .map(axum::Json)
}

pub(super) async fn gc(
    context: Context,
    Json(request): Json<GcRequest>,
) -> Result<axum::Json<GcReport>, ApiError> {
    context.only_for_admin("collecting what nothing needs")?;
    context
        .run_verb(|daemon| async move { daemon.gc(request).await })
        .await
        .map(axum::Json)
}
