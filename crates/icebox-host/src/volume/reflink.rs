//! The `reflink` driver: plain files that share extents, on file systems that can (btrfs, XFS).
//!
//! A head is a clone (`FICLONE`, ioctl_ficlone(2)) of the newest layer or the base, so every layer is a whole disk that
//! stands alone and no chain is ever read through. The VMM sees a raw file. A live freeze clones the head into the layer
//! and then only renames the head: the VMM keeps its descriptor and notices nothing.
//!
//! ```text
//! freeze   heads/<from> ── FICLONE ─> staging/disk ── fsync ── rename heads/<from> to heads/<to>
//!                                                              └ the point of no return
//! ```
//!
//! A clone costs time in proportion to the file's extents, not to its size; the kernel writes the file's dirty pages out
//! first.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, MergeLayers,
    Removed, Space, VolumeDriver, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId};
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;

use super::heads::{self, Heads};
use crate::fs::{self, failed};

/// The `reflink` driver.
#[derive(Clone, Debug)]
pub struct Reflink {
    heads: Heads,
}

impl Reflink {
    /// The driver for the data directory of `layout`.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            heads: Heads::new(layout, "raw"),
        }
    }
}

#[async_trait]
impl VolumeDriver for Reflink {
    fn name(&self) -> &'static str {
        "reflink"
    }

    async fn probe(&self) -> Result<(), HostError> {
        self.heads.run(|heads| probe(heads.layout().data())).await
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        LiveFreeze::ByHost(self)
    }

    /// A write that fails leaves what was written before.
    fn watch(&self) -> Option<&dyn WatchHeads> {
        None
    }

    fn layers_are_whole(&self) -> bool {
        true
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        None
    }

    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        self.heads.ensure_base(base).await
    }

    async fn remove_base(&self, _base: &Digest) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        let sandbox = head.sandbox.clone();
        let (head, chain) = (head.clone(), chain.clone());
        self.heads
            .in_turn(&sandbox, move |heads| {
                let (source, source_path) = open_top(heads.layout(), &chain)?;
                heads.ensure(&head, |file, path| {
                    clone(&source, &source_path, file, path)?;
                    file.set_len(chain.size.0)
                        .map_err(|error| failed("set the size of", path, error))
                })
            })
            .await
    }

    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let sandbox = head.sandbox.clone();
        let head = head.clone();
        self.heads
            .in_turn(&sandbox, move |heads| heads.remove(&head))
            .await
    }

    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        let sandbox = head.sandbox.clone();
        let (head, size) = (head.clone(), chain.size);
        self.heads
            .in_turn(&sandbox, move |heads| {
                let path = heads.path(&head);
                let found = fs::length(&path)?;
                heads::require_size(&path, found, size)?;
                Ok(BlockDevice::Raw { path })
            })
            .await
    }

    async fn detach(&self, _head: &HeadId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        let sandbox = head.sandbox.clone();
        let head = head.clone();
        self.heads
            .in_turn(&sandbox, move |heads| heads.flush(&head))
            .await
    }

    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let sandbox = head.sandbox.clone();
        let (head, staging) = (head.clone(), staging.to_owned());
        self.heads
            .in_turn(&sandbox, move |heads| heads.seal(&head, &staging))
            .await
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let (chain, out) = (chain.clone(), out.to_owned());
        self.heads
            .run(move |heads| {
                let (source, source_path) = open_top(heads.layout(), &chain)?;
                fs::create_whole(&out, |file| {
                    clone(&source, &source_path, file, &out)?;
                    file.set_len(chain.size.0)
                        .map_err(|error| failed("set the size of", &out, error))
                })
            })
            .await
    }

    /// Bytes that the head alone stores: what it shares with the base or a layer is theirs.
    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let head = head.clone();
        self.heads
            .run(move |heads| fs::allocated_exclusively(&heads.path(&head)))
            .await
    }

    async fn space(&self) -> Result<Option<Space>, HostError> {
        Ok(None)
    }

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        self.heads.run(Heads::list).await
    }

    /// A layer is a file in its directory.
    async fn remove_layer(&self, _layer: &LayerId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    /// Bytes that the layer alone stores, as of a head.
    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        let layer = layer.clone();
        self.heads
            .run(move |heads| fs::allocated_exclusively(&heads.layout().layer_disk(&layer)))
            .await
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl FreezeByHost for Reflink {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        let sandbox = from.sandbox.clone();
        let (from, to, staging) = (from.clone(), to.clone(), staging.to_owned());
        self.heads
            .in_turn(&sandbox, move |heads| freeze(heads, &from, &to, &staging))
            .await
    }

    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        let sandbox = from.sandbox.clone();
        let (from, to) = (from.clone(), to.clone());
        self.heads
            .in_turn(&sandbox, move |heads| {
                Ok(!fs::exists(&heads.path(&from))? && fs::exists(&heads.path(&to))?)
            })
            .await
    }
}

