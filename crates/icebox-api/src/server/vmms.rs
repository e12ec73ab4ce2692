//! `/vmms`.

use super::Context;
use crate::ApiError;
use crate::types::HostVmm;

pub(super) async fn list(context: Context) -> Result<axum::Json<Vec<HostVmm>>, ApiError> {
    context.daemon.vmms().await.map(axum::Json)
}
