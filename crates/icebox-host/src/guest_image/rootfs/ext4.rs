//! Makes an ext4 filesystem out of a directory tree.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
};

use icebox_engine::id::Digest;

use super::{
    super::{ImageError, Io, Progress, Stage, command::Tool, digest::uuid_of},
    DEFAULT_SIZE, MAX_SIZE, MIN_SIZE, mib,
};

const BLOCK: u64 = 4096;
/// One inode per 16 KiB is mke2fs's own default for a root filesystem.
const BYTES_PER_INODE: u64 = 16 << 10;
/// A guest's journal: enough for a sandbox, and small in every copy of it.
const JOURNAL_MIB: u64 = 16;

/// What a tree needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Content {
    bytes: u64,
    inodes: u64,
}

impl Content {
    /// Sums up `dir`, files rounded up to whole blocks. Hard links count once for each name.
    fn of(dir: &Path) -> Result<Self, ImageError> {
        let mut content = Self {
            bytes: BLOCK,
            inodes: 1,
        };
        let mut pending = vec![dir.to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).at("read the directory", &dir)? {
                let entry = entry.at("read the directory", &dir)?;
                let metadata = entry.metadata().at("look at", &entry.path())?;
                content.inodes += 1;
                // A sparse file stays sparse, and a directory is at least a block.
                content.bytes += (metadata.blocks() * 512)
                    .min(metadata.len())
                    .next_multiple_of(BLOCK);
                if metadata.is_dir() {
                    content.bytes += BLOCK;
                    pending.push(entry.path());
                }
            }
        }
        Ok(content)
    }

    /// A size that holds the content with a quarter to spare, in whole MiB.
    fn default_size(self) -> u64 {
        let inodes = self.inodes * 256;
        let needed = (self.bytes + inodes) / 4 * 5 + (JOURNAL_MIB << 20) + (64 << 20);
        (mib(needed) << 20).clamp(DEFAULT_SIZE, MAX_SIZE)
    }
}

/// Makes the filesystem of `size` bytes (or as large as is sensible) in the new sparse file `image`.
pub(super) fn make(
    tree: &Path,
    image: &Path,
    size: Option<u64>,
    identity: &Digest,
    progress: &dyn Progress,
) -> Result<(), ImageError> {
    progress.report(Stage::Filesystem, 0, None);
    let content = Content::of(tree)?;
    let size = size.unwrap_or_else(|| content.default_size());
    if content.bytes + (mib(MIN_SIZE) << 18) > size {
        return Err(ImageError::TooSmall {
            size_mib: mib(size),
        });
    }
    let file = File::create_new(image).at("create", image)?;
    file.set_len(size).at("set the size of", image)?;
    drop(file);
    let inodes = (size / BYTES_PER_INODE).max(content.inodes + content.inodes / 2 + 1024);
    let uuid = uuid_of(identity);
    let journal = JOURNAL_MIB.min(mib(size) / 8).max(4);
    let finished = Tool::new("mke2fs")
        .args([
            "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256",
        ])
        .args([
            "-N",
            &inodes.to_string(),
            "-J",
            &format!("size={journal}"),
            "-U",
            &uuid,
        ])
        // The file's holes are the zeros that inode tables and journal begin with. Saying so marks them as done: a guest
        // would otherwise spend its first minutes writing them, into every sandbox's own disk.
        .args([
            "-E",
            &format!("hash_seed={uuid},assume_storage_prezeroed=1,nodiscard"),
        ])
        // Names for the time of making: what the library before and since 1.47.1 reads.
        .env("E2FSPROGS_FAKE_TIME", EPOCH)
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .arg("-d")
        .arg(tree)
        .arg(image)
        .run()?;
    finished.success_or(|finished| {
        let full = [
            "Could not allocate block",
            "Could not allocate inode",
            "No free space",
            "too small",
        ];
        if full.iter().any(|symptom| finished.tail.contains(symptom)) {
            ImageError::TooSmall {
                size_mib: mib(size),
            }
        } else if finished.tail.contains("No space left on device") {
            ImageError::NoSpace {
                path: image.to_owned(),
            }
        } else {
            finished.error()
        }
    })?;
    Ok(())
}

/// The time in the superblock of every image: 2020-01-01. Not 0, which the library takes for "unset".
const EPOCH: &str = "1577836800";
