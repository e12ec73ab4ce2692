//! A chain as one raw image.
//!
//! Newest layer first, the base last: each chunk is read and written at most once, from the newest that has it. The image
//! begins as one hole, so zeros are not written at all. Where the file system shares extents, it begins as a clone of the
//! base, of which nothing is read then.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use icebox_engine::host::HostError;

use super::exceptions::{self, CHUNK, StoreError};
use crate::fs::{self, clamp_usize, failed};

/// How much is read at a time.
const PIECE: u64 = 256 * CHUNK;

/// A file, and its name for messages.
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) file: File,
}

impl Source {
    pub(super) fn open(path: PathBuf) -> Result<Self, HostError> {
        let file = fs::open_file(&path)?;
        Ok(Self { path, file })
    }
}

/// Writes the disk of `size` bytes that `layers`, newest first, make of `base` to `out`, an empty file. Not durable until
/// it is synced.
pub(super) fn flatten(
    base: &Source,
    layers: &[Source],
    size: u64,
    out: &File,
    out_path: &Path,
) -> Result<(), HostError> {
    let failed_at_base = |error| {
        let action = format!("copy {} to", base.path.display());
        failed(&action, out_path, error)
    };
    let is_clone = fs::share(&base.file, out).map_err(failed_at_base)?;
    out.set_len(size).map_err(failed_at_base)?;
    let mut written = Written::default();
    for layer in layers {
        let write = |bytes: &[u8], at| {
            if is_clone {
                fs::write_sparse(out, bytes, at)
            } else {
                fs::write_into_hole(out, bytes, at)
            }
        };
        copy_layer(&layer.file, size, &mut written, write)
            .map_err(|error| error.at(&layer.path))?;
    }
    if is_clone {
        return Ok(());
    }
    copy_base(&base.file, out, &written).map_err(failed_at_base)
}

fn copy_layer(
    file: &File,
    size: u64,
    written: &mut Written,
    mut write: impl FnMut(&[u8], u64) -> std::io::Result<()>,
) -> Result<(), StoreError> {
    let mut ahead = Ahead::new(file);
    exceptions::for_each_run(file, size, |run| {
        let mut from = run.old;
        while let Some(part) = written.first_gap(from..run.old + run.length) {
            let new = run.new + (part.start - run.old);
            let at = part.start * CHUNK;
            // A disk may end within a chunk.
            let length = ((part.end - part.start) * CHUNK).min(size - at);
            write(ahead.read(new * CHUNK, length)?, at)?;
            written.add(part.clone());
            from = part.end;
        }
        Ok(())
    })
}

fn copy_base(base: &File, out: &File, written: &Written) -> std::io::Result<()> {
    let mut buffer = vec![0; clamp_usize(PIECE)];
    fs::for_each_extent(base, |extent| {
        let mut from = extent.start;
        while from < extent.end {
            let chunks = from / CHUNK..extent.end.div_ceil(CHUNK);
            let Some(gap) = written.first_gap(chunks) else {
                break;
            };
            let mut at = (gap.start * CHUNK).max(from);
            from = (gap.end * CHUNK).min(extent.end);
            while at < from {
                let part = (from - at).min(PIECE);
                let bytes = &mut buffer[..clamp_usize(part)];
                base.read_exact_at(bytes, at)?;
                fs::write_into_hole(out, bytes, at)?;
                at += part;
            }
        }
        Ok(())
    })
}

/// Reads a store in large pieces: chunks that lie apart on the disk lie side by side in it.
pub(super) struct Ahead<'a> {
    file: &'a File,
    at: u64,
    buffer: Vec<u8>,
}

