//! The disk of a VMM that opens it by a path of its own box, and knows no way to switch to another.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, chown};
use std::path::{Path, PathBuf};

use icebox_engine::host::{BlockDevice, ErrorKind, HostError};

use crate::launcher::{BOX_DIRECTORY, Bind, BoxSpec, Node};

/// What there is to know about a disk before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnDisk {
    path: PathBuf,
    bytes: u64,
    is_device: bool,
}

impl OwnDisk {
    /// Looks at a disk of a VMM that is called `vmm`.
    ///
    /// # Errors
    /// It cannot be read, or is of a kind that such a VMM cannot freeze.
    pub(crate) fn look_at(vmm: &str, disk: &BlockDevice) -> Result<Self, HostError> {
        let BlockDevice::Raw { path } = disk else {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                format!("{vmm} has no way to switch between qcow2 overlays"),
            )
            .hint("choose another volume driver than qcow2"));
        };
        let failed = |error| HostError::io(format!("read head {}", path.display()), error);
        let mut file = File::open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self {
            path: path.clone(),
            bytes,
            is_device: kind.is_block_device(),
        })
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is a block device of the host, not a file.
    pub(crate) fn is_device(&self) -> bool {
        self.is_device
    }

    /// Where it is in every box.
    pub(crate) fn in_box(&self) -> PathBuf {
        if self.is_device {
            PathBuf::from("/dev/disk")
        } else {
            Path::new(BOX_DIRECTORY).join("disk")
        }
    }

    /// Has the box's uid own it, if it is a file: it is this sandbox's alone; what it is frozen into is root's again.
    pub(crate) fn hand_over(&self, uid: u32) -> std::io::Result<()> {
        if self.is_device {
            return Ok(());
        }
        chown(&self.path, Some(uid), Some(uid))
    }

    /// Puts it into a box.
    pub(crate) fn expose(&self, spec: &mut BoxSpec) {
        if self.is_device {
            spec.devices.push(Node {
                source: self.path.clone(),
                target: self.in_box(),
            });
        } else {
            let bind = Bind::writable(self.path.clone(), self.in_box());
            spec.binds.push(bind);
        }
    }
}
