//! Saves for a VMM that can restore nothing but one whole file: a copy of the file that the guest was restored from, with
//! what has changed since.
//!
//! The file is always a new one. It shares the old one's blocks where the file system can, and then a save costs what has
//! changed. Which pages those are needs no memory of earlier saves, neither ours nor the VMM's: they are the guest's own
//! copies, whatever was saved or failed to be since. So there is no chain of saves that could miss a link.
//!
//! ```text
//!   page is in what the VMM has written ──► that: it is of the same instant as its device state
//!   else the guest has a copy of its own ─► that copy
//!   else a pager fills it, and it was removed ─► zeros
//!   else ─────────────────────────────────► as in the old file
//! ```
//!
//! Where a pager fills memory, all that is there is the guest's own, whether or not it differs: that it does is compared.
//!
//! A VMM whose guest stands still may yet go on with what the guest has asked of its devices. That touches nothing but the
//! rings between the two, which the VMM writes at every save, and buffers that are not the guest's until the rings say so.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::SavedPages;
use icebox_engine::layout::MEMORY_BASE;
use icebox_engine::unit::PAGE_SIZE;

use super::process::MappedPart;
use super::save::{BATCH_PAGES, BaseWriter, SaveError, SaveOutcome, allocated, create, failed};
use super::{PAGE, ProcessMemory, ZERO_PAGE};
use crate::fs::{for_each_extent, sparse_copy};

/// Writes the memory of a guest that stands still into `directory`: what `old` has, with the pages that `parts` have copies
/// of, and those that the VMM has written to `written`, a file as long as the guest's memory with holes for what has not
/// changed.
///
/// As with [`save`](super::save), readable by everybody, not writable and not durable. Blocks for as long as the changed
/// pages take to copy; where the file system shares no blocks, all that is not zero.
pub(crate) fn save_flat(
    process: &ProcessMemory,
    parts: &[MappedPart],
    old: (&File, &Path),
    written: &File,
    directory: &Path,
) -> Result<SaveOutcome, SaveError> {
    let (old, old_path) = old;
    let path = directory.join(MEMORY_BASE);
    let file = create(&path)?;
    sparse_copy(old, &file).map_err(|source| failed("copy", old_path, source))?;
    let write = |source| failed("write", &path, source);
    let extents =
        extents(written).map_err(|source| failed("read what was saved over", old_path, source))?;
    let mut writer = BaseWriter::new(&file, true);
    let mut changed = 0;
    let [mut now, mut newer, mut before] = [(); 3].map(|()| vec![0; BATCH_PAGES * PAGE_SIZE]);
    for part in parts {
        let present = process.changed_pages(part.ram)?;
        let holder = |number: u64| {
            if !part.is_filled || present.binary_search(&number).is_ok() {
                Holder::Guest
            } else if part.has_replaced(number) {
                Holder::Nobody
            } else {
                Holder::Old
            }
        };
        let numbers = candidates(present.clone(), part, &extents);
        for run in numbers.chunk_by(|a, b| b - a == 1 && holder(*a) == holder(*b)) {
            // The guest stands still: neighbours are read together.
            for batch in run.chunks(BATCH_PAGES) {
                let length = batch.len() * PAGE_SIZE;
                let at = part.offset + batch[0] * PAGE;
                written
                    .read_exact_at(&mut newer[..length], at)
                    .map_err(write)?;
                old.read_exact_at(&mut before[..length], at)
                    .map_err(|source| failed("read", old_path, source))?;
                match holder(batch[0]) {
                    Holder::Guest => {
                        process.read(part.ram, batch[0] * PAGE, &mut now[..length])?;
                    }
                    Holder::Nobody => now[..length].fill(0),
                    Holder::Old => now[..length].copy_from_slice(&before[..length]),
                }
                let pages = [&now, &newer, &before].map(|it| it[..length].chunks_exact(PAGE_SIZE));
                let [now, newer, before] = pages;
                for (number, ((now, newer), before)) in
                    (at / PAGE..).zip(now.zip(newer).zip(before))
                {
                    // What the VMM has not written reads as zero. What is zero in the guest is so there.
                    let page = if newer == ZERO_PAGE { now } else { newer };
                    if page != before {
                        changed += 1;
                        writer.push(number, page).map_err(write)?;
                    }
                }
            }
        }
    }
    Ok(SaveOutcome {
        pages: SavedPages::Full,
        changed,
        zero: writer.finish().map_err(write)?,
        allocated: allocated(&file).map_err(write)?,
    })
}

