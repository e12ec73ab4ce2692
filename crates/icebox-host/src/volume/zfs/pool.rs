//! The pool itself: what [`Pool`] asks for, one `zfs` command each, and the volumes' devices.
//!
//! Every name in a command is one that [`super::names`] made or took apart; nothing of it comes from a guest.
//!
//! The root belongs to one data directory, by a number that both hold. Without it, a daemon that starts on an empty
//! directory, since the right one is not mounted, would take every layer in the pool for a stray.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError, Space};
use icebox_engine::layout::Layout;
use icebox_engine::unit::Bytes;

use super::command::Program;
use super::datasets::{Listing, Look, Pool, Seen};
use super::names::{Root, Snapshot, Volume};
use super::nodes::{self, Nodes};
use super::stream;
use crate::fs::{self, Chunk, failed};
use crate::pace::Pace;

/// Bytes of a volume's blocks. A clone has those of its origin, so this is for good.
///
/// What OpenZFS chooses since 2.2. Smaller ones store less when a guest writes little in many places, and cost a pool of
/// disks with 4 KiB sectors its compression, and RAID-Z much of its space.
pub(super) const BLOCK: u64 = 16 << 10;

/// The property that names the data directory whose the root is.
const OWNER: &str = "icebox:owner";
/// Bytes of the owner's file. Far above what is in it.
const OWNER_MAX: u64 = 4096;

/// How often something that is busy is asked again, from a hundredth of a second to five seconds.
const BUSY_TRIES: u32 = 9;
const BUSY_FIRST: Duration = Duration::from_millis(10);
/// How long a device may be open that should go.
const CLOSED: Duration = Duration::from_secs(5);

/// The datasets of one installation, in a pool.
#[derive(Debug)]
pub(super) struct ZfsPool {
    root: Root,
    layout: Layout,
    nodes: Nodes,
    /// The root is there and belongs to the data directory.
    is_ours: AtomicBool,
}

impl ZfsPool {
    pub(super) fn new(root: Root, layout: Layout) -> Self {
        Self {
            root,
            layout,
            nodes: Nodes::default(),
            is_ours: AtomicBool::new(false),
        }
    }

