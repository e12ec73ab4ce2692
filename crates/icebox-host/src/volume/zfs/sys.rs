//! `BLKZNAME`: which dataset a volume's device shows.
#![allow(unsafe_code, reason = "an ioctl of ZFS")]

use std::fs::File;

use rustix::io::Result;
use rustix::ioctl::{self, Getter, Opcode, opcode};

/// Bytes that the kernel writes: `ZFS_MAX_DATASET_NAME_LEN`.
const NAME: usize = 256;
/// include/sys/fs/zfs.h of OpenZFS.
const BLKZNAME: Opcode = opcode::read::<[u8; NAME]>(0x12, 125);

/// The full name of the dataset that `device` shows, a volume or a snapshot. Fails with `ENOTTY` on other devices.
pub(super) fn dataset_of(device: &File) -> Result<Vec<u8>> {
    // SAFETY: BLKZNAME writes as many bytes as its number says.
    let getter = unsafe { Getter::<BLKZNAME, [u8; NAME]>::new() };
    // SAFETY: see above.
    let name = unsafe { ioctl::ioctl(device, getter) }?;
    let end = name.iter().position(|byte| *byte == 0);
    Ok(name[..end.unwrap_or(NAME)].to_vec())
}
