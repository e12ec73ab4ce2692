//! Writing a guest's memory as a memory object.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use icebox_engine::host::{ErrorKind, HostError, SavedMemory, SavedPages};
use icebox_engine::layout::{MEMORY_BASE, MEMORY_DIFF};
use icebox_engine::unit::{Bytes, PAGE_SIZE};

use super::diff::DiffWriter;
use super::process::ProcessMemoryError;
use super::{GuestRam, PAGE, ProcessMemory, ZERO_PAGE};
use crate::fs::{clamp_usize, give_back, punch, sparse_copy};

/// Pages per read of the process's memory: 1 MiB.
pub(super) const BATCH_PAGES: usize = 256;

/// A diff is cumulative, and every guest on it has its pages as anonymous memory: past this part of the memory, a new
/// base is cheaper.
const DIFF_PART_MAX: u64 = 4;

/// Why memory could not be saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveError {
    /// The process's memory cannot be read.
    #[error(transparent)]
    Process(#[from] ProcessMemoryError),
    /// A file cannot be written or the old base not read.
    #[error("{operation} {}", .path.display())]
    File {
        /// What was done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl SaveError {
    /// As an error of the driver. A file's error keeps its kind: no space is [`Exhausted`](ErrorKind::Exhausted).
    pub(crate) fn into_host(self, message: String) -> HostError {
        match self {
            Self::File {
                operation,
                path,
                source,
            } => HostError::io(format!("{message}: {operation} {}", path.display()), source),
            Self::Process(ProcessMemoryError::Gone) => {
                HostError::new(ErrorKind::Gone, message).caused_by(ProcessMemoryError::Gone)
            }
            Self::Process(error) => HostError::new(ErrorKind::Other, message).caused_by(error),
        }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SaveOutcome {
    /// A new base, or a diff.
    pub(crate) pages: SavedPages,
    /// Pages that differ from the old base; without one, pages that the guest touched.
    pub(crate) changed: u64,
    /// Of those, pages that are zero.
    pub(crate) zero: u64,
    /// Bytes allocated for the file. Blocks that a new base shares with the old one count in full.
    pub(crate) allocated: u64,
}

impl SaveOutcome {
    /// The whole save, with a device state of so many bytes.
    pub(crate) fn with_state(self, bytes: u64) -> SavedMemory {
        SavedMemory {
            pages: self.pages,
            changed_pages: self.changed,
            zero_pages: self.zero,
            allocated: Bytes(self.allocated + bytes.next_multiple_of(PAGE)),
        }
    }
}

/// Writes the memory of a guest that stands still into `directory`. `old_base` is the file it is mapped over, if any.
///
/// A page that the guest has a copy of is written only if it differs from the base: about a third of an idle guest's
/// copies do not, since the guest wrote back what was there.
///
/// Files are readable by everybody ([`Bind`](crate::launcher::Bind) says why) and not writable. Not durable: whoever
/// publishes the directory syncs it. Blocks for as long as the changed pages take to copy.
pub(crate) fn save(
    process: &ProcessMemory,
    ram: GuestRam,
    old_base: Option<&Path>,
    directory: &Path,
) -> Result<SaveOutcome, SaveError> {
    let copies = process.changed_pages(ram)?;
    let Some(old_path) = old_base else {
        return save_full(process, ram, &copies, None, directory);
    };
    let old = File::open(old_path).map_err(|source| failed("open", old_path, source))?;
    let old = OldBase {
        file: &old,
        path: old_path,
    };
    if copies.len() as u64 > ram.bytes / PAGE / DIFF_PART_MAX {
        return save_full(process, ram, &copies, Some(old), directory);
    }
    let path = directory.join(MEMORY_DIFF);
    let file = create(&path)?;
    let failed = |source| failed("write", &path, source);
    let mut writer = DiffWriter::new(&file, ram.bytes);
    let changed = read_pages(process, ram, &copies, Some(old), |number, page| {
        writer.push(number, page).map_err(failed)
    })?;
    Ok(SaveOutcome {
        pages: SavedPages::Diff,
        changed,
        zero: writer.finish().map_err(failed)?,
        allocated: allocated(&file).map_err(failed)?,
    })
}

/// The memory that a guest was restored from. A guest has a copy of each page that it ever wrote to, and many of those
/// hold again what they held before: locks, counters, what an earlier diff brought and is gone.
#[derive(Clone, Copy)]
struct OldBase<'a> {
    file: &'a File,
    path: &'a Path,
}

fn save_full(
    process: &ProcessMemory,
    ram: GuestRam,
    copies: &[u64],
    old: Option<OldBase<'_>>,
    directory: &Path,
) -> Result<SaveOutcome, SaveError> {
    let path = directory.join(MEMORY_BASE);
    let file = create(&path)?;
    if let Some(old) = old {
        sparse_copy(old.file, &file).map_err(|source| failed("copy", old.path, source))?;
    }
    file.set_len(ram.bytes)
        .map_err(|source| failed("resize", &path, source))?;
    let failed = |source| failed("write", &path, source);
    let mut writer = BaseWriter::new(&file, old.is_some());
    let changed = read_pages(process, ram, copies, old, |number, page| {
        writer.push(number, page).map_err(failed)
    })?;
    Ok(SaveOutcome {
        pages: SavedPages::Full,
        changed,
        zero: writer.finish().map_err(failed)?,
        allocated: allocated(&file).map_err(failed)?,
    })
}

/// Moves the memory that a VMM has saved to a file of its own, `length` bytes of it, into `directory`: what is not zero. What
/// is copied is given back, so that both together never take more room than one. Stops early when `wanted` turns false.
///
/// As with [`save`], readable by everybody, not writable and not durable. Blocks for as long as that takes to read.
pub(crate) fn save_file(
    memory: &File,
    length: u64,
    directory: &Path,
    wanted: &AtomicBool,
) -> Result<SaveOutcome, SaveError> {
    let path = directory.join(MEMORY_BASE);
    let file = create(&path)?;
    let failed = |source| failed("write", &path, source);
    file.set_len(length).map_err(failed)?;
    let mut writer = BaseWriter::new(&file, false);
    let mut batch = vec![0; BATCH_PAGES * PAGE_SIZE];
    let pages = length / PAGE;
    for first in (0..pages).step_by(BATCH_PAGES) {
        if !wanted.load(Ordering::Relaxed) {
            return Err(failed(io::ErrorKind::Interrupted.into()));
        }
        let count = BATCH_PAGES.min(clamp_usize(pages - first));
        let bytes = &mut batch[..count * PAGE_SIZE];
        memory.read_exact_at(bytes, first * PAGE).map_err(failed)?;
        for (number, page) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
            writer.push(number, page).map_err(failed)?;
        }
        give_back(memory, first * PAGE, bytes.len() as u64).map_err(failed)?;
    }
    let zero = writer.finish().map_err(failed)?;
    Ok(SaveOutcome {
        pages: SavedPages::Full,
        // Which of the zero pages the guest ever touched, nobody knows.
        changed: pages - zero,
        zero: 0,
        allocated: allocated(&file).map_err(failed)?,
    })
}

pub(super) fn allocated(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

pub(super) fn failed(operation: &'static str, path: &Path, source: io::Error) -> SaveError {
    SaveError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

pub(super) fn create(path: &Path) -> Result<File, SaveError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|file| {
            // Not by open's mode, which the umask cuts.
            file.set_permissions(Permissions::from_mode(0o444))?;
            Ok(file)
        })
        .map_err(|source| failed("create", path, source))
}

/// Calls `each` with every page of `numbers` that differs from the old base, if there is one, reading neighbours
/// together. Returns how many there were.
fn read_pages(
    process: &ProcessMemory,
    ram: GuestRam,
    numbers: &[u64],
    old: Option<OldBase<'_>>,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), SaveError>,
) -> Result<u64, SaveError> {
    let mut now = vec![0; BATCH_PAGES * PAGE_SIZE];
    let mut before = vec![0; if old.is_some() { now.len() } else { 0 }];
    let mut changed = 0;
    for run in numbers.chunk_by(|a, b| b - a == 1) {
        for batch in run.chunks(BATCH_PAGES) {
            let length = batch.len() * PAGE_SIZE;
            let at = batch[0] * PAGE;
            process.read(ram, at, &mut now[..length])?;
            if let Some(old) = old {
                old.file
                    .read_exact_at(&mut before[..length], at)
                    .map_err(|source| failed("read", old.path, source))?;
            }
            for (index, (number, page)) in batch
                .iter()
                .zip(now[..length].chunks_exact(PAGE_SIZE))
                .enumerate()
            {
                let was = before.get(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
                if was != Some(page) {
                    changed += 1;
                    each(*number, page)?;
                }
            }
        }
    }
    Ok(changed)
}

/// Writes pages into a base: neighbours together, zero pages as holes.
pub(super) struct BaseWriter<'a> {
    file: &'a File,
    /// Whether the file may hold something where a zero page belongs.
    over_content: bool,
    start: u64,
    batch: Vec<u8>,
    zero: u64,
}

impl<'a> BaseWriter<'a> {
    pub(super) fn new(file: &'a File, over_content: bool) -> Self {
        Self {
            file,
            over_content,
            start: 0,
            batch: Vec::with_capacity(BATCH_PAGES * PAGE_SIZE),
            zero: 0,
        }
    }

    pub(super) fn push(&mut self, number: u64, page: &[u8]) -> io::Result<()> {
        if page == ZERO_PAGE {
            self.zero += 1;
            if self.over_content {
                punch(self.file, number * PAGE, PAGE)?;
            }
            return Ok(());
        }
        let continues = self.start + self.batch.len() as u64 == number * PAGE;
        if !continues || self.batch.len() == BATCH_PAGES * PAGE_SIZE {
            self.write_batch()?;
            self.start = number * PAGE;
        }
        self.batch.extend_from_slice(page);
        Ok(())
    }

    fn write_batch(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.batch, self.start)?;
        self.batch.clear();
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<u64> {
        self.write_batch()?;
        Ok(self.zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::identity_of;

    #[test]
    fn a_base_is_sparse_and_zeroed_pages_become_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(600 * PAGE).unwrap();
        let mut writer = BaseWriter::new(&file, false);
        for number in 0..300 {
            writer.push(number, &[7; PAGE_SIZE]).unwrap();
        }
        writer.push(400, &[0; PAGE_SIZE]).unwrap();
        writer.push(599, &[9; PAGE_SIZE]).unwrap();
        assert_eq!(writer.finish().unwrap(), 1);

        let mut over = BaseWriter::new(&file, true);
        over.push(10, &[0; PAGE_SIZE]).unwrap();
        over.push(11, &[8; PAGE_SIZE]).unwrap();
        assert_eq!(over.finish().unwrap(), 1);

        let byte = |page: u64| {
            let mut bytes = [0xff; PAGE_SIZE];
            file.read_exact_at(&mut bytes, page * PAGE).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]));
            bytes[0]
        };
        assert_eq!(
            [0, 9, 10, 11, 12, 299, 300, 400, 598, 599].map(byte),
            [7, 7, 0, 8, 7, 7, 0, 0, 0, 9]
        );
        assert_eq!(file.metadata().unwrap().len(), 600 * PAGE);
    }

    #[test]
    fn inv_28_inv_29_of_a_vmms_own_save_everything_but_zeros_is_kept_and_takes_no_room_twice() {
        let directory = tempfile::tempdir().unwrap();
        let saved = tempfile::tempfile().unwrap();
        let pages = 2 * BATCH_PAGES as u64 + 3;
        let written = [0, 1, BATCH_PAGES as u64, pages - 1];
        saved.write_all_at(&[0; 8 * PAGE_SIZE], 8 * PAGE).unwrap();
        for number in written {
            saved.write_all_at(&[7; PAGE_SIZE], number * PAGE).unwrap();
        }
        let mut whole = vec![0; usize::try_from(pages).unwrap() * PAGE_SIZE];
        saved.read_exact_at(&mut whole, 0).unwrap();
        let wanted = AtomicBool::new(true);
        let outcome = save_file(&saved, pages * PAGE, directory.path(), &wanted).unwrap();
        assert_eq!(outcome.pages, SavedPages::Full);
        assert_eq!(outcome.changed, written.len() as u64);
        assert!(outcome.allocated <= 64 << 10, "{outcome:?}");
        let path = directory.path().join(MEMORY_BASE);
        assert!(std::fs::read(&path).unwrap() == whole);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o444);
        // There is no room for both.
        assert_eq!(allocated(&saved).unwrap(), 0);

        // One that was cut short is no memory.
        let other = tempfile::tempdir().unwrap();
        assert!(save_file(&saved, (pages + 1) * PAGE, other.path(), &wanted).is_err());
        // What nobody wants any more stays where it is.
        saved.write_all_at(&[7; PAGE_SIZE], 0).unwrap();
        let (other, unwanted) = (tempfile::tempdir().unwrap(), AtomicBool::new(false));
        assert!(save_file(&saved, pages * PAGE, other.path(), &unwanted).is_err());
        assert_ne!(allocated(&saved).unwrap(), 0);
    }

    #[test]
    fn inv_29_only_pages_that_the_old_base_has_just_so_are_left_out() {
        let old = tempfile::NamedTempFile::new().unwrap();
        old.as_file().write_all_at(&[7; 3 * PAGE_SIZE], 0).unwrap();
        old.as_file().set_len(5 * PAGE).unwrap();
        let mut memory = vec![0_u8; 7 * PAGE_SIZE];
        let start = memory.as_ptr().align_offset(PAGE_SIZE);
        let guest = &mut memory[start..start + 6 * PAGE_SIZE];
        // The same; almost the same; zeroed since. Over the hole: zero, not zero. Beyond the end.
        guest[..2 * PAGE_SIZE].fill(7);
        guest[2 * PAGE_SIZE - 1] = 8;
        guest[5 * PAGE_SIZE - 1] = 1;

        let process = ProcessMemory::open(&identity_of(std::process::id()).unwrap()).unwrap();
        let ram = GuestRam {
            address: guest.as_ptr() as u64,
            bytes: 6 * PAGE,
        };
        let base = OldBase {
            file: old.as_file(),
            path: old.path(),
        };
        let read = |numbers: &[u64], base| {
            let mut seen = Vec::new();
            let changed = read_pages(&process, ram, numbers, base, |number, page| {
                seen.push((number, page[PAGE_SIZE - 1]));
                Ok(())
            });
            changed.map(|changed| {
                assert_eq!(changed, seen.len() as u64);
                seen
            })
        };
        assert_eq!(
            read(&[0, 1, 2, 3, 4], Some(base)).unwrap(),
            [(1, 8), (2, 0), (4, 1)]
        );
        assert_eq!(read(&[0, 3], None).unwrap(), [(0, 7), (3, 0)]);
        assert!(
            read(&[4, 5], Some(base)).is_err(),
            "beyond the old base's end"
        );
    }
}
