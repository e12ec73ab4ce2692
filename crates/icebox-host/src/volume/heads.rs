//! Heads as files in their sandboxes' directories: what the drivers have in common.

use std::fs::File;
use std::path::{Path, PathBuf};

use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed};
use icebox_engine::id::{HeadId, SandboxId};
use icebox_engine::layout::{LAYER_DISK, Layout, parse_number};

use crate::fs::{self, failed};

/// The heads of one driver. Every method blocks.
#[derive(Clone, Debug)]
pub(super) struct Heads {
    layout: Layout,
    /// The extension of the driver's heads.
    format: &'static str,
}

impl Heads {
    pub(super) fn new(layout: Layout, format: &'static str) -> Self {
        Self { layout, format }
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

    /// Moves the head into `staging` as a layer's data. Durable on return; a repetition finishes the work.
    ///
    /// One rename moves it, so whatever crashes, the data is in exactly one of the two places.
    pub(super) fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let path = self.path(head);
        let disk = staging.join(LAYER_DISK);
        match (fs::exists(&path)?, fs::exists(&disk)?) {
            (true, false) => {
                let file = fs::open_file(&path)?;
                set_read_only(&file, &path)?;
                file.sync_all()
                    .map_err(|error| failed("flush", &path, error))?;
                fs::rename_to_new(&path, &disk)?;
            }
            (false, true) => {}
            (true, true) => {
                return Err(HostError::new(
                    ErrorKind::AlreadyExists,
                    format!(
                        "seal head {head}: {} holds another layer's data",
                        disk.display()
                    ),
                ));
            }
            (false, false) => {
                return Err(HostError::new(
                    ErrorKind::NotFound,
                    format!(
                        "seal head {head}: neither {} nor {} exists",
                        path.display(),
                        disk.display()
                    ),
                ));
            }
        }
        fs::sync_directory(staging)?;
        fs::sync_directory(&self.layout.heads(&head.sandbox))
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

/// Says of a layer's data that it will not change any more. For people and for accidents: what keeps a VMM from writing
/// to it is that the launcher opens it read-only and that its uid cannot reach it by name (INV-25).
pub(super) fn set_read_only(file: &File, path: &Path) -> Result<(), HostError> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(std::fs::Permissions::from_mode(0o400))
        .map_err(|error| failed("set the permissions of", path, error))
}

/// Refuses a base whose image is not there: the engine imports it before it asks for heads.
pub(super) fn require_image(image: &Path) -> Result<(), HostError> {
    if fs::exists(image)? {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::NotFound,
        format!("there is no base image {}", image.display()),
    ))
}