    fn zfs(&self, arguments: &[&str]) -> Result<String, HostError> {
        if !self.is_there()? {
            return Err(HostError::new(
                ErrorKind::NotFound,
                format!("there is no dataset {}", self.root.name()),
            ));
        }
        match Program::find()?.run(arguments) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Or is it the pool that went?
                self.is_ours.store(false, Ordering::Relaxed);
                self.is_there()?;
                Err(error)
            }
            other => other,
        }
    }

    /// Whether the root is there.
    ///
    /// # Errors
    /// It belongs to somebody else, or the dataset above it is not there: nothing is known then.
    fn is_there(&self) -> Result<bool, HostError> {
        if self.is_ours.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let program = Program::find()?;
        match program.run(&["get", "-H", "-o", "value", OWNER, self.root.name()]) {
            Ok(owner) => {
                self.require_owner(owner.trim())?;
                self.is_ours.store(true, Ordering::Relaxed);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.require_parent(&program)?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn require_parent(&self, program: &Program) -> Result<(), HostError> {
        let parent = self.root.parent();
        let kind = match program.run(&["get", "-H", "-o", "value", "type", parent]) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(HostError::new(
                    ErrorKind::Unsupported,
                    format!("there is no dataset {parent} (zfs.dataset)"),
                )
                .hint(format!(
                    "import its pool: `zpool import {}`; or make it: `zfs create -o mountpoint=none {parent}`",
                    parent.split('/').next().unwrap_or(parent),
                )));
            }
            kind => kind?,
        };
        if kind.trim() == "filesystem" {
            return Ok(());
        }
        Err(HostError::new(
            ErrorKind::Unsupported,
            format!(
                "{parent} (zfs.dataset) is a {}, not a file system",
                kind.trim()
            ),
        )
        .hint("name a file system of the pool, which need not be mounted"))
    }

    fn require_owner(&self, found: &str) -> Result<(), HostError> {
        let file = self.layout.zfs_owner_file();
        let ours = match fs::read_bounded(&file, OWNER_MAX) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => "nobody".to_owned(),
            Err(error) => return Err(error),
        };
        if ours == found {
            return Ok(());
        }
        let (root, data) = (self.root.name(), self.layout.data().display());
        Err(HostError::new(
            ErrorKind::Unsupported,
            format!("the dataset {root} belongs to another data directory than {data}"),
        )
        .hint(format!(
            "mount the data directory that it was made for; or, if that is lost, `zfs destroy -r {root}` destroys every disk in it"
        )))
    }

    /// Makes the root if it is not there.
    pub(super) fn ensure_root(&self) -> Result<(), HostError> {
        if self.is_there()? {
            return Ok(());
        }
        let owner = format!("{OWNER}={}", self.owner()?);
        let options = [
            owner.as_str(),
            "mountpoint=none",
            "canmount=off",
            // Whole disks: nobody on the host looks for a guest's partitions.
            "volmode=dev",
            "snapdev=hidden",
            // Snapshots of others would keep what is removed.
            "com.sun:auto-snapshot=false",
        ];
        let mut arguments = vec!["create"];
        arguments.extend(options.iter().flat_map(|option| ["-o", option]));
        arguments.push(self.root.name());
        match Program::find()?.run(&arguments) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => drop(made?),
        }
        // Whoever was faster.
        self.is_there().map(drop)
    }

    /// The number of the data directory, which gets one if it has none.
    fn owner(&self) -> Result<String, HostError> {
        let file = self.layout.zfs_owner_file();
        match fs::read_bounded(&file, OWNER_MAX) {
            Ok(bytes) => return Ok(String::from_utf8_lossy(&bytes).trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut number = [0; 16];
        rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| HostError::io("get random numbers", error.into()))?;
        let number: String = number.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = file.file_name().and_then(|name| name.to_str());
        let line = format!("{number}\n");
        fs::replace_file(
            self.layout.data(),
            name.unwrap_or_default(),
            line.as_bytes(),
        )?;
        Ok(number)
    }

    /// What can still be written to the dataset.
    pub(super) fn available(&self) -> Result<Bytes, HostError> {
        self.number("available", self.root.name())
    }

    /// The room in the dataset, asked for in one go.
    pub(super) fn space(&self) -> Result<Space, HostError> {
        let name = self.root.name();
        let text = self.zfs(&["get", "-H", "-p", "-o", "value", "available,used", name])?;
        let mut numbers = text.lines().map(|line| line.trim().parse().map(Bytes));
        let (Some(Ok(available)), Some(Ok(used))) = (numbers.next(), numbers.next()) else {
            return Err(HostError::new(
                ErrorKind::Other,
                format!("available and used of {name} are {:?}", text.trim()),
            ));
        };
        Ok(Space {
            place: format!("the dataset {name}"),
            total: available + used,
            available,
        })
    }

    /// Bytes that a volume, or a snapshot, added to the snapshot before it.
    pub(super) fn written(
        &self,
        volume: &Volume,
        snapshot: Option<&Snapshot>,
    ) -> Result<Bytes, HostError> {
        match snapshot {
            Some(snapshot) => self.number("written", &self.root.snapshot(volume, snapshot)),
            None => self.number("written", &self.root.volume(volume)),
        }
    }

    /// The length of a volume's disk, or of that in a snapshot.
    pub(super) fn size(
        &self,
        volume: &Volume,
        snapshot: Option<&Snapshot>,
    ) -> Result<u64, HostError> {
        let size = match snapshot {
            Some(snapshot) => self.number("volsize", &self.root.snapshot(volume, snapshot)),
            None => self.number("volsize", &self.root.volume(volume)),
        };
        size.map(|size| size.0)
    }

    fn number(&self, property: &str, name: &str) -> Result<Bytes, HostError> {
        let text = self.zfs(&["get", "-H", "-p", "-o", "value", property, name])?;
        let number = text.trim().parse();
        number.map(Bytes).map_err(|error| {
            HostError::new(
                ErrorKind::Other,
                format!("{property} of {name} is {:?}", text.trim()),
            )
            .caused_by(error)
        })
    }

    /// Makes the disk of a volume at least `size` bytes long.
    pub(super) fn grow(&self, volume: &Volume, size: u64) -> Result<(), HostError> {
        if self.size(volume, None)? < size {
            let size = format!("volsize={size}");
            self.zfs(&["set", &size, &self.root.volume(volume)])?;
        }
        Ok(())
    }

    /// Makes an empty volume of `size` bytes, which takes what is written to it.
    pub(super) fn create(&self, volume: &Volume, size: u64) -> Result<(), HostError> {
        let (block, size) = (BLOCK.to_string(), size.to_string());
        let name = self.root.volume(volume);
        self.zfs(&["create", "-s", "-b", &block, "-V", &size, &name])
            .map(drop)
    }

    /// The device of a volume.
    pub(super) fn node(&self, volume: &Volume) -> Result<PathBuf, HostError> {
        self.nodes.wait(&self.root.volume(volume))
    }

    /// Writes out what the host keeps of a volume's device.
    pub(super) fn flush(&self, volume: &Volume) -> Result<(), HostError> {
        let node = self.node(volume)?;
        nodes::open(&node, false)?
            .sync_all()
            .map_err(|error| failed("flush", &node, error))
    }

    /// Makes `import` a volume with the content of `image`, and its snapshot.
    pub(super) fn fill(&self, import: &Volume, image: &Path) -> Result<(), HostError> {
        let needed = fs::allocated(image)?;
        let available = self.available()?;
        // What ZFS keeps of blocks beside them is under a hundredth.
        if available.0 < needed.0 + needed.0 / 64 {
            return Err(HostError::new(
                ErrorKind::Exhausted,
                format!(
                    "import {} into {}: {needed} are needed, and {available} are available",
                    image.display(),
                    self.root.name()
                ),
            )
            .hint("free some space in the pool: `icebox rm` what is no longer needed, then `icebox gc`"));
        }
        let file = fs::open_file(image)?;
        self.create(import, fs::length(image)?.next_multiple_of(BLOCK))?;
        let node = self.node(import)?;
        let device = nodes::open(&node, true)?;
        copy(&file, &device)
            .and_then(|()| device.sync_all())
            .map_err(|error| failed(&format!("copy {} to", image.display()), &node, error))?;
        drop(device);
        self.snapshot(import, &Snapshot::Image)?;
        let name = self.root.volume(import);
        self.zfs(&["set", "readonly=on", &name]).map(drop)
    }

    /// Writes what is in a snapshot to `out`, a sparse file that has its length.
    pub(super) fn read(
        &self,
        volume: &Volume,
        snapshot: &Snapshot,
        out: &File,
        pace: &mut Pace,
    ) -> Result<(), HostError> {
        let name = self.root.snapshot(volume, snapshot);
        let length = out
            .metadata()
            .map_err(|error| HostError::io("measure a file that is being written", error))?
            .len();
        Program::find()?.stream(&["send", &name], |stream| {
            stream::read(stream, |offset, data| {
                // A volume's last block may reach beyond a disk that is smaller than it.
                let rest = fs::clamp_usize(length.saturating_sub(offset));
                let data = &data[..data.len().min(rest)];
                fs::write_sparse(out, data, offset)?;
                pace.wrote(out, data.len() as u64)
            })
        })
    }

    /// Repeats what fails since somebody looks at a device at this moment, as udev does.
    #[expect(
        clippy::disallowed_methods,
        reason = "the kernel has no event for a device that was closed"
    )]
    fn patiently(&self, arguments: &[&str]) -> Result<(), HostError> {
        let mut pause = BUSY_FIRST;
        for _ in 0..BUSY_TRIES {
            match self.zfs(arguments) {
                Err(error) if error.kind() == ErrorKind::Busy => std::thread::sleep(pause),
                other => return other.map(drop),
            }
            pause *= 2;
        }
        self.zfs(arguments).map(drop)
    }

    /// What a command printed about datasets that may not be there.
    fn if_any(&self, arguments: &[&str]) -> Result<String, HostError> {
        match self.zfs(arguments) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            other => other,
        }
    }
}

