//! The ioctls of device-mapper and of loop devices.
#![allow(unsafe_code, reason = "ioctls with structures of their own")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _};

use linux_raw_sys::loop_device::{LOOP_CONFIGURE, LOOP_CTL_GET_FREE, loop_config, loop_info64};
use rustix::io::{Errno, Result};
use rustix::ioctl::{self, Direction, Ioctl, IoctlOutput, Opcode, Setter, opcode};

/// Bytes of `struct dm_ioctl`: include/uapi/linux/dm-ioctl.h in Linux.
pub(super) const HEADER: usize = 312;
/// Where the header says how many bytes the kernel may read and write.
const DATA_SIZE: usize = 12;

/// Sends a command to device-mapper. `buffer` is a header and what follows it; the answer replaces it.
pub(super) fn device_mapper(control: &File, command: u8, buffer: &mut [u8]) -> Result<()> {
    let length = u32::try_from(buffer.len()).map_err(|_| Errno::TOOBIG)?;
    buffer
        .get_mut(..HEADER)
        .ok_or(Errno::INVAL)?
        .get_mut(DATA_SIZE..DATA_SIZE + 4)
        .ok_or(Errno::INVAL)?
        .copy_from_slice(&length.to_ne_bytes());
    // SAFETY: `Command` is an ioctl of device-mapper, whose argument has as many bytes as its header says, which is what
    // was just written there.
    unsafe { ioctl::ioctl(control, Command { command, buffer }) }
}

struct Command<'a> {
    command: u8,
    buffer: &'a mut [u8],
}

// SAFETY: the pointer is that of a buffer which outlives the call, and which is as long as its header says.
unsafe impl Ioctl for Command<'_> {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::from_components(Direction::ReadWrite, 0xfd, self.command, HEADER)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        self.buffer.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(
        _out: IoctlOutput,
        _extract_output: *mut rustix::ffi::c_void,
    ) -> Result<()> {
        Ok(())
    }
}

/// The number of a loop device that is free at the moment.
pub(super) fn free_loop(control: &File) -> Result<u32> {
    struct GetFree;
    // SAFETY: the command takes no argument and returns a number.
    unsafe impl Ioctl for GetFree {
        type Output = u32;

        const IS_MUTATING: bool = false;

        fn opcode(&self) -> Opcode {
            LOOP_CTL_GET_FREE
        }

        fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
            std::ptr::null_mut()
        }

        unsafe fn output_from_ptr(
            out: IoctlOutput,
            _extract_output: *mut rustix::ffi::c_void,
        ) -> Result<u32> {
            u32::try_from(out).map_err(|_| Errno::RANGE)
        }
    }
    // SAFETY: see above.
    unsafe { ioctl::ioctl(control, GetFree) }
}

/// Puts `backing` on a free loop device, with `LO_FLAGS_…`. Fails with [`Errno::BUSY`] if somebody was faster.
pub(super) fn configure_loop(device: &File, backing: impl AsFd, flags: u32) -> Result<()> {
    let fd = backing.as_fd().as_raw_fd();
    let config = loop_config {
        fd: u32::try_from(fd).map_err(|_| Errno::BADF)?,
        block_size: 0,
        info: loop_info64 {
            lo_device: 0,
            lo_inode: 0,
            lo_rdevice: 0,
            lo_offset: 0,
            lo_sizelimit: 0,
            lo_number: 0,
            lo_encrypt_type: 0,
            lo_encrypt_key_size: 0,
            lo_flags: flags,
            lo_file_name: [0; 64],
            lo_crypt_name: [0; 64],
            lo_encrypt_key: [0; 32],
            lo_init: [0; 2],
        },
        __reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`.
    let configure = unsafe { Setter::<LOOP_CONFIGURE, loop_config>::new(config) };
    // SAFETY: see above; the descriptor in the structure outlives the call.
    unsafe { ioctl::ioctl(device, configure) }
}
