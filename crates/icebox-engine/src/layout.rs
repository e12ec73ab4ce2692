//! Where everything is: the one place that knows paths under the data directory and the runtime directory.
//!
//! ```text
//! <data>/format                      layout version, checked before anything else
//!        lock                        flock of the daemon that owns the tree
//!        zfs-owner                   the number that its volumes in a pool know it by
//!        journal.sqlite              events and what sandboxes used; decides nothing
//!        kernels/<digest>/           bases/<digest>/image     layers/<id>/disk     memories/<id>/{base,diff}
//!        templates/<id>/             sandboxes/<id>/{manifest.json, heads/<n>.<format>, generations/<n>/, console.log}
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

    /// The object whose [`flat_name`](Self::flat_name) is `name`. `None` for a name that is not ours.
    #[must_use]
    pub fn from_flat_name(name: &str) -> Option<Self> {
        let (kind, rest) = name.split_once('-')?;
        match kind {
            "kernel" => Some(Self::Kernel(rest.parse().ok()?)),
            "base" => Some(Self::Base(rest.parse().ok()?)),
            "layer" => Some(Self::Layer(rest.parse().ok()?)),
            "memory" => Some(Self::Memory(rest.parse().ok()?)),
            "template" => Some(Self::Template(rest.parse().ok()?)),
            "sandbox" => Some(Self::Sandbox(rest.parse().ok()?)),
            "generation" => {
                let (id, number) = rest.split_once('-')?;
                Some(Self::Generation(
                    id.parse().ok()?,
                    GenerationNo(parse_number(number)?),
                ))
            }
            _ => None,
        }
    }
}

/// The number that a path component of ours stands for: decimal digits as `u32` displays them, so that one number has
/// one name.
#[must_use]
pub fn parse_number(text: &str) -> Option<u32> {
    text.parse()
        .ok()
        .filter(|number: &u32| number.to_string() == text)
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

    /// The file that holds the layout's version.
    #[must_use]
    pub fn format_file(&self) -> PathBuf {
        self.data.join("format")
    }

    /// The file that the owner of the tree has locked.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.data.join("lock")
    }

    /// The file with the number that volumes outside the data directory know it by.
    #[must_use]
    pub fn zfs_owner_file(&self) -> PathBuf {
        self.data.join("zfs-owner")
    }

    /// The directory of all objects that are being made.
    #[must_use]
    pub fn staging_area(&self) -> PathBuf {
        self.data.join("staging")
    }

    /// Where `object` is made before it is published.
    #[must_use]
    pub fn staging(&self, object: &Object) -> PathBuf {
        self.staging_area().join(object.flat_name())
    }

    /// The directory of all objects that wait to be deleted.
    #[must_use]
    pub fn trash_area(&self) -> PathBuf {
        self.data.join("trash")
    }

    /// Where `object` waits to be deleted.
    #[must_use]
    pub fn trash(&self, object: &Object) -> PathBuf {
        self.trash_area().join(object.flat_name())
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

    /// The directory of a sandbox's heads, for drivers that keep heads in files.
    #[must_use]
    pub fn heads(&self, sandbox: &SandboxId) -> PathBuf {
        self.object(&Object::Sandbox(sandbox.clone())).join("heads")
    }

    /// A head's data, for drivers that keep heads in files. `format` is the file's extension: it tells which driver's
    /// head it is, so that no driver lists or removes another's.
    #[must_use]
    pub fn head(&self, head: &HeadId, format: &str) -> PathBuf {
        self.heads(&head.sandbox)
            .join(format!("{}.{format}", head.number))
    }

    /// What the guest wrote to its console, bounded by the VMM driver.
    #[must_use]
    pub fn console_log(&self, sandbox: &SandboxId) -> PathBuf {
        self.object(&Object::Sandbox(sandbox.clone()))
            .join("console.log")
    }

    /// Where a VMM that writes saves by itself does so: room for a whole memory, on the file system where it is kept. Empty
    /// between saves.
    #[must_use]
    pub fn save_area(&self, sandbox: &SandboxId) -> PathBuf {
        self.object(&Object::Sandbox(sandbox.clone())).join("save")
    }

    /// The runtime directory of one sandbox's VMM. Short: a socket's path must stay under 108 bytes.
    #[must_use]
    pub fn vm(&self, sandbox: &SandboxId) -> PathBuf {
        self.run.join("vm").join(sandbox.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_names_parse_back_and_nothing_else_does() {
        let sandbox = SandboxId::random();
        let digest = Digest::from_bytes([7; 32]);
        for object in [
            Object::Kernel(digest.clone()),
            Object::Base(digest),
            Object::Layer(LayerId::random()),
            Object::Memory(MemoryId::random()),
            Object::Template(TemplateId::random()),
            Object::Sandbox(sandbox.clone()),
            Object::Generation(sandbox.clone(), GenerationNo(12)),
        ] {
            assert_eq!(
                Object::from_flat_name(&object.flat_name()),
                Some(object.clone()),
                "{object}"
            );
        }
        for foreign in [
            "lost+found".to_owned(),
            "base-".to_owned(),
            format!("layer-{sandbox}"),
            format!("generation-{sandbox}"),
            format!("generation-{sandbox}-01"),
            format!("generation-{sandbox}-+1"),
            format!("sandbox-{sandbox}~1"),
        ] {
            assert_eq!(Object::from_flat_name(&foreign), None, "{foreign}");
        }
    }
}
