//! An existing ext4 image as a root image.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use super::{
    super::{ImageError, Io, Progress, Stage, command::Tool},
    MAX_SIZE, MIN_SIZE, mib,
};
use crate::fs::{Chunk, for_each_chunk, write_sparse};

/// Copies `source` to the new sparse file `image`, checks it, and grows it to `size` if that is larger. The source is only
/// read. A journal that was not closed cleanly is replayed in the copy, as mounting it would.
pub(super) fn copy(
    source: &Path,
    image: &Path,
    size: Option<u64>,
    progress: &dyn Progress,
) -> Result<(), ImageError> {
    let from = File::open(source).at("open", source)?;
    let superblock = Superblock::read(&from).map_err(|reason| match reason {
        Bad::Io(error) => ImageError::io("read", source, error),
        Bad::Foreign(reason) => ImageError::NotExt4 {
            path: source.to_owned(),
            reason,
        },
    })?;
    let total = from.metadata().at("look at", source)?.len();
    if superblock.bytes > total {
        let reason = format!(
            "it is cut short: {} MiB of {} are there",
            mib(total),
            mib(superblock.bytes)
        );
        return Err(ImageError::NotExt4 {
            path: source.to_owned(),
            reason,
        });
    }
    if !(MIN_SIZE..=MAX_SIZE).contains(&superblock.bytes) {
        return Err(ImageError::SizeOutOfRange {
            size_mib: mib(superblock.bytes),
            min_mib: mib(MIN_SIZE),
            max_mib: mib(MAX_SIZE),
        });
    }
    if let Some(size) = size
        && size < superblock.bytes
    {
        return Err(ImageError::TooSmall {
            size_mib: mib(size),
        });
    }
    sparse_copy(&from, image, total, progress)?;
    drop(from);
    let damaged = |tail| ImageError::DamagedFilesystem {
        path: source.to_owned(),
        tail,
    };
    progress.report(Stage::Check, 0, None);
    if superblock.needs_recovery {
        Tool::new("e2fsck")
            .args(["-y", "-E", "journal_only"])
            .arg(image)
            .run()?
            .success_or(|finished| damaged(finished.text()))?;
    }
    Tool::new("e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .run()?
        .success_or(|finished| {
            let text = finished.text();
            let lines: Vec<&str> = text
                .lines()
                .filter(|line| !line.starts_with("Pass "))
                .take(12)
                .collect();
            damaged(lines.join("\n"))
        })?;
    if let Some(size) = size
        && size > superblock.bytes
    {
        progress.report(Stage::Filesystem, 0, None);
        let file = File::options().write(true).open(image).at("open", image)?;
        file.set_len(size).at("grow", image)?;
        drop(file);
        // The check above was read-only, so that the superblock does not know of it; `-f` says that it happened.
        Tool::new("resize2fs")
            .arg("-f")
            .arg(image)
            .run()?
            .success()?;
    }
    Ok(())
}

/// Copies data and leaves holes where there are holes or zeros.
fn sparse_copy(
    from: &File,
    image: &Path,
    total: u64,
    progress: &dyn Progress,
) -> Result<(), ImageError> {
    let to = File::create_new(image).at("create", image)?;
    to.set_len(total).at("set the size of", image)?;
    let mut done = 0;
    for_each_chunk(from, |chunk| {
        if let Chunk::Data(bytes) = chunk {
            write_sparse(&to, bytes, done)?;
        }
        done += chunk.len();
        progress.report(Stage::Copy, done, Some(total));
        Ok(())
    })
    .at("copy the image to", image)
}

/// What is needed of an ext4 superblock (Documentation/filesystems/ext4/super.rst in the kernel's sources).
struct Superblock {
    bytes: u64,
    needs_recovery: bool,
}

enum Bad {
    Io(io::Error),
    Foreign(String),
}

impl Superblock {
    fn read(file: &File) -> Result<Self, Bad> {
        const MAGIC: u16 = 0xef53;
        const INCOMPAT_RECOVER: u32 = 0x4;
        const INCOMPAT_EXTENTS: u32 = 0x40;
        const INCOMPAT_64BIT: u32 = 0x80;
        let foreign = |reason: &str| Err(Bad::Foreign(reason.to_owned()));
        if !file.metadata().map_err(Bad::Io)?.is_file() {
            return foreign("it is not a regular file");
        }
        let mut start = Vec::new();
        file.take(2048).read_to_end(&mut start).map_err(Bad::Io)?;
        let at = |at: usize| start.get(1024 + at..).unwrap_or_default();
        let u16_at = |offset: usize| {
            at(offset)
                .first_chunk()
                .map(|bytes| u16::from_le_bytes(*bytes))
        };
        let u32_at = |offset: usize| {
            at(offset)
                .first_chunk()
                .map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        if u16_at(0x38) != Some(MAGIC) {
            return foreign(describe(&start));
        }
        let incompat = u32_at(0x60);
        if incompat & INCOMPAT_EXTENTS == 0 {
            return foreign("it is ext2 or ext3 (it has no extents)");
        }
        let high = if incompat & INCOMPAT_64BIT == 0 {
            0
        } else {
            u32_at(0x150)
        };
        let blocks = (u64::from(high) << 32) | u64::from(u32_at(0x4));
        let Some(bytes) = 1024_u64
            .checked_shl(u32_at(0x18))
            .and_then(|block| block.checked_mul(blocks))
        else {
            return foreign("its superblock is nonsense");
        };
        Ok(Self {
            bytes,
            needs_recovery: incompat & INCOMPAT_RECOVER != 0,
        })
    }
}

/// Names what people give instead of an ext4 image.
fn describe(start: &[u8]) -> &'static str {
    if start.is_empty() {
        "it is empty"
    } else if start.starts_with(b"QFI\xfb") {
        "it is a qcow2 image; convert it with `qemu-img convert -O raw`"
    } else if start.get(512..520) == Some(b"EFI PART") || start.get(510..512) == Some(&[0x55, 0xaa])
    {
        "it is a whole disk with a partition table"
    } else if start.starts_with(b"hsqs") {
        "it is a squashfs image"
    } else if start.starts_with(b"XFSB") {
        "it is an XFS image"
    } else {
        "it has no ext4 superblock"
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::guest_image::Silent;

    #[test]
    fn zeros_become_holes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let mut bytes = vec![0; 4 << 20];
        bytes[1 << 20] = 1;
        let end = bytes.len() - 1;
        bytes[end] = 2;
        fs::write(&source, &bytes).unwrap();
        let copy = dir.path().join("copy");
        sparse_copy(
            &File::open(&source).unwrap(),
            &copy,
            bytes.len() as u64,
            &Silent,
        )
        .unwrap();
        assert!(fs::read(&copy).unwrap() == bytes);
        let allocated = fs::metadata(&copy).unwrap().blocks() * 512;
        assert!(
            allocated <= 64 << 10,
            "{allocated} bytes for two blocks of data"
        );
    }
}