impl Pool for ZfsPool {
    fn list(&self) -> Result<Listing, HostError> {
        let (kinds, root) = ("volume,snapshot", self.root.name());
        let names = self.if_any(&["list", "-H", "-r", "-o", "name", "-t", kinds, root])?;
        let mut listing = Listing::default();
        for name in names.lines() {
            if let Some((volume, snapshot)) = self.root.parse_snapshot(name) {
                listing.0.entry(volume).or_default().insert(snapshot);
            } else if let Some(volume) = self.root.parse_volume(name) {
                listing.0.entry(volume).or_default();
            }
        }
        Ok(listing)
    }

    fn look(&self, at: Option<&Volume>) -> Result<BTreeMap<Volume, Look>, HostError> {
        let name = at.map(|volume| self.root.volume(volume));
        let name = name.as_deref().unwrap_or(self.root.name());
        let columns = "name,written,origin,clones";
        let printed = self.if_any(&[
            "list",
            "-H",
            "-p",
            "-r",
            "-o",
            columns,
            "-t",
            "volume,snapshot",
            "-s",
            "createtxg",
            name,
        ])?;
        looks(&self.root, &printed)
    }

    fn snapshot(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError> {
        let name = self.root.snapshot(volume, snapshot);
        self.zfs(&["snapshot", &name]).map(drop)
    }

    fn make_clone(
        &self,
        (volume, snapshot): (&Volume, &Snapshot),
        to: &Volume,
        size: u64,
    ) -> Result<(), HostError> {
        let (from, to) = (self.root.snapshot(volume, snapshot), self.root.volume(to));
        let size = format!("volsize={size}");
        self.zfs(&["clone", "-o", &size, &from, &to]).map(drop)
    }

    fn destroy(&self, volume: &Volume) -> Result<(), HostError> {
        self.patiently(&["destroy", &self.root.volume(volume)])
    }

    fn destroy_snapshots(&self, volume: &Volume, snapshots: &[Snapshot]) -> Result<(), HostError> {
        let names: BTreeSet<String> = snapshots.iter().map(ToString::to_string).collect();
        let names: Vec<String> = names.into_iter().collect();
        // Few enough for one argument.
        for some in names.chunks(500) {
            let name = format!("{}@{}", self.root.volume(volume), some.join(","));
            self.patiently(&["destroy", &name])?;
        }
        Ok(())
    }

    fn promote(&self, clone: &Volume) -> Result<(), HostError> {
        self.zfs(&["promote", &self.root.volume(clone)]).map(drop)
    }

    fn rename(&self, volume: &Volume, to: &Volume) -> Result<(), HostError> {
        let (volume, to) = (self.root.volume(volume), self.root.volume(to));
        self.patiently(&["rename", &volume, &to])
    }

    fn rename_snapshot(
        &self,
        volume: &Volume,
        snapshot: &Snapshot,
        to: &Snapshot,
    ) -> Result<(), HostError> {
        let (from, to) = (
            self.root.snapshot(volume, snapshot),
            self.root.snapshot(volume, to),
        );
        self.patiently(&["rename", &from, &to])
    }

    fn hide(&self, volume: &Volume) -> Result<(), HostError> {
        let name = self.root.volume(volume);
        // The kernel leaves a device that is open at this moment, and does not try again.
        let hide = || self.zfs(&["set", "volmode=none", &name]).map(drop);
        hide()?;
        self.nodes.wait_gone(&name, CLOSED, hide)
    }

    fn roll_back(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError> {
        let name = self.root.snapshot(volume, snapshot);
        self.patiently(&["rollback", &name])
    }
}

/// What `list -o name,written,origin,clones` prints, oldest snapshot first.
fn looks(root: &Root, printed: &str) -> Result<BTreeMap<Volume, Look>, HostError> {
    let mut looks: BTreeMap<Volume, Look> = BTreeMap::new();
    for line in printed.lines() {
        let mut fields = line.split('\t');
        let (Some(name), Some(written), Some(origin), Some(clones)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(HostError::new(
                ErrorKind::Other,
                format!("zfs list printed {line:?}"),
            ));
        };
        if let Some((volume, snapshot)) = name.split_once('@') {
            let Some(volume) = root.parse_volume(volume) else {
                continue;
            };
            let clones: Vec<&str> = clones
                .split(',')
                .filter(|clone| !clone.is_empty() && *clone != "-")
                .collect();
            let ours: Vec<Volume> = clones
                .iter()
                .filter_map(|it| root.parse_volume(it))
                .collect();
            looks.entry(volume).or_default().snapshots.push(Seen {
                name: Snapshot::parse(snapshot),
                has_others: ours.len() < clones.len(),
                clones: ours,
            });
        } else if let Some(volume) = root.parse_volume(name) {
            let look = looks.entry(volume).or_default();
            look.written = written.parse().unwrap_or(0);
            look.origin = root.parse_snapshot(origin);
        }
    }
    Ok(looks)
}

/// Writes an image to an empty device: blocks of zeros are what is there already.
fn copy(image: &File, device: &File) -> std::io::Result<()> {
    let mut at = 0;
    fs::for_each_chunk(image, |chunk| {
        if let Chunk::Data(bytes) = chunk {
            write_blocks(device, bytes, at)?;
        }
        at += chunk.len();
        Ok(())
    })
}

/// Writes the blocks of `bytes` that are not zero, as few pieces as can be.
fn write_blocks(device: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let block = |at: u64| fs::clamp_usize(BLOCK - at % BLOCK);
    let (mut from, mut to) = (0, 0);
    while to < bytes.len() {
        let end = bytes.len().min(to + block(offset + to as u64));
        if fs::is_zero(&bytes[to..end]) {
            device.write_all_at(&bytes[from..to], offset + from as u64)?;
            from = end;
        }
        to = end;
    }
    device.write_all_at(&bytes[from..], offset + from as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use icebox_engine::id::{HeadId, LayerId, SandboxId};

    use super::*;
    use crate::instance::Instance;
    use crate::volume::zfs::names::{Line, Next};

    #[test]
    fn a_listing_says_who_needs_what() {
        let instance = Instance::of_data_directory(Path::new("/var/lib/icebox"));
        let root = Root::new("tank/icebox", &instance).unwrap();
        let line = Line(HeadId {
            sandbox: SandboxId::random(),
            number: 1,
        });
        let (head, other) = (Volume::Head(line.clone()), Volume::Kept(line.clone()));
        let frozen = Snapshot::Frozen {
            layer: Some(LayerId::random()),
            line,
            next: Next::Head(2),
        };
        let of = |volume, snapshot| root.snapshot(volume, snapshot);
        let printed = [
            format!(
                "{}\t0\t-\ttank/foreign,{}",
                of(&other, &frozen),
                root.volume(&head)
            ),
            format!("{}@auto\t12\t-\t", root.volume(&other)),
            format!("{}\t4096\t-\t-", root.volume(&other)),
            format!("{}\t8192\t{}\t-", root.volume(&head), of(&other, &frozen)),
            format!("{}/data\t1\t-\t-", root.name()),
            format!("{}/data@x\t1\t-\t-", root.name()),
        ];
        let looks = looks(&root, &printed.join("\n")).unwrap();
        assert_eq!(looks.len(), 2);
        assert_eq!(looks[&head].origin, Some((other.clone(), frozen.clone())));
        assert_eq!(looks[&head].written, 8192);
        let [ours, foreign] = looks[&other].snapshots.as_slice() else {
            panic!("{looks:?}");
        };
        assert_eq!(ours.name, Some(frozen));
        assert_eq!(ours.clones, [head]);
        assert!(ours.has_others);
        assert_eq!(foreign.name, None);
        assert!(!foreign.has_others && foreign.clones.is_empty());
        super::looks(&root, "tank/icebox").unwrap_err();
    }

    #[test]
    fn blocks_of_zeros_are_not_written() {
        let device = tempfile::tempfile().unwrap();
        let length = 5 * BLOCK + 512;
        device.set_len(length).unwrap();
        let mut content = vec![0; fs::clamp_usize(length)];
        for at in [0, 1, 3 * BLOCK + 7, 5 * BLOCK] {
            content[fs::clamp_usize(at)] = 1;
        }
        // In pieces that end in the middle of blocks.
        let mut at = 0;
        for piece in content.chunks(40_000) {
            write_blocks(&device, piece, at).unwrap();
            at += piece.len() as u64;
        }
        let mut found = vec![0; content.len()];
        device.read_exact_at(&mut found, 0).unwrap();
        assert!(found == content);
        let stored = device.metadata().unwrap().blocks() * 512;
        assert!(stored <= 4 * BLOCK, "{stored}");
    }
}
