//! Where everything is: the one place that knows paths under the data directory and the runtime directory.
//!
//! ```text
//! <data>/format                      layout version, checked before anything else
//!        lock                        flock of the daemon that owns the tree
//!        kernels/<digest>/           bases/<digest>/image     layers/<id>/disk     memories/<id>/{base,diff}
//!        templates/<id>/             sandboxes/<id>/{manifest.json, heads/<n>, generations/<n>/, console.log}
//!        staging/                    objects being made; nothing in it survives a start
//!        trash/                      objects being removed
//! <run>/vm/<sandbox>/                API socket and pid files of one VMM; gone after a reboot
//! ```
//!
//! Every object directory holds a `manifest.json`. Pure: nothing here touches the disk.

use std::path::{Path, PathBuf};

use crate::id::{Digest, GenerationNo, HeadId, LayerId, MemoryId, SandboxId, TemplateId};

/// The file that makes a directory an object.
pub const MANIFEST: &str = "manifest.json";
/// A generation's or snapshot template's device state, beside its manifest.
pub const DEVICE_STATE: &str = "device-state";
/// A memory object's full, sparse pages.
pub const MEMORY_BASE: &str = "base";
/// A memory object's changes against another memory's base.
pub const MEMORY_DIFF: &str = "diff";
/// A layer's data, in its driver's format.
pub const LAYER_DISK: &str = "disk";
/// A base's raw image.
pub const BASE_IMAGE: &str = "image";

/// Something with a directory and a manifest of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A kernel with its modules.
    Kernel(Digest),
    /// An imported disk image.
    Base(Digest),
    /// An immutable disk state.
    Layer(LayerId),
    /// An immutable guest memory.
    Memory(MemoryId),
    /// What sandboxes are created from.
    Template(TemplateId),
    /// A sandbox.
    Sandbox(SandboxId),
    /// What one pause of a sandbox wrote.
    Generation(SandboxId, GenerationNo),
}

impl Object {
    /// The object's directory, relative to the data directory.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        match self {
            Self::Kernel(digest) => Path::new("kernels").join(digest.as_str()),
            Self::Base(digest) => Path::new("bases").join(digest.as_str()),
            Self::Layer(id) => Path::new("layers").join(id.as_str()),
            Self::Memory(id) => Path::new("memories").join(id.as_str()),
            Self::Template(id) => Path::new("templates").join(id.as_str()),
            Self::Sandbox(id) => Path::new("sandboxes").join(id.as_str()),
            Self::Generation(id, number) => Path::new("sandboxes")
                .join(id.as_str())
                .join("generations")
                .join(number.to_string()),
        }
    }

    /// One path component that tells this object from every other: its name in `staging/` and `trash/`.
    #[must_use]
    pub fn flat_name(&self) -> String {
        match self {
            Self::Kernel(digest) => format!("kernel-{digest}"),
            Self::Base(digest) => format!("base-{digest}"),
            Self::Layer(id) => format!("layer-{id}"),
            Self::Memory(id) => format!("memory-{id}"),
            Self::Template(id) => format!("template-{id}"),
            Self::Sandbox(id) => format!("sandbox-{id}"),
            Self::Generation(id, number) => format!("generation-{id}-{number}"),
        }
    }
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kernel(digest) => write!(f, "kernel {}", digest.short()),
            Self::Base(digest) => write!(f, "base {}", digest.short()),
            Self::Layer(id) => write!(f, "layer {id}"),
            Self::Memory(id) => write!(f, "memory {id}"),
            Self::Template(id) => write!(f, "template {id}"),
            Self::Sandbox(id) => write!(f, "sandbox {id}"),
            Self::Generation(id, number) => write!(f, "generation {number} of sandbox {id}"),
        }
    }
}

/// The paths of one installation.
#[derive(Clone, Debug)]
pub struct Layout {
    data: PathBuf,
    run: PathBuf,
}

impl Layout {
    /// The layout of the data directory `data` with runtime files under `run`. Both should be absolute.
    #[must_use]
    pub fn new(data: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            run: run.into(),
        }
    }

    /// The data directory: everything that must survive a reboot.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The runtime directory: sockets and what only lives until the next boot.
    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Where `object` is.
    #[must_use]
    pub fn object(&self, object: &Object) -> PathBuf {
        self.data.join(object.directory())
    }

    /// Where `object` is made before it is published.
    #[must_use]
    pub fn staging(&self, object: &Object) -> PathBuf {
        self.data.join("staging").join(object.flat_name())
    }

    /// Where `object` waits to be deleted.
    #[must_use]
    pub fn trash(&self, object: &Object) -> PathBuf {
        self.data.join("trash").join(object.flat_name())
    }

    /// A base's raw image.
    #[must_use]
    pub fn base_image(&self, digest: &Digest) -> PathBuf {
        self.object(&Object::Base(digest.clone())).join(BASE_IMAGE)
    }

    /// A layer's data.
    #[must_use]
    pub fn layer_disk(&self, id: &LayerId) -> PathBuf {
        self.object(&Object::Layer(id.clone())).join(LAYER_DISK)
    }

    /// A head's data, for drivers that keep heads in files.
    #[must_use]
    pub fn head(&self, head: &HeadId) -> PathBuf {
        self.object(&Object::Sandbox(head.sandbox.clone()))
            .join("heads")
            .join(head.number.to_string())
    }

    /// What the guest wrote to its console, bounded by the VMM driver.
    #[must_use]
    pub fn console_log(&self, sandbox: &SandboxId) -> PathBuf {
        self.object(&Object::Sandbox(sandbox.clone()))
            .join("console.log")
    }

    /// The runtime directory of one sandbox's VMM. Short: a socket's path must stay under 108 bytes.
    #[must_use]
    pub fn vm(&self, sandbox: &SandboxId) -> PathBuf {
        self.run.join("vm").join(sandbox.as_str())
    }
}
