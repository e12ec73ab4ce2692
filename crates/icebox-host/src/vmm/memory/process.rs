//! The memory of a VMM's process, by way of `/proc`.
//!
//! Everything here reads what a possibly hostile process arranged: counts and addresses are bounded, and nothing is
//! believed beyond "these are bytes of that process".

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use icebox_engine::host::ProcessIdentity;

use super::PAGE;
use crate::launcher::identity_of;

/// Longest `/proc/<pid>/maps` that is looked at: a VMM has a few hundred mappings.
const MAPS_BYTES_MAX: u64 = 4 << 20;

/// pagemap, Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped, bit 61 file page or shared
/// anonymous page.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;
const PAGEMAP_ENTRY_BYTES: usize = size_of::<u64>();

/// The part of a process's address space that is the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestRam {
    /// Host virtual address of guest physical address 0.
    pub(crate) address: u64,
    /// Its length, a multiple of the page size.
    pub(crate) bytes: u64,
}

/// A part of a guest's memory that is the private mapping of a part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MappedPart {
    /// Where the process has it.
    pub(crate) ram: GuestRam,
    /// Where it begins in the file.
    pub(crate) offset: u64,
    /// Pages of it, numbered from its beginning, that the process has mapped something else over: all of them are its own.
    /// Of a part that is [filled](Self::is_filled): that were removed, and are zero if they are not there.
    pub(crate) replaced: Vec<Range<u64>>,
    /// Whether it is no mapping of the file, but anonymous memory that a pager fills from it. What is not there cannot be
    /// read, and is as in the file, or was removed.
    pub(crate) is_filled: bool,
}

impl MappedPart {
    /// Whether a page is among the [replaced](Self::replaced), which are in order.
    pub(crate) fn has_replaced(&self, number: u64) -> bool {
        let next = self.replaced.partition_point(|it| it.end <= number);
        self.replaced
            .get(next)
            .is_some_and(|it| it.contains(&number))
    }
}

/// Why guest memory cannot be found or accessed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessMemoryError {
    /// The process has ended.
    #[error("the VMM has ended")]
    Gone,
    /// Access failed.
    #[error("{operation}")]
    Io {
        /// What was done.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The address space is not what a VMM's looks like.
    #[error("the VMM does not map {0}")]
    NotMapped(String),
}

/// Access to a process's memory. Stays with the process it was opened for: a later process with the same pid is
/// never read or written.
#[derive(Debug)]
pub(crate) struct ProcessMemory {
    pid: u32,
    memory: File,
    pagemap: File,
}

impl ProcessMemory {
    /// Opens the memory of exactly this process. Needs `CAP_SYS_PTRACE`.
    pub(crate) fn open(process: &ProcessIdentity) -> Result<Self, ProcessMemoryError> {
        let pid = process.pid;
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .and_then(|memory| Ok((memory, File::open(format!("/proc/{pid}/pagemap"))?)));
        let (memory, pagemap) =
            opened.map_err(|source| io_error(format!("open memory of process {pid}"), source))?;
        // The descriptors mean the process that had the pid when they were opened. It is ours if ours still has it.
        match identity_of(pid) {
            Ok(now) if now == *process => Ok(Self {
                pid,
                memory,
                pagemap,
            }),
            _ => Err(ProcessMemoryError::Gone),
        }
    }

    /// Finds the private, writable mapping of a whole file.
    ///
    /// By inode and length, since `maps` shows another device number than stat(2) for files on btrfs subvolumes.
    pub(crate) fn find_file(&self, path: &Path) -> Result<GuestRam, ProcessMemoryError> {
        let file = fs::metadata(path).map_err(|source| ProcessMemoryError::Io {
            operation: format!("look at {}", path.display()),
            source,
        })?;
        self.mappings()?
            .into_iter()
            .find(|mapping| {
                mapping.inode == file.ino()
                    && mapping.offset == 0
                    && mapping.is_private_writable
                    && mapping.end - mapping.start == file.len()
            })
            .map(|mapping| GuestRam {
                address: mapping.start,
                bytes: file.len(),
            })
            .ok_or_else(|| ProcessMemoryError::NotMapped(format!("all of {}", path.display())))
    }

