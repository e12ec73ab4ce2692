//! Several overlays as one: what a run of layers holds together, written as one overlay and compared with it.
//!
//! ```text
//! newest   · A · 0 ·        subcluster by subcluster, the newest that says something decides:
//!          · · B B ·        data, or zero. Where none does, the merged one is silent too.
//! oldest   C C · · ·
//! merged   C A B 0 ·
//! ```
//!
//! Clusters are written one after the other, each followed, at the end of its GiB, by the table that leads there; the
//! refcounts come last, when it is known how many there are. Data that turns out to be zero becomes a mark that takes no
//! room.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::{ErrorKind, HostError};

use super::format::{
    CLUSTER, CLUSTERS_PER_TABLE, COPIED, Content, L1_SPAN, L2_ENTRY, Overlay, OverlayError,
    SUBCLUSTER, SUBCLUSTERS, Table, header, l1_entries,
};
use crate::fs::{clamp_usize, failed, is_zero};

/// Clusters that one block of refcounts (16 bits each) counts.
const COUNTED: u64 = CLUSTER / 2;

/// Why a merged overlay cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum MergeError {
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("it would have more than the {most} bytes of all that it is made of")]
    Grows { most: u64 },
    #[error("at guest offset {guest:#x} it does not show what it was merged of")]
    Differs { guest: u64 },
}

impl MergeError {
    /// The error as the engine knows it.
    pub(super) fn at(self, path: &Path) -> HostError {
        match self {
            Self::Io(error) | Self::Overlay(OverlayError::Io(error)) => {
                failed("merge layers into", path, error)
            }
            other => HostError::new(
                ErrorKind::Invalid,
                format!("merge layers into {}", path.display()),
            )
            .caused_by(other),
        }
    }
}

/// Overlays on each other, newest first, read as one.
struct Run<'a> {
    overlays: &'a [Overlay],
    /// The tables of the L1 entry that is being read.
    tables: Vec<Option<Table>>,
}

/// A cluster that a run has.
struct Cluster {
    /// Which subclusters it says something about.
    held: u32,
    /// What that is, zeros for zero and for what is not held.
    data: Vec<u8>,
}

impl Cluster {
    /// Which of the subclusters that are held are zero.
    fn zeros(&self) -> u32 {
        let parts = self.data.chunks(clamp_usize(SUBCLUSTER));
        let zeros = parts
            .zip(0..)
            .filter(|(part, number)| self.held >> number & 1 == 1 && is_zero(part));
        zeros.fold(0, |mask, (_, number)| mask | 1 << number)
    }

    /// Writes some of its subclusters to a cluster of `out`, neighbours at once.
    fn store(&self, which: u32, out: &File, host: u64) -> std::io::Result<()> {
        let is_stored = |number: usize| which >> number & 1 == 1;
        let mut first = 0;
        while first < SUBCLUSTERS as usize {
            let mut end = first + 1;
            while end < SUBCLUSTERS as usize && is_stored(end) == is_stored(first) {
                end += 1;
            }
            if is_stored(first) {
                let at = first * clamp_usize(SUBCLUSTER)..end * clamp_usize(SUBCLUSTER);
                let offset = host + at.start as u64;
                out.write_all_at(&self.data[at], offset)?;
            }
            first = end;
        }
        Ok(())
    }
}

impl<'a> Run<'a> {
    fn new(overlays: &'a [Overlay]) -> Self {
        Self {
            overlays,
            tables: Vec::new(),
        }
    }

    /// Goes to an L1 entry. Whether any overlay maps something there.
    fn enter(&mut self, index: u64) -> Result<bool, OverlayError> {
        let tables = self.overlays.iter().map(|overlay| overlay.table(index));
        self.tables = tables.collect::<Result<_, _>>()?;
        Ok(self.tables.iter().any(Option::is_some))
    }

