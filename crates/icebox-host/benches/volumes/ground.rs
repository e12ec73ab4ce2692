//! A driver on a disk of its own, whose every access is counted.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use icebox_engine::host::{BlockDevice, Chain, LiveFreeze, Store as _, VolumeDriver};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{BASE_IMAGE, Layout, Object};
use icebox_engine::unit::Bytes;
use icebox_host::instance::Instance;
use icebox_host::store::FileStore;
use icebox_host::volume;
use serde_json::{Value, json};

/// Bytes of the disk under everything; sparse.
const DISK: u64 = 8 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    DmSnapshot,
    Zfs,
    Reflink,
    Qcow2,
}

impl Driver {
    pub(crate) const ALL: &[Self] = &[Self::DmSnapshot, Self::Zfs, Self::Reflink, Self::Qcow2];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DmSnapshot => "dm-snapshot",
            Self::Zfs => "zfs",
            Self::Reflink => "reflink",
            Self::Qcow2 => "qcow2",
        }
    }

    /// Why it cannot run here.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let (needs, why) = match self {
            Self::DmSnapshot => ("/dev/mapper/control", "this kernel has no device-mapper"),
            Self::Zfs => ("/dev/zfs", "this kernel has no ZFS"),
            Self::Reflink | Self::Qcow2 => ("/dev/loop-control", "this kernel has no loop devices"),
        };
        (!Path::new(needs).exists()).then_some(why)
    }

    /// What its data directory is on.
    fn file_system(self) -> &'static str {
        match self {
            Self::Reflink => "xfs",
            Self::DmSnapshot | Self::Zfs | Self::Qcow2 => "ext4",
        }
    }
}

impl FromStr for Driver {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|driver| driver.name() == name);
        found.copied().ok_or(format!("there is no driver {name}"))
    }
}

/// Runs a tool to its end, and returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} is needed: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// What the disk under everything was asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Accesses {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) bytes: u64,
}

/// A disk, of which every access is counted. Gone when dropped.
struct Disk {
    device: PathBuf,
    directory: tempfile::TempDir,
}

impl Disk {
    fn new(directory: &Path) -> Self {
        let directory = tempfile::tempdir_in(directory).unwrap();
        let image = directory.path().join("disk");
        fs::File::create(&image).unwrap().set_len(DISK).unwrap();
        let device = run(Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image));
        Self {
            device: PathBuf::from(device.trim_end()),
            directory,
        }
    }

    fn accesses(&self) -> Accesses {
        let name = self.device.file_name().unwrap();
        let path = Path::new("/sys/block").join(name).join("stat");
        // Documentation/block/stat.rst: 0 reads, 2 sectors read, 4 writes, 6 sectors written.
        let text = fs::read_to_string(path).unwrap();
        let fields: Vec<u64> = text
            .split_whitespace()
            .map(|field| field.parse().unwrap())
            .collect();
        Accesses {
            reads: fields[0],
            writes: fields[4],
            bytes: (fields[2] + fields[6]) * 512,
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        undo(Command::new("losetup").arg("--detach").arg(&self.device));
    }
}

/// A file system on a disk. Unmounted when dropped.
struct FileSystem {
    mount: PathBuf,
    disk: Disk,
}

impl FileSystem {
    fn new(kind: &str, directory: &Path) -> Self {
        let disk = Disk::new(directory);
        let mount = disk.directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        run(Command::new(format!("mkfs.{kind}"))
            .arg("-q")
            .arg(&disk.device));
        run(Command::new("mount").args([&disk.device, &mount]));
        Self { mount, disk }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        undo(Command::new("umount").arg(&self.mount));
    }
}

/// A ZFS pool on a disk. Destroyed when dropped.
struct Pool {
    name: String,
    disk: Disk,
}

impl Pool {
    fn new(directory: &Path) -> Self {
        let disk = Disk::new(directory);
        let name = format!("icebox-bench-{}", std::process::id());
        run(Command::new("zpool")
            .args([
                "create",
                "-o",
                "cachefile=none",
                // What is freed is to go back to whatever the disk is a file on.
                "-o",
                "autotrim=on",
                "-O",
                "mountpoint=none",
                &name,
            ])
            .arg(&disk.device));
        run(Command::new("zfs").args(["create", &format!("{name}/icebox")]));
        Self { name, disk }
    }