impl<'a> Ahead<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self {
            file,
            at: 0,
            buffer: Vec::new(),
        }
    }

    /// The `length` bytes at `at`, at most a [`PIECE`].
    pub(super) fn read(&mut self, at: u64, length: u64) -> std::io::Result<&[u8]> {
        let end = self.at + self.buffer.len() as u64;
        if at < self.at || at + length > end {
            self.buffer.resize(clamp_usize(PIECE), 0);
            self.at = at;
            let mut filled = 0;
            while filled < self.buffer.len() {
                match self
                    .file
                    .read_at(&mut self.buffer[filled..], at + filled as u64)
                {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.buffer.truncate(filled);
        }
        let start = clamp_usize(at - self.at);
        self.buffer
            .get(start..start + clamp_usize(length))
            .ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }
}

/// Chunks in a leaf: 128 MiB of a disk.
const LEAF: u64 = 1 << 15;

/// Which chunks of a disk have been written. Takes a bit for each in a stretch where there is one.
#[derive(Default)]
pub(super) struct Written(Vec<Option<Box<[u64; 512]>>>);

impl Written {
    fn contains(&self, chunk: u64) -> bool {
        let leaf = self
            .0
            .get(clamp_usize(chunk / LEAF))
            .and_then(Option::as_ref);
        leaf.is_some_and(|leaf| {
            let bit = chunk % LEAF;
            leaf[clamp_usize(bit / 64)] & 1 << (bit % 64) != 0
        })
    }

    pub(super) fn add(&mut self, chunks: Range<u64>) {
        for chunk in chunks {
            let index = clamp_usize(chunk / LEAF);
            if index >= self.0.len() {
                self.0.resize_with(index + 1, || None);
            }
            let leaf = self.0[index].get_or_insert_with(|| Box::new([0; 512]));
            let bit = chunk % LEAF;
            leaf[clamp_usize(bit / 64)] |= 1 << (bit % 64);
        }
    }

    /// The first chunks of `within` that are not written.
    pub(super) fn first_gap(&self, within: Range<u64>) -> Option<Range<u64>> {
        if self.0.is_empty() {
            return (!within.is_empty()).then_some(within);
        }
        let start = within.clone().find(|chunk| !self.contains(*chunk))?;
        let end = (start..within.end)
            .find(|chunk| self.contains(*chunk))
            .unwrap_or(within.end);
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::super::exceptions::tests::store;
    use super::*;

    fn source(file: File) -> Source {
        Source {
            path: "/a/file".into(),
            file,
        }
    }

    fn flat(base: File, layers: Vec<File>, size: u64) -> File {
        let out = tempfile::tempfile().unwrap();
        let layers: Vec<_> = layers.into_iter().map(source).collect();
        flatten(&source(base), &layers, size, &out, Path::new("/out")).unwrap();
        assert_eq!(out.metadata().unwrap().len(), size);
        out
    }

    fn chunks(file: &File) -> Vec<u8> {
        let mut content = vec![0; clamp_usize(file.metadata().unwrap().len())];
        file.read_exact_at(&mut content, 0).unwrap();
        content
            .chunks(4096)
            .map(|chunk| {
                assert!(chunk.iter().all(|byte| *byte == chunk[0]));
                chunk[0]
            })
            .collect()
    }

    #[test]
    fn the_newest_layer_that_has_a_chunk_decides_and_zeros_are_holes() {
        // 700 chunks and a sector, over a base that is shorter, with data, stored zeros and a hole.
        let size = 700 * CHUNK + 512;
        let base = tempfile::tempfile().unwrap();
        base.write_all_at(&vec![7; 300 * 4096], 0).unwrap();
        base.write_all_at(&vec![0; 100 * 4096], 300 * 4096).unwrap();
        base.set_len(500 * CHUNK).unwrap();
        let place = |n: u64| 2 + n / 256 * 257 + n % 256;
        // More than an area, backwards, so that nothing is a neighbour on the disk; then the end of the disk.
        let mut old: Vec<_> = (0..299).map(|n| (298 - n, place(n), 1)).collect();
        old.push((700, place(299), 1));
        // Neighbours that end within what the older one has, zeros over data, data over zeros.
        let mut new: Vec<_> = (0..50).map(|n| (100 + n, place(n), 2)).collect();
        new.extend((50..60).map(|n| (150 + n, place(n), 0)));
        new.push((350, place(60), 2));
        let out = flat(base, vec![store(size, &new), store(size, &old)], size);
        for (chunk, byte) in chunks(&out).into_iter().enumerate() {
            let expected = match chunk {
                100..150 | 350 => 2,
                200..210 => 0,
                0..299 | 700 => 1,
                299 => 7,
                _ => 0,
            };
            assert_eq!(byte, expected, "chunk {chunk}");
        }
        let stored = out.metadata().unwrap().blocks() * 512;
        assert!(stored <= 310 * CHUNK, "{stored} bytes are stored");
    }

    #[test]
    fn no_layer_and_an_unused_one_leave_the_base_as_it_is() {
        let size = 40 * CHUNK;
        let base = || {
            let base = tempfile::tempfile().unwrap();
            base.write_all_at(&[3; 5 * 4096], 4 * CHUNK).unwrap();
            base.set_len(20 * CHUNK).unwrap();
            base
        };
        let unused = tempfile::tempfile().unwrap();
        unused.set_len(exceptions::length_for(size)).unwrap();
        let alone = chunks(&flat(base(), Vec::new(), size));
        assert_eq!(alone[3..10], [0, 3, 3, 3, 3, 3, 0]);
        assert_eq!(chunks(&flat(base(), vec![unused], size)), alone);
    }

    #[test]
    fn gaps_are_what_is_not_written_across_leaves() {
        let mut written = Written::default();
        assert_eq!(written.first_gap(5..9), Some(5..9));
        assert_eq!(written.first_gap(5..5), None);
        written.add(LEAF - 2..LEAF + 3);
        assert_eq!(
            written.first_gap(LEAF - 5..LEAF + 9),
            Some(LEAF - 5..LEAF - 2)
        );
        assert_eq!(
            written.first_gap(LEAF - 2..LEAF + 9),
            Some(LEAF + 3..LEAF + 9)
        );
        assert_eq!(written.first_gap(LEAF - 2..LEAF + 3), None);
        assert_eq!(
            written.first_gap(9 * LEAF..9 * LEAF + 1),
            Some(9 * LEAF..9 * LEAF + 1)
        );
    }
}