fn freeze(heads: &Heads, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
    let (old, new) = (heads.path(from), heads.path(to));
    let disk = staging.join(LAYER_DISK);
    match (fs::exists(&old)?, fs::exists(&new)?) {
        (true, false) => {
            // Also if an earlier attempt came as far as a whole clone: the guest may have written since.
            let unfinished = staging.join(format!("{LAYER_DISK}.new"));
            let source = fs::open_file(&old)?;
            let file = fs::create_file(&unfinished)?;
            let made = clone(&source, &old, &file, &unfinished)
                .and_then(|()| fs::set_read_only(&file, &unfinished))
                .and_then(|()| {
                    file.sync_all()
                        .map_err(|error| failed("flush", &unfinished, error))
                })
                .and_then(|()| {
                    std::fs::rename(&unfinished, &disk)
                        .map_err(|error| failed("replace", &disk, error))
                });
            if made.is_err() {
                fs::remove_remains(&unfinished);
            }
            made?;
            fs::sync_directory(staging)?;
            fs::rename_to_new(&old, &new)?;
        }
        (false, true) if fs::exists(&disk)? || heads.is_published(staging)? => {}
        (true, true) => {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!("freeze head {from}: head {to} exists already"),
            ));
        }
        (false, _) => return Err(heads.lost(from, &disk)),
    }
    fs::sync_directory(&heads.layout().heads(&from.sandbox))
}

/// Opens what a head on `chain` is cloned from.
fn open_top(layout: &Layout, chain: &Chain) -> Result<(File, PathBuf), HostError> {
    let path = match (chain.layers.first(), &chain.base) {
        (Some(layer), _) => layout.layer_disk(layer),
        (None, Some(base)) => {
            let image = layout.base_image(base);
            heads::require_image(&image)?;
            image
        }
        (None, None) => {
            return Err(HostError::new(
                ErrorKind::Invalid,
                "a disk on neither a layer nor a base",
            ));
        }
    };
    let file = fs::open_file(&path)?;
    heads::require_room(&path, fs::length(&path)?, chain.size)?;
    Ok((file, path))
}

fn clone(from: &File, from_path: &Path, to: &File, to_path: &Path) -> Result<(), HostError> {
    rustix::fs::ioctl_ficlone(to, from).map_err(|error| {
        failed(
            &format!("share {} with", from_path.display()),
            to_path,
            error.into(),
        )
    })
}

/// Shares extents between two scratch files that have no name, and writes to one of them.
fn probe(data: &Path) -> Result<(), HostError> {
    const CONTENT: [u8; 8192] = [0x5a; 8192];
    let scratch = || {
        tempfile::tempfile_in(data).map_err(|error| failed("make a scratch file in", data, error))
    };
    let (from, to) = (scratch()?, scratch()?);
    let access = |error| failed("use a scratch file in", data, error);
    // Empty first: that needs no room.
    let shared = rustix::fs::ioctl_ficlone(&to, &from);
    shared.map_err(|error| {
        HostError::new(
            ErrorKind::Unsupported,
            format!(
                "the reflink driver cannot work in {}: its file system ({}) does not share extents between files",
                data.display(),
                fs::file_system(data),
            ),
        )
        .caused_by(std::io::Error::from(error))
        .hint("put the data directory on btrfs, or on XFS made with reflink=1 (the default of mkfs.xfs since 5.1), have `icebox pool create` make such an XFS in a file, or choose the qcow2 driver")
    })?;
    from.write_all_at(&CONTENT, 0).map_err(access)?;
    clone(&from, data, &to, data)?;
    to.write_all_at(&[1], 0).map_err(access)?;
    let mut first = [0; 1];
    from.read_exact_at(&mut first, 0).map_err(access)?;
    if first[0] != CONTENT[0] {
        return Err(HostError::new(
            ErrorKind::Unsupported,
            format!(
                "the file system of {} ({}) lets a write to a clone through to its original",
                data.display(),
                fs::file_system(data),
            ),
        ));
    }
    Ok(())
}
