//! VMMs on Linux: processes that run guests, and what is common to saving their memory.
//!
//! A driver implements [`icebox_engine::host::Vmm`]. [`qemu`] is the only one so far. What a guest's memory looks
//! like on disk, and how changed pages are found from outside the process, does not depend on the VMM and lives in
//! `memory`.

mod memory;
mod meter;
pub mod qemu;

use std::io;
use std::path::Path;

use icebox_engine::host::ProcessIdentity;

/// The file of a VMM's runtime directory that says which process it is: its [identity], as JSON, written before it starts.
///
/// [identity]: ProcessIdentity
pub const PID_FILE: &str = "pid";

/// Which process the VMM with this runtime directory is or was; `None` if it was never started, or has been cleaned up.
pub(crate) fn read_pid_file(directory: &Path) -> io::Result<Option<ProcessIdentity>> {
    match std::fs::read(directory.join(PID_FILE)) {
        Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
