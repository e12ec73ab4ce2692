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
//! A test may also name a stretch of its work (`note_beginning`): then the power is cut at every flush in it, one after the
//! other, each time on the disk as it was at that flush, which the machine may write to and which is thrown away after it.
//!
//! The log is that of Linux's `dm-log-writes` (`drivers/md/dm-log-writes.c`, which QEMU's `block/blklogwrites.c` follows):
//! a header, then an entry for each write, with its data, and for each flush; all begin at a multiple of the sector size,
//! all numbers are little-endian.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::at;
use super::image::remove_tree;
use super::machine::option_value;
use crate::run::Failure;

/// Sparse.
const DISK_BYTES: u64 = 32 << 30;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;

/// How many flushes before a stretch belong to it: a machine goes on while the line that it printed is on its way here.
const EARLIER: usize = 2;

/// Its files go when it is dropped.
pub(super) struct PowerDisk {
    disk: PathBuf,
    log: PathBuf,
    /// Bytes of the log when the stretch began, or 0.
    begun: AtomicU64,
}

/// A disk whose power was cut, at one flush after the other.
pub(super) struct Cuts {
    log: File,
    disk: File,
    history: History,
    /// The flush that it was cut at last.
    done: usize,
}

impl PowerDisk {
    /// An empty disk.
    pub(super) fn new(cache: &Path) -> Result<Self, Failure> {
        let new = Self {
            disk: cache.join("power.disk"),
            log: cache.join("power.log"),
            begun: AtomicU64::new(0),
        };
        new.blank_disk()?;
        remove_tree(&new.log)?;
        File::create_new(&new.log).map_err(at("create", &new.log))?;
        Ok(new)
    }

    fn blank_disk(&self) -> Result<File, Failure> {
        remove_tree(&self.disk)?;
        let disk = File::create_new(&self.disk).map_err(at("create", &self.disk))?;
        disk.set_len(DISK_BYTES).map_err(at("size", &self.disk))?;
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
        let device = "virtio-blk-pci,drive=power,discard=off,write-zeroes=off,request-merging=off";
        [
            "-blockdev".to_owned(),
            node.to_string(),
            "-device".to_owned(),
            device.to_owned(),
        ]
    }

    /// The arguments of QEMU that attach what a cut has left of it; what is written to that is thrown away.
    pub(super) fn arguments_after_a_cut(&self) -> [String; 4] {
        let path = option_value(&self.disk);
        [
            "-drive".to_owned(),
            format!("id=power,file={path},format=raw,if=none,cache=unsafe,snapshot=on"),
            "-device".to_owned(),
            "virtio-blk-pci,drive=power".to_owned(),
        ]
    }

    /// The test begins what its power is to be cut at every flush of.
    pub(super) fn note_beginning(&self) -> Result<(), Failure> {
        let log = fs::metadata(&self.log).map_err(at("look at", &self.log))?;
        self.begun.store(log.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Makes the disk what it was at the last flush.
    ///
    /// # Errors
    /// The log cannot be read, or its end is not certain.
    pub(super) fn lose_what_was_not_flushed(&self) -> Result<(), Failure> {
        let mut cuts = self.cuts()?;
        let last = cuts.history.flushes.len();
        cuts.go_to(last)?;
        let kept = cuts.history.kept(last);
        eprintln!(
            "── power cut: {last} flushes, {kept} writes kept, {} lost",
            cuts.history.writes.len() - kept
        );
        Ok(())
    }

    /// An empty disk, and what can be done to it.
    pub(super) fn cuts(&self) -> Result<Cuts, Failure> {
        let log = File::open(&self.log).map_err(at("open", &self.log))?;
        let history = History::read(&log).map_err(unclear)?;
        let disk = self.blank_disk()?;
        Ok(Cuts {
            log,
            disk,
            history,
            done: 0,
        })
    }

    /// The numbers of the flushes of the stretch.
    pub(super) fn stretch(&self, cuts: &Cuts) -> std::ops::RangeInclusive<usize> {
        let begun = self.begun.load(Ordering::Relaxed);
        let flushes = &cuts.history.flushes;
        let before = flushes.partition_point(|flush| flush.at < begun);
        (before + 1).saturating_sub(EARLIER).max(1)..=flushes.len()
    }
}

impl Cuts {
    /// Makes the disk what it was at the `number`th flush, counted from 1, which is not before where it is.
    pub(super) fn go_to(&mut self, number: usize) -> Result<(), Failure> {
        let writes = self.history.kept(self.done)..self.history.kept(number);
        for write in &self.history.writes[writes] {
            copy(&self.log, &self.disk, write).map_err(unclear)?;
        }
        self.done = number;
        Ok(())
    }
}

fn unclear(error: io::Error) -> Failure {
    Failure(format!(
        "cannot tell what the power cut left of the disk: {error}"
    ))
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

/// A write in the log.
struct Write {
    /// Where its data are in the log.
    data: u64,
    /// Where they go on the disk.
    to: u64,
    length: u64,
}

/// A flush in the log.
struct Flush {
    /// Where it is in the log.
    at: u64,
    /// How many writes were before it.
    writes: usize,
}

/// What was done to a disk.
#[derive(Default)]
struct History {
    writes: Vec<Write>,
    flushes: Vec<Flush>,
}

impl History {
    fn read(log: &File) -> io::Result<Self> {
        let damaged = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let end = log.metadata()?.len();
        let [magic, version, entries, sector] = numbers(log, 0)?;
        // 32 bits; zeros follow.
        let sector = sector & u64::from(u32::MAX);
        if (magic, version) != (MAGIC, VERSION) || !sector.is_power_of_two() {
            return Err(damaged("the log has no header".to_owned()));
        }
        let mut history = Self::default();
        let (mut at, mut read) = (sector, 0);
        while at + sector <= end {
            let [first, count, flags, _] = numbers(log, at)?;
            let write = Write {
                data: at + sector,
                to: first * sector,
                length: count * sector,
            };
            match (flags, write.length) {
                (FLUSH, 0) => history.flushes.push(Flush {
                    at,
                    writes: history.writes.len(),
                }),
                (0, 1..) if write.data + write.length <= end => {
                    at += write.length;
                    history.writes.push(write);
                }
                // Room that was taken for a write under way when QEMU was killed.
                _ => break,
            }
            at += sector;
            read += 1;
        }
        // What QEMU knew of when the last flush ended.
        if read < entries {
            return Err(damaged(format!(
                "a write under way left a gap in the log, before a flush: {read} entries of {entries}"
            )));
        }
        Ok(history)
    }

    /// How many writes are certain after the `number`th flush, counted from 1.
    fn kept(&self, number: usize) -> usize {
        match number {
            0 => 0,
            number => self.flushes[number - 1].writes,
        }
    }
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
        let log = file("log", &log);
        let history = History::read(&log).unwrap();
        assert_eq!((history.writes.len(), history.flushes.len()), (3, 1));
        let disk = file("disk", &[0; 2048]);
        let mut cuts = Cuts {
            log,
            disk: disk.try_clone().unwrap(),
            history,
            done: 0,
        };
        cuts.go_to(1).unwrap();
        let mut found = [0; 2048];
        disk.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found[..512], [1; 512]);
        assert_eq!(found[512..1024], [2; 512]);
        assert_eq!(found[1024..], [0; 1024]);
    }
}
