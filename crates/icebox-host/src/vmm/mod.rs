//! VMMs on Linux: processes that run guests, and what is common to saving their memory.
//!
//! A driver implements [`icebox_engine::host::Vmm`]. [`qemu`], [`cloud_hypervisor`] and [`firecracker`] do. What a guest's memory
//! looks like on disk, and how changed pages are found from outside the process, does not depend on the VMM and lives in
//! `memory`.

mod api;
mod asked;
pub mod cloud_hypervisor;
mod console;
mod cpu;
pub mod firecracker;
#[cfg(test)]
mod hostile;
pub(crate) mod memory;
mod meter;
mod own_disk;
mod own_save;
mod processes;
mod program;
pub mod qemu;
mod trial;
mod userfault;
mod watched;

use std::io;
use std::path::Path;

use icebox_engine::host::{ErrorKind, HostError, LaunchPlan, ProcessIdentity, Start};

use crate::launcher::Bind;
use crate::pager::PAGER_PID_FILE;

/// The file of a VMM's runtime directory that says which process it is: its [identity], as JSON, written before it starts.
///
/// [identity]: ProcessIdentity
pub const PID_FILE: &str = "pid";

/// Which process the VMM with this runtime directory is or was; `None` if it was never started, or has been cleaned up.
pub(crate) fn read_pid_file(directory: &Path) -> io::Result<Option<ProcessIdentity>> {
    read_identity(&directory.join(PID_FILE))
}

/// Which process the pager of the VMM with this runtime directory is or was.
pub(crate) fn read_pager_pid_file(directory: &Path) -> io::Result<Option<ProcessIdentity>> {
    read_identity(&directory.join(PAGER_PID_FILE))
}

fn read_identity(path: &Path) -> io::Result<Option<ProcessIdentity>> {
    match std::fs::read(path) {
        Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A program outside `/usr` needs its own directory in the box.
fn program_binds(program: &Path) -> Vec<Bind> {
    match program.parent() {
        Some(directory) if !directory.starts_with("/usr") && !directory.starts_with("/bin") => {
            vec![Bind::read_only(directory, directory)]
        }
        _ => Vec::new(),
    }
}

/// Refuses a memory of another size than the guest's: a VMM would map part of it, or extend it with nothing (INV-44).
fn check_memory(plan: &LaunchPlan) -> Result<(), HostError> {
    let Start::Restore { memory, .. } = &plan.start else {
        return Ok(());
    };
    let length = std::fs::metadata(&memory.base)
        .map_err(|error| HostError::io(format!("read memory {}", memory.base.display()), error))?
        .len();
    let expected = plan.geometry.memory().0;
    if length == expected {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::Invalid,
        format!(
            "memory {} is of a guest with {} MiB, not {} MiB",
            memory.base.display(),
            length >> 20,
            plan.geometry.mem_mib
        ),
    ))
}

/// Refuses a memory that is not in one file, for a VMM that can restore no other.
fn check_undivided(vmm: &str, plan: &LaunchPlan) -> Result<(), HostError> {
    match &plan.start {
        Start::Restore { memory, .. } if memory.diff.is_some() => Err(HostError::new(
            ErrorKind::Unsupported,
            format!("{vmm} cannot restore a memory that is a base and what differs from it"),
        )),
        _ => Ok(()),
    }
}
