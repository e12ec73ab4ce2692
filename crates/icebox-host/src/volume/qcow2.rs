//! The `qcow2` driver: overlays of qcow2 over a raw base, frozen by the VMM.
//!
//! It needs nothing of the host but files, so it is the embedded default. A head is an empty overlay that this module
//! writes itself, in one file creation and without a process; the VMM switches a running guest to it and the old head is
//! then sealed, by one rename, as a layer. Flattening reads the immutable chain here, too.
//!
//! The names of backing files are never in the overlays' headers: the chain is known from the manifests and handed to
//! the VMM as open files. To look at one with the tools of QEMU, spell the chain out:
//!
//! ```text
//! qemu-img map --image-opts driver=qcow2,file.filename=layers/l…/disk,backing.driver=raw,backing.file.filename=bases/…/image
//! ```
//!
//! An overlay that a VMM had open for writing is hostile input: a guest that broke out of its VMM can have written any
//! header into it. Its [header is checked](format) before it is handed to the next VMM or flattened, so that it cannot
//! name a file to be opened in its stead.

pub mod format;
mod merge;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, HostError, LiveFreeze, MergeLayers, Removed, Space,
    VolumeDriver, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId};
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;

use self::format::Overlay;
use super::flatten::{self, BLOCK, Change, Content, Layer};
use super::heads::{self, Heads};
use crate::fs::{self, failed};

/// The `qcow2` driver.
#[derive(Clone, Debug)]
pub struct Qcow2 {
    heads: Heads,
}

impl Qcow2 {
    /// The driver for the data directory of `layout`.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            heads: Heads::new(layout, "qcow2"),
        }
    }
}

#[async_trait]
impl VolumeDriver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    async fn probe(&self) -> Result<(), HostError> {
        self.heads.run(|heads| probe(heads.layout().data())).await
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        LiveFreeze::ByVmm
    }

    /// A write that fails leaves what was written before.
    fn watch(&self) -> Option<&dyn WatchHeads> {
        None
    }

    fn layers_are_whole(&self) -> bool {
        false
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        Some(self)
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
                require_chain(heads.layout(), &chain)?;
                heads.ensure(&head, |file, path| {
                    format::write_empty(file, chain.size.0).map_err(|error| error.at(path))
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
        let (head, chain) = (head.clone(), chain.clone());
        self.heads
            .in_turn(&sandbox, move |heads| {
                let layout = heads.layout();
                let base = require_chain(layout, &chain)?;
                let path = heads.path(&head);
                let overlay = open(&path, chain.size)?;
                heads::require_size(&path, overlay.size(), chain.size)?;
                Ok(BlockDevice::Qcow2 {
                    head: path,
                    layers: chain
                        .layers
                        .iter()
                        .map(|layer| layout.layer_disk(layer))
                        .collect(),
                    base,
                })
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
            .run(move |heads| flatten(heads.layout(), &chain, &out))
            .await
    }

    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let head = head.clone();
        self.heads
            .run(move |heads| fs::allocated(&heads.path(&head)))
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

    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        let layer = layer.clone();
        self.heads
            .run(move |heads| fs::allocated(&heads.layout().layer_disk(&layer)))
            .await
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl MergeLayers for Qcow2 {
    async fn merge(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.heads
            .run(move |heads| {
                let run = open_run(heads.layout(), &run, size)?;
                fs::create_whole(&disk, |file| {
                    merge::write(&run, size.0, file).map_err(|error| error.at(&disk))
                })
            })
            .await
    }

    async fn verify(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.heads
            .run(move |heads| {
                let run = open_run(heads.layout(), &run, size)?;
                let file = fs::open_file(&disk)?;
                fs::forget_cached(&file);
                let merged = Overlay::open(file, size.0).map_err(|error| error.at(&disk))?;
                heads::require_size(&disk, merged.size(), size)?;
                merge::compare(&run, &merged).map_err(|error| error.at(&disk))
            })
            .await
    }
}

/// Opens layers for a merge.
fn open_run(layout: &Layout, run: &[LayerId], size: Bytes) -> Result<Vec<Overlay>, HostError> {
    run.iter()
        .map(|layer| open(&layout.layer_disk(layer), size))
        .collect()
}

/// Opens an overlay for a disk of at most `size_max`, and checks its header.
fn open(path: &Path, size_max: Bytes) -> Result<Overlay, HostError> {
    Overlay::open(fs::open_file(path)?, size_max.0).map_err(|error| error.at(path))
}

/// Refuses a chain whose files are not all there and what they should be. Returns its base's image.
///
/// The newest layer may be missing: it is still a head while the VMM switches from it.
fn require_chain(layout: &Layout, chain: &Chain) -> Result<PathBuf, HostError> {
    let Some(base) = &chain.base else {
        return Err(HostError::new(
            ErrorKind::Invalid,
            "a chain of qcow2 overlays without a base image under it",
        ));
    };
    let image = layout.base_image(base);
    heads::require_image(&image)?;
    heads::require_room(&image, fs::length(&image)?, chain.size)?;
    for (layer, depth) in chain.layers.iter().zip(0..) {
        match open(&layout.layer_disk(layer), chain.size) {
            Err(error) if error.kind() == ErrorKind::NotFound && depth == 0 => {}
            checked => {
                checked?;
            }
        }
    }
    Ok(image)
}

/// Writes, checks and reads a scratch overlay in a file that has no name.
fn probe(data: &Path) -> Result<(), HostError> {
    const SIZE: u64 = 1 << 20;
    let file = tempfile::tempfile_in(data)
        .map_err(|error| failed("make a scratch file in", data, error))?;
    format::write_empty(&file, SIZE)
        .and_then(|()| Overlay::open(file, SIZE))
        .and_then(|overlay| overlay.for_each_run(|_, _, _| Ok(())))
        .map_err(|error| error.at(data))
}

/// A layer's overlay, and its name for messages.
struct Changed {
    path: PathBuf,
    overlay: Overlay,
}

impl Layer for Changed {
    fn file(&self) -> &File {
        self.overlay.file()
    }

    /// What lies side by side on the disk need not do so in the overlay.
    fn read_ahead(&self) -> u64 {
        0
    }

    fn for_each_change(
        &self,
        size: u64,
        each: &mut dyn FnMut(Change) -> io::Result<()>,
    ) -> Result<(), HostError> {
        self.overlay
            .for_each_run(|guest, length, content| {
                let content = match content {
                    format::Content::Below => return Ok(()),
                    format::Content::Zero => Content::Zero,
                    format::Content::Data(at) => Content::At(at),
                };
                let end = (guest + length).min(size).div_ceil(BLOCK);
                let blocks = guest / BLOCK..end;
                each(Change { blocks, content })?;
                Ok(())
            })
            .map_err(|error| error.at(&self.path))
    }
}

/// Writes the disk as of `chain` to `out`, which does not exist yet.
fn flatten(layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError> {
    let image = require_chain(layout, chain)?;
    let base = fs::open_file(&image)?;
    let layers: Vec<Changed> = chain
        .layers
        .iter()
        .map(|layer| {
            let path = layout.layer_disk(layer);
            let overlay = open(&path, chain.size)?;
            Ok(Changed { path, overlay })
        })
        .collect::<Result<_, HostError>>()?;
    flatten::to_file(layout, (&base, &image), &layers, chain.size.0, out)
}
