//! Why a kernel, an initramfs or a root image could not be made.

use std::{
    io,
    path::{Path, PathBuf},
};

use icebox_engine::{
    host::{ErrorKind, HostError},
    id::Digest,
};

/// A failure of this module. Nothing is left behind when one is returned. [`hint`](Self::hint) says what the user can
/// do, where there is something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message of each variant says what it and its fields are"
)]
pub enum ImageError {
    #[error("cannot {op} {}", .path.display())]
    Io {
        op: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("no space left on the filesystem of {} while building", .path.display())]
    NoSpace { path: PathBuf },
    #[error("{tool} is not installed")]
    ToolMissing { tool: String },
    #[error("cannot run {tool}")]
    ToolStart { tool: String, source: io::Error },
    #[error("{tool} failed ({status}){}", Tail(.tail))]
    Tool {
        tool: String,
        status: String,
        /// The last lines it wrote to stderr, bounded.
        tail: String,
    },
    #[error("{op} needs root")]
    NeedsRoot { op: &'static str },
    #[error("no package called {package:?}")]
    UnknownPackage { package: String },
    #[error("{package:?} is not a package name")]
    InvalidPackage { package: String },
    #[error("no distribution release called {suite:?}")]
    UnknownSuite { suite: String },
    #[error("{suite:?} is not the name of a distribution release")]
    InvalidSuite { suite: String },
    #[error("cannot download packages{}", Tail(.tail))]
    Network { tail: String },
    #[error("{} is not a Linux kernel image: {reason}", .path.display())]
    NotAKernel { path: PathBuf, reason: String },
    #[error("{} is not a usable kernel module: {reason}", .path.display())]
    BadModule { path: PathBuf, reason: String },
    #[error("kernel {release} has no module {module} and does not have it built in")]
    ModuleMissing { module: String, release: String },
    #[error("kernel modules need each other in a circle: {}", .chain.join(" -> "))]
    ModuleCycle { chain: Vec<String> },
    #[error("no kernel {} here", .0.short())]
    UnknownKernel(Digest),
    #[error("cannot read the manifest {}: {reason}", .path.display())]
    BadManifest { path: PathBuf, reason: String },
    #[error("{} has format {found}, and this version reads formats up to {known}", .path.display())]
    NewerManifest {
        path: PathBuf,
        found: u64,
        known: u64,
    },
    #[error("{} is not a usable archive: {reason}", .path.display())]
    BadArchive { path: PathBuf, reason: String },
    #[error("{} is not an ext4 image: {reason}", .path.display())]
    NotExt4 { path: PathBuf, reason: String },
    #[error("the filesystem in {} is damaged{}", .path.display(), Tail(.tail))]
    DamagedFilesystem { path: PathBuf, tail: String },
    #[error("{} is not a directory", .path.display())]
    NotADirectory { path: PathBuf },
    #[error("the content does not fit a root image of {size_mib} MiB")]
    TooSmall { size_mib: u64 },
    #[error("a root image of {size_mib} MiB is out of range ({min_mib} MiB to {max_mib} MiB)")]
    SizeOutOfRange {
        size_mib: u64,
        min_mib: u64,
        max_mib: u64,
    },
}

/// A tail of stderr, appended only when there is one.
struct Tail<'a>(&'a str);

impl std::fmt::Display for Tail<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ":\n{}", self.0)
        }
    }
}

impl ImageError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Host(error) => return error.hint_text().map(ToOwned::to_owned),
            Self::NoSpace { path } => format!(
                "free some space below {}, or move the data directory",
                path.display()
            ),
            Self::ToolMissing { tool } => {
                format!("run scripts/setup, or install the package that has {tool}")
            }
            Self::NeedsRoot { .. } => "run the daemon as root".to_owned(),
            Self::UnknownPackage { .. } | Self::InvalidPackage { .. } => {
                "package names are the distribution's own, for example `python3` or `git`"
                    .to_owned()
            }
            Self::UnknownSuite { .. } | Self::InvalidSuite { .. } => {
                "give a release by its code name, for example `debian:bookworm`".to_owned()
            }
            Self::Network { .. } => {
                "check that this machine reaches its package mirror (`apt-get update`)".to_owned()
            }
            Self::NotAKernel { .. } => {
                "give an x86-64 bzImage, or a vmlinux built with CONFIG_PVH=y".to_owned()
            }
            Self::ModuleMissing { .. } => {
                "give the kernel's own module directory, or build the driver in".to_owned()
            }
            Self::UnknownKernel(_) => {
                "`icebox kernel ls` shows the kernels that are here".to_owned()
            }
            Self::NewerManifest { .. } => {
                "use the newer version of icebox that wrote it".to_owned()
            }
            Self::NotExt4 { .. } => {
                "give a raw image that holds one ext4 filesystem and no partition table".to_owned()
            }
            Self::DamagedFilesystem { .. } => {
                "repair a copy with `e2fsck -f`, then build again".to_owned()
            }
            Self::TooSmall { .. } => "ask for a larger disk".to_owned(),
            _ => return None,
        })
    }

    /// `op` on `path` failed; running out of space becomes its own error.
    pub(super) fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            Self::NoSpace {
                path: path.to_owned(),
            }
        } else {
            Self::Io {
                op,
                path: path.to_owned(),
                source,
            }
        }
    }
}

impl From<ImageError> for HostError {
    fn from(error: ImageError) -> Self {
        let error = match error {
            ImageError::Host(error) => return error,
            error => error,
        };
        let kind = match &error {
            ImageError::UnknownKernel(_) => ErrorKind::NotFound,
            ImageError::NoSpace { .. } => ErrorKind::Exhausted,
            ImageError::ToolMissing { .. }
            | ImageError::NeedsRoot { .. }
            | ImageError::NewerManifest { .. } => ErrorKind::Unsupported,
            ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::NotFound
            }
            ImageError::Io { .. }
            | ImageError::ToolStart { .. }
            | ImageError::Tool { .. }
            | ImageError::Network { .. }
            | ImageError::BadManifest { .. } => ErrorKind::Other,
            _ => ErrorKind::Invalid,
        };
        let hint = error.hint();
        let message = error.to_string();
        let mut host = Self::new(kind, message);
        if let Some(hint) = hint {
            host = host.hint(hint);
        }
        // The message is already this error's own; only what is below it is its cause.
        match error {
            ImageError::Io { source, .. } | ImageError::ToolStart { source, .. } => {
                host.caused_by(source)
            }
            _ => host,
        }
    }
}

/// Adds the operation and the path to an I/O error.
pub(super) trait Io<T> {
    /// Wraps the error as [`ImageError::Io`], or [`ImageError::NoSpace`] if that is what it was.
    ///
    /// # Errors
    /// The one it was called on, if any.
    fn at(self, op: &'static str, path: &Path) -> Result<T, ImageError>;
}

impl<T> Io<T> for io::Result<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::io(op, path, source))
    }
}

impl<T> Io<T> for Result<T, rustix::io::Errno> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::io(op, path, source.into()))
    }
}
