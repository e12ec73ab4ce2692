//! The pages that guests on a memory want first, in a file beside it: a hint, which may be missing or wrong.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use icebox_engine::unit::PAGE_SIZE;
use sha2::{Digest as _, Sha256};

/// The most pages: 256 MiB.
pub(super) const PAGES_MAX: usize = 1 << 16;
/// What such a file begins with. Another arrangement gets another.
const MAGIC: &[u8; 8] = b"ibxwset1";
/// The magic, the memory's length and a digest of both and of all pages.
const HEADER: usize = 8 + 8 + 32;
const ENTRY: usize = size_of::<u32>();
/// The longest file.
pub(super) const FILE_BYTES_MAX: u64 = (HEADER + PAGES_MAX * ENTRY) as u64;

fn digest(bytes: u64, pages: &[u8]) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(MAGIC);
    digest.update(bytes.to_le_bytes());
    digest.update(pages);
    digest.finalize().into()
}

/// Writes the pages, in their order, of a memory of so many bytes. In one piece: of two who write, one is last.
pub(super) fn write(file: &File, pages: &[u32], bytes: u64) -> io::Result<()> {
    let pages: Vec<u8> = pages
        .iter()
        .take(PAGES_MAX)
        .flat_map(|page| page.to_le_bytes())
        .collect();
    let mut content = Vec::with_capacity(HEADER + pages.len());
    content.extend(MAGIC);
    content.extend(bytes.to_le_bytes());
    content.extend(digest(bytes, &pages));
    content.extend(pages);
    file.write_all_at(&content, 0)?;
    file.set_len(content.len() as u64)
}

/// The pages in the content of such a file, if it is whole, and of a memory of so many bytes.
pub(super) fn parse(content: &[u8], bytes: u64) -> Option<Vec<u32>> {
    let (magic, rest) = content.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (sum, pages) = rest.split_first_chunk::<32>()?;
    let is_whole = magic == MAGIC
        && u64::from_le_bytes(*length) == bytes
        && pages.len() % ENTRY == 0
        && pages.len() <= PAGES_MAX * ENTRY
        && *sum == digest(bytes, pages);
    if !is_whole {
        return None;
    }
    let entries = pages.as_chunks::<ENTRY>().0;
    let pages: Vec<u32> = entries.iter().map(|it| u32::from_le_bytes(*it)).collect();
    let mut seen = HashSet::new();
    let is_possible =
        |page: &u32| u64::from(*page) < bytes / PAGE_SIZE as u64 && seen.insert(*page);
    (!pages.is_empty() && pages.iter().all(is_possible)).then_some(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 16 * PAGE_SIZE as u64;

    fn written(pages: &[u32]) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        // What was there is longer.
        file.as_file().set_len(1000).unwrap();
        write(file.as_file(), pages, BYTES).unwrap();
        std::fs::read(file.path()).unwrap()
    }

    #[test]
    fn a_working_set_is_read_as_it_was_written() {
        let pages = [3, 0, 15, 7];
        assert_eq!(parse(&written(&pages), BYTES).unwrap(), pages);
    }

    #[test]
    fn a_working_set_that_is_damaged_or_impossible_is_none() {
        let whole = written(&[3, 0]);
        assert_eq!(parse(&[], BYTES), None);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length], BYTES), None, "{length}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert_eq!(parse(&damaged, BYTES), None, "{at}");
        }
        // Of another memory; past the end; twice; nothing; too much.
        assert_eq!(parse(&whole, 2 * BYTES), None);
        for pages in [&[16][..], &[3, 3], &[]] {
            assert_eq!(parse(&written(pages), BYTES), None, "{pages:?}");
        }
        let mut long = whole;
        long.resize(HEADER + (PAGES_MAX + 1) * ENTRY, 0);
        let sum = digest(BYTES, &long[HEADER..]);
        long[16..HEADER].copy_from_slice(&sum);
        assert_eq!(parse(&long, BYTES), None);
    }
}
