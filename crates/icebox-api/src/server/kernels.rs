//! `/kernels`.

use axum::extract::State;
use axum::response::Response;

use super::Context;
use super::extract::{self, Json};
use crate::ApiError;
use crate::types::{Kernel, KernelSource, NewKernel};

pub(super) async fn list(
    State(context): State<Context>,
) -> Result<axum::Json<Vec<Kernel>>, ApiError> {
    context.daemon.kernels().await.map(axum::Json)
}

/// Not run to the end: a client that goes away cancels its import.
pub(super) async fn import(
    State(context): State<Context>,
    Json(new): Json<NewKernel>,
) -> Result<Response, ApiError> {
    if new.source != KernelSource::Debian {
        context.only_for_admin("a kernel from a path of the host")?;
    }
    context.daemon.import_kernel(new).await.map(extract::lines)
}
