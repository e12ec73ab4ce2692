//! `FS_IOC_FIEMAP`: which extents a file has, and which of them it shares. `sync_file_range`.
#![allow(
    unsafe_code,
    reason = "an ioctl with a structure of its own, and a call that no crate wraps"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Updater, opcode};

// Numbers and structures: include/uapi/linux/fiemap.h and fs.h in Linux.
const FS_IOC_FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);
const FIEMAP_FLAG_SYNC: u32 = 1;
const FIEMAP_EXTENT_LAST: u32 = 1;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
/// Extents asked for at a time: 14 KiB of stack.
const BATCH: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    header: Header,
    extents: [Extent; BATCH],
}

/// The sum of the lengths of the extents of `file` that no other file shares. Flushes the file first.
pub(super) fn exclusive_extents(file: &File) -> Result<u64, Errno> {
    let mut sum = 0;
    let mut start = 0;
    loop {
        let mut request = Request {
            header: Header {
                start,
                length: u64::MAX - start,
                flags: FIEMAP_FLAG_SYNC,
                mapped_extents: 0,
                extent_count: 256,
                reserved: 0,
            },
            extents: [Extent::default(); BATCH],
        };
        // SAFETY: the opcode is FS_IOC_FIEMAP, whose argument is a `struct fiemap`: the header, followed by room for as
        // many extents as its `extent_count` says, which is exactly what `Request` is.
        let control = unsafe { Updater::<FS_IOC_FIEMAP, Request>::new(&mut request) };
        // SAFETY: see above; the kernel writes at most `extent_count` extents into the request, which outlives the call.
        unsafe { ioctl::ioctl(file, control) }?;
        let mapped = usize::try_from(request.header.mapped_extents)
            .unwrap_or(usize::MAX)
            .min(BATCH);
        let Some(last) = request.extents[..mapped].last() else {
            return Ok(sum);
        };
        sum += request.extents[..mapped]
            .iter()
            .filter(|extent| extent.flags & FIEMAP_EXTENT_SHARED == 0)
            .map(|extent| extent.length)
            .sum::<u64>();
        let next = last.logical.saturating_add(last.length);
        if last.flags & FIEMAP_EXTENT_LAST != 0 || next <= start {
            return Ok(sum);
        }
        start = next;
    }
}

/// Writes the file's changed pages out and waits for them, sync_file_range(2). Neither its metadata nor the disk's own cache.
pub(super) fn write_out(file: &File) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes an open descriptor and numbers; a length of 0 is up to the end of the file.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
