//! Writing a guest's memory as a memory object.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use icebox_engine::host::{ErrorKind, HostError, SavedPages};
use icebox_engine::layout::{MEMORY_BASE, MEMORY_DIFF};
use icebox_engine::unit::PAGE_SIZE;
use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

use super::diff::DiffWriter;
use super::process::ProcessMemoryError;
use super::{GuestRam, PAGE, ProcessMemory, ZERO_PAGE};

/// Pages per read of the process's memory: 1 MiB.
const BATCH_PAGES: usize = 256;

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
    /// Pages that the guest has copies of.
    pub(crate) changed: u64,
    /// Of those, pages that are zero.
    pub(crate) zero: u64,
    /// Bytes allocated for the file. Blocks that a new base shares with the old one count in full.
    pub(crate) allocated: u64,
}

/// Writes the memory of a guest that stands still into `directory`. `old_base` is the file it is mapped over, if any.
///
/// Files are readable by everybody ([`Bind`](crate::launcher::Bind) says why) and not writable. Not durable: whoever
/// publishes the directory syncs it. Blocks for as long as the changed pages take to copy.
pub(crate) fn save(
    process: &ProcessMemory,
    ram: GuestRam,
    old_base: Option<&Path>,
    directory: &Path,
) -> Result<SaveOutcome, SaveError> {
    let changed = process.changed_pages(ram)?;
    let small = (changed.len() as u64) <= ram.bytes / PAGE / DIFF_PART_MAX;
    let (pages, zero, allocated) = match old_base {
        Some(old) if small => {
            let path = directory.join(MEMORY_DIFF);
            let file = create(&path)?;
            let failed = |source| failed("write", &path, source);
            let mut writer = DiffWriter::new(&file, ram.bytes);
            let mut base = OldBase::open(old)?;
            read_pages(process, ram, &changed, |number, page| {
                if base.has(number, page)? {
                    return Ok(());
                }
                writer.push(number, page).map_err(failed)
            })?;
            let zero = writer.finish().map_err(failed)?;
            (SavedPages::Diff, zero, allocated(&file).map_err(failed)?)
        }
        old_base => {
            let path = directory.join(MEMORY_BASE);
            let file = create(&path)?;
            file.set_len(ram.bytes)
                .map_err(|source| failed("resize", &path, source))?;
            if let Some(old) = old_base {
                copy_sparse(old, &file).map_err(|source| failed("copy", old, source))?;
            }
            let mut writer = BaseWriter::new(&file, old_base.is_some());
            read_pages(process, ram, &changed, |number, page| {
                writer
                    .push(number, page)
                    .map_err(|source| failed("write", &path, source))
            })?;
            let failed = |source| failed("write", &path, source);
            let zero = writer.finish().map_err(failed)?;
            (SavedPages::Full, zero, allocated(&file).map_err(failed)?)
        }
    };
    Ok(SaveOutcome {
        pages,
        changed: changed.len() as u64,
        zero,
        allocated,
    })
}

