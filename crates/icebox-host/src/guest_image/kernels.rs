//! The engine's view of kernels: which one is the default, and the files of one boot.

use std::{fs, path::PathBuf};

use async_trait::async_trait;
use icebox_engine::{
    host::{BootFiles, ErrorKind, HostError, Kernels},
    id::Digest,
};

use super::{
    Places, initramfs,
    kernel::{self, Kernel},
};
use crate::blocking::blocking;

/// Kernels in their directory, each booted with one agent.
#[derive(Clone, Debug)]
pub struct KernelStore {
    places: Places,
    agent: PathBuf,
    default: Option<Digest>,
}

impl KernelStore {
    /// `agent` is the static agent that goes into every initramfs. Without `default`, the kernel that was added last is
    /// the default.
    #[must_use]
    pub fn new(places: Places, agent: PathBuf, default: Option<Digest>) -> Self {
        Self {
            places,
            agent,
            default,
        }
    }

    fn find_default(&self) -> Result<Digest, HostError> {
        if let Some(digest) = &self.default {
            return Ok(Kernel::open(&self.places, digest)?.digest().clone());
        }
        // A manifest is written once, so its time is when its kernel was added.
        kernel::list(&self.places)?
            .into_iter()
            .max_by_key(|kernel| {
                fs::metadata(kernel.manifest())
                    .and_then(|metadata| metadata.modified())
                    .ok()
            })
            .map(|kernel| kernel.digest().clone())
            .ok_or_else(|| {
                HostError::new(ErrorKind::NotFound, "there is no kernel to boot")
                    .hint("`icebox kernel import` gets Debian's")
            })
    }
}

#[async_trait]
impl Kernels for KernelStore {
    async fn default_kernel(&self) -> Result<Digest, HostError> {
        let this = self.clone();
        blocking(move || this.find_default()).await
    }

    async fn boot_files(&self, kernel: &Digest) -> Result<BootFiles, HostError> {
        let this = self.clone();
        let digest = kernel.clone();
        blocking(move || {
            let kernel = Kernel::open(&this.places, &digest)?;
            let initramfs = initramfs::ensure(&kernel, &this.agent)?;
            Ok(BootFiles {
                kernel: kernel.image(),
                initramfs: initramfs.path,
                agent: initramfs.agent,
            })
        })
        .await
    }
}
