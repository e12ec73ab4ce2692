//! The `dm-snapshot` driver: copy-on-write by device-mapper, on any file system.
//!
//! A head is a sparse file that the kernel keeps changed chunks in; what a VMM opens is a block device. Nothing of it is
//! specific to a VMM, a guest that writes much of its disk pays no metadata cache, and a freeze does not ask the VMM.
//!
//! ```text
//!  icebox-…-top-<sandbox>     linear     what the VMM opens: its node never changes
//!    icebox-…-head-<n>        snapshot   heads/<n>.cow, written
//!      icebox-…-layer-…       snapshot   layers/<id>/disk, read-only; shared by all heads above it
//!        …
//!          icebox-…-base-…    linear     bases/<digest>/image on a read-only loop device, and zeros up to the disk's
//!                                        size; one for all
//! ```
//!
//! **Who uses what is the kernel's to know.** A table that names a device keeps it open; so what is not a top and is not
//! open is used by nobody, and [goes](stacks). Loop devices go by themselves. Nothing is counted, and what a crash
//! leaves behind is found the same way (INV-15, INV-52).
//!
//! **A freeze** puts a new snapshot on the one that the guest writes to, and moves the top there:
//!
//! ```text
//! head <to> over head <from> ── next table of the top ── suspend ── flush <from> ── rename <from>.cow to the layer ── resume
//!                                                        └ guest I/O waits ┘        └ the point of no return
//! ```
//!
//! The files say how far it came: whether the guest goes on as `to` is whether `from`'s file is gone. A device that was
//! left suspended goes on when the engine asks.
//!
//! Guests' discards are not passed on: the `snapshot` target cannot give a chunk back. Each layer is a device that reads
//! pass through; layers are [merged](merge) as files, whoever has devices on them.

mod devices;
mod exceptions;
mod loops;
mod merge;
mod stacks;
mod sys;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, HostError, LiveFreeze, MergeLayers, Removed, Watch,
    WatchHeads,
};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;

use self::exceptions::CHUNK;
use self::stacks::Stacks;
use super::flatten::{self, Change, Content, Layer};
use super::heads::{self, Heads};
use super::in_files::{Freeze, InFiles, Kind, Merge};
use crate::fs::{self, failed};
use crate::instance::Instance;

const SECTOR: u64 = 512;

/// The `dm-snapshot` driver.
pub type DmSnapshot = InFiles<Snapshots>;

/// What is particular to `dm-snapshot`.
#[derive(Clone, Debug)]
pub struct Snapshots(Arc<Stacks>);

impl DmSnapshot {
    /// The driver for the data directory of `layout`. Devices carry the tag of `instance`.
    #[must_use]
    pub fn new(layout: Layout, instance: &Instance) -> Self {
        Self::over(layout, Snapshots(Arc::new(Stacks::of(instance))))
    }
}

impl Kind for Snapshots {
    const NAME: &'static str = "dm-snapshot";
    const FORMAT: &'static str = "cow";
    const LAYERS_ARE_WHOLE: bool = false;

    fn probe(&self, data: &Path) -> Result<(), HostError> {
        self.0.probe(data)
    }

    fn live_freeze(driver: &DmSnapshot) -> LiveFreeze<'_> {
        LiveFreeze::ByHost(driver)
    }

    fn watch(driver: &DmSnapshot) -> Option<&dyn WatchHeads> {
        Some(driver)
    }

    fn merges_layers(driver: &DmSnapshot) -> Option<&dyn MergeLayers> {
        Some(driver)
    }

    /// Refuses an image that is not a whole number of sectors, too: no block device could show its end.
    fn require_base(&self, image: &Path) -> Result<(), HostError> {
        heads::require_image(image)?;
        require_sectors(image)
    }

    fn ensure_head(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<Ensured, HostError> {
        require_chain(heads.layout(), chain)?;
        let length = exceptions::length_for(chain.size.0);
        heads.ensure(head, |file, path| empty(file, path, length))
    }

    fn attach(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<BlockDevice, HostError> {
        require_chain(heads.layout(), chain)?;
        let path = heads.path(head);
        let found = exceptions::size_for(fs::length(&path)?).unwrap_or(0);
        heads::require_size(&path, found, chain.size)?;
        let path = self.0.attach(heads, head, chain)?;
        Ok(BlockDevice::Raw { path })
    }

    fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        self.0.detach(head)
    }

    /// The device's own page cache first, then the file's.
    fn flush(&self, heads: &Heads, head: &HeadId) -> Result<(), HostError> {
        if fs::exists(&heads.path(head))? {
            self.0.flush(heads, head)?;
        }
        heads.flush(head)
    }

    fn flatten(&self, layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let image = require_chain(layout, chain)?;
        let base = fs::open_file(&image)?;
        let layers: Vec<Store> = chain
            .layers
            .iter()
            .map(|layer| {
                let path = layout.layer_disk(layer);
                let file = fs::open_file(&path)?;
                Ok(Store { path, file })
            })
            .collect::<Result<_, HostError>>()?;
        flatten::to_file(layout, (&base, &image), &layers, chain.size.0, out)
    }
}

