//! The question to KVM what of CPUID it can show guests.

#![allow(unsafe_code, reason = "an ioctl with a structure of its own")]

use std::fs::File;
use std::io;

use rustix::ioctl::{self, Updater, opcode};

/// One answer of CPUID.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    /// What was in `eax`.
    pub(super) function: u32,
    /// What was in `ecx`.
    pub(super) index: u32,
    /// `eax`, `ebx`, `ecx` and `edx` afterwards.
    pub(super) registers: [u32; 4],
}

/// More than KVM has answers.
const ENTRIES_MAX: u32 = 256;

/// `struct kvm_cpuid_entry2` of linux/kvm.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Entry {
    function: u32,
    index: u32,
    flags: u32,
    registers: [u32; 4],
    padding: [u32; 3],
}

/// `struct kvm_cpuid2`, with room for entries.
#[repr(C)]
struct Table {
    entries: u32,
    padding: u32,
    room: [Entry; ENTRIES_MAX as usize],
}

/// `_IOWR(KVMIO, 0x05, struct kvm_cpuid2)`, whose size is that of the head alone.
const KVM_GET_SUPPORTED_CPUID: ioctl::Opcode = opcode::read_write::<[u32; 2]>(0xae, 0x05);

pub(super) fn supported_by_kvm(kvm: &File) -> io::Result<Vec<Leaf>> {
    let mut table = Table {
        entries: ENTRIES_MAX,
        padding: 0,
        room: [Entry::default(); ENTRIES_MAX as usize],
    };
    // SAFETY: the command reads and writes a `kvm_cpuid2` with room for as many entries as it says, which this is.
    let update = unsafe { Updater::<KVM_GET_SUPPORTED_CPUID, Table>::new(&mut table) };
    // SAFETY: as above; the kernel keeps no pointer to it.
    unsafe { ioctl::ioctl(kvm, update) }?;
    let leaf = |entry: &Entry| Leaf {
        function: entry.function,
        index: entry.index,
        registers: entry.registers,
    };
    let count = table.entries as usize;
    Ok(table.room.iter().take(count).map(leaf).collect())
}
