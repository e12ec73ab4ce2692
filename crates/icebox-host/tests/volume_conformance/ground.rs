//! A file system to stand on, a store and a driver on it, and disks whose content is known.

use std::fs;
use std::future::Future;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;

use icebox_engine::host::{BlockDevice, Chain, Ensured, LiveFreeze, Store as _, VolumeDriver};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{BASE_IMAGE, Layout, Object};
use icebox_engine::unit::Bytes;
use icebox_host::instance::Instance;
use icebox_host::store::FileStore;
use icebox_host::volume;
use serde_json::{Value, json};

use crate::mounts::{can_map, can_mount, can_pool};
use crate::pool::{Pool, patiently};

/// Set in the process that runs inside the private mount namespace; names the directory to work in.
const INSIDE: &str = "ICEBOX_CONFORMANCE_DIRECTORY";
/// Bytes of every base. The rest of a larger disk reads as zeros.
pub(crate) const BASE_SIZE: u64 = 8 << 20;
/// Bytes of the file systems: the least that mkfs.xfs takes.
const FILE_SYSTEM_SIZE: u64 = 320 << 20;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Driver {
    DmSnapshot,
    Qcow2,
    Reflink,
    Zfs,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
    Btrfs,
}

impl FileSystem {
    fn make(self, image: &Path) {
        let (program, options): (_, &[&str]) = match self {
            Self::Ext4 => ("mkfs.ext4", &["-q", "-F"]),
            Self::Xfs => ("mkfs.xfs", &["-q"]),
            Self::Btrfs => ("mkfs.btrfs", &["-q"]),
        };
        run(Command::new(program).args(options).arg(image));
    }

    fn mount(self, image: &Path, mount: &Path) {
        let options = match self {
            // Nothing is written behind the tests' back while they look.
            Self::Ext4 | Self::Btrfs => "loop,commit=300",
            // It refuses a copy beside an original that it has not quite forgotten.
            Self::Xfs => "loop,nouuid",
        };
        run(Command::new("mount")
            .args(["-o", options])
            .args([image, mount]));
    }

    /// Its name to the kernel.
    fn kind(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext2/3/4",
            Self::Xfs => "XFS",
            Self::Btrfs => "btrfs",
        }
    }
}

/// Gives back what it was given, or what it made of it.
type Check = fn(Ground) -> Pin<Box<dyn Future<Output = Ground>>>;

/// Runs `check` on a fresh file system in a mount namespace of its own. `test` is the path of the calling test.
pub(crate) fn on(driver: Driver, file_system: FileSystem, test: &str, check: Check) {
    if let Ok(directory) = std::env::var(INSIDE) {
        let ground = Ground::new(driver, file_system, Path::new(&directory));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let ground = runtime.block_on(async {
            let ground = check(ground).await;
            ground.assert_clean().await;
            ground
        });
        drop(runtime);
        return ground.leave();
    }
    if matches!(driver, Driver::DmSnapshot) && !can_map(test) {
        return;
    }
    if matches!(driver, Driver::Zfs) && !can_pool(test) {
        return;
    }
    if !can_mount(file_system.kind(), test) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    // The harness knows its tests without the name of the crate.
    let test = test.split_once("::").unwrap().1;
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, directory.path())
        .status()
        .unwrap();
    // A pool belongs to no mount namespace.
    let is_left = Pool::of(directory.path()).destroy();
    assert!(status.success(), "{driver:?} on {file_system:?}: {status}");
    assert!(!is_left, "{driver:?} on {file_system:?}: its pool is left");
    assert_no_loop_device(directory.path());
}

/// No loop device is left on a file in `directory`.
fn assert_no_loop_device(directory: &Path) {
    for entry in fs::read_dir("/sys/block").unwrap() {
        let path = entry.unwrap().path().join("loop/backing_file");
        if let Ok(backing) = fs::read_to_string(&path) {
            assert!(
                !Path::new(backing.trim_end()).starts_with(directory),
                "{} is still on {backing}",
                path.display()
            );
        }
    }
}

