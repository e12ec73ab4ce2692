//! Content digests, and reading files that are mostly holes.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use icebox_engine::id::Digest;
use rustix::{fs::SeekFrom as Whence, io::Errno};
use sha2::{Digest as _, Sha256};

use super::{ImageError, Io, Progress, Stage};

/// The digest of `bytes`.
pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// The digest of the file at `path`, holes read as the zeros they stand for. Blocks; a hole costs the hashing of zeros
/// but no reading.
///
/// # Errors
/// Opening or reading failed.
pub fn digest_of_file(path: &Path, progress: &dyn Progress) -> Result<Digest, ImageError> {
    let mut file = File::open(path).at("open", path)?;
    let total = file.metadata().at("look at", path)?.len();
    let mut hash = Sha256::new();
    let mut seen = 0;
    for_each_chunk(&mut file, |chunk| {
        seen += chunk.len();
        match chunk {
            Chunk::Data(bytes) => hash.update(bytes),
            Chunk::Hole(length) => update_zeros(&mut hash, length),
        }
        progress.report(Stage::Digest, seen, Some(total));
        Ok(())
    })
    .at("read", path)?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// A version 8 UUID (RFC 9562, "custom") out of the first 122 bits of a digest: for identifiers that are to be the same
/// for the same input.
pub(super) fn uuid_of(digest: &Digest) -> String {
    let hex = digest.as_str();
    let variant = match u8::from_str_radix(&hex[16..17], 16).unwrap_or_default() & 3 {
        0 => '8',
        1 => '9',
        2 => 'a',
        _ => 'b',
    };
    format!(
        "{}-{}-8{}-{variant}{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..32]
    )
}

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Hashes `length` zeros.
fn update_zeros(hash: &mut Sha256, mut length: u64) {
    while length > 0 {
        let part = usize::try_from(length)
            .unwrap_or(usize::MAX)
            .min(ZEROS.len());
        hash.update(&ZEROS[..part]);
        length -= part as u64;
    }
}

/// A stretch of a file.
#[derive(Clone, Copy)]
pub(super) enum Chunk<'a> {
    Data(&'a [u8]),
    /// This many bytes that the filesystem stores nothing for; they read as zeros.
    Hole(u64),
}

impl Chunk<'_> {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Hole(length) => *length,
        }
    }
}

/// Walks `file` from its start to its end, holes as holes where the filesystem can tell (`SEEK_DATA`), as data where
/// it cannot. Holes come in pieces of at most 64 MiB, data in pieces of at most 1 MiB.
pub(super) fn for_each_chunk(
    file: &mut File,
    mut each: impl FnMut(Chunk<'_>) -> io::Result<()>,
) -> io::Result<()> {
    const HOLE: u64 = 64 << 20;
    let end = file.seek(SeekFrom::End(0))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < end {
        let data = match rustix::fs::seek(&*file, Whence::Data(at)) {
            Ok(data) => data.min(end),
            // From here to the end there is only a hole.
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        while at < data {
            let part = (data - at).min(HOLE);
            each(Chunk::Hole(part))?;
            at += part;
        }
        if at == end {
            break;
        }
        let data_end = match rustix::fs::seek(&*file, Whence::Hole(at)) {
            Ok(hole) => hole.min(end),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(error) => return Err(error.into()),
        };
        file.seek(SeekFrom::Start(at))?;
        while at < data_end {
            let part = usize::try_from(data_end - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let bytes = &mut buffer[..part];
            file.read_exact(bytes)?;
            each(Chunk::Data(bytes))?;
            at += part as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::guest_image::Silent;

    #[test]
    fn holes_hash_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        for (size, writes) in [
            (0, vec![]),
            (1, vec![(0, 1)]),
            (3 << 20, vec![]),
            (
                5 << 20,
                vec![(0, 10), (1 << 20, 70_000), ((5 << 20) - 3, 3)],
            ),
            (200 << 20, vec![(150 << 20, 4096)]),
        ] {
            let path = dir.path().join("file");
            let file = File::create(&path).unwrap();
            file.set_len(size).unwrap();
            let mut plain = vec![0; usize::try_from(size).unwrap()];
            for (at, length) in writes {
                let bytes: Vec<u8> = (0..length)
                    .map(|i| u8::try_from(i % 251).unwrap() + 1)
                    .collect();
                file.write_all_at(&bytes, at).unwrap();
                plain[usize::try_from(at).unwrap()..][..length].copy_from_slice(&bytes);
            }
            assert_eq!(
                digest_of_file(&path, &Silent).unwrap(),
                digest_of(&plain),
                "size {size}"
            );
        }
    }

    #[test]
    fn a_uuid_is_well_formed_and_follows_the_digest() {
        let uuid = uuid_of(&digest_of(b"icebox"));
        let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert!(
            uuid[14..].starts_with('8') && "89ab".contains(&uuid[19..20]),
            "{uuid}"
        );
        assert_ne!(uuid, uuid_of(&digest_of(b"other")));
    }
}
