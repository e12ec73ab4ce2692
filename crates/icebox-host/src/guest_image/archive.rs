//! Compressed streams, told apart by their first bytes.
//!
//! The decoders are written in safe Rust, because what they read may come from anywhere.

use std::io::{self, BufRead, BufReader, Cursor, Read};

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
    Lz4Legacy,
}

/// LZ4's first frame format, which compressed kernels still have: lz4_Frame_format.md, "Legacy frame".
const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// What a block of it holds uncompressed, at most.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

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
        } else if start.starts_with(&LZ4_LEGACY) {
            Self::Lz4Legacy
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
            Self::Lz4Legacy => Box::new(Lz4Legacy {
                from,
                block: Cursor::default(),
            }),
        })
    }
}

/// Blocks, each behind its compressed length, until the stream ends.
struct Lz4Legacy<R> {
    from: R,
    /// What is left of the block that was uncompressed last.
    block: Cursor<Vec<u8>>,
}

impl<R: BufRead> Lz4Legacy<R> {
    /// Uncompresses the next block. Nothing, if there is none.
    fn next_block(&mut self) -> io::Result<()> {
        let length = loop {
            if self.from.fill_buf()?.is_empty() {
                return Ok(());
            }
            let mut length = [0; 4];
            self.from.read_exact(&mut length)?;
            // Where two streams were put together.
            if length != LZ4_LEGACY {
                break u32::from_le_bytes(length) as usize;
            }
        };
        if length > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK_BYTES) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut compressed = vec![0; length];
        self.from.read_exact(&mut compressed)?;
        let block =
            lz4_flex::block::decompress(&compressed, LZ4_BLOCK_BYTES).map_err(io::Error::other)?;
        self.block = Cursor::new(block);
        Ok(())
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.block.fill_buf()?.is_empty() {
            self.next_block()?;
        }
        self.block.read(into)
    }
}
