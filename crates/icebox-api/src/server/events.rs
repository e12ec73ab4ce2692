//! `/events`: one JSON line per event.

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;

use super::Context;
use super::extract::{self, Query};
use crate::ApiError;

#[derive(Deserialize, JsonSchema)]
pub(super) struct Range {
    /// Those after this number. Absent: from now on.
    since: Option<u64>,
    /// Whether to go on with those that are to come.
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
