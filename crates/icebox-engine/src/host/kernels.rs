//! Kernels: what a sandbox boots, beside its disk.

use std::path::PathBuf;

use async_trait::async_trait;

use super::HostError;
use crate::id::Digest;

/// The files of one boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel image.
    pub kernel: PathBuf,
    /// Our initramfs for it: its modules and the agent.
    pub initramfs: PathBuf,
    /// The agent inside the initramfs: recorded in every generation, since a capture contains it.
    pub agent: Digest,
}

/// Finds kernels that were imported.
#[async_trait]
pub trait Kernels: Send + Sync {
    /// The kernel that new templates use.
    ///
    /// # Errors
    /// None has been imported: says how to.
    async fn default_kernel(&self) -> Result<Digest, HostError>;

    /// The files to boot `kernel` with, the initramfs made if this kernel and agent have not met yet.
    async fn boot_files(&self, kernel: &Digest) -> Result<BootFiles, HostError>;
}
