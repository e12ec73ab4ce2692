//! The few system calls of the launcher without a safe wrapper.

#![allow(
    unsafe_code,
    reason = "unshare, close_range, signal and the version of Landlock have no safe wrapper, and tokio wants a promise about descriptors"
)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling process, which has one thread, mounts, System V IPC and a host name of its own.
pub(super) fn unshare_mounts() -> io::Result<()> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: none of these flags shares or unshares file descriptors or memory.
    unsafe { unshare_unsafe(flags) }?;
    Ok(())
}

/// Marks every descriptor from `first` on to be closed by exec.
pub(super) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: changes a flag of descriptors; none is closed before exec.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Which version of Landlock the kernel has.
pub(super) fn landlock_version() -> io::Result<u32> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag and no rules, nothing is made and nothing read.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION,
        )
    };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// Lets a write beyond `RLIMIT_FSIZE` fail instead of ending this process, and what it becomes by exec.
pub(super) fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: a signal that is ignored runs no code of ours.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the runtime tell when a descriptor is readable.
pub(super) fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is an open descriptor that stays the same until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}
