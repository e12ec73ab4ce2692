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

use icebox_engine::host::{BlockDevice, Chain, Ensured, ErrorKind, HostError, LiveFreeze};
use icebox_engine::id::HeadId;
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;

use super::heads::{self, Heads};
use super::in_files::{Freeze, InFiles, Kind};
use crate::fs::{self, failed};

/// The `reflink` driver.
pub type Reflink = InFiles<Clones>;

/// What is particular to `reflink`.
#[derive(Clone, Debug)]
pub struct Clones;

impl Reflink {
    /// The driver for the data directory of `layout`.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self::over(layout, Clones)
    }
}

impl Kind for Clones {
    const NAME: &'static str = "reflink";
    const FORMAT: &'static str = "raw";
    const LAYERS_ARE_WHOLE: bool = true;

    fn probe(&self, data: &Path) -> Result<(), HostError> {
        probe(data)
    }

    fn live_freeze(driver: &Reflink) -> LiveFreeze<'_> {
        LiveFreeze::ByHost(driver)
    }

    fn ensure_head(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<Ensured, HostError> {
        let top = Top::open(heads.layout(), chain)?;
        heads.ensure(head, |file, path| top.clone_to(file, path))
    }

    fn attach(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<BlockDevice, HostError> {
        let path = heads.path(head);
        let found = fs::length(&path)?;
        heads::require_size(&path, found, chain.size)?;
        Ok(BlockDevice::Raw { path })
    }

    fn flatten(&self, layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let top = Top::open(layout, chain)?;
        fs::create_whole(out, |file| top.clone_to(file, out))
    }

    /// Bytes that the file alone stores: what it shares with others is theirs.
    fn usage(&self, file: &Path) -> Result<Bytes, HostError> {
        fs::allocated_exclusively(file)
    }
}

impl Freeze for Clones {
    fn freeze(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
        staging: &Path,
    ) -> Result<(), HostError> {
        freeze(heads, from, to, staging)
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

/// What a head on a chain is cloned from.
struct Top {
    path: PathBuf,
    file: File,
    /// Of the head.
    size: Bytes,
}

impl Top {
    fn open(layout: &Layout, chain: &Chain) -> Result<Self, HostError> {
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
        let size = chain.size;
        heads::require_room(&path, fs::length(&path)?, size)?;
        Ok(Self { path, file, size })
    }

    fn clone_to(&self, file: &File, path: &Path) -> Result<(), HostError> {
        clone(&self.file, &self.path, file, path)?;
        file.set_len(self.size.0)
            .map_err(|error| failed("set the size of", path, error))
    }
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
