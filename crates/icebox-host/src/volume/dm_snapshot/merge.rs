//! Several exception stores as one: what a run of layers holds together, written as one store and compared with it.
//!
//! A chunk is taken from the newest store that has it, as when a chain is [flattened](crate::volume::flatten). The merged store is
//! one that the kernel could have written: chunk after chunk, each area of exceptions before its chunks.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::{ErrorKind, HostError};

use super::exceptions::{
    AREA, CHUNK, StoreError, exception, for_each_run, header, length_for, place, table_of,
};
use crate::fs::{clamp_usize, failed, write_into_hole};
use crate::volume::flatten::{Ahead, PIECE, Written};

/// Why a merged store cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MergeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("it does not show what it was merged of: chunk {chunk} of the disk")]
    Differs { chunk: u64 },
    #[error("it holds {found} chunks instead of {expected}")]
    Count { found: u64, expected: u64 },
}

impl MergeError {
    /// The error as the engine knows it.
    pub(super) fn at(self, path: &Path) -> HostError {
        match self {
            Self::Io(error) | Self::Store(StoreError::Io(error)) => {
                failed("merge layers into", path, error)
            }
            other => HostError::new(
                ErrorKind::Invalid,
                format!("merge layers into {}", path.display()),
            )
            .caused_by(other),
        }
    }
}

/// Walks what `stores` (newest first) hold of a disk of `size` bytes together: each chunk once, from the newest store that
/// has it. `each` gets the chunks and what is in them.
fn for_each_visible(
    stores: &[File],
    size: u64,
    mut each: impl FnMut(Range<u64>, &[u8]) -> Result<(), MergeError>,
) -> Result<(), MergeError> {
    let mut seen = Written::default();
    for store in stores {
        let mut ahead = Ahead::new(store, PIECE);
        // What `each` finds wrong ends the walk.
        let mut wrong = None;
        for_each_run(store, size, |run| {
            let mut from = run.old;
            while let Some(part) = seen.first_gap(from..run.old + run.length)
                && wrong.is_none()
            {
                seen.add(part.clone());
                from = part.end;
                let new = run.new + (part.start - run.old);
                let data = ahead.read(new * CHUNK, (part.end - part.start) * CHUNK)?;
                wrong = each(part, data).err();
            }
            Ok(())
        })?;
        if let Some(error) = wrong {
            return Err(error);
        }
    }
    Ok(())
}

/// Writes what `stores` (newest first) hold into `out`, which is empty, as a store for a disk of `size` bytes. Not durable
/// until synced. If they hold nothing, it is one that no kernel has seen.
pub(super) fn write(stores: &[File], size: u64, out: &File) -> Result<(), MergeError> {
    out.set_len(length_for(size))?;
    let mut area = Vec::with_capacity(clamp_usize(CHUNK));
    let mut index = 0;
    for_each_visible(stores, size, |chunks, data| {
        let mut rest = data;
        for chunk in chunks.clone() {
            area.extend(exception(chunk, place(index)));
            index += 1;
            // Neighbours in the store up to the end of the area.
            let left = chunks.end - chunk - 1;
            if left == 0 || index % AREA == 0 {
                let (now, later) = rest.split_at(rest.len() - clamp_usize(left * CHUNK));
                let first = index - now.len() as u64 / CHUNK;
                write_into_hole(out, now, place(first) * CHUNK)?;
                rest = later;
            }
            if index % AREA == 0 {
                out.write_all_at(&area, table_of(index - 1))?;
                area.clear();
            }
        }
        Ok(())
    })?;
    if index == 0 {
        return Ok(());
    }
    if !area.is_empty() {
        out.write_all_at(&area, table_of(index - 1))?;
    }
    out.write_all_at(&header(), 0)?;
    Ok(())
}

