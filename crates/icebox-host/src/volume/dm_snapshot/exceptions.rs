//! The persistent exception store: what device-mapper's `snapshot` target keeps in a copy-on-write file.
//!
//! The kernel reads and writes it. Here it is sized, and read when a chain is flattened: a layer's file can be read
//! without its devices, by a process that never had them.
//!
//! ```text
//! chunk 0   header: magic, valid, version, chunk size
//! chunk 1   area 0: 256 exceptions (old chunk, new chunk), a new chunk of 0 ends the list
//! chunk 2…  256 chunks of data
//! chunk 258 area 1: …
//! ```
//!
//! Source: drivers/md/dm-snap-persistent.c in Linux. All numbers are little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::{ErrorKind, HostError};

use crate::fs::{clamp_usize, failed};

/// `SnAp`.
const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;
const SECTOR: u64 = 512;
/// Sectors in a chunk, the unit of copy-on-write: what a guest's file system writes is a multiple of 4 KiB.
pub(super) const CHUNK_SECTORS: u64 = 8;
/// Bytes in a chunk.
pub(super) const CHUNK: u64 = CHUNK_SECTORS * SECTOR;
const EXCEPTION: usize = 16;
/// Exceptions in an area.
pub(super) const AREA: u64 = CHUNK / EXCEPTION as u64;
/// The most chunks of a run.
const RUN: u64 = 256;

/// What is left to a user whose disk is lost.
pub(super) const WAY_BACK: &str = "what was paused or snapshotted before is whole: `stop` the sandbox and `resume --generation N`; `dmesg` may say which write failed";

/// Why a file cannot be used as an exception store.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("it is not an exception store")]
    Foreign,
    #[error("the kernel gave it up: a write to it failed, or it was full")]
    GivenUp,
    #[error("its {field} is {found} instead of {expected}")]
    Header {
        field: &'static str,
        found: u32,
        expected: u64,
    },
    #[error(
        "exception {index} leads from chunk {old} to chunk {new}, outside of it or of the disk"
    )]
    Exception { index: u64, old: u64, new: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl StoreError {
    /// The error as the engine knows it.
    pub(super) fn at(self, path: &Path) -> HostError {
        match self {
            Self::Io(error) => failed("read the exception store", path, error),
            other => HostError::new(
                ErrorKind::Invalid,
                format!("{} is not a usable exception store", path.display()),
            )
            .caused_by(other)
            .hint(WAY_BACK),
        }
    }
}

/// The length of the file for a disk of `size` bytes, all of it written.
///
/// The length says the size: [`size_for`] is the inverse. Room for a header, for every chunk, for the areas (the kernel
/// clears the next one when it has filled one, so there is one more than is used) and for the part of a chunk that a
/// disk may end with.
pub(super) fn length_for(size: u64) -> u64 {
    size + (3 + size.div_ceil(CHUNK) / AREA) * CHUNK
}

/// The size of the disk that a file of `length` bytes is for; `None` if it is for none.
pub(super) fn size_for(length: u64) -> Option<u64> {
    // Nearly right: the chunk that a disk ends with can be the first of its area.
    let near = length / CHUNK / (AREA + 1);
    [near, near.saturating_sub(1)]
        .into_iter()
        .filter_map(|areas| length.checked_sub((3 + areas) * CHUNK))
        .find(|size| size.is_multiple_of(SECTOR) && length_for(*size) == length)
}

/// The beginning of a store that is in use.
pub(super) fn header() -> Vec<u8> {
    let numbers = [MAGIC, 1, VERSION].into_iter().flat_map(u32::to_le_bytes);
    numbers
        .chain(CHUNK_SECTORS.to_le_bytes())
        .take(16)
        .collect()
}

/// Where the kernel puts the chunk of the exception with this number, in chunks, if it allocates them one after the other.
pub(super) fn place(index: u64) -> u64 {
    2 + index / AREA * (AREA + 1) + index % AREA
}

/// Where the area is that has the exception with this number, in bytes.
pub(super) fn table_of(index: u64) -> u64 {
    (1 + index / AREA * (AREA + 1)) * CHUNK
}

/// One exception, as it stands in its area.
pub(super) fn exception(old: u64, new: u64) -> [u8; EXCEPTION] {
    let mut bytes = [0; EXCEPTION];
    bytes[..8].copy_from_slice(&old.to_le_bytes());
    bytes[8..].copy_from_slice(&new.to_le_bytes());
    bytes
}

/// Whether nothing was ever written to it: no kernel has made a device of it yet.
pub(super) fn is_unused(file: &File) -> Result<bool, StoreError> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)?;
    Ok(magic == [0; 4])
}

/// Refuses a store that the kernel would make an unusable device of, or has given up.
pub(super) fn require_usable(file: &File) -> Result<(), StoreError> {
    if is_unused(file)? {
        return Ok(());
    }
    check_header(file)
}

/// Neighbours on the disk that are neighbours in the store as well, in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Where on the disk.
    pub(super) old: u64,
    /// Where in the store.
    pub(super) new: u64,
    pub(super) length: u64,
}

impl Run {
    fn takes(&mut self, old: u64, new: u64) -> bool {
        let follows = (old, new) == (self.old + self.length, self.new + self.length);
        let fits = follows && self.length < RUN;
        self.length += u64::from(fits);
        fits
    }
}

