//! A disk whose power can be cut.
//!
//! Killing QEMU loses what the machine had in memory, but not what its disk had in its cache: whatever was written has
//! reached this machine's files, flushed or not. So QEMU notes every write and every flush in a log, and the disk that
//! the machine finds when it boots again is made of it: what was there at the last flush, and nothing of what came later.
//!
//! ```text
//!   machine ── virtio-blk ── blklogwrites ── disk      (what it reads while it runs)
//!                                         └─ log       write, write, flush, write, flush, write ✂
//!                                                      └──────── kept ─────────────┘
//! ```
//!
//! The log is that of Linux's `dm-log-writes` (`drivers/md/dm-log-writes.c`, which QEMU's `block/blklogwrites.c` follows):
//! a header, then an entry for each write, with its data, and for each flush; all begin at a multiple of the sector size,
//! all numbers are little-endian.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::at;
use super::image::remove_tree;
use crate::run::Failure;

/// Sparse.
const DISK_BYTES: u64 = 32 << 30;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;

/// Its files go when it is dropped.
pub(super) struct PowerDisk {
    disk: PathBuf,
    log: PathBuf,
}

impl PowerDisk {
    /// An empty disk.
    pub(super) fn new(cache: &Path) -> Result<Self, Failure> {
        let new = Self {
            disk: cache.join("power.disk"),
            log: cache.join("power.log"),
        };
        new.blank()?;
        Ok(new)
    }

    fn blank(&self) -> Result<File, Failure> {
        remove_tree(&self.disk)?;
        let disk = File::create_new(&self.disk).map_err(at("create", &self.disk))?;
        disk.set_len(DISK_BYTES).map_err(at("size", &self.disk))?;
        remove_tree(&self.log)?;
        File::create_new(&self.log).map_err(at("create", &self.log))?;
        Ok(disk)
    }

    /// The arguments of QEMU that attach it.
    pub(super) fn arguments(&self) -> [String; 4] {
        // The machine's flushes end in the log: nobody cuts this machine's power.
        let file =
            |path: &Path| json!({"driver": "file", "filename": path, "cache": {"no-flush": true}});
        let node = json!({
            "driver": "blklogwrites",
            "node-name": "power",
            "cache": {"no-flush": false},
            "file": file(&self.disk),
            "log": file(&self.log),
        });
        // Writes and flushes are all that is in the log then. Merged requests may have as many pieces as the system takes
        // at once, and the log's header is one more: they would fail.
        let device =
            "virtio-blk-pci,drive=power,discard=off,write-zeroes=off,request-merging=off";
        [
            "-blockdev".to_owned(),
            node.to_string(),
            "-device".to_owned(),
            device.to_owned(),
        ]
    }

    /// Makes the disk what it was at the last flush.
    ///
    /// # Errors
    /// The log cannot be read, or its end is not certain.
    pub(super) fn lose_what_was_not_flushed(&mut self) -> Result<(), Failure> {
        let log = File::open(&self.log).map_err(at("open", &self.log))?;
        let disk = self.blank()?;
        let kept = replay(&log, &disk).map_err(|error| {
            Failure(format!(
                "cannot tell what the power cut left of the disk: {error}"
            ))
        })?;
        eprintln!(
            "── power cut: {} flushes, {} writes kept, {} lost",
            kept.flushes, kept.writes, kept.lost
        );
        Ok(())
    }
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        for file in [&self.disk, &self.log] {
            if let Err(error) = fs::remove_file(file) {
                eprintln!("cannot remove {}: {error}", file.display());
            }
        }
    }
}

/// What became of the writes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kept {
    flushes: u64,
    writes: u64,
    lost: u64,
}

/// A write in the log.
struct Write {
    /// Where its data are in the log.
    data: u64,
    /// Where they go on the disk.
    to: u64,
    length: u64,
}

/// Does to `disk`, which is empty, what was done up to the last flush in `log`.
fn replay(log: &File, disk: &File) -> io::Result<Kept> {
    let damaged = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let end = log.metadata()?.len();
    let [magic, version, entries, sector] = numbers(log, 0)?;
    // 32 bits; zeros follow.
    let sector = sector & u64::from(u32::MAX);
    if (magic, version) != (MAGIC, VERSION) || !sector.is_power_of_two() {
        return Err(damaged("the log has no header".to_owned()));
    }
    let mut kept = Kept::default();
    let mut waiting = Vec::new();
    let (mut at, mut read) = (sector, 0);
    while at + sector <= end {
        let [first, count, flags, _] = numbers(log, at)?;
        at += sector;
        let write = Write {
            data: at,
            to: first * sector,
            length: count * sector,
        };
        match (flags, write.length) {
            (FLUSH, 0) => {
                kept.flushes += 1;
                for write in waiting.drain(..) {
                    copy(log, disk, &write)?;
                    kept.writes += 1;
                }
            }
            (0, 1..) if write.data + write.length <= end => {
                at += write.length;
                waiting.push(write);
            }
            // Room that was taken for a write under way when QEMU was killed.
            _ => break,
        }
        read += 1;
    }
    // What QEMU knew of when the last flush ended.
    if read < entries {
        return Err(damaged(format!(
            "a write under way left a gap in the log, before a flush: {read} entries of {entries}"
        )));
    }
    kept.lost = u64::try_from(waiting.len()).unwrap_or(u64::MAX);
    Ok(kept)
}

/// Four numbers, as headers and entries begin with.
fn numbers(log: &File, at: u64) -> io::Result<[u64; 4]> {
    let mut bytes = [0; 32];
    log.read_exact_at(&mut bytes, at)?;
    let (numbers, _) = bytes.as_chunks();
    let mut found = [0; 4];
    for (found, number) in found.iter_mut().zip(numbers) {
        *found = u64::from_le_bytes(*number);
    }
    Ok(found)
}

fn copy(log: &File, disk: &File, write: &Write) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(write.length).map_err(io::Error::other)?];
    log.read_exact_at(&mut buffer, write.data)?;
    disk.write_all_at(&buffer, write.to)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn entry(first: u64, data: &[u8], flags: u64) -> Vec<u8> {
        let count = u64::try_from(data.len() / 512).unwrap();
        let mut sector = [first, count, flags, 0].map(u64::to_le_bytes).concat();
        sector.resize(512, 0);
        [&sector, data].concat()
    }

    fn file(name: &str, content: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!("icebox-power-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn what_was_not_flushed_is_lost() {
        let mut header = [MAGIC, VERSION, 3, 512].map(u64::to_le_bytes).concat();
        header.resize(512, 0);
        let log = [
            header,
            entry(0, &[1; 1024], 0),
            entry(1, &[2; 512], 0),
            entry(0, &[], FLUSH),
            entry(0, &[3; 512], 0),
        ]
        .concat();
        let disk = file("disk", &[0; 2048]);
        let kept = replay(&file("log", &log), &disk).unwrap();
        let expected = Kept {
            flushes: 1,
            writes: 2,
            lost: 1,
        };
        assert_eq!(kept, expected);
        let mut found = [0; 2048];
        disk.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found[..512], [1; 512]);
        assert_eq!(found[512..1024], [2; 512]);
        assert_eq!(found[1024..], [0; 1024]);
    }
}
