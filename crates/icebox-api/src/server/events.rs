//! `/events`: one JSON line per event.

use axum::response::Response;
use serde::Deserialize;

use super::Context;
use super::extract::{self, Query};
use crate::ApiError;

#[derive(Deserialize)]
pub(super) struct Range {
    since: Option<u64>,
    #[serde(default)]
    follow: bool,
}

pub(super) async fn events(
    context: Context,
    Query(range): Query<Range>,
) -> Result<Response, ApiError> {
    let events = context.daemon.events(range.since, range.follow).await?;
    Ok(extract::lines_until(events, context.leaving))
}
