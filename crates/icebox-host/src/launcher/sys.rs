//! The few system calls of the launcher without a safe wrapper.

#![allow(
    unsafe_code,
    reason = "unshare, close_range, signal and the version of Landlock have no safe wrapper, and tokio wants a promise about descriptors"
)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

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

/// Closes every descriptor but the standard ones and `kept`: what the daemon itself has inherited and does not know of. The
/// process must own no other.
pub(super) fn close_all_but(kept: BorrowedFd<'_>) -> io::Result<()> {
    const FIRST: u32 = 3;
    let kept = kept.as_raw_fd().cast_unsigned();
    for (from, to) in [(FIRST, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if from > to {
            continue;
        }
        // SAFETY: as the caller says, nothing here owns a descriptor that is closed.
        if unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
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
