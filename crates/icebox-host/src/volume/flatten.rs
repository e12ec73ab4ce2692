//! A chain of layers that hold what was changed, as one raw image.
//!
//! Newest layer first, the base last: each block is read and written at most once, from the newest that has it. The image
//! begins as one hole, so zeros are not written at all. Where the file system shares extents, it begins as a clone of the
//! base, of which nothing is read then.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::HostError;
use icebox_engine::layout::Layout;

use crate::fs::{self, clamp_usize, failed};
use crate::pace::Pace;

/// What layers are made of: the chunks of device-mapper's snapshots here, the subclusters of our overlays.
pub(super) const BLOCK: u64 = 4096;
/// How much is read at a time, at most.
pub(super) const PIECE: u64 = 256 * BLOCK;

/// What a layer says of blocks that follow each other, at most a [`PIECE`].
pub(super) struct Change {
    pub(super) blocks: Range<u64>,
    pub(super) content: Content,
}

/// Where the content of blocks is.
pub(super) enum Content {
    /// Nowhere: it is zero.
    Zero,
    /// In the layer's file, from this offset on.
    At(u64),
}

/// What was changed, in a file.
pub(super) trait Layer {
    /// Where the data is.
    fn file(&self) -> &File;

    /// How many bytes to read at once: more than is asked for where what is asked for next comes next in the file.
    fn read_ahead(&self) -> u64;

    /// Hands over every change of a disk of `size` bytes.
    ///
    /// # Errors
    /// The layer is damaged, or what `each` returned.
    fn for_each_change(
        &self,
        size: u64,
        each: &mut dyn FnMut(Change) -> io::Result<()>,
    ) -> Result<(), HostError>;
}

/// Makes `out`, which does not exist yet, of what [`flatten`] makes of `layers` and `base`, at a pace that leaves the guests
/// of `layout` their share of the disk. Durable on return; if it fails, the file does not exist.
pub(super) fn to_file<L: Layer>(
    layout: &Layout,
    base: (&File, &Path),
    layers: &[L],
    size: u64,
    out: &Path,
) -> Result<(), HostError> {
    let mut pace = Pace::beside_guests(layout);
    fs::create_whole(out, |file| {
        flatten(base, layers, size, (file, out), &mut pace)
    })
}

/// Writes the disk of `size` bytes that `layers`, newest first, make of `base` to `out`, an empty file. Not durable until
/// it is synced.
pub(super) fn flatten<L: Layer>(
    (base, base_path): (&File, &Path),
    layers: &[L],
    size: u64,
    (out, out_path): (&File, &Path),
    pace: &mut Pace,
) -> Result<(), HostError> {
    let failed_at_base = |error| {
        let action = format!("copy {} to", base_path.display());
        failed(&action, out_path, error)
    };
    let is_clone = fs::share(base, out).map_err(failed_at_base)?;
    out.set_len(size).map_err(failed_at_base)?;
    let mut out = Out {
        file: out,
        is_clone,
        pace,
    };
    let mut written = Written::default();
    for layer in layers {
        copy_layer(layer, size, &mut written, &mut out)?;
    }
    if is_clone {
        return Ok(());
    }
    copy_base(base, &mut out, &written).map_err(failed_at_base)
}

/// The image that is being written.
struct Out<'a> {
    file: &'a File,
    /// It began with the base's content, so zeros have to be made. In what is still a hole, they are there.
    is_clone: bool,
    pace: &'a mut Pace,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        if self.is_clone {
            fs::write_sparse(self.file, bytes, at)?;
        } else {
            fs::write_into_hole(self.file, bytes, at)?;
        }
        self.pace.wrote(self.file, bytes.len() as u64)
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        if self.is_clone {
            fs::punch(self.file, at, length)?;
        }
        Ok(())
    }
}

/// Copies what no newer layer had.
fn copy_layer(
    layer: &impl Layer,
    size: u64,
    written: &mut Written,
    out: &mut Out,
) -> Result<(), HostError> {
    let mut ahead = Ahead::new(layer.file(), layer.read_ahead());
    layer.for_each_change(size, &mut |change| {
        let mut from = change.blocks.start;
        while let Some(part) = written.first_gap(from..change.blocks.end) {
            let at = part.start * BLOCK;
            // A disk may end within a block.
            let length = (part.end * BLOCK).min(size) - at;
            match change.content {
                Content::At(offset) => {
                    let offset = offset + (part.start - change.blocks.start) * BLOCK;
                    out.write(ahead.read(offset, length)?, at)?;
                }
                Content::Zero => out.zero(at, length)?,
            }
            written.add(part.clone());
            from = part.end;
        }
        Ok(())
    })
}

fn copy_base(base: &File, out: &mut Out, written: &Written) -> io::Result<()> {
    let mut buffer = vec![0; clamp_usize(PIECE)];
    fs::for_each_extent(base, |extent| {
        let mut from = extent.start;
        while from < extent.end {
            let blocks = from / BLOCK..extent.end.div_ceil(BLOCK);
            let Some(gap) = written.first_gap(blocks) else {
                break;
            };
            let mut at = (gap.start * BLOCK).max(from);
            from = (gap.end * BLOCK).min(extent.end);
            while at < from {
                let part = (from - at).min(PIECE);
                let bytes = &mut buffer[..clamp_usize(part)];
                base.read_exact_at(bytes, at)?;
                out.write(bytes, at)?;
                at += part;
            }
        }
        Ok(())
    })
}

