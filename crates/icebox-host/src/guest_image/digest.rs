//! Content digests, and identifiers made of them.

use std::{fs::File, path::Path};

use icebox_engine::id::Digest;
use sha2::{Digest as _, Sha256};

use super::{ImageError, Io, Progress, Stage};
use crate::fs;

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
    let file = File::open(path).at("open", path)?;
    fs::sha256(&file, |done, total| {
        progress.report(Stage::Digest, done, Some(total));
    })
    .at("read", path)
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
