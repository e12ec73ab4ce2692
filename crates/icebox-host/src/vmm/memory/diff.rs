//! The file format of a memory's changes against a base.
//!
//! All numbers are little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `iceboxmd` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | page size in bytes, 4096 |
//! | 16 | 8 | size of the guest's memory in bytes |
//! | 24 | 8 | *n*, number of changed pages |
//! | 32 | 8 | *s*, how many of them are stored |
//! | 40 | 4056 | zero |
//! | 4096 | 4096 × *s* | stored pages, in the order of their entries |
//! | 4096 × (1 + *s*) | 8 × *n* | entries, strictly ascending by page |
//!
//! An entry is the page's number shifted left by one; its lowest bit says that the page is all zero now and not
//! stored (a page can be zero in the guest and not in the base, INV-29). The file ends with the last entry.
//!
//! A diff is part of an object that is published by renaming its directory after fsync, so a torn one is never seen.
//! Reading still trusts nothing: every field is checked against the file's length and the guest's memory before it
//! is used (the file may be foreign, or damaged).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use icebox_engine::unit::PAGE_SIZE;

use super::{PAGE, ZERO_PAGE};

const MAGIC: &[u8; 8] = b"iceboxmd";
/// The newest format that this code reads and the only one that it writes.
const VERSION: u32 = 1;
/// What is used of the header's page.
const HEADER_BYTES: usize = 40;
const ENTRY_BYTES: usize = size_of::<u64>();
#[allow(clippy::cast_possible_truncation, reason = "4096")]
const PAGE_SIZE_FIELD: u32 = PAGE_SIZE as u32;
/// Pages per read and write.
const BATCH_PAGES: usize = 256;

/// Why a file is not a diff that can be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiffError {
    /// It cannot be read.
    #[error("read memory diff")]
    Read(#[from] io::Error),
    /// Not one of ours.
    #[error("the file is not a memory diff")]
    Magic,
    /// From a newer program.
    #[error("the memory diff has format {found}, this program reads up to {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Of another guest.
    #[error(
        "the memory diff is for a guest with {found} bytes of memory in pages of {page_size}, not {expected} in pages of {PAGE_SIZE}"
    )]
    Geometry {
        /// Memory size in the file.
        found: u64,
        /// Page size in the file.
        page_size: u32,
        /// Memory size of the guest.
        expected: u64,
    },
    /// Damaged.
    #[error("the memory diff is damaged: {0}")]
    Damaged(&'static str),
}

/// A diff, open for reading and checked.
#[derive(Debug)]
pub(crate) struct Diff {
    file: File,
    entries: Vec<u64>,
}

