//! What the kernel offers and no safe binding covers. Everything here is small, and says why it is sound.

#![allow(
    unsafe_code,
    reason = "ioctls without a safe binding, descriptors that arrive by number or are handed to the runtime"
)]

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use rustix::{
    io::FdFlags,
    ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode},
};
use tokio::io::unix::AsyncFd;

/// Takes over the descriptor `number`, which a parent left open for this process, and keeps it from the next one.
pub(crate) fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the borrow ends with this block; a number that is not open gives EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as the call above showed, and nothing in this fresh process owns it: it opened nothing.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets every signal do to this process, and to what it becomes, what it does by default: dispositions to ignore and
/// blocked signals outlive an exec, and a program must not depend on how the agent was started.
pub(crate) fn reset_signals() -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default disposition runs no code of ours. That SIGKILL, SIGSTOP and the C library's own signals
        // refuse is as it should be.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is valid for writes of a signal set; sigemptyset(3) cannot fail then.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: the set was initialised above, and the old one is not asked for.
    let status =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(status))
    }
}

/// Lets the runtime wait for `fd` to be ready.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor, the same for as long as it lives, and `AsyncFd` keeps it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// An ioctl that passes a structure in and reads it back.
struct InOut<T> {
    opcode: Opcode,
    value: T,
}

// SAFETY: only built in this module, with opcodes whose argument is a pointer to exactly this `T`.
unsafe impl<T> Ioctl for InOut<T> {
    type Output = T;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.value).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, argument: *mut c_void) -> rustix::io::Result<T> {
        // SAFETY: `argument` is what `as_ptr` gave, still alive and aligned; it is read once, and `T` has no drop
        // glue that a second copy could run.
        Ok(unsafe { argument.cast::<T>().read() })
    }
}

/// `struct fstrim_range` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct TrimRange {
    start: u64,
    length: u64,
    minimum: u64,
}

/// Tells the disk which blocks of the filesystem mounted at `mountpoint` are free. Blocks until it has been told.
///
/// Returns the number of bytes that were discarded.
pub(crate) fn trim(mountpoint: impl AsFd) -> io::Result<u64> {
    const FITRIM: Opcode = opcode::read_write::<TrimRange>(b'X', 121);
    let request = InOut {
        opcode: FITRIM,
        value: TrimRange {
            start: 0,
            length: u64::MAX,
            minimum: 0,
        },
    };
    // SAFETY: FITRIM reads and writes one `struct fstrim_range`, which is what `TrimRange` lays out.
    let range = unsafe { ioctl::ioctl(mountpoint, request) }?;
    Ok(range.length)
}

/// Bytes that one call credits; more are added in several.
const ENTROPY_CHUNK: usize = 64;

/// `struct rand_pool_info` of linux/random.h, with room for one chunk.
#[repr(C)]
#[derive(Clone, Copy)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; ENTROPY_CHUNK],
}

/// Mixes `bytes` into the kernel's pool, credits them in full, and makes the generator start from the new state.
///
/// `random` is `/dev/random` or `/dev/urandom`; the caller needs CAP_SYS_ADMIN.
pub(crate) fn reseed(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    // `struct rand_pool_info` ends in a flexible array, which the size in the number does not count.
    const RNDADDENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 3);
    const RNDRESEEDCRNG: Opcode = opcode::none(b'R', 7);
    for chunk in bytes.chunks(ENTROPY_CHUNK) {
        let mut info = PoolInfo {
            entropy_bits: 0,
            size: 0,
            bytes: [0; ENTROPY_CHUNK],
        };
        info.bytes[..chunk.len()].copy_from_slice(chunk);
        let size = i32::try_from(chunk.len()).map_err(io::Error::other)?;
        info.size = size;
        info.entropy_bits = size * 8;
        let request = InOut {
            opcode: RNDADDENTROPY,
            value: info,
        };
        // SAFETY: the kernel reads the two counts and then `size` bytes, all of which lie within `PoolInfo`.
        unsafe { ioctl::ioctl(random.as_fd(), request) }?;
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    let request = unsafe { ioctl::NoArg::<RNDRESEEDCRNG>::new() };
    // SAFETY: as above.
    unsafe { ioctl::ioctl(random, request) }?;
    Ok(())
}