    /// Finds the private, writable mappings of parts of a file, each in one piece but for what the process has put in the
    /// place of some pages since. `parts` are in order.
    pub(crate) fn find_parts(
        &self,
        path: &Path,
        parts: &[Range<u64>],
    ) -> Result<Vec<MappedPart>, ProcessMemoryError> {
        let file = fs::metadata(path).map_err(|source| ProcessMemoryError::Io {
            operation: format!("look at {}", path.display()),
            source,
        })?;
        let mappings: Vec<Mapping> = self
            .mappings()?
            .into_iter()
            .filter(|it| it.inode == file.ino() && it.is_private_writable)
            .collect();
        parts
            .iter()
            .map(|part| {
                find_part(&mappings, part).ok_or_else(|| {
                    let what = format!("bytes {part:?} of {}", path.display());
                    ProcessMemoryError::NotMapped(what)
                })
            })
            .collect()
    }

    /// Checks that anonymous memory of the VMM covers this range.
    pub(crate) fn check_anonymous(&self, ram: GuestRam) -> Result<(), ProcessMemoryError> {
        let end = ram.address.saturating_add(ram.bytes);
        let covered = self.mappings()?.iter().any(|mapping| {
            mapping.inode == 0
                && mapping.is_private_writable
                && mapping.start <= ram.address
                && end <= mapping.end
        });
        if covered {
            Ok(())
        } else {
            Err(ProcessMemoryError::NotMapped(format!(
                "{} bytes of anonymous memory at {:#x}",
                ram.bytes, ram.address
            )))
        }
    }

    fn mappings(&self) -> Result<Vec<Mapping>, ProcessMemoryError> {
        use io::Read;
        let path = format!("/proc/{}/maps", self.pid);
        let mut text = String::new();
        File::open(&path)
            .and_then(|file| file.take(MAPS_BYTES_MAX).read_to_string(&mut text))
            .map_err(|source| io_error(format!("read {path}"), source))?;
        Ok(text.lines().filter_map(Mapping::parse).collect())
    }

    /// Numbers of the pages that the guest has a copy of its own of, ascending.
    ///
    /// Over a private file mapping those are the ones it wrote; over anonymous memory, all that it touched.
    pub(crate) fn changed_pages(&self, ram: GuestRam) -> Result<Vec<u64>, ProcessMemoryError> {
        /// Entries per read: 64 KiB.
        const BATCH: usize = 8192;
        let mut changed = Vec::new();
        let mut buffer = vec![0; BATCH * PAGEMAP_ENTRY_BYTES];
        let (pages, first) = (ram.bytes / PAGE, ram.address / PAGE);
        for at in (0..pages).step_by(BATCH) {
            let count = usize::try_from(pages - at).map_or(BATCH, |left| left.min(BATCH));
            let bytes = &mut buffer[..count * PAGEMAP_ENTRY_BYTES];
            self.pagemap
                .read_exact_at(bytes, (first + at) * PAGEMAP_ENTRY_BYTES as u64)
                .map_err(|source| {
                    io_error(format!("read page map of process {}", self.pid), source)
                })?;
            for (number, entry) in (at..).zip(bytes.chunks_exact(PAGEMAP_ENTRY_BYTES)) {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0 {
                    changed.push(number);
                }
            }
        }
        Ok(changed)
    }

    /// Reads guest memory.
    pub(crate) fn read(
        &self,
        ram: GuestRam,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), ProcessMemoryError> {
        self.memory
            .read_exact_at(bytes, ram.address + offset)
            .map_err(|source| io_error(format!("read memory of process {}", self.pid), source))
    }

    /// Writes guest memory: into the process's own copy, never into the file under it.
    pub(crate) fn write(&self, ram: GuestRam, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, ram.address + offset)
    }
}