#[async_trait]
impl WatchHeads for DmSnapshot {
    /// One ioctl for each head, answered from the kernel's memory.
    async fn look(&self, wanted: &[HeadId]) -> Result<Watch, HostError> {
        let wanted = wanted.to_vec();
        self.run(move |Snapshots(stacks), heads| stacks.look(heads, wanted))
            .await
    }
}

impl Freeze for Snapshots {
    fn freeze(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
        staging: &Path,
    ) -> Result<(), HostError> {
        let Self(stacks) = self;
        let (old, new) = (heads.path(from), heads.path(to));
        let disk = staging.join(LAYER_DISK);
        if fs::exists(&old)? {
            exceptions::require_usable(&fs::open_file(&old)?).map_err(|error| error.at(&old))?;
            // One of an earlier attempt is empty: nothing is written to it before this is over.
            let length = fs::length(&old)?;
            heads.ensure(to, |file, path| empty(file, path, length))?;
            stacks.freeze(heads, from, to, || heads.seal(from, staging))
        } else if fs::exists(&new)? && (fs::exists(&disk)? || heads.is_published(staging)?) {
            stacks.finish(heads, from, to)?;
            fs::sync_directory(&heads.layout().heads(&from.sandbox))
        } else {
            Err(heads.lost(from, &disk))
        }
    }

    /// A device that a freeze left suspended goes on: as `to` if it is frozen, as it was if it is not.
    fn settle(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
        is_frozen: bool,
    ) -> Result<(), HostError> {
        if is_frozen {
            self.0.finish(heads, from, to)
        } else {
            self.0.go_on(from)
        }
    }
}

impl Merge for Snapshots {
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
        let found = exceptions::size_for(fs::length(disk)?).unwrap_or(0);
        heads::require_size(disk, found, size)?;
        merge::compare(&run, size.0, &file).map_err(|error| error.at(disk))
    }
}

/// Makes an empty file a store that nothing has been written to.
fn empty(file: &File, path: &Path, length: u64) -> Result<(), HostError> {
    file.set_len(length)
        .map_err(|error| failed("set the size of", path, error))
}

/// Refuses an image that does not end with a sector.
fn require_sectors(image: &Path) -> Result<(), HostError> {
    let length = fs::length(image)?;
    if length > 0 && length.is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::Invalid,
        format!(
            "{} has {length} bytes, which is not a whole number of sectors",
            image.display()
        ),
    )
    .hint("append zeros up to a multiple of 512 bytes: truncate --size=%512"))
}

/// Opens layers for a merge.
fn open_run(layout: &Layout, run: &[LayerId], size: Bytes) -> Result<Vec<File>, HostError> {
    let open = |layer| {
        let path = layout.layer_disk(layer);
        require_store(&path, size)?;
        fs::open_file(&path)
    };
    run.iter().map(open).collect()
}

/// Refuses a file that is no store for a disk of at most `size`.
fn require_store(path: &Path, size: Bytes) -> Result<(), HostError> {
    let length = fs::length(path)?;
    let found = exceptions::size_for(length).ok_or_else(|| {
        HostError::new(
            ErrorKind::Invalid,
            format!(
                "{} has {length} bytes: no exception store has",
                path.display()
            ),
        )
    })?;
    heads::require_room(path, found, size)
}

/// Refuses a chain whose files are not all there and what they should be. Returns its base's image.
fn require_chain(layout: &Layout, chain: &Chain) -> Result<PathBuf, HostError> {
    let image = layout.base_image(chain.base.as_ref().ok_or_else(no_base)?);
    heads::require_image(&image)?;
    require_sectors(&image)?;
    heads::require_room(&image, fs::length(&image)?, chain.size)?;
    for layer in &chain.layers {
        require_store(&layout.layer_disk(layer), chain.size)?;
    }
    Ok(image)
}

fn no_base() -> HostError {
    HostError::new(ErrorKind::Invalid, "a disk on no base")
}

/// A layer's store, and its name for messages.
struct Store {
    path: PathBuf,
    file: File,
}

impl Layer for Store {
    fn file(&self) -> &File {
        &self.file
    }

    /// Chunks that lie apart on the disk lie side by side in the store.
    fn read_ahead(&self) -> u64 {
        flatten::PIECE
    }

    fn for_each_change(
        &self,
        size: u64,
        each: &mut dyn FnMut(Change) -> io::Result<()>,
    ) -> Result<(), HostError> {
        exceptions::for_each_run(&self.file, size, |run| {
            each(Change {
                blocks: run.old..run.old + run.length,
                content: Content::At(run.new * CHUNK),
            })?;
            Ok(())
        })
        .map_err(|error| error.at(&self.path))
    }
}