fn allocated(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> SaveError {
    SaveError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn create(path: &Path) -> Result<File, SaveError> {
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

/// Calls `each` with every page of `numbers`, reading neighbours together.
fn read_pages(
    process: &ProcessMemory,
    ram: GuestRam,
    numbers: &[u64],
    mut each: impl FnMut(u64, &[u8]) -> Result<(), SaveError>,
) -> Result<(), SaveError> {
    let mut buffer = vec![0; BATCH_PAGES * PAGE_SIZE];
    for run in numbers.chunk_by(|a, b| b - a == 1) {
        for batch in run.chunks(BATCH_PAGES) {
            let bytes = &mut buffer[..batch.len() * PAGE_SIZE];
            process.read(ram, batch[0] * PAGE, bytes)?;
            for (number, page) in batch.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
                each(*number, page)?;
            }
        }
    }
    Ok(())
}

/// The memory that a guest was restored from. A guest has a copy of each page that it ever wrote to, and many of those
/// hold again what they held before: locks, counters, what an earlier diff brought and is gone.
struct OldBase<'a> {
    path: &'a Path,
    file: File,
    page: Vec<u8>,
}

impl<'a> OldBase<'a> {
    fn open(path: &'a Path) -> Result<Self, SaveError> {
        let file = File::open(path).map_err(|source| failed("open", path, source))?;
        Ok(Self {
            path,
            file,
            page: vec![0; PAGE_SIZE],
        })
    }

    /// Whether this page is the same there: a restore brings it back without help. Blocks; in the page cache as a rule,
    /// since the guest's copy was made from it.
    fn has(&mut self, number: u64, page: &[u8]) -> Result<bool, SaveError> {
        self.file
            .read_exact_at(&mut self.page, number * PAGE)
            .map_err(|source| failed("read", self.path, source))?;
        Ok(self.page == page)
    }
}

/// Writes pages into a base: neighbours together, zero pages as holes.
struct BaseWriter<'a> {
    file: &'a File,
    /// Whether the file may hold something where a zero page belongs.
    over_content: bool,
    start: u64,
    batch: Vec<u8>,
    zero: u64,
}

impl<'a> BaseWriter<'a> {
    fn new(file: &'a File, over_content: bool) -> Self {
        Self {
            file,
            over_content,
            start: 0,
            batch: Vec::with_capacity(BATCH_PAGES * PAGE_SIZE),
            zero: 0,
        }
    }

    fn push(&mut self, number: u64, page: &[u8]) -> io::Result<()> {
        if page == ZERO_PAGE {
            self.zero += 1;
            if self.over_content {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(self.file, hole, number * PAGE, PAGE)?;
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

    fn finish(mut self) -> io::Result<u64> {
        self.write_batch()?;
        Ok(self.zero)
    }
}

/// Copies what is allocated of a file into one of the same length. The kernel shares the blocks where the file system
/// can (copy_file_range(2)).
fn copy_sparse(from: &Path, to: &File) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let from = File::open(from)?;
    let length = from.metadata()?.len();
    let mut at = 0;
    while at < length {
        let data = match seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data after `at`.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&from, SeekFrom::Hole(data))?;
        let (mut source, mut target) = (data, data);
        while source < end {
            let count = usize::try_from(end - source).unwrap_or(usize::MAX);
            if copy_file_range(&from, Some(&mut source), to, Some(&mut target), count)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn inv_29_only_pages_that_the_old_base_has_just_so_are_left_out() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, &[7; PAGE_SIZE]).unwrap();
        file.as_file().set_len(3 * PAGE).unwrap();
        let mut base = OldBase::open(file.path()).unwrap();
        let mut almost = [7; PAGE_SIZE];
        almost[PAGE_SIZE - 1] = 8;
        assert!(base.has(0, &[7; PAGE_SIZE]).unwrap());
        assert!(!base.has(0, &almost).unwrap());
        assert!(!base.has(0, &ZERO_PAGE).unwrap(), "zeroed since");
        assert!(base.has(2, &ZERO_PAGE).unwrap(), "a hole");
        assert!(!base.has(2, &almost).unwrap());
        assert!(base.has(3, &almost).is_err(), "beyond the end");
    }

    #[test]
    fn copying_keeps_holes() {
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("from");
        let source = File::create_new(&from).unwrap();
        source.set_len(1 << 20).unwrap();
        source.write_all_at(b"first", 0).unwrap();
        source.write_all_at(b"last", (1 << 20) - 4).unwrap();
        let to = tempfile::tempfile_in(directory.path()).unwrap();
        to.set_len(1 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        let mut bytes = vec![0; 1 << 20];
        to.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(
            (&bytes[..5], &bytes[(1 << 20) - 4..]),
            (&b"first"[..], &b"last"[..])
        );
        assert!(bytes[5..(1 << 20) - 4].iter().all(|byte| *byte == 0));
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 19);
    }
}
