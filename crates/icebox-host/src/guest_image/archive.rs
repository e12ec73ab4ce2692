//! Compressed streams, told apart by their first bytes.
//!
//! The decoders are written in safe Rust, because what they read may come from anywhere.

use std::io::{self, BufRead, BufReader, Read};

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

/// Most memory a decoder may take for its window: what `xz -9` and `zstd --long` need (64 and 128 MiB).
const WINDOW_BYTES: u64 = 128 << 20;

impl Compression {
    fn of(start: &[u8]) -> Self {
        if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if start.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
            Self::Xz
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else {
            Self::None
        }
    }

    /// Reads `from` uncompressed, whatever it is.
    pub(super) fn reader<'a>(from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        let mut from = BufReader::with_capacity(1 << 16, from);
        Ok(match Self::of(from.fill_buf()?) {
            Self::None => Box::new(from),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(from)),
            Self::Xz => {
                let kib = u32::try_from(WINDOW_BYTES / 1024).unwrap_or(u32::MAX);
                Box::new(lzma_rust2::XzReader::new_mem_limit(from, true, kib))
            }
            Self::Zstd => Box::new(
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(from, WINDOW_BYTES)
                    .map_err(io::Error::other)?,
            ),
        })
    }
}
