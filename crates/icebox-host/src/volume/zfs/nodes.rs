//! Which `/dev/zd<n>` shows which volume.
//!
//! The kernel makes a volume's device some time after the command that made the volume has ended, and takes the lowest
//! number that is free. udev, where it runs, makes links by name; nothing here needs them. Devices are asked for their
//! names, each once: what is known of one stays true while its sequence number does (`diskseq`, Linux 5.15; on older
//! kernels they are asked every time).

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use icebox_engine::host::{ErrorKind, HostError};
use rustix::fs::OFlags;
use rustix::fs::inotify;

use super::command::wait_readable;
use super::sys;
use crate::fs::{failed, open_device};

const SYS_BLOCK: &str = "/sys/block";
const DEV: &str = "/dev";
const LINKS: &str = "/dev/zvol";

/// How long a device may take to come or go. Usually milliseconds; the kernel makes them one after the other.
const LONGEST: Duration = Duration::from_secs(20);
/// How often it is looked at what no event tells: a device that goes, and a name that changes.
const GLANCE: Duration = Duration::from_millis(20);

/// What is known of devices.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: Mutex<HashMap<String, Known>>,
}

/// A device that was asked for its name.
#[derive(Clone, Debug)]
struct Known {
    sequence: u64,
    dataset: String,
}

impl Nodes {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        // Single inserts and removes.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device that shows `dataset` now, if there is one.
    fn now(&self, dataset: &str) -> Result<Option<PathBuf>, HostError> {
        if let Ok(node) = fs::canonicalize(Path::new(LINKS).join(dataset))
            && shows(&node, dataset)
        {
            return Ok(Some(node));
        }
        let mut nodes = there()?;
        // The newest first: it is mostly one that was just made, and opening a device that nobody has open is slow.
        nodes.sort_by_key(|(_, sequence)| std::cmp::Reverse(*sequence));
        for (name, sequence) in &nodes {
            let known = self.lock().get(name).cloned();
            if let (Some(known), Some(sequence)) = (known, sequence)
                && known.sequence == *sequence
                && known.dataset != dataset
            {
                continue;
            }
            let node = Path::new(DEV).join(name);
            let Some(shown) = shown_by(&node) else {
                continue;
            };
            let is_it = shown == dataset;
            if let Some(sequence) = *sequence {
                let known = Known {
                    sequence,
                    dataset: shown,
                };
                self.lock().insert(name.clone(), known);
            }
            if is_it {
                return Ok(Some(node));
            }
        }
        self.lock()
            .retain(|known, _| nodes.iter().any(|(name, _)| name == known));
        Ok(None)
    }

    /// Waits until a device shows `dataset`.
    ///
    /// # Errors
    /// There is none in [`LONGEST`].
    pub(super) fn wait(&self, dataset: &str) -> Result<PathBuf, HostError> {
        let end = Instant::now() + LONGEST;
        if let Some(node) = self.now(dataset)? {
            return Ok(node);
        }
        // From here on no new node is missed.
        let watch = |error: rustix::io::Errno| failed("watch", Path::new(DEV), error.into());
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)
            .map_err(watch)?;
        inotify::add_watch(&events, DEV, inotify::WatchFlags::CREATE).map_err(watch)?;
        let mut buffer = [0; 4096];
        loop {
            if let Some(node) = self.now(dataset)? {
                return Ok(node);
            }
            if Instant::now() > end {
                return Err(HostError::new(
                    ErrorKind::Timeout,
                    format!(
                        "the volume {dataset} got no device in {} s",
                        LONGEST.as_secs()
                    ),
                )
                .hint("/dev must be the kernel's (devtmpfs), and the module parameter zvol_inhibit_dev 0"));
            }
            // A node exists before it can be opened: some looks come without an event.
            match wait_readable(&events, GLANCE) {
                Ok(()) => match rustix::io::read(&events, &mut buffer) {
                    Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Err(watch(error)),
                },
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(failed("watch", Path::new(DEV), error)),
            }
        }
    }

    /// Waits until no device shows `dataset`, and calls `again` after every look that found one.
    ///
    /// # Errors
    /// Somebody has it open ([`ErrorKind::Busy`]), or `again` failed.
    #[expect(
        clippy::disallowed_methods,
        reason = "the kernel has no event for a device that was closed"
    )]
    pub(super) fn wait_gone(
        &self,
        dataset: &str,
        longest: Duration,
        mut again: impl FnMut() -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let end = Instant::now() + longest;
        let mut pause = GLANCE;
        while let Some(node) = self.now(dataset)? {
            if Instant::now() > end {
                return Err(HostError::new(
                    ErrorKind::Busy,
                    format!("the volume {dataset} is in use at {}", node.display()),
                )
                .hint(format!(
                    "something has it open: `fuser -v {}`",
                    node.display()
                )));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(500));
            again()?;
        }
        Ok(())
    }
}

/// Whether this is a whole device of ZFS.
fn is_node(name: &str) -> bool {
    let number = name.strip_prefix("zd");
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The devices of volumes, with what is different for every device that a number was ever given to, and grows.
fn there() -> Result<Vec<(String, Option<u64>)>, HostError> {
    let failed = |error| failed("list", Path::new(SYS_BLOCK), error);
    let mut there = Vec::new();
    for entry in fs::read_dir(SYS_BLOCK).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Ok(name) = entry.file_name().into_string()
            && is_node(&name)
        {
            let sequence = fs::read_to_string(entry.path().join("diskseq"));
            let sequence = sequence.ok().and_then(|text| text.trim().parse().ok());
            there.push((name, sequence));
        }
    }
    Ok(there)
}

/// The dataset that a device shows. `None` if it cannot be opened: it goes, or is not ready.
fn shown_by(node: &Path) -> Option<String> {
    let device = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking())
        .open(node)
        .ok()?;
    String::from_utf8(sys::dataset_of(&device).ok()?).ok()
}

fn nonblocking() -> i32 {
    OFlags::NONBLOCK.bits().cast_signed()
}

fn shows(node: &Path, dataset: &str) -> bool {
    shown_by(node).is_some_and(|shown| shown == dataset)
}

/// Opens a volume's device.
pub(super) fn open(node: &Path, write: bool) -> Result<File, HostError> {
    let mut options = OpenOptions::new();
    open_device(options.read(true).write(write), node).map_err(|error| failed("open", node, error))
}

/// Bytes of a device.
pub(super) fn size(node: &Path) -> Result<u64, HostError> {
    open(node, false)?
        .seek(SeekFrom::End(0))
        .map_err(|error| failed("measure", node, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_devices_of_zfs_and_no_others() {
        for node in ["zd0", "zd16", "zd1024"] {
            assert!(is_node(node), "{node}");
        }
        for other in ["zd", "zd0p1", "sda", "zram0", "zd-1"] {
            assert!(!is_node(other), "{other}");
        }
    }
}
