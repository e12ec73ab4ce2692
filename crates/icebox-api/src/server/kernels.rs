//! `/kernels`.

use axum::response::Response;

use super::Context;
use super::extract::{self, Json};
use crate::ApiError;
use crate::types::{Kernel, NewKernel};

pub(super) async fn list(context: Context) -> Result<axum::Json<Vec<Kernel>>, ApiError> {
    context.daemon.kernels().await.map(axum::Json)
}

/// Not run to the end: a client that goes away cancels its import.
pub(super) async fn import(
    context: Context,
    Json(new): Json<NewKernel>,
) -> Result<Response, ApiError> {
    context.only_for_admin("importing a kernel")?;
    context.daemon.import_kernel(new).await.map(extract::lines)
}