    /// Bytes of it that are in use.
    fn allocated(&self) -> u64 {
        run(Command::new("zpool").args(["sync", &self.name]));
        let said = run(Command::new("zpool").args(["list", "-Hp", "-o", "alloc", &self.name]));
        said.trim().parse().unwrap()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        undo(Command::new("zpool").args(["destroy", "-f", &self.name]));
    }
}

/// While a panic unwinds, what cannot be undone is only told.
fn undo(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        other => eprintln!("{command:?}: {other:?}"),
    }
}

/// A sandbox's disk.
#[derive(Clone)]
pub(crate) struct Volume {
    pub(crate) head: HeadId,
    pub(crate) chain: Chain,
}

pub(crate) struct Ground {
    pub(crate) driver: Box<dyn VolumeDriver>,
    pub(crate) name: &'static str,
    pub(crate) layout: Layout,
    store: FileStore,
    /// How many bases there are: no two are equal.
    bases: u64,
    // Last: what is above them goes first.
    pool: Option<Pool>,
    file_system: FileSystem,
}

impl Ground {
    pub(crate) fn new(driver: Driver, directory: &Path) -> Self {
        let file_system = FileSystem::new(driver.file_system(), directory);
        let layout = Layout::new(
            file_system.mount.join("data"),
            file_system.disk.directory.path().join("run"),
        );
        let pool = (driver == Driver::Zfs).then(|| Pool::new(directory));
        let store = FileStore::open(layout.clone()).unwrap();
        let instance = Instance::of_data_directory(layout.data());
        let built: Box<dyn VolumeDriver> = match driver {
            Driver::DmSnapshot => Box::new(volume::DmSnapshot::new(layout.clone(), &instance)),
            Driver::Zfs => {
                let dataset = pool.as_ref().map(|pool| format!("{}/icebox", pool.name));
                let layout = layout.clone();
                Box::new(volume::Zfs::new(layout, &instance, dataset.as_deref()).unwrap())
            }
            Driver::Reflink => Box::new(volume::Reflink::new(layout.clone())),
            Driver::Qcow2 => Box::new(volume::Qcow2::new(layout.clone())),
        };
        Self {
            driver: built,
            name: driver.name(),
            layout,
            store,
            bases: 0,
            pool,
            file_system,
        }
    }