impl Diff {
    /// Opens a diff of a guest with `memory_bytes` of memory. Blocks.
    pub(crate) fn open(file: File, memory_bytes: u64) -> Result<Self, DiffError> {
        let length = file.metadata()?.len();
        let mut header = [0; HEADER_BYTES];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(DiffError::Magic);
            }
            other => other?,
        }
        if header[..8] != MAGIC[..] {
            return Err(DiffError::Magic);
        }
        let u32_at =
            |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or_default());
        let u64_at =
            |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap_or_default());
        let version = u32_at(8);
        if version != VERSION {
            return Err(DiffError::Version { found: version });
        }
        let (page_size, found) = (u32_at(12), u64_at(16));
        if page_size != PAGE_SIZE_FIELD || found != memory_bytes {
            return Err(DiffError::Geometry {
                found,
                page_size,
                expected: memory_bytes,
            });
        }
        let (count, stored) = (u64_at(24), u64_at(32));
        // Bounds everything that follows: entries take at most 1/512 of the guest's memory.
        if count > memory_bytes / PAGE || stored > count {
            return Err(DiffError::Damaged("more pages than the guest has"));
        }
        let index_offset = PAGE * (1 + stored);
        if length != index_offset + count * ENTRY_BYTES as u64 {
            return Err(DiffError::Damaged("its length does not fit its header"));
        }
        let mut raw = vec![0; usize::try_from(length - index_offset).map_err(io::Error::other)?];
        file.read_exact_at(&mut raw, index_offset)?;
        let entries: Vec<u64> = raw
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()))
            .collect();
        if !entries.is_sorted_by(|a, b| a >> 1 < b >> 1) {
            return Err(DiffError::Damaged("its entries are not in order"));
        }
        if entries
            .last()
            .is_some_and(|last| last >> 1 >= memory_bytes / PAGE)
        {
            return Err(DiffError::Damaged("a page lies outside the guest's memory"));
        }
        if entries.iter().filter(|entry| is_stored(**entry)).count() as u64 != stored {
            return Err(DiffError::Damaged("its entries do not fit its header"));
        }
        Ok(Self { file, entries })
    }

    /// Calls `write(offset in guest memory, bytes)` for every changed page, in order, neighbours together. Blocks.
    pub(crate) fn apply(
        &self,
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; BATCH_PAGES * PAGE_SIZE];
        let mut position = PAGE;
        for run in self.entries.chunk_by(|a, b| b - a == 2) {
            for batch in run.chunks(BATCH_PAGES) {
                let first = batch.first().map_or(0, |entry| (entry >> 1) * PAGE);
                let bytes = &mut buffer[..batch.len() * PAGE_SIZE];
                if is_stored(batch[0]) {
                    self.file.read_exact_at(bytes, position)?;
                    position += bytes.len() as u64;
                } else {
                    bytes.fill(0);
                }
                write(first, bytes)?;
            }
        }
        Ok(())
    }
}

fn is_stored(entry: u64) -> bool {
    entry & 1 == 0
}

/// Writes a diff, page by page in ascending order.
#[derive(Debug)]
pub(crate) struct DiffWriter<'a> {
    file: &'a File,
    memory_bytes: u64,
    entries: Vec<u64>,
    written: u64,
    batch: Vec<u8>,
}

impl<'a> DiffWriter<'a> {
    /// Begins an empty file.
    pub(crate) fn new(file: &'a File, memory_bytes: u64) -> Self {
        Self {
            file,
            memory_bytes,
            entries: Vec::new(),
            written: 0,
            batch: Vec::with_capacity(BATCH_PAGES * PAGE_SIZE),
        }
    }

    /// Adds the page with this number, which is greater than the last one's. Blocks.
    pub(crate) fn push(&mut self, number: u64, page: &[u8]) -> io::Result<()> {
        if page == ZERO_PAGE {
            self.entries.push(number << 1 | 1);
            return Ok(());
        }
        self.entries.push(number << 1);
        self.batch.extend_from_slice(page);
        if self.batch.len() == BATCH_PAGES * PAGE_SIZE {
            self.write_batch()?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> io::Result<()> {
        self.file
            .write_all_at(&self.batch, PAGE * (1 + self.written))?;
        self.written += self.batch.len() as u64 / PAGE;
        self.batch.clear();
        Ok(())
    }

    /// Completes the file: from here on it can be read. Returns how many of its pages are zero. Blocks.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.write_batch()?;
        let count = self.entries.len() as u64;
        let index: Vec<u8> = self
            .entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        self.file.write_all_at(&index, PAGE * (1 + self.written))?;
        let mut header = Vec::with_capacity(PAGE_SIZE);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&PAGE_SIZE_FIELD.to_le_bytes());
        for field in [self.memory_bytes, count, self.written] {
            header.extend_from_slice(&field.to_le_bytes());
        }
        header.resize(PAGE_SIZE, 0);
        self.file.write_all_at(&header, 0)?;
        Ok(count - self.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 64 * PAGE;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_SIZE]
    }

    fn written(pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut writer = DiffWriter::new(&file, MEMORY);
        for (number, byte) in pages {
            writer.push(*number, &page(*byte)).unwrap();
        }
        let zero = writer.finish().unwrap();
        assert_eq!(
            zero,
            pages.iter().filter(|(_, byte)| *byte == 0).count() as u64
        );
        file
    }

