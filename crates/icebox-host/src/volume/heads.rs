//! Heads as files in their sandboxes' directories: what the drivers have in common.

use std::fs::File;
use std::path::{Path, PathBuf};

use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed};
use icebox_engine::id::{HeadId, SandboxId};
use icebox_engine::layout::{LAYER_DISK, Layout, Object, parse_number};
use icebox_engine::unit::Bytes;

use crate::blocking::blocking;
use crate::fs::{self, failed};
use crate::turns::Turns;

/// The heads of one driver. Every method that is not `async` blocks.
#[derive(Clone, Debug)]
pub struct Heads {
    layout: Layout,
    /// The extension of the driver's heads.
    format: &'static str,
    /// By sandbox: one head becomes a layer and another comes after it.
    turns: Turns,
}

impl Heads {
    pub(super) fn new(layout: Layout, format: &'static str) -> Self {
        Self {
            layout,
            format,
            turns: Turns::new(),
        }
    }

    /// Runs `work` on a thread that may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let heads = self.clone();
        blocking(move || work(&heads)).await
    }

    /// Runs `work` on a thread that may block, after everything that was asked of this sandbox's heads before.
    pub(super) async fn in_turn<T: Send + 'static>(
        &self,
        sandbox: &SandboxId,
        work: impl FnOnce(&Self) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let heads = self.clone();
        self.turns.run(sandbox, move || work(&heads)).await
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn path(&self, head: &HeadId) -> PathBuf {
        self.layout.head(head, self.format)
    }

    /// The name a head has until it is complete and durable.
    fn unfinished(&self, head: &HeadId) -> PathBuf {
        self.layout.head(head, &format!("{}.new", self.format))
    }

    /// Makes a head whose content `fill` writes into an empty file. A head that exists keeps its content; one that
    /// `fill` did not finish never exists. Durable on return.
    pub(super) fn ensure(
        &self,
        head: &HeadId,
        fill: impl FnOnce(&File, &Path) -> Result<(), HostError>,
    ) -> Result<Ensured, HostError> {
        let path = self.path(head);
        let directory = self.layout.heads(&head.sandbox);
        if fs::exists(&path)? {
            // Whoever made it may have died before its rename was durable.
            fs::sync_directory(&directory)?;
            return Ok(Ensured::AlreadyPresent);
        }
        if fs::ensure_directory(&directory)? == Ensured::Created {
            fs::sync_directory(directory.parent().unwrap_or(&directory))?;
        }
        let unfinished = self.unfinished(head);
        let file = fs::create_file(&unfinished)?;
        let made = fill(&file, &unfinished)
            .and_then(|()| {
                file.sync_all()
                    .map_err(|error| failed("flush", &unfinished, error))
            })
            .and_then(|()| fs::rename_to_new(&unfinished, &path));
        if made.is_err() {
            fs::remove_remains(&unfinished);
        }
        made?;
        fs::sync_directory(&directory)?;
        Ok(Ensured::Created)
    }

    /// Ensures that the head, whole or unfinished, is not there. Durable on return.
    pub(super) fn remove(&self, head: &HeadId) -> Result<Removed, HostError> {
        let unfinished = fs::remove_file(&self.unfinished(head))?;
        let whole = fs::remove_file(&self.path(head))?;
        let directory = self.layout.heads(&head.sandbox);
        if fs::exists(&directory)? {
            fs::sync_directory(&directory)?;
        }
        Ok(match (unfinished, whole) {
            (Removed::AlreadyAbsent, Removed::AlreadyAbsent) => Removed::AlreadyAbsent,
            _ => Removed::Removed,
        })
    }

    /// Makes what was written to the head durable.
    pub(super) fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        let path = self.path(head);
        fs::open_file(&path)?
            .sync_all()
            .map_err(|error| failed("flush", &path, error))
    }

    /// Moves the head into `staging` as a layer's data. Durable on return; a repetition finishes the work, also one that
    /// comes when the layer is published already.
    ///
    /// One rename moves it, so whatever crashes, the data is in exactly one of the two places.
    pub(super) fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let path = self.path(head);
        let disk = staging.join(LAYER_DISK);
        match (fs::exists(&path)?, fs::exists(&disk)?) {
            (true, false) => {
                let file = fs::open_file(&path)?;
                fs::set_read_only(&file, &path)?;
                file.sync_all()
                    .map_err(|error| failed("flush", &path, error))?;
                fs::rename_to_new(&path, &disk)?;
            }
            (false, true) => {}
            (false, false) if self.is_published(staging)? => {}
            (true, true) => {
                return Err(HostError::new(
                    ErrorKind::AlreadyExists,
                    format!(
                        "seal head {head}: {} holds another layer's data",
                        disk.display()
                    ),
                ));
            }
            (false, false) => return Err(self.lost(head, &disk)),
        }
        fs::sync_directory(staging)?;
        fs::sync_directory(&self.layout.heads(&head.sandbox))
    }

    /// Whether the layer that `staging` is for has left it: an object now, so its data is whole.
    pub(super) fn is_published(&self, staging: &Path) -> Result<bool, HostError> {
        let object = staging
            .file_name()
            .and_then(|name| Object::from_flat_name(name.to_str()?));
        match object {
            Some(Object::Layer(layer)) => fs::exists(&self.layout.layer_disk(&layer)),
            _ => Ok(false),
        }
    }

    /// Neither the head nor what it would have become is there.
    pub(super) fn lost(&self, head: &HeadId, disk: &Path) -> HostError {
        HostError::new(
            ErrorKind::NotFound,
            format!(
                "freeze head {head}: neither {} nor the layer {} that it becomes is there",
                self.path(head).display(),
                disk.display()
            ),
        )
    }

    /// Every head of the driver, unfinished ones included.
    pub(super) fn list(&self) -> Result<Vec<HeadId>, HostError> {
        let mut heads = Vec::new();
        for entry in fs::entries(&self.layout.data().join("sandboxes"))? {
            let name = entry.file_name();
            let Some(sandbox) = name
                .to_str()
                .and_then(|name| name.parse::<SandboxId>().ok())
            else {
                continue;
            };
            for entry in fs::entries(&self.layout.heads(&sandbox))? {
                let number = entry.file_name().to_str().and_then(|name| {
                    let (number, format) = name.split_once('.')?;
                    let ours =
                        format == self.format || format.strip_suffix(".new") == Some(self.format);
                    parse_number(number).filter(|_| ours)
                });
                if let Some(number) = number {
                    heads.push(HeadId {
                        sandbox: sandbox.clone(),
                        number,
                    });
                }
            }
        }
        heads.sort_unstable();
        heads.dedup();
        Ok(heads)
    }
}

/// Refuses a base whose image is not there.
pub(super) fn require_image(image: &Path) -> Result<(), HostError> {
    if fs::exists(image)? {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::NotFound,
        format!("there is no base image {}", image.display()),
    ))
}

/// Refuses a disk of `size` over `below`, which has `length` bytes: it must be at least as big, and whole sectors.
pub(super) fn require_room(below: &Path, length: u64, size: Bytes) -> Result<(), HostError> {
    if size.0 >= length && size.0.is_multiple_of(512) {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::Invalid,
        format!(
            "a disk of {} bytes over {} of {length}: it must be at least as big, and a multiple of 512",
            size.0,
            below.display(),
        ),
    ))
}

/// Refuses a head whose disk has not the size that its sandbox's manifest says.
pub(super) fn require_size(path: &Path, found: u64, size: Bytes) -> Result<(), HostError> {
    if found == size.0 {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::Invalid,
        format!(
            "{} is a disk of {found} bytes instead of {}",
            path.display(),
            size.0
        ),
    ))
}