    /// The cluster at a guest offset under the entry; `None` if nobody says anything about it.
    fn cluster(&self, guest: u64) -> Result<Option<Cluster>, OverlayError> {
        let mut cluster: Option<Cluster> = None;
        for (overlay, table) in self.overlays.iter().zip(&self.tables) {
            let Some(table) = table else { continue };
            let Some(contents) = overlay.cluster(table, guest)? else {
                continue;
            };
            let cluster = cluster.get_or_insert_with(|| Cluster {
                held: 0,
                data: vec![0; clamp_usize(CLUSTER)],
            });
            let says = |number: usize| match contents[number] {
                content if cluster.held >> number & 1 == 0 => content,
                _ => Content::Below,
            };
            let mut news = 0_u32;
            let mut first = 0;
            while first < contents.len() {
                let here = says(first);
                let mut end = first + 1;
                while end < contents.len() && says(end) == here.after((end - first) as u64) {
                    end += 1;
                }
                if here != Content::Below {
                    news |= mask(first, end);
                }
                if let Content::Data(host) = here {
                    let at = first * clamp_usize(SUBCLUSTER)..end * clamp_usize(SUBCLUSTER);
                    let guest = guest + at.start as u64;
                    overlay.read(guest, host, &mut cluster.data[at])?;
                }
                first = end;
            }
            cluster.held |= news;
        }
        Ok(cluster.filter(|cluster| cluster.held != 0))
    }
}

/// The subclusters from `first` to before `end`.
fn mask(first: usize, end: usize) -> u32 {
    (first..end).fold(0, |mask, number| mask | 1 << number)
}

/// Writes what `run` (newest first) holds into `out`, which is empty, as an overlay for a disk of `size` bytes. Not
/// durable until synced.
pub(super) fn write(run: &[Overlay], size: u64, out: &File) -> Result<(), MergeError> {
    let l1_entries = l1_entries(size)?;
    // Every cluster of it comes from one of theirs, or from several at the same place.
    let most = run.iter().map(Overlay::length).sum();
    let mut run = Run::new(run);
    let l1_table = CLUSTER;
    // After the header and the L1 table.
    let mut end = 2 * CLUSTER;
    let mut allocate = || {
        let at = end;
        end += CLUSTER;
        if end <= most {
            Ok(at)
        } else {
            Err(MergeError::Grows { most })
        }
    };
    for index in 0..u64::from(l1_entries) {
        if !run.enter(index)? {
            continue;
        }
        let mut table = vec![0; clamp_usize(CLUSTER)];
        let mut is_empty = true;
        let entries = table.chunks_mut(L2_ENTRY).zip(0..CLUSTERS_PER_TABLE);
        for (entry, number) in entries {
            let guest = index * L1_SPAN + number * CLUSTER;
            if guest >= size {
                break;
            }
            let Some(cluster) = run.cluster(guest)? else {
                continue;
            };
            is_empty = false;
            let zeros = cluster.zeros();
            let stored = cluster.held & !zeros;
            if stored != 0 {
                let host = allocate()?;
                cluster.store(stored, out, host)?;
                entry[..8].copy_from_slice(&(host | COPIED).to_be_bytes());
            }
            let bits = u64::from(zeros) << SUBCLUSTERS | u64::from(stored);
            entry[8..].copy_from_slice(&bits.to_be_bytes());
        }
        if !is_empty {
            let at = allocate()?;
            out.write_all_at(&table, at)?;
            out.write_all_at(&(at | COPIED).to_be_bytes(), l1_table + index * 8)?;
        }
    }
    finish(out, size, l1_entries, l1_table, end)
}

/// Writes the refcounts of a file that has `used` bytes, each cluster used once, and its header.
fn finish(
    out: &File,
    size: u64,
    l1_entries: u32,
    l1_table: u64,
    used: u64,
) -> Result<(), MergeError> {
    let used = used / CLUSTER;
    // The table of refcounts and its blocks are counted themselves.
    let mut blocks = (used + 1).div_ceil(COUNTED);
    while blocks * COUNTED < used + 1 + blocks {
        blocks += 1;
    }
    let (table, total) = (used * CLUSTER, used + 1 + blocks);
    for block in 0..blocks {
        let at = (used + 1 + block) * CLUSTER;
        let counted = clamp_usize((total - block * COUNTED).min(COUNTED));
        out.write_all_at(&at.to_be_bytes(), table + block * 8)?;
        out.write_all_at(&1_u16.to_be_bytes().repeat(counted), at)?;
    }
    out.set_len(total * CLUSTER)?;
    out.write_all_at(&header(size, l1_entries, l1_table, table), 0)?;
    Ok(())
}