/// Who knows what is in a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// The guest has it.
    Guest,
    /// It was removed: it is zero.
    Nobody,
    /// It is not there yet: as in the old file.
    Old,
}

/// What a file has data for, in whole pages.
fn extents(file: &File) -> std::io::Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    for_each_extent(file, |extent| {
        let (start, end) = (extent.start / PAGE, extent.end.div_ceil(PAGE));
        extents.push(start * PAGE..end * PAGE);
        Ok(())
    })?;
    Ok(extents)
}

/// Numbers of the pages of a part that may differ from the old file, ascending.
fn candidates(present: Vec<u64>, part: &MappedPart, extents: &[Range<u64>]) -> Vec<u64> {
    let mut numbers = present;
    numbers.extend(part.replaced.iter().cloned().flatten());
    let end = part.offset + part.ram.bytes;
    for extent in extents {
        let (from, to) = (extent.start.max(part.offset), extent.end.min(end));
        if from < to {
            numbers.extend((from - part.offset) / PAGE..(to - part.offset) / PAGE);
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::identity_of;
    use crate::vmm::memory::GuestRam;

    #[test]
    fn inv_08_inv_29_a_flat_save_is_the_old_memory_with_what_has_changed() {
        let old = tempfile::NamedTempFile::new().unwrap();
        old.as_file().write_all_at(&[7; 6 * PAGE_SIZE], 0).unwrap();
        old.as_file().set_len(8 * PAGE).unwrap();
        let mut memory = vec![0_u8; 9 * PAGE_SIZE];
        let start = memory.as_ptr().align_offset(PAGE_SIZE);
        let guest = &mut memory[start..start + 8 * PAGE_SIZE];
        // As it was; another; zeroed; as it was; written by the VMM, and changed since; said to be written by it, and not;
        // new; never touched.
        for (page, byte) in [(0, 7), (1, 8), (2, 0), (3, 7), (4, 1), (5, 9), (6, 3)] {
            guest[page * PAGE_SIZE..(page + 1) * PAGE_SIZE].fill(byte);
        }
        let written = tempfile::tempfile().unwrap();
        written.set_len(8 * PAGE).unwrap();
        written.write_all_at(&[2; PAGE_SIZE], 4 * PAGE).unwrap();
        written.write_all_at(&[0; PAGE_SIZE], 5 * PAGE).unwrap();

        let process = ProcessMemory::open(&identity_of(std::process::id()).unwrap()).unwrap();
        let address = guest.as_ptr() as u64;
        // Two parts, the second of which has lost its mapping of the file.
        let part = |from: u64, pages: u64, replaced: &[Range<u64>]| MappedPart {
            ram: GuestRam {
                address: address + from * PAGE,
                bytes: pages * PAGE,
            },
            offset: from * PAGE,
            replaced: replaced.to_vec(),
            is_filled: false,
        };
        let parts = [part(0, 6, &[]), part(6, 2, &[0..1, 1..2])];
        let directory = tempfile::tempdir().unwrap();
        let old_file = (old.as_file(), old.path());
        let outcome = save_flat(&process, &parts, old_file, &written, directory.path()).unwrap();
        assert_eq!(outcome.pages, SavedPages::Full);
        assert_eq!((outcome.changed, outcome.zero), (5, 1));
        let saved = std::fs::read(directory.path().join(MEMORY_BASE)).unwrap();
        let bytes: Vec<u8> = saved.chunks(PAGE_SIZE).map(|page| page[17]).collect();
        assert_eq!(bytes, [7, 8, 0, 7, 2, 9, 3, 0]);
        // Never the file itself.
        let mut before = [0];
        old.as_file().read_exact_at(&mut before, PAGE).unwrap();
        assert_eq!(before, [7]);
        assert!(save_flat(&process, &parts, old_file, &written, directory.path()).is_err());
    }
}