/// The part of a file that these mappings of it show at one address.
fn find_part(mappings: &[Mapping], part: &Range<u64>) -> Option<MappedPart> {
    let mut within: Vec<&Mapping> = mappings
        .iter()
        .filter(|it| part.contains(&it.offset))
        .collect();
    within.sort_by_key(|it| it.offset);
    let first = within.first()?;
    let address = first.start.checked_sub(first.offset - part.start)?;
    let mut replaced = Vec::new();
    let mut at = part.start;
    for mapping in within {
        let end = mapping.offset + (mapping.end - mapping.start);
        let fits = mapping.start == address + (mapping.offset - part.start);
        if !fits || mapping.offset < at || end > part.end {
            return None;
        }
        if mapping.offset > at {
            replaced.push((at - part.start) / PAGE..(mapping.offset - part.start) / PAGE);
        }
        at = end;
    }
    if at < part.end {
        replaced.push((at - part.start) / PAGE..(part.end - part.start) / PAGE);
    }
    Some(MappedPart {
        ram: GuestRam {
            address,
            bytes: part.end - part.start,
        },
        offset: part.start,
        replaced,
        is_filled: false,
    })
}

/// An error of a file in `/proc/<pid>`: that it is not there means that the process is not.
fn io_error(operation: String, source: io::Error) -> ProcessMemoryError {
    match source.kind() {
        // The memory of a process that has ended is empty.
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => ProcessMemoryError::Gone,
        _ if source.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            ProcessMemoryError::Gone
        }
        _ => ProcessMemoryError::Io { operation, source },
    }
}

/// A line of `/proc/<pid>/maps`, proc(5).
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_private_writable: bool,
    offset: u64,
    inode: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?.as_bytes();
        let offset = fields.next()?;
        let _device = fields.next()?;
        let inode = fields.next()?;
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            is_private_writable: permissions.get(1) == Some(&b'w')
                && permissions.get(3) == Some(&b'p'),
            offset: u64::from_str_radix(offset, 16).ok()?,
            inode: inode.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_in_one_piece_but_for_what_was_put_over_it() {
        let mapping = |start: u64, pages: u64, offset: u64| Mapping {
            start,
            end: start + pages * PAGE,
            is_private_writable: true,
            offset: offset * PAGE,
            inode: 7,
        };
        let at = 0x7f00_0000_0000;
        let (first, second) = (0..6 * PAGE, 6 * PAGE..8 * PAGE);
        let maps = [mapping(at, 6, 0), mapping(at - (1 << 30), 2, 6)];
        let found = find_part(&maps, &second).unwrap();
        assert_eq!(
            (found.ram.address, found.offset),
            (at - (1 << 30), 6 * PAGE)
        );
        assert_eq!(find_part(&maps, &first).unwrap().replaced, []);

        // The first page, the middle and the end are something else now.
        let maps = [mapping(at + 4 * PAGE, 1, 4), mapping(at + PAGE, 1, 1)];
        let found = find_part(&maps, &first).unwrap();
        assert_eq!(
            found.ram,
            GuestRam {
                address: at,
                bytes: 6 * PAGE
            }
        );
        assert_eq!(found.replaced, [0..1, 2..4, 5..6]);

        // Two mappings that are not of one piece, one that goes on too far, and none.
        let maps = [mapping(at, 1, 0), mapping(at + PAGE, 1, 4)];
        assert_eq!(find_part(&maps, &first), None);
        assert_eq!(find_part(&[mapping(at, 7, 0)], &first), None);
        assert_eq!(find_part(&[mapping(at, 6, 0)], &second), None);
    }

    #[test]
    fn maps_are_understood() {
        let line = "7f1c2a000000-7f1c4a000000 rw-p 00000000 fd:01 1234567                    /run/icebox/box/memory";
        assert_eq!(
            Mapping::parse(line),
            Some(Mapping {
                start: 0x7f1c_2a00_0000,
                end: 0x7f1c_4a00_0000,
                is_private_writable: true,
                offset: 0,
                inode: 1_234_567,
            })
        );
        let shared = Mapping::parse("1000-2000 rw-s 00001000 00:05 9 /memfd:x (deleted)").unwrap();
        assert!(!shared.is_private_writable);
        assert_eq!(shared.offset, 0x1000);
        assert_eq!(Mapping::parse("garbage"), None);
    }
}
