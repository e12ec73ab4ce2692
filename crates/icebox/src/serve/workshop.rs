//! What the daemon does on its host beside running sandboxes: root images, kernels, looking around.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_api::ApiError;
use icebox_api::types::{BuildEvent, BuildSource, Kernel, KernelEvent, KernelSource, Report};
use icebox_engine::unit::Bytes;
use tokio::sync::mpsc;

/// Makes root images and kernels, and knows what works here. Dropping a call ends it and leaves nothing.
#[async_trait]
pub(super) trait Workshop: Send + Sync {
    /// Makes a root image.
    async fn image(
        &self,
        source: BuildSource,
        size: Option<Bytes>,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<RootImage, ApiError>;

    /// All kernels.
    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError>;

    /// Imports a kernel.
    async fn import_kernel(
        &self,
        source: KernelSource,
        events: &mpsc::Sender<KernelEvent>,
    ) -> Result<Kernel, ApiError>;

    /// Looks at everything that sandboxes need here.
    async fn doctor(&self) -> Report;
}

/// A finished root image.
pub(super) struct RootImage {
    path: PathBuf,
}

impl RootImage {
    /// An image in a place that needs no removing.
    pub(super) fn elsewhere(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