/// Reads a file in large pieces. What lies beyond its end is zero.
pub(super) struct Ahead<'a> {
    file: &'a File,
    least: u64,
    at: u64,
    buffer: Vec<u8>,
}

impl<'a> Ahead<'a> {
    /// Reads at least `least` bytes at once.
    pub(super) fn new(file: &'a File, least: u64) -> Self {
        Self {
            file,
            least,
            at: 0,
            buffer: Vec::new(),
        }
    }

    /// The `length` bytes at `at`, at most a [`PIECE`].
    pub(super) fn read(&mut self, at: u64, length: u64) -> io::Result<&[u8]> {
        let end = self.at + self.buffer.len() as u64;
        if at < self.at || at + length > end {
            self.at = at;
            self.buffer.clear();
            self.buffer.resize(clamp_usize(self.least.max(length)), 0);
            let mut filled = 0;
            while filled < self.buffer.len() {
                match self
                    .file
                    .read_at(&mut self.buffer[filled..], at + filled as u64)
                {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        let start = clamp_usize(at - self.at);
        Ok(&self.buffer[start..start + clamp_usize(length)])
    }
}

/// Blocks in a leaf: 128 MiB of a disk.
const LEAF: u64 = 1 << 15;

/// Which blocks of a disk have been written. Takes a bit for each in a stretch where there is one.
#[derive(Default)]
pub(super) struct Written(Vec<Option<Box<[u64; 512]>>>);

impl Written {
    fn contains(&self, block: u64) -> bool {
        let leaf = self
            .0
            .get(clamp_usize(block / LEAF))
            .and_then(Option::as_ref);
        leaf.is_some_and(|leaf| {
            let bit = block % LEAF;
            leaf[clamp_usize(bit / 64)] & 1 << (bit % 64) != 0
        })
    }

    pub(super) fn add(&mut self, blocks: Range<u64>) {
        for block in blocks {
            let index = clamp_usize(block / LEAF);
            if index >= self.0.len() {
                self.0.resize_with(index + 1, || None);
            }
            let leaf = self.0[index].get_or_insert_with(|| Box::new([0; 512]));
            let bit = block % LEAF;
            leaf[clamp_usize(bit / 64)] |= 1 << (bit % 64);
        }
    }

    /// The first blocks of `within` that are not written.
    pub(super) fn first_gap(&self, within: Range<u64>) -> Option<Range<u64>> {
        if self.0.is_empty() {
            return (!within.is_empty()).then_some(within);
        }
        let start = within.clone().find(|block| !self.contains(*block))?;
        let end = (start..within.end)
            .find(|block| self.contains(*block))
            .unwrap_or(within.end);
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    /// Its changes, and the file that they are in.
    struct Changes(File, Vec<(Range<u64>, Option<u64>)>);

    impl Layer for Changes {
        fn file(&self) -> &File {
            &self.0
        }

        fn read_ahead(&self) -> u64 {
            0
        }

        fn for_each_change(
            &self,
            _: u64,
            each: &mut dyn FnMut(Change) -> io::Result<()>,
        ) -> Result<(), HostError> {
            for (blocks, at) in &self.1 {
                let content = at.map_or(Content::Zero, |block| Content::At(block * BLOCK));
                let blocks = blocks.clone();
                each(Change { blocks, content })
                    .map_err(|error| failed("copy to", Path::new("/out"), error))?;
            }
            Ok(())
        }
    }

    /// A file with these bytes, a block each.
    fn file(blocks: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        for (byte, block) in blocks.iter().zip(0..) {
            let bytes = vec![*byte; clamp_usize(BLOCK)];
            file.write_all_at(&bytes, block * BLOCK).unwrap();
        }
        file
    }

    fn flat(base: &File, layers: &[Changes], size: u64) -> (Vec<u8>, u64) {
        let out = tempfile::tempfile().unwrap();
        let path = Path::new("/a/file");
        let mut pace = Pace::alone();
        flatten((base, path), layers, size, (&out, path), &mut pace).unwrap();
        let mut content = vec![1; clamp_usize(size)];
        out.read_exact_at(&mut content, 0).unwrap();
        let firsts = content.chunks(clamp_usize(BLOCK)).map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]));
            block[0]
        });
        let metadata = out.metadata().unwrap();
        assert_eq!(metadata.len(), size);
        (firsts.collect(), metadata.blocks() * 512 / BLOCK)
    }

    #[test]
    fn the_newest_layer_that_has_a_block_decides_and_zeros_are_holes() {
        let base = file(&[9, 9, 9, 9, 0, 9]);
        let old = Changes(file(&[1, 2, 3]), vec![(1..4, Some(0))]);
        // Data, zeros over data, zeros that are stored; and the end of the disk, which is not in the file.
        let new = Changes(
            file(&[4, 0]),
            vec![
                (0..1, Some(0)),
                (2..3, None),
                (5..6, Some(1)),
                (7..8, Some(7)),
            ],
        );
        let (found, stored) = flat(&base, &[new, old], 7 * BLOCK + 512);
        assert_eq!(found, [4, 1, 0, 3, 0, 0, 0, 0]);
        assert_eq!(stored, 3);
    }

    #[test]
    fn what_no_layer_has_is_the_base_s() {
        let base = file(&[0, 3, 3, 0]);
        let silent = Changes(file(&[]), Vec::new());
        assert_eq!(
            flat(&base, &[silent], 6 * BLOCK),
            (vec![0, 3, 3, 0, 0, 0], 2)
        );
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
