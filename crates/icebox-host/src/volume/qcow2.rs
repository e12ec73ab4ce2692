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

use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, HostError, LiveFreeze, MergeLayers,
};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::Layout;
use icebox_engine::unit::Bytes;

use self::format::Overlay;
use super::flatten::{self, BLOCK, Change, Content, Layer};
use super::heads::{self, Heads};
use super::in_files::{InFiles, Kind, Merge};
use crate::fs::{self, failed};

/// The `qcow2` driver.
pub type Qcow2 = InFiles<Overlays>;

/// What is particular to `qcow2`.
#[derive(Clone, Debug)]
pub struct Overlays;

impl Qcow2 {
    /// The driver for the data directory of `layout`.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self::over(layout, Overlays)
    }
}

impl Kind for Overlays {
    const NAME: &'static str = "qcow2";
    const FORMAT: &'static str = "qcow2";
    const LAYERS_ARE_WHOLE: bool = false;

    /// Writes, checks and reads a scratch overlay in a file that has no name.
    fn probe(&self, data: &Path) -> Result<(), HostError> {
        const SIZE: u64 = 1 << 20;
        let file = tempfile::tempfile_in(data)
            .map_err(|error| failed("make a scratch file in", data, error))?;
        format::write_empty(&file, SIZE)
            .and_then(|()| Overlay::open(file, SIZE))
            .and_then(|overlay| overlay.for_each_run(|_, _, _| Ok(())))
            .map_err(|error| error.at(data))
    }

    fn live_freeze(_driver: &Qcow2) -> LiveFreeze<'_> {
        LiveFreeze::ByVmm
    }

    fn merges_layers(driver: &Qcow2) -> Option<&dyn MergeLayers> {
        Some(driver)
    }

    fn ensure_head(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<Ensured, HostError> {
        require_chain(heads.layout(), chain)?;
        heads.ensure(head, |file, path| {
            format::write_empty(file, chain.size.0).map_err(|error| error.at(path))
        })
    }

    fn attach(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<BlockDevice, HostError> {
        let layout = heads.layout();
        let base = require_chain(layout, chain)?;
        let path = heads.path(head);
        let overlay = open(&path, chain.size)?;
        heads::require_size(&path, overlay.size(), chain.size)?;
        let layers = chain.layers.iter();
        Ok(BlockDevice::Qcow2 {
            head: path,
            layers: layers.map(|layer| layout.layer_disk(layer)).collect(),
            base,
        })
    }

    fn flatten(&self, layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError> {
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
}

impl Merge for Overlays {
    fn merge(
        &self,
        layout: &Layout,
        run: &[LayerId],
        size: Bytes,
        file: &File,
        disk: &Path,
    ) -> Result<(), HostError> {
        let run = open_run(layout, run, size)?;
        merge::write(&run, size.0, file).map_err(|error| error.at(disk))
    }

    fn verify(
        &self,
        layout: &Layout,
        run: &[LayerId],
        size: Bytes,
        file: File,
        disk: &Path,
    ) -> Result<(), HostError> {
        let run = open_run(layout, run, size)?;
        let merged = Overlay::open(file, size.0).map_err(|error| error.at(disk))?;
        heads::require_size(disk, merged.size(), size)?;
        merge::compare(&run, &merged).map_err(|error| error.at(disk))
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