/// Compares a store with those that it was made of: the same chunks, with the same content.
pub(super) fn compare(stores: &[File], size: u64, merged: &File) -> Result<(), MergeError> {
    let mut other = vec![0; clamp_usize(CHUNK)];
    let mut expected = 0;
    for_each_visible(stores, size, |chunks, data| {
        for (chunk, one) in chunks.zip(data.chunks(other.len())) {
            let mut leads = exception(0, 0);
            let at = table_of(expected) + expected % AREA * leads.len() as u64;
            merged.read_exact_at(&mut leads, at)?;
            merged.read_exact_at(&mut other, place(expected) * CHUNK)?;
            if leads != exception(chunk, place(expected)) || one != other {
                return Err(MergeError::Differs { chunk });
            }
            expected += 1;
        }
        Ok(())
    })?;
    let mut found = 0;
    for_each_run(merged, size, |run| {
        found += run.length;
        Ok(())
    })?;
    if found == expected {
        Ok(())
    } else {
        Err(MergeError::Count { found, expected })
    }
}

#[cfg(test)]
mod tests {
    use super::super::exceptions::is_unused;
    use super::super::exceptions::tests::store;
    use super::*;

    const SIZE: u64 = 1000 * CHUNK + 512;

    /// What stores (newest first) show of a disk that is full of `0xee`.
    fn shown(stores: &[File]) -> Vec<u8> {
        let mut content = vec![0xee; clamp_usize(1001 * CHUNK)];
        for store in stores.iter().rev() {
            for_each_run(store, SIZE, |run| {
                let at = clamp_usize(run.old * CHUNK)..clamp_usize((run.old + run.length) * CHUNK);
                store.read_exact_at(&mut content[at], run.new * CHUNK)?;
                Ok(())
            })
            .unwrap();
        }
        content
    }

    /// A store with these chunks of the disk, in this order, each full of `byte` and the chunk's number.
    fn holding(chunks: impl IntoIterator<Item = u64>, byte: u8) -> File {
        let exceptions: Vec<_> = chunks
            .into_iter()
            .zip(0..)
            .map(|(old, index)| {
                (
                    old,
                    place(index),
                    byte.wrapping_add(old.to_le_bytes()[0] & 7),
                )
            })
            .collect();
        store(SIZE, &exceptions)
    }

    fn merged(stores: &[File]) -> File {
        let out = tempfile::tempfile().unwrap();
        write(stores, SIZE, &out).unwrap();
        out
    }

    #[test]
    fn a_merged_store_shows_what_its_run_showed() {
        let unused = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length_for(SIZE)).unwrap();
            file
        };
        let runs = [
            // Neighbours over several areas, overlapping; backwards; a chunk here and there; the disk's last.
            vec![holding(200..500, 0x10), holding(0..700, 0x20)],
            vec![
                holding((0..900).step_by(3), 0x30),
                holding((0..600).rev(), 0x40),
            ],
            vec![holding([7, 1000], 0), unused(), holding([1000, 7, 8], 0x50)],
            vec![
                holding(0..256, 0x60),
                holding(256..512, 0x70),
                holding(100..612, 0x80),
            ],
            vec![holding(0..10, 0x90), holding(0..10, 0xa0)],
        ];
        for run in runs {
            let out = merged(&run);
            compare(&run, SIZE, &out).unwrap();
            assert_eq!(out.metadata().unwrap().len(), length_for(SIZE));
            assert!(shown(std::slice::from_ref(&out)) == shown(&run));
            let again = [holding(300..310, 0xb0), out];
            assert!(shown(&[merged(&again)]) == shown(&again));
        }
        let nothing = [unused(), unused()];
        let out = merged(&nothing);
        compare(&nothing, SIZE, &out).unwrap();
        assert!(is_unused(&out).unwrap());
    }

    #[test]
    fn what_differs_is_found() {
        let run = [holding(0..300, 0x10), holding(200..400, 0x20)];
        let refused = |at: u64, bytes: &[u8]| {
            let out = merged(&run);
            out.write_all_at(bytes, at).unwrap();
            compare(&run, SIZE, &out).unwrap_err()
        };
        let data = refused(place(299) * CHUNK + 5, &[0xff]);
        assert!(matches!(data, MergeError::Differs { chunk: 299 }), "{data}");
        let elsewhere = refused(table_of(10) + 10 * 16, &[11]);
        assert!(
            matches!(elsewhere, MergeError::Differs { chunk: 10 }),
            "{elsewhere}"
        );
        let more = refused(
            table_of(400) + (400 % AREA) * 16,
            &exception(900, place(400)),
        );
        let counts = MergeError::Count {
            found: 401,
            expected: 400,
        };
        assert_eq!(more.to_string(), counts.to_string());
    }
}