    /// A place on the file system of the data directory.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.file_system.mount.join(name)
    }

    pub(crate) fn accesses(&self) -> Accesses {
        let files = self.file_system.disk.accesses();
        let pool = self.pool.as_ref().map(|pool| pool.disk.accesses());
        let pool = pool.unwrap_or_default();
        Accesses {
            reads: files.reads + pool.reads,
            writes: files.writes + pool.writes,
            bytes: files.bytes + pool.bytes,
        }
    }

    /// Bytes that have been given out.
    pub(crate) fn used(&self) -> u64 {
        rustix::fs::sync();
        let status = rustix::fs::statvfs(self.layout.data()).unwrap();
        let files = (status.f_blocks - status.f_bfree) * status.f_frsize;
        files + self.pool.as_ref().map_or(0, Pool::allocated)
    }

    /// Imports a base of `size` bytes, of which `percent` hold data, in runs of a mebibyte.
    pub(crate) async fn base(&mut self, size: u64, percent: u64) -> Digest {
        const RUN: u64 = 1 << 20;
        let built = self.layout.data().join("staging/built");
        let file = fs::File::create(&built).unwrap();
        file.set_len(size).unwrap();
        self.bases += 1;
        let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(self.bases);
        let mut bytes = vec![0; usize::try_from(RUN).unwrap()];
        for run in 0..size / RUN {
            // As evenly as it can be.
            if (run + 1) * percent / 100 > run * percent / 100 {
                for word in bytes.chunks_exact_mut(8) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    word.copy_from_slice(&random.to_le_bytes());
                }
                file.write_all_at(&bytes, run * RUN).unwrap();
            }
        }
        let digest = self.store.digest(&built).await.unwrap();
        let object = Object::Base(digest.clone());
        self.store.stage(&object).await.unwrap();
        self.store
            .move_into_staging(&built, &object, BASE_IMAGE)
            .await
            .unwrap();
        self.store.publish(&object, b"{}").await.unwrap();
        self.driver.ensure_base(&digest).await.unwrap();
        digest
    }

    /// What lies under a head on `base`.
    pub(crate) fn on_base(&self, base: &Digest, size: u64) -> Chain {
        Chain {
            layers: Vec::new(),
            base: Some(base.clone()),
            size: Bytes(size),
        }
    }

    /// A new sandbox with a disk on `chain`.
    pub(crate) async fn volume(&self, chain: &Chain) -> Volume {
        let sandbox = SandboxId::random();
        self.store
            .commit(&Object::Sandbox(sandbox.clone()), b"{}")
            .await
            .unwrap();
        let head = HeadId { sandbox, number: 1 };
        self.driver.ensure_head(&head, chain).await.unwrap();
        Volume {
            head,
            chain: chain.clone(),
        }
    }

    pub(crate) async fn attach(&self, volume: &Volume) -> BlockDevice {
        self.driver
            .attach(&volume.head, &volume.chain)
            .await
            .unwrap()
    }

    /// Freezes an attached disk. It goes on as a head over the layer, which is returned.
    pub(crate) async fn freeze(&self, volume: &mut Volume) -> LayerId {
        let layer = LayerId::random();
        let object = Object::Layer(layer.clone());
        let staging = self.store.staged(&object).await.unwrap();
        let to = HeadId {
            number: volume.head.number + 1,
            ..volume.head.clone()
        };
        let chain = self.over(&layer, &volume.chain);
        match self.driver.live_freeze() {
            LiveFreeze::ByHost(host) => host.freeze(&volume.head, &to, &staging).await.unwrap(),
            LiveFreeze::ByVmm => {
                self.driver.ensure_head(&to, &chain).await.unwrap();
                self.driver.attach(&to, &chain).await.unwrap();
                self.driver.seal(&volume.head, &staging).await.unwrap();
            }
        }
        self.store.publish(&object, b"{}").await.unwrap();
        *volume = Volume { head: to, chain };
        layer
    }

    /// What lies under a head over `layer`, whose own is `below`.
    pub(crate) fn over(&self, layer: &LayerId, below: &Chain) -> Chain {
        let mut chain = below.clone();
        if self.driver.layers_are_whole() {
            chain.layers.clear();
            chain.base = None;
        }
        chain.layers.insert(0, layer.clone());
        chain
    }

    /// Detaches and removes a disk with its sandbox.
    pub(crate) async fn remove(&self, volume: &Volume) {
        self.driver.detach(&volume.head).await.unwrap();
        self.driver.remove_head(&volume.head).await.unwrap();
        self.store
            .trash(&Object::Sandbox(volume.head.sandbox.clone()))
            .await
            .unwrap();
        self.store.empty_trash().await.unwrap();
    }
}

/// A disk as QEMU's tools take it, with the options that guests' disks have.
pub(crate) fn blockdev(device: &BlockDevice) -> Value {
    let file = |path: &Path, driver: &str| json!({"driver": driver, "filename": path});
    match device {
        BlockDevice::Raw { path } => {
            let kind = if path.starts_with("/dev") {
                "host_device"
            } else {
                "file"
            };
            json!({"driver": "raw", "file": file(path, kind)})
        }
        BlockDevice::Qcow2 { head, layers, base } => {
            let mut below = json!({"driver": "raw", "read-only": true, "file": file(base, "file")});
            for layer in layers.iter().rev() {
                below = json!({"driver": "qcow2", "read-only": true, "file": file(layer, "file"), "backing": below});
            }
            json!({"driver": "qcow2", "l2-cache-entry-size": 4096, "file": file(head, "file"), "backing": below})
        }
    }
}
