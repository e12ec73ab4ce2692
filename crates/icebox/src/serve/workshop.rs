//! What the daemon does on its host beside running sandboxes: root images, kernels, looking around.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_api::ApiError;
use icebox_api::types::{BuildEvent, BuildSource, Kernel, KernelEvent, KernelSource, Report};
use icebox_engine::id::Digest;
use icebox_engine::unit::Bytes;
use tempfile::TempDir;
use tokio::sync::mpsc;

/// Makes root images and kernels, and knows what works here. Dropping a call ends it and leaves nothing.
#[async_trait]
pub(super) trait Workshop: Send + Sync {
    /// The kernel for new templates. Imports the distribution's if there is none yet.
    async fn kernel(&self, events: &mpsc::Sender<BuildEvent>) -> Result<Digest, ApiError>;

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

/// A finished root image in a directory of its own, which goes with it unless the image has been moved away.
pub(super) struct RootImage {
    path: PathBuf,
    _directory: Option<TempDir>,
}

impl RootImage {
    pub(super) fn new(directory: TempDir, path: PathBuf) -> Self {
        Self {
            path,
            _directory: Some(directory),
        }
    }

    /// An image in a place that needs no removing.
    pub(super) fn elsewhere(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            _directory: None,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