/// Runs a tool to its end; its output is part of the failure.
pub(crate) fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} is needed: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn make(driver: Driver, layout: &Layout, pool: Option<&Pool>) -> Box<dyn VolumeDriver> {
    let layout = layout.clone();
    let instance = Instance::of_data_directory(layout.data());
    match driver {
        Driver::DmSnapshot => Box::new(volume::DmSnapshot::new(layout, &instance)),
        Driver::Qcow2 => Box::new(volume::Qcow2::new(layout)),
        Driver::Reflink => Box::new(volume::Reflink::new(layout)),
        Driver::Zfs => {
            let dataset = pool.map(Pool::dataset);
            Box::new(volume::Zfs::new(layout, &instance, dataset.as_deref()).unwrap())
        }
    }
}

pub(crate) struct Ground {
    kind: Driver,
    /// Where the driver keeps disks, if not in the data directory.
    pub(crate) pool: Option<Pool>,
    pub(crate) image: PathBuf,
    pub(crate) file_system: FileSystem,
    pub(crate) mount: PathBuf,
    pub(crate) layout: Layout,
    pub(crate) store: FileStore,
    pub(crate) driver: Box<dyn VolumeDriver>,
}

impl Ground {
    fn new(driver: Driver, file_system: FileSystem, directory: &Path) -> Self {
        let (image, mount) = (directory.join("image"), directory.join("mount"));
        fs::File::create(&image)
            .unwrap()
            .set_len(FILE_SYSTEM_SIZE)
            .unwrap();
        file_system.make(&image);
        fs::create_dir(&mount).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &mount]));
        let layout = Layout::new(mount.join("data"), directory.join("run"));
        let store = FileStore::open(layout.clone()).unwrap();
        let pool = matches!(driver, Driver::Zfs).then(|| Pool::make(directory));
        Self {
            kind: driver,
            driver: make(driver, &layout, pool.as_ref()),
            pool,
            image,
            file_system,
            mount,
            layout,
            store,
        }
    }

    /// The driver as another process has it: it knows nothing.
    pub(crate) fn another(&self) -> Box<dyn VolumeDriver> {
        self.another_in(&self.layout)
    }

    /// The driver for another data directory.
    pub(crate) fn another_in(&self, layout: &Layout) -> Box<dyn VolumeDriver> {
        make(self.kind, layout, self.pool.as_ref())
    }

    /// Whether layers and heads are files in the data directory.
    pub(crate) fn is_in_files(&self) -> bool {
        self.pool.is_none()
    }

    /// What is in the driver's pool, if it has one.
    pub(crate) fn names(&self) -> Vec<String> {
        self.pool.as_ref().map(Pool::names).unwrap_or_default()
    }

    /// What the size of a disk is a multiple of.
    pub(crate) fn block(&self) -> u64 {
        if self.is_in_files() { 512 } else { 16 << 10 }
    }

    /// Nothing is being made or removed any more, and nothing is there that the layout does not know.
    async fn assert_clean(&self) {
        let ours = format!(
            "icebox-{}-",
            Instance::of_data_directory(self.layout.data())
        );
        for entry in fs::read_dir("/sys/block").unwrap() {
            if let Ok(name) = fs::read_to_string(entry.unwrap().path().join("dm/name")) {
                assert!(!name.starts_with(&ours), "device {name} is left");
            }
        }
        assert_eq!(self.store.list_staging().await.unwrap(), []);
        self.store.empty_trash().await.unwrap();
        let mut names: Vec<_> = fs::read_dir(self.layout.data())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| self.is_in_files() || name != "zfs-owner")
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "bases",
                "format",
                "kernels",
                "layers",
                "lock",
                "memories",
                "sandboxes",
                "staging",
                "templates",
                "trash"
            ]
        );
    }

    /// The same place on another image: a daemon that starts again after its disk was replaced by `image`.
    pub(crate) fn restart_on(self, image: &Path) -> Self {
        drop(self.store);
        run(Command::new("umount").arg(&self.mount));
        self.file_system.mount(image, &self.mount);
        let store = FileStore::open(self.layout.clone()).unwrap();
        let pool = self.pool.map(|pool| pool.replace_by(&Pool::beside(image)));
        Self {
            store,
            driver: make(self.kind, &self.layout, pool.as_ref()),
            pool,
            ..self
        }
    }

    /// What the disks would hold if the power went now: copies of them at `copy`, and beside it.
    pub(crate) fn cut(&self, copy: &Path) {
        let copied = |from: &Path, to: &Path| {
            run(Command::new("cp").arg("--sparse=always").args([from, to]));
        };
        copied(&self.image, copy);
        if let Some(pool) = &self.pool {
            copied(pool.file(), &Pool::beside(copy));
        }
    }

    fn leave(self) {
        drop(self.store);
        run(Command::new("umount").arg(self.mount));
        if let Some(pool) = self.pool {
            pool.leave();
        }
    }

    /// Imports a base of [`BASE_SIZE`]: data, zeros that are stored, and holes.
    pub(crate) async fn base(&self) -> (Digest, Vec<u8>) {
        let mut content = vec![0; usize::try_from(BASE_SIZE).unwrap()];
        for (block, bytes) in content.chunks_mut(4096).enumerate() {
            if block % 7 < 3 {
                bytes.fill(u8::try_from(block % 250).unwrap() + 1);
            }
        }
        let built = self.layout.data().join("staging/built");
        let file = fs::File::create(&built).unwrap();
        file.set_len(BASE_SIZE).unwrap();
        for (block, bytes) in content.chunks(4096).enumerate() {
            if block % 7 < 5 {
                file.write_all_at(bytes, block as u64 * 4096).unwrap();
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
        assert_eq!(
            self.driver.ensure_base(&digest).await.unwrap(),
            Ensured::AlreadyPresent
        );
        (digest, content)
    }

    /// The first head of a new sandbox, which is not there yet.
    pub(crate) async fn disk_id(&self) -> HeadId {
        let sandbox = SandboxId::random();
        self.store
            .commit(&Object::Sandbox(sandbox.clone()), b"{}")
            .await
            .unwrap();
        HeadId { sandbox, number: 1 }
    }

    /// A new sandbox's disk on `chain`, whose content is `content`.
    pub(crate) async fn disk_on(&self, chain: Chain, content: &[u8]) -> Disk {
        let head = self.disk_id().await;
        let mut content = content.to_vec();
        content.resize(usize::try_from(chain.size.0).unwrap(), 0);
        assert_eq!(
            self.driver.ensure_head(&head, &chain).await.unwrap(),
            Ensured::Created
        );
        Disk {
            head,
            chain,
            content,
        }
    }

    /// A new sandbox's disk, twice the size of its new base.
    pub(crate) async fn disk(&self) -> Disk {
        let (base, content) = self.base().await;
        let chain = Chain {
            layers: Vec::new(),
            base: Some(base),
            size: Bytes(2 * BASE_SIZE),
        };
        self.disk_on(chain, &content).await
    }

    pub(crate) fn staging(&self, layer: &LayerId) -> PathBuf {
        self.layout.staging(&Object::Layer(layer.clone()))
    }

    /// The chain under a head that goes on top of `layer`, which was frozen off `disk`.
    pub(crate) fn chain_over(&self, layer: &LayerId, disk: &Disk) -> Chain {
        let mut chain = disk.chain.clone();
        if self.driver.layers_are_whole() {
            chain.layers.clear();
            chain.base = None;
        }
        chain.layers.insert(0, layer.clone());
        chain
    }

    /// Freezes a disk that nobody has open, up to the layer in staging. May be repeated.
    pub(crate) async fn freeze_unpublished(&self, disk: &Disk, layer: &LayerId) -> HeadId {
        let to = HeadId {
            number: disk.head.number + 1,
            ..disk.head.clone()
        };
        let staging = self
            .store
            .staged(&Object::Layer(layer.clone()))
            .await
            .unwrap();
        match self.driver.live_freeze() {
            LiveFreeze::ByHost(host) => host.freeze(&disk.head, &to, &staging).await.unwrap(),
            LiveFreeze::ByVmm => {
                let chain = self.chain_over(layer, disk);
                self.driver.ensure_head(&to, &chain).await.unwrap();
                self.driver.attach(&to, &chain).await.unwrap();
                self.driver.seal(&disk.head, &staging).await.unwrap();
            }
        }
        to
    }

    /// Freezes a disk that nobody has open. It goes on as a head over the layer, which is returned.
    pub(crate) async fn freeze(&self, disk: &mut Disk) -> LayerId {
        let layer = LayerId::random();
        self.driver.flush(&disk.head).await.unwrap();
        let to = self.freeze_unpublished(disk, &layer).await;
        self.store
            .publish(&Object::Layer(layer.clone()), b"{}")
            .await
            .unwrap();
        disk.chain = self.chain_over(&layer, disk);
        disk.head = to;
        layer
    }

    /// Writes `length` bytes of `byte` at `offset` to the attached disk.
    pub(crate) async fn write(&self, disk: &mut Disk, offset: u64, length: u64, byte: u8) {
        self.write_all(disk, &[(offset, length, byte)]).await;
    }

    pub(crate) async fn write_all(&self, disk: &mut Disk, writes: &[(u64, u64, u8)]) {
        for (offset, length, byte) in writes {
            let offset = usize::try_from(*offset).unwrap();
            let length = usize::try_from(*length).unwrap();
            disk.content[offset..offset + length].fill(*byte);
        }
        match self.driver.attach(&disk.head, &disk.chain).await.unwrap() {
            BlockDevice::Raw { path } => {
                let file = patiently(|| fs::OpenOptions::new().write(true).open(&path));
                for (offset, length, byte) in writes {
                    file.write_all_at(&vec![*byte; usize::try_from(*length).unwrap()], *offset)
                        .unwrap();
                }
            }
            device @ BlockDevice::Qcow2 { .. } => {
                let mut command = Command::new("qemu-io");
                for (offset, length, byte) in writes {
                    command.args(["-c", &format!("write -P {byte} {offset} {length}")]);
                }
                run(command.arg(format!("json:{}", blockdev(&device))));
            }
        }
        self.driver.detach(&disk.head).await.unwrap();
    }

    /// The disk's content as a guest reads it.
    pub(crate) async fn read(&self, disk: &Disk) -> Vec<u8> {
        let content = match self.driver.attach(&disk.head, &disk.chain).await.unwrap() {
            BlockDevice::Raw { path } => patiently(|| fs::read(&path)),
            device @ BlockDevice::Qcow2 { .. } => {
                let out = tempfile::NamedTempFile::new().unwrap();
                run(Command::new("qemu-img")
                    .args(["convert", "-O", "raw"])
                    .arg(format!("json:{}", blockdev(&device)))
                    .arg(out.path()));
                fs::read(out.path()).unwrap()
            }
        };
        self.driver.detach(&disk.head).await.unwrap();
        content
    }

    /// The file that holds what was written to a head, whichever driver's it is.
    pub(crate) fn head_file(&self, disk: &Disk) -> PathBuf {
        let number = disk.head.number.to_string();
        fs::read_dir(self.layout.heads(&disk.head.sandbox))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.file_stem().is_some_and(|stem| *stem == *number))
            .unwrap()
    }

    /// Does to a head what makes it another disk than its sandbox's manifest says.
    pub(crate) fn spoil(&self, disk: &Disk) {
        let size = disk.chain.size.0;
        if let Some(pool) = &self.pool {
            let volume = pool.volume_of(disk);
            for size in [self.block(), size + self.block()] {
                pool.zfs(&["set", &format!("volsize={size}"), &volume]);
            }
            return;
        }
        let path = self.head_file(disk);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(0).unwrap();
        file.set_len(size + 4096).unwrap();
    }

    /// Whether a layer's data is the same storage as the head's that it was.
    pub(crate) fn shares_with_layers(&self) -> bool {
        matches!(self.kind, Driver::Reflink)
    }

    /// Removes a layer that nothing needs, as a collection does.
    pub(crate) async fn drop_layer(&self, layer: &LayerId) {
        self.driver.remove_layer(layer).await.unwrap();
        let object = Object::Layer(layer.clone());
        self.store.trash(&object).await.unwrap();
        self.store.empty_trash().await.unwrap();
    }

    pub(crate) async fn assert_content(&self, disk: &Disk) {
        let found = self.read(disk).await;
        assert_same(&found, &disk.content, &format!("head {}", disk.head));
    }

    pub(crate) async fn usage(&self, disk: &Disk) -> Bytes {
        self.driver.head_usage(&disk.head).await.unwrap()
    }

    /// The content of a layer or base, by way of a flattened copy.
    pub(crate) async fn flattened(&self, chain: &Chain) -> Vec<u8> {
        let out = self.mount.join(format!("flat-{}", LayerId::random()));
        self.driver.flatten(chain, &out).await.unwrap();
        let content = fs::read(&out).unwrap();
        fs::remove_file(out).unwrap();
        content
    }

    /// Digest and length of every file under every base and layer.
    pub(crate) async fn immutable(&self) -> Vec<(PathBuf, Digest)> {
        let mut found = Vec::new();
        for area in ["bases", "layers"] {
            for object in fs::read_dir(self.layout.data().join(area)).unwrap() {
                for file in fs::read_dir(object.unwrap().path()).unwrap() {
                    let path = file.unwrap().path();
                    let digest = self.store.digest(&path).await.unwrap();
                    found.push((path, digest));
                }
            }
        }
        if !self.is_in_files() {
            for layer in self.driver.list_layers().await.unwrap() {
                let chain = Chain {
                    layers: vec![layer.clone()],
                    base: None,
                    size: Bytes(8 * BASE_SIZE),
                };
                let out = self.mount.join(layer.as_str());
                self.driver.flatten(&chain, &out).await.unwrap();
                let digest = self.store.digest(&out).await.unwrap();
                fs::remove_file(&out).unwrap();
                found.push((out, digest));
            }
        }
        found.sort();
        found
    }
}

/// A sandbox's disk, and what is on it.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) head: HeadId,
    pub(crate) chain: Chain,
    pub(crate) content: Vec<u8>,
}

/// Compares without printing megabytes.
pub(crate) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if found != expected {
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        let at = differs.unwrap();
        panic!(
            "{what}: byte {at:#x} is {} instead of {}",
            found[at], expected[at]
        );
    }
}

/// A chain as QEMU's tools take it, spelled out: what the files' headers say of other files does not matter.
pub(crate) fn blockdev(device: &BlockDevice) -> Value {
    let file = |path: &Path| json!({"driver": "file", "filename": path});
    match device {
        BlockDevice::Raw { path } => json!({"driver": "raw", "file": file(path)}),
        BlockDevice::Qcow2 { head, layers, base } => {
            let mut below = json!({"driver": "raw", "read-only": true, "file": file(base)});
            for layer in layers.iter().rev() {
                below = json!({"driver": "qcow2", "read-only": true, "file": file(layer), "backing": below});
            }
            json!({"driver": "qcow2", "file": file(head), "backing": below})
        }
    }
}