/// Compares an overlay with the run that it was made of: both must say something about the same places, and the same.
pub(super) fn compare(run: &[Overlay], merged: &Overlay) -> Result<(), MergeError> {
    let size = merged.size();
    let (mut run, mut merged) = (Run::new(run), Run::new(std::slice::from_ref(merged)));
    for index in 0..size.div_ceil(L1_SPAN) {
        let (one, other) = (run.enter(index)?, merged.enter(index)?);
        if !one && !other {
            continue;
        }
        for number in 0..CLUSTERS_PER_TABLE {
            let guest = index * L1_SPAN + number * CLUSTER;
            if guest >= size {
                break;
            }
            let same = match (run.cluster(guest)?, merged.cluster(guest)?) {
                (None, None) => true,
                (Some(one), Some(other)) => one.held == other.held && one.data == other.data,
                _ => false,
            };
            if !same {
                return Err(MergeError::Differs { guest });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::path::PathBuf;

    use super::super::format::tests::qemu;
    use super::super::format::write_empty;
    use super::*;

    /// Ends in the middle of a subcluster of the third GiB.
    const SIZE: u64 = (2 << 30) + 5 * 512;

    /// A base and overlays on it, oldest first, each with its own writes.
    struct Stack {
        directory: tempfile::TempDir,
        overlays: Vec<PathBuf>,
    }

    impl Stack {
        fn new(writes: &[&[&str]]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let base = crate::fs::create_file(&directory.path().join("base")).unwrap();
            base.set_len(1 << 30).unwrap();
            base.write_all_at(&vec![0xb5; 3 << 20], 0).unwrap();
            let mut stack = Self {
                directory,
                overlays: Vec::new(),
            };
            for writes in writes {
                let path = stack.path(&stack.overlays.len().to_string());
                write_empty(&crate::fs::create_file(&path).unwrap(), SIZE).unwrap();
                stack.overlays.push(path);
                let chain = stack.chain(&stack.overlays);
                let mut arguments: Vec<_> =
                    writes.iter().flat_map(|write| ["-c", *write]).collect();
                arguments.push(&chain);
                if !writes.is_empty() {
                    qemu("qemu-io", &arguments);
                }
            }
            stack
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        /// As QEMU's tools take it.
        fn chain(&self, overlays: &[PathBuf]) -> String {
            let file =
                |path: &Path| format!(r#"{{"driver":"file","filename":"{}"}}"#, path.display());
            let mut chain = format!(r#"{{"driver":"raw","file":{}}}"#, file(&self.path("base")));
            for overlay in overlays {
                chain = format!(
                    r#"{{"driver":"qcow2","discard":"unmap","file":{},"backing":{chain}}}"#,
                    file(overlay)
                );
            }
            format!("json:{chain}")
        }

        fn open(overlay: &Path) -> Overlay {
            Overlay::open(File::open(overlay).unwrap(), SIZE).unwrap()
        }

        /// Merges the overlays of a range, and returns the file.
        fn merge(&self, range: std::ops::Range<usize>) -> (PathBuf, Vec<Overlay>) {
            let run: Vec<_> = self.overlays[range]
                .iter()
                .rev()
                .map(|it| Self::open(it))
                .collect();
            let path = self.path("merged");
            write(&run, SIZE, &crate::fs::create_file(&path).unwrap()).unwrap();
            (path, run)
        }
    }

    const WRITES: [&[&str]; 5] = [
        &[
            "write -P 1 0 1M",
            "write -P 2 1600M 256k",
            "write -P 3 2147483648 2560",
        ],
        // Over data, over nothing, over a part of a subcluster, beyond a GiB, up to the end of the disk.
        &[
            "write -P 4 4k 8k",
            "write -P 5 2M 300k",
            "write -P 6 1073741312 1k",
            "write -P 7 2147484160 512",
        ],
        // Zeros that are marked, zeros that are stored, what is given up.
        &[
            "write -z 100k 300k",
            "write -P 0 2100k 64k",
            "discard 1600M 128k",
            "write -P 8 4608 512",
        ],
        &[
            "write -P 9 256k 4k",
            "write -P 10 1700M 1M",
            "write -P 11 3M 4k",
        ],
        &["write -P 12 0 4k", "write -z 1700M 64k"],
    ];

    #[test]
    fn a_merged_overlay_shows_to_qemu_what_its_run_showed() {
        let stack = Stack::new(&WRITES);
        for range in [0..5, 1..4, 0..2, 3..5] {
            let (merged, run) = stack.merge(range.clone());
            compare(&run, &Stack::open(&merged)).unwrap();
            let mut overlays = stack.overlays.clone();
            overlays.splice(range.clone(), [merged.clone()]);
            let (before, after) = (stack.chain(&stack.overlays), stack.chain(&overlays));
            qemu("qemu-img", &["compare", &before, &after]);
            qemu(
                "qemu-img",
                &["check", "-q", "-f", "qcow2", merged.to_str().unwrap()],
            );
            let allocated = |path: &PathBuf| path.metadata().unwrap().blocks() * 512;
            let all: u64 = stack.overlays[range].iter().map(allocated).sum();
            assert!(allocated(&merged) <= all, "{} of {all}", allocated(&merged));
            // What is written next goes where it should.
            let (head, chain) = (stack.path("head"), &mut overlays);
            write_empty(&crate::fs::create_file(&head).unwrap(), SIZE).unwrap();
            chain.push(head);
            let chain = stack.chain(chain);
            qemu(
                "qemu-io",
                &["-c", "write -P 20 1k 1k", "-c", "read -P 20 1k 1k", &chain],
            );
        }
    }

    #[test]
    fn a_merged_overlay_is_merged_again() {
        let stack = Stack::new(&WRITES);
        let (merged, _) = stack.merge(1..4);
        let run = [Stack::open(&stack.overlays[4]), Stack::open(&merged)];
        let path = stack.path("again");
        write(&run, SIZE, &crate::fs::create_file(&path).unwrap()).unwrap();
        compare(&run, &Stack::open(&path)).unwrap();
        let after = stack.chain(&[stack.overlays[0].clone(), path]);
        qemu(
            "qemu-img",
            &["compare", &stack.chain(&stack.overlays), &after],
        );
    }

    #[test]
    fn what_differs_is_found() {
        let stack = Stack::new(&WRITES);
        let (merged, run) = stack.merge(1..4);
        let file = File::options().write(true).open(&merged).unwrap();
        // The first cluster of data follows the header and the L1 table.
        file.write_all_at(&[0xff], 2 * CLUSTER + SUBCLUSTER)
            .unwrap();
        let error = compare(&run, &Stack::open(&merged)).unwrap_err();
        assert!(matches!(error, MergeError::Differs { guest: 0 }), "{error}");
        // And what is there on one side only.
        for (longer, shorter) in [(1..4, 1..3), (1..3, 1..4)] {
            let (merged, _) = stack.merge(longer);
            let run: Vec<_> = stack.overlays[shorter]
                .iter()
                .rev()
                .map(|it| Stack::open(it))
                .collect();
            let error = compare(&run, &Stack::open(&merged)).unwrap_err();
            assert!(matches!(error, MergeError::Differs { .. }), "{error}");
        }
    }

    #[test]
    fn runs_of_nothing_are_nothing() {
        let stack = Stack::new(&[&[], &[]]);
        let (merged, run) = stack.merge(0..2);
        compare(&run, &Stack::open(&merged)).unwrap();
        qemu(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", merged.to_str().unwrap()],
        );
        assert!(merged.metadata().unwrap().blocks() * 512 <= 16 << 10);
    }

    #[test]
    fn an_overlay_that_leads_everywhere_to_one_place_is_refused() {
        let stack = Stack::new(&[&["write -P 1 0 128k"], &[]]);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&stack.overlays[0])
            .unwrap();
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, 3 * CLUSTER).unwrap();
        let table = u64::from_be_bytes(entry) & !COPIED;
        let mut cluster = [0; L2_ENTRY];
        file.read_exact_at(&mut cluster, table).unwrap();
        file.write_all_at(&cluster.repeat(1000), table).unwrap();
        let run = [
            Stack::open(&stack.overlays[1]),
            Stack::open(&stack.overlays[0]),
        ];
        let out = tempfile::tempfile().unwrap();
        let error = write(&run, SIZE, &out).unwrap_err();
        assert!(matches!(error, MergeError::Grows { .. }), "{error}");
        assert!(out.metadata().unwrap().len() < 4 << 20);
    }
}