    fn applied(diff: &Diff) -> Vec<(u64, u8)> {
        let mut pages = Vec::new();
        diff.apply(|offset, bytes| {
            for (index, page) in bytes.chunks(PAGE_SIZE).enumerate() {
                assert!(page.iter().all(|byte| *byte == page[0]));
                pages.push((offset / PAGE + index as u64, page[0]));
            }
            Ok(())
        })
        .unwrap();
        pages
    }

    #[test]
    fn inv_29_pages_come_back_and_zeroed_ones_are_zero() {
        let pages = [(0, 1), (1, 2), (2, 0), (3, 0), (4, 5), (60, 0), (63, 7)];
        let diff = Diff::open(written(&pages), MEMORY).unwrap();
        assert_eq!(applied(&diff), pages);
    }

    #[test]
    fn long_runs_cross_batches() {
        let memory = 3 * BATCH_PAGES as u64 * PAGE;
        let file = tempfile::tempfile().unwrap();
        let mut writer = DiffWriter::new(&file, memory);
        let all: Vec<(u64, u8)> = (0..memory / PAGE)
            .map(|n| (n, (n % 250) as u8 + 1))
            .collect();
        for (number, byte) in &all {
            writer.push(*number, &page(*byte)).unwrap();
        }
        writer.finish().unwrap();
        assert_eq!(applied(&Diff::open(file, memory).unwrap()), all);
    }

    #[test]
    fn an_empty_diff_changes_nothing() {
        let diff = Diff::open(written(&[]), MEMORY).unwrap();
        assert_eq!(applied(&diff), []);
    }

    #[test]
    fn inv_44_another_version_or_geometry_is_refused() {
        let file = written(&[(1, 1)]);
        assert!(matches!(
            Diff::open(file.try_clone().unwrap(), 2 * MEMORY),
            Err(DiffError::Geometry { found: MEMORY, .. })
        ));
        file.write_all_at(&2_u32.to_le_bytes(), 8).unwrap();
        let error = Diff::open(file, MEMORY).unwrap_err();
        assert!(matches!(error, DiffError::Version { found: 2 }));
        assert_eq!(
            error.to_string(),
            "the memory diff has format 2, this program reads up to 1"
        );
    }

    #[test]
    fn damage_is_found_before_anything_is_applied() {
        let corrupt = |change: &dyn Fn(&File)| {
            let file = written(&[(1, 1), (2, 0), (9, 9)]);
            change(&file);
            Diff::open(file, MEMORY)
        };
        let index = PAGE * 3;
        let entry = |at: u64, value: u64| {
            move |file: &File| {
                file.write_all_at(&value.to_le_bytes(), index + 8 * at)
                    .unwrap();
            }
        };
        assert!(matches!(
            corrupt(&|f| f.set_len(0).unwrap()),
            Err(DiffError::Magic)
        ));
        assert!(matches!(
            corrupt(&|f| f.write_all_at(b"x", 0).unwrap()),
            Err(DiffError::Magic)
        ));
        for damaged in [
            corrupt(&|f| f.set_len(index + 23).unwrap()),
            corrupt(&|f| f.set_len(index + 32).unwrap()),
            corrupt(&|f| f.write_all_at(&u64::MAX.to_le_bytes(), 24).unwrap()),
            corrupt(&|f| f.write_all_at(&u64::MAX.to_le_bytes(), 32).unwrap()),
            corrupt(&entry(0, 3 << 1)),
            corrupt(&entry(1, 1 << 1 | 1)),
            corrupt(&entry(2, 64 << 1)),
            corrupt(&entry(1, 2 << 1)),
        ] {
            assert!(matches!(damaged, Err(DiffError::Damaged(_))), "{damaged:?}");
        }
        assert!(corrupt(&entry(2, 63 << 1)).is_ok());
    }
}
