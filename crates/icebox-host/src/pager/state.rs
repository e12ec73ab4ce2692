//! What only a pager knows, in a file for whoever saves its guest: where the memory is, and which pages of it were removed.
//!
//! ```text
//!   0     a number that is odd while events are dealt with
//!   8     how many pieces the memory is in, then the address and the length of each
//!   4096  a bit for each page that was ever removed: if it is not there, it is zero
//! ```
//!
//! A removal lasts until its event was read, and an event is read while the number is odd. So whoever knows that there was a
//! removal, and then sees an even number, sees its bits.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use icebox_engine::unit::PAGE_SIZE;

use super::handshake::{REGIONS_MAX, Region};
use crate::fs::clamp_usize;

const PAGE: u64 = PAGE_SIZE as u64;
/// Where the bits are.
const BITS: u64 = PAGE;
/// The number, and the number of pieces.
const WORD: usize = 8;
/// Events are dealt with in microseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// The length of the file for a memory of so many bytes.
pub(super) fn length(bytes: u64) -> u64 {
    BITS + (bytes / PAGE).div_ceil(8)
}

/// Makes the file, empty, in the place of an earlier one.
pub(super) fn create(path: &Path) -> io::Result<()> {
    remove(path)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).map(drop)
}

/// Removes it, if it is there: the memory is mapped from its file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The pager's side.
#[derive(Debug)]
pub(super) struct State {
    file: File,
    number: u64,
    removed: Vec<u8>,
}

impl State {
    /// Begins with nothing removed.
    pub(super) fn begin(file: File, regions: &[Region], bytes: u64) -> io::Result<Self> {
        file.set_len(length(bytes))?;
        let mut header = (regions.len() as u64).to_le_bytes().to_vec();
        for region in regions {
            header.extend(region.address.to_le_bytes());
            header.extend(region.bytes.to_le_bytes());
        }
        file.write_all_at(&header, WORD as u64)?;
        Ok(Self {
            file,
            number: 0,
            removed: vec![0; clamp_usize((bytes / PAGE).div_ceil(8))],
        })
    }

    /// Before events are read, and after they were dealt with.
    pub(super) fn step(&mut self) -> io::Result<()> {
        self.number += 1;
        self.file.write_all_at(&self.number.to_le_bytes(), 0)
    }

    /// These pages were removed.
    pub(super) fn remove(&mut self, pages: Range<u64>) -> io::Result<()> {
        let (first, last) = (pages.start / 8, pages.end.div_ceil(8));
        for page in pages {
            if let Some(byte) = self.removed.get_mut(clamp_usize(page / 8)) {
                *byte |= 1 << (page % 8);
            }
        }
        let bytes = self.removed.get(clamp_usize(first)..clamp_usize(last));
        self.file
            .write_all_at(bytes.unwrap_or_default(), BITS + first)
    }

    /// Whether a page was ever removed.
    pub(super) fn is_removed(&self, page: u64) -> bool {
        is_set(&self.removed, page)
    }
}

fn is_set(bits: &[u8], page: u64) -> bool {
    bits.get(clamp_usize(page / 8))
        .is_some_and(|byte| byte >> (page % 8) & 1 == 1)
}

/// A piece of a memory that a pager fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FilledPart {
    /// Where the VMM has it.
    pub(crate) address: u64,
    /// Its length.
    pub(crate) bytes: u64,
    /// Where it begins in the memory.
    pub(crate) offset: u64,
    /// Pages of it, numbered from its beginning, that were removed.
    pub(crate) removed: Vec<Range<u64>>,
}

/// What a pager has said of a memory of so many bytes, whose guest stands still; `None` if it has no pager.
#[expect(
    clippy::disallowed_methods,
    reason = "the pager is another process, and does not say when it is done"
)]
pub(crate) fn read(path: &Path, bytes: u64) -> io::Result<Option<Vec<FilledPart>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if file.metadata()?.len() != length(bytes) {
        return Err(broken("the pager's state is of another memory"));
    }
    let until = Instant::now() + DEADLINE;
    let number = || {
        let mut number = [0; WORD];
        file.read_exact_at(&mut number, 0)
            .map(|()| u64::from_le_bytes(number))
    };
    let mut removed = vec![0; clamp_usize(length(bytes) - BITS)];
    loop {
        let before = number()?;
        file.read_exact_at(&mut removed, BITS)?;
        if before % 2 == 0 && number()? == before {
            break;
        }
        if Instant::now() > until {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the pager does not come to rest",
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut header = [0; WORD + REGIONS_MAX * 2 * WORD];
    file.read_exact_at(&mut header, WORD as u64)?;
    let (words, _) = header.as_chunks::<WORD>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    let count = words.next().unwrap_or_default();
    let mut parts = Vec::new();
    let mut offset = 0;
    while (parts.len() as u64) < count.min(REGIONS_MAX as u64) {
        let (Some(address), Some(length)) = (words.next(), words.next()) else {
            break;
        };
        let is_possible = length > 0 && length % PAGE == 0 && length <= bytes - offset;
        if !is_possible || address % PAGE != 0 || address.checked_add(length).is_none() {
            return Err(broken("the pager's state says what cannot be"));
        }
        parts.push(FilledPart {
            address,
            bytes: length,
            offset,
            removed: ranges(&removed, offset / PAGE..(offset + length) / PAGE),
        });
        offset += length;
    }
    if offset == bytes {
        Ok(Some(parts))
    } else {
        Err(broken("the pager's state does not say where all memory is"))
    }
}

/// The pages of a range whose bits are set, from its beginning.
fn ranges(bits: &[u8], pages: Range<u64>) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for page in pages.clone().filter(|page| is_set(bits, *page)) {
        let number = page - pages.start;
        match found.last_mut() {
            Some(last) if last.end == number => last.end += 1,
            _ => found.push(number..number + 1),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_08_what_was_removed_is_seen_by_who_saves() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let bytes = 24 * PAGE;
        assert_eq!(read(&path, bytes).unwrap(), None);
        create(&path).unwrap();
        assert!(read(&path, bytes).is_err(), "no VMM has come yet");
        let region = |address, pages: u64, offset: u64| Region {
            address,
            bytes: pages * PAGE,
            offset: offset * PAGE,
        };
        let regions = [region(0x10_0000, 20, 0), region(0x8_0000, 4, 20)];
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let mut state = State::begin(file.unwrap(), &regions, bytes).unwrap();
        state.step().unwrap();
        state.remove(7..10).unwrap();
        state.remove(19..22).unwrap();
        let ahead = std::thread::spawn({
            let path = path.clone();
            move || read(&path, bytes).unwrap().unwrap()
        });
        std::thread::yield_now();
        assert!(!ahead.is_finished(), "events are being dealt with");
        state.remove(23..24).unwrap();
        state.step().unwrap();
        let parts = ahead.join().unwrap();
        assert_eq!(parts[0].removed, [7..10, 19..20]);
        assert_eq!(parts[1].removed, [0..2, 3..4]);
        assert_eq!((parts[1].address, parts[1].offset), (0x8_0000, 20 * PAGE));
        assert!(state.is_removed(8) && !state.is_removed(10));
        assert!(read(&path, bytes + PAGE * 8).is_err(), "of another memory");
    }
}
