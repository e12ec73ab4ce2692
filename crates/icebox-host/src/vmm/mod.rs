//! VMMs on Linux: processes that run guests, and what is common to saving their memory.
//!
//! A driver implements [`icebox_engine::host::Vmm`]. [`qemu`] is the only one so far. What a guest's memory looks
//! like on disk, and how changed pages are found from outside the process, does not depend on the VMM and lives in
//! `memory`.

mod memory;
mod meter;
pub mod qemu;

/// The file of a VMM's runtime directory that says which process it is: its [identity], as JSON, written before it starts.
///
/// [identity]: icebox_engine::host::ProcessIdentity
pub const PID_FILE: &str = "pid";
