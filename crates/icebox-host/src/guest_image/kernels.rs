//! The engine's view of kernels: which one is the default, and the files of one boot.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use async_trait::async_trait;
use icebox_engine::{
    host::{BootFiles, ErrorKind, HostError, Kernels},
    id::Digest,
};

use super::{
    ImageError, Io, Places, initramfs,
    kernel::{self, Kernel},
};
use crate::blocking::blocking;

/// Kernels in their directory, each booted with one agent.
#[derive(Clone, Debug)]
pub struct KernelStore {
    places: Places,
    agent: PathBuf,
    default: Option<Digest>,
    /// What boots found already: the two files are megabytes to read, compare and hash.
    known: Arc<Mutex<HashMap<Digest, Known>>>,
}

/// Boot files, and the looks of the files they were derived from and are in.
#[derive(Clone, Debug)]
struct Known {
    files: BootFiles,
    agent: Looks,
    initramfs: Looks,
}

/// What tells one state of a file from another without reading it: the rule of `make` and `rsync`, with the inode.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Looks {
    inode: u64,
    size: u64,
    modified: SystemTime,
}

impl Looks {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            inode: metadata.ino(),
            size: metadata.len(),
            modified: metadata.modified()?,
        })
    }
}

impl Known {
    fn holds(&self, agent: &Looks) -> bool {
        self.agent == *agent
            && Looks::of(&self.files.initramfs).is_ok_and(|looks| looks == self.initramfs)
    }
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
            known: Arc::default(),
        }
    }

    fn find_boot_files(&self, kernel: &Digest) -> Result<BootFiles, ImageError> {
        // Looked at before it is read: a change in between is seen the next time.
        let agent = Looks::of(&self.agent).at("look at the agent", &self.agent)?;
        let known = self.known().get(kernel).cloned();
        if let Some(known) = known.filter(|known| known.holds(&agent)) {
            return Ok(known.files);
        }
        let found = Kernel::open(&self.places, kernel)?;
        let initramfs = initramfs::ensure(&found, &self.agent)?;
        let files = BootFiles {
            kernel: found.image(),
            initramfs: initramfs.path,
            agent: initramfs.agent,
        };
        let entry = Known {
            initramfs: Looks::of(&files.initramfs).at("look at", &files.initramfs)?,
            files: files.clone(),
            agent,
        };
        self.known().insert(kernel.clone(), entry);
        Ok(files)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
        blocking(move || this.find_boot_files(&digest).map_err(HostError::from)).await
    }
}
