//! Loop devices that go by themselves.
//!
//! A loop device is made with "autoclear": it goes when its last user closes it. So nobody counts users and nothing is
//! detached by hand: a device-mapper table that names a loop device keeps it, and whatever crashes between the two takes
//! it along.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use icebox_engine::host::{ErrorKind, HostError};
use linux_raw_sys::loop_device::_bindgen_ty_1 as Flag;
use rustix::io::Errno;

use super::devices::Number;
use super::sys;
use crate::fs::failed;

const CONTROL: &str = "/dev/loop-control";
/// How often somebody else may take the device that we were told is free.
const TRIES: usize = 64;

/// A loop device that is kept while this exists, and afterwards by who uses it.
#[derive(Debug)]
pub(super) struct Loop {
    device: File,
    number: Number,
}

/// What is written to a loop device, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing. Reads go through the page cache, which all sandboxes share.
    ReadOnly,
    /// Without a copy in the page cache, where the file system can do that.
    ReadWrite,
}

impl Loop {
    /// Puts an open file on a free loop device. `path` is for messages.
    pub(super) fn on(file: &File, path: &Path, access: Access) -> Result<Self, HostError> {
        let control = Path::new(CONTROL);
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open(control)
            .map_err(|error| {
                failed("open", control, error).hint("load the kernel's loop driver: modprobe loop")
            })?;
        let mut flags = Flag::LO_FLAGS_AUTOCLEAR as u32;
        flags |= match access {
            Access::ReadOnly => Flag::LO_FLAGS_READ_ONLY as u32,
            Access::ReadWrite => Flag::LO_FLAGS_DIRECT_IO as u32,
        };
        for _ in 0..TRIES {
            let free = sys::free_loop(&control)
                .map_err(|error| failed("find a free loop device for", path, error.into()))?;
            let node = PathBuf::from(format!("/dev/loop{free}"));
            let device = OpenOptions::new()
                .read(true)
                .write(access == Access::ReadWrite)
                .open(&node)
                .map_err(|error| failed("open", &node, error))?;
            match sys::configure_loop(&device, file, flags) {
                Ok(()) => {
                    let metadata = device
                        .metadata()
                        .map_err(|error| failed("look at", &node, error))?;
                    let number = Number::from_raw(metadata.rdev());
                    return Ok(Self { device, number });
                }
                Err(Errno::BUSY) => {}
                Err(error) => {
                    return Err(failed(
                        &format!("put {} on", path.display()),
                        &node,
                        error.into(),
                    ));
                }
            }
        }
        Err(HostError::new(
            ErrorKind::Busy,
            format!(
                "others took every loop device that was free for {}",
                path.display()
            ),
        ))
    }

    pub(super) fn number(&self) -> Number {
        self.number
    }

    /// Bytes of the device: the whole sectors of its file.
    pub(super) fn size(&self) -> Result<u64, HostError> {
        use std::io::{Seek as _, SeekFrom};
        (&self.device)
            .seek(SeekFrom::End(0))
            .map_err(|error| HostError::io("ask for the size of a loop device", error))
    }
}
