//! The ioctls of a userfaultfd.
#![allow(unsafe_code, reason = "ioctls with structures of their own")]

use std::os::fd::AsFd;

use icebox_engine::unit::PAGE_SIZE;
use linux_raw_sys::general::{uffdio_copy, uffdio_range, uffdio_zeropage};
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_WAKE, UFFDIO_ZEROPAGE};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Setter, Updater};

/// What has become of a request to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// All of them.
    All,
    /// So many bytes. What hinders the rest, the next request says.
    Part(u64),
}

/// Copies pages to `address` in the memory that a userfaultfd is of, and wakes who waits for them.
pub(super) fn copy(userfault: impl AsFd, address: u64, pages: &[u8]) -> Result<Filled, Errno> {
    let mut request = uffdio_copy {
        dst: address,
        src: pages.as_ptr() as u64,
        len: pages.len() as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: the opcode is that of this structure.
    let updater = unsafe { Updater::<{ UFFDIO_COPY as Opcode }, _>::new(&mut request) };
    // SAFETY: the kernel reads `len` bytes at `src`, which are those of `pages`, and writes to the structure, and to memory
    // that was registered with the userfaultfd, which is none of this program's.
    let done = unsafe { ioctl::ioctl(userfault, updater) };
    how_much(done, request.copy)
}

/// Fills one page with zeros, and wakes who waits for it.
pub(super) fn zero(userfault: impl AsFd, address: u64) -> Result<Filled, Errno> {
    let mut request = uffdio_zeropage {
        range: uffdio_range {
            start: address,
            len: PAGE_SIZE as u64,
        },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: the opcode is that of this structure.
    let updater = unsafe { Updater::<{ UFFDIO_ZEROPAGE as Opcode }, _>::new(&mut request) };
    // SAFETY: the kernel writes to the structure, and to memory that was registered with the userfaultfd.
    let done = unsafe { ioctl::ioctl(userfault, updater) };
    how_much(done, request.zeropage)
}

fn how_much(done: Result<(), Errno>, filled: i64) -> Result<Filled, Errno> {
    match (done, u64::try_from(filled)) {
        (Ok(()), _) => Ok(Filled::All),
        (Err(Errno::AGAIN), Ok(bytes)) if bytes > 0 => Ok(Filled::Part(bytes)),
        (Err(error), _) => Err(error),
    }
}

/// Wakes who waits for a page that is there.
pub(super) fn wake(userfault: impl AsFd, address: u64) -> Result<(), Errno> {
    let request = uffdio_range {
        start: address,
        len: PAGE_SIZE as u64,
    };
    // SAFETY: the opcode is that of this structure.
    let setter = unsafe { Setter::<{ UFFDIO_WAKE as Opcode }, _>::new(request) };
    // SAFETY: the kernel reads the structure.
    unsafe { ioctl::ioctl(userfault, setter) }
}

/// The VMM's half, for tests.
#[cfg(test)]
pub(super) mod vmm {
    use std::io;
    use std::os::fd::{FromRawFd as _, OwnedFd};

    use linux_raw_sys::general::{
        UFFD_API, UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING, uffdio_api,
        uffdio_register,
    };
    use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};

    use super::*;

    /// Anonymous memory that is filled through a userfaultfd. Never given back: a reader may wait for it.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::pager) struct Memory {
        pub(in crate::pager) address: u64,
        pub(in crate::pager) bytes: usize,
    }

    impl Memory {
        pub(in crate::pager) fn map(bytes: usize) -> Self {
            // SAFETY: a new mapping, where the kernel wants it.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(address, libc::MAP_FAILED);
            Self {
                address: address as u64,
                bytes,
            }
        }

        /// The byte at an offset, which waits for it.
        pub(in crate::pager) fn read(self, offset: usize) -> u8 {
            assert!(offset < self.bytes);
            let pointer = (self.address as *const u8).wrapping_add(offset);
            // SAFETY: within the mapping, which is never taken back.
            unsafe { pointer.read_volatile() }
        }

        pub(in crate::pager) fn write(self, offset: usize, byte: u8) {
            assert!(offset < self.bytes);
            let pointer = (self.address as *mut u8).wrapping_add(offset);
            // SAFETY: within the mapping, which is never taken back.
            unsafe { pointer.write_volatile(byte) };
        }

        /// As a balloon does.
        pub(in crate::pager) fn remove(self, offset: usize, bytes: usize) {
            assert!(offset + bytes <= self.bytes);
            let pointer = (self.address as *mut u8).wrapping_add(offset);
            // SAFETY: within the mapping, of which nobody holds a reference.
            let done = unsafe { libc::madvise(pointer.cast(), bytes, libc::MADV_DONTNEED) };
            assert_eq!(done, 0);
        }

        /// Whether a page is there.
        pub(in crate::pager) fn has(self, page: usize) -> bool {
            let pointer = (self.address as *mut u8).wrapping_add(page * PAGE_SIZE);
            let mut there = [0_u8];
            // SAFETY: asks for one page of the mapping, and writes one byte.
            let done = unsafe { libc::mincore(pointer.cast(), PAGE_SIZE, there.as_mut_ptr()) };
            assert_eq!(done, 0);
            there[0] & 1 == 1
        }
    }

    /// A userfaultfd for some memory.
    pub(in crate::pager) fn userfault(memory: &[Memory]) -> io::Result<OwnedFd> {
        // SAFETY: makes a descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = uffdio_api {
            api: u64::from(UFFD_API),
            features: u64::from(UFFD_FEATURE_EVENT_REMOVE),
            ioctls: 0,
        };
        // SAFETY: the opcode is that of this structure.
        let updater = unsafe { Updater::<{ UFFDIO_API as Opcode }, _>::new(&mut api) };
        // SAFETY: the kernel reads and writes the structure.
        unsafe { ioctl::ioctl(&fd, updater) }?;
        for memory in memory {
            let mut register = uffdio_register {
                range: uffdio_range {
                    start: memory.address,
                    len: memory.bytes as u64,
                },
                mode: u64::from(UFFDIO_REGISTER_MODE_MISSING),
                ioctls: 0,
            };
            // SAFETY: the opcode is that of this structure.
            let updater =
                unsafe { Updater::<{ UFFDIO_REGISTER as Opcode }, _>::new(&mut register) };
            // SAFETY: the kernel reads and writes the structure.
            unsafe { ioctl::ioctl(&fd, updater) }?;
        }
        Ok(fd)
    }
}
