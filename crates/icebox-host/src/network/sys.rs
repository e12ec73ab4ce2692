//! The kernel interfaces of this part that no safe crate covers: new namespaces for the calling thread, and taps.

#![allow(
    unsafe_code,
    reason = "unshare and the tun ioctls have no safe wrapper"
)]

use std::ffi::{c_char, c_short};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// `struct ifreq` of linux/if.h, as far as the tun ioctls read it: the name, the flags and the rest of the union.
#[repr(C)]
struct InterfaceRequest {
    name: [c_char; 16],
    flags: c_short,
    rest: [u8; 22],
}

// linux/if_tun.h
const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETPERSIST: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 203);
const IFF_TAP: c_short = 0x0002;
const IFF_NO_PI: c_short = 0x1000;
const IFF_VNET_HDR: c_short = 0x4000;

/// Moves the calling thread, and only it, into a new network namespace.
pub(super) fn unshare_network() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET alone shares and unshares no file descriptors and no memory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Moves the calling thread, and only it, into a copy of its mount namespace. It has a working directory of its own
/// from then on.
pub(super) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: CLONE_NEWNS unshares the file system context too, but no file descriptors and no memory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(())
}

/// Attaches to the tap `name` in the calling thread's network namespace; makes it if it does not exist.
/// Frames carry a virtio-net header and no packet information. Non-blocking.
pub(super) fn attach_tap(name: &str) -> io::Result<File> {
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    if name.len() >= request.name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name:?} is longer than 15 characters"),
        ));
    }
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads a whole `struct ifreq`, which `InterfaceRequest` has the size and layout of.
    let set = unsafe { Setter::<TUNSETIFF, InterfaceRequest>::new(request) };
    // SAFETY: as above; the kernel keeps no pointer to it.
    unsafe { ioctl(&tap, set) }?;
    Ok(tap)
}

/// Makes the tap outlive its descriptor: it then goes with its namespace.
pub(super) fn persist_tap(tap: &File) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes an integer by value.
    let persist = unsafe { IntegerSetter::<TUNSETPERSIST>::new_usize(1) };
    // SAFETY: as above.
    unsafe { ioctl(tap, persist) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_size_of_the_kernel_s() {
        // struct ifreq on 64-bit Linux.
        assert_eq!(size_of::<InterfaceRequest>(), 40);
    }

    #[test]
    fn a_name_that_would_be_cut_is_refused() {
        let error = attach_tap("sixteen-letters!").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