/// Walks what the store of `file` holds, for a disk of `size` bytes, in the order in which it was first written.
pub(super) fn for_each_run(
    file: &File,
    size: u64,
    mut each: impl FnMut(Run) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    if is_unused(file)? {
        return Ok(());
    }
    check_header(file)?;
    let length = file.metadata()?.len();
    let mut table = vec![0; clamp_usize(CHUNK)];
    let mut run: Option<Run> = None;
    'areas: for area in 0.. {
        let at = table_of(area * AREA);
        if at + CHUNK > length {
            break;
        }
        file.read_exact_at(&mut table, at)?;
        let (exceptions, _) = table.as_chunks::<EXCEPTION>();
        for (exception, index) in exceptions.iter().zip(area * AREA..) {
            let (old, new) = (double(exception, 0), double(exception, 8));
            if new == 0 {
                break 'areas;
            }
            if old >= size.div_ceil(CHUNK) || new >= length / CHUNK {
                return Err(StoreError::Exception { index, old, new });
            }
            if !run.as_mut().is_some_and(|run| run.takes(old, new))
                && let Some(whole) = run.replace(Run {
                    old,
                    new,
                    length: 1,
                })
            {
                each(whole)?;
            }
        }
    }
    run.map_or(Ok(()), each)
}

fn check_header(file: &File) -> Result<(), StoreError> {
    let mut header = [0; 16];
    file.read_exact_at(&mut header, 0)?;
    if word(&header, 0) != MAGIC {
        return Err(StoreError::Foreign);
    }
    if word(&header, 4) == 0 {
        return Err(StoreError::GivenUp);
    }
    for (field, at, expected) in [
        ("version", 8, VERSION.into()),
        ("chunk size", 12, CHUNK_SECTORS),
    ] {
        let found = word(&header, at);
        if u64::from(found) != expected {
            return Err(StoreError::Header {
                field,
                found,
                expected,
            });
        }
    }
    Ok(())
}

/// The little-endian 32-bit number at `at`.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// The little-endian 64-bit number at `at`.
fn double(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A store as the kernel writes it, with chunk `new` full of `byte` for every `(old, new, byte)`.
    pub(in super::super) fn store(size: u64, exceptions: &[(u64, u64, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length_for(size)).unwrap();
        file.write_all_at(&header(), 0).unwrap();
        for (index, (old, new, byte)) in exceptions.iter().enumerate() {
            let index = index as u64;
            let at = table_of(index) + index % AREA * 16;
            file.write_all_at(&exception(*old, *new), at).unwrap();
            file.write_all_at(&[*byte; 4096], new * CHUNK).unwrap();
        }
        file
    }

    fn runs(file: &File, size: u64) -> Result<Vec<Run>, StoreError> {
        let mut runs = Vec::new();
        for_each_run(file, size, |run| {
            runs.push(run);
            Ok(())
        })?;
        Ok(runs)
    }

    #[test]
    fn the_length_of_a_file_says_the_size_of_the_disk() {
        let areas = AREA * CHUNK;
        for around in [areas, 2 * areas, 255 * areas, 256 * areas, 1 << 30, 1 << 44] {
            for sectors in 0..40 {
                let size = around - 20 * SECTOR + sectors * SECTOR;
                assert_eq!(size_for(length_for(size)), Some(size), "{size}");
            }
            assert_eq!(size_for(length_for(around) + 1), None);
        }
        for nothing in [0, 512, 4096, 3 * 4096 - 512] {
            assert_eq!(size_for(nothing), None);
        }
        // Chunks, areas and a header all have room; the kernel needs an area more than is used.
        let chunks = 10 * AREA;
        assert!(length_for(chunks * CHUNK) >= (1 + chunks + 11) * CHUNK);
    }

    #[test]
    fn neighbours_make_runs_and_areas_end_them() {
        let size = 600 * CHUNK + 512;
        let mut exceptions: Vec<_> = (0..300).map(|n: u64| (n, place(n), 1)).collect();
        exceptions.push((600, place(300), 1));
        let run = |old, new, length| Run { old, new, length };
        assert_eq!(
            runs(&store(size, &exceptions), size).unwrap(),
            [run(0, 2, 256), run(256, 259, 44), run(600, 303, 1)]
        );
    }

    #[test]
    fn an_unused_store_holds_nothing_and_a_damaged_one_is_refused() {
        let size = 16 * CHUNK;
        let unused = tempfile::tempfile().unwrap();
        unused.set_len(length_for(size)).unwrap();
        assert_eq!(runs(&unused, size).unwrap(), []);
        require_usable(&unused).unwrap();

        let refused = |at: u64, bytes: &[u8]| {
            let file = store(size, &[(1, 2, 1)]);
            require_usable(&file).unwrap();
            file.write_all_at(bytes, at).unwrap();
            let error = runs(&file, size).unwrap_err().to_string();
            if at < CHUNK {
                assert_eq!(require_usable(&file).unwrap_err().to_string(), error);
            }
            error
        };
        assert!(refused(0, b"LUKS").contains("not an exception store"));
        assert!(refused(4, &[0]).contains("gave it up"));
        assert!(refused(8, &[2]).contains("version is 2"));
        assert!(refused(12, &[16]).contains("chunk size is 16"));
        assert!(refused(CHUNK, &[16]).contains("exception 0 leads from chunk 16"));
        assert!(refused(CHUNK + 8, &[0xff; 8]).contains("outside"));
    }
}
