//! What the `dm-snapshot` driver does with devices: its own, stale ones, and other people's.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use icebox_engine::host::{
    BlockDevice, ErrorKind, FreezeByHost, LiveFreeze, Removed, Store as _, VolumeDriver as _,
};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::{LAYER_DISK, Object};
use icebox_host::instance::Instance;
use icebox_host::volume::DmSnapshot;

use crate::ground::{Disk, Ground, assert_same, run};

const MIB: u64 = 1 << 20;

pub(crate) async fn attach(ground: &Ground, disk: &Disk) -> PathBuf {
    match ground.driver.attach(&disk.head, &disk.chain).await.unwrap() {
        BlockDevice::Raw { path } => path,
        other => panic!("not a block device: {other:?}"),
    }
}

/// As a VMM does.
pub(crate) fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

pub(crate) fn write(file: &File, disk: &mut Disk, offset: u64, byte: u8) {
    let start = usize::try_from(offset).unwrap();
    disk.content[start..][..4096].fill(byte);
    file.write_all_at(&[byte; 4096], offset).unwrap();
    file.sync_all().unwrap();
}

pub(crate) fn by_host(ground: &Ground) -> &dyn FreezeByHost {
    match ground.driver.live_freeze() {
        LiveFreeze::ByHost(host) => host,
        LiveFreeze::ByVmm => panic!("this driver does not freeze"),
    }
}

/// A daemon that starts anew, knowing nothing.
pub(crate) fn another_process(ground: &Ground) -> DmSnapshot {
    let instance = Instance::of_data_directory(ground.layout.data());
    DmSnapshot::new(ground.layout.clone(), &instance)
}

fn top_name(ground: &Ground, disk: &Disk) -> String {
    let instance = Instance::of_data_directory(ground.layout.data());
    format!("icebox-{instance}-top-{}", disk.head.sandbox)
}

/// How many loop devices are on `file`.
pub(crate) fn loops_on(file: &Path) -> usize {
    fs::read_dir("/sys/block")
        .unwrap()
        .filter(|entry| {
            let path = entry.as_ref().unwrap().path().join("loop/backing_file");
            fs::read_to_string(path).is_ok_and(|backing| Path::new(backing.trim_end()) == file)
        })
        .count()
}

pub(crate) async fn inv_12_inv_13_dm_snapshot_a_device_in_use_is_an_error_and_all_below_it_stays(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    let vmm = open(&attach(ground, &disk).await);
    let error = ground.driver.detach(&disk.head).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.hint_text().unwrap().contains("open"), "{error}");
    // All of it is still there.
    let image = ground.layout.base_image(disk.chain.base.as_ref().unwrap());
    assert_eq!(loops_on(&image), 1);
    write(&vmm, &mut disk, MIB, 0x13);
    // Who only looks, as udev does, delays it.
    let mut looking = Command::new("sleep").arg("0.3").stdin(vmm).spawn().unwrap();
    assert_eq!(
        ground.driver.detach(&disk.head).await.unwrap(),
        Removed::Removed
    );
    looking.wait().unwrap();
    assert_eq!(loops_on(&image), 0);
    assert_eq!(
        ground.driver.detach(&disk.head).await.unwrap(),
        Removed::AlreadyAbsent
    );
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_14_dm_snapshot_stale_devices_are_replaced_and_no_others(ground: &Ground) {
    let mut disk = ground.disk().await;
    let other = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let path = attach(ground, &disk).await;
    let vmm = open(&path);
    write(&vmm, &mut disk, MIB, 0x14);
    // In use: adopted as it is.
    let later = another_process(ground);
    let adopted = later.attach(&disk.head, &disk.chain).await.unwrap();
    assert_eq!(adopted, BlockDevice::Raw { path: path.clone() });
    write(&vmm, &mut disk, 2 * MIB, 0x15);
    drop(vmm);
    // Not in use, and made by a process that is gone: made anew, with the same content.
    attach(ground, &other).await;
    let last = another_process(ground);
    let BlockDevice::Raw { path } = last.attach(&disk.head, &disk.chain).await.unwrap() else {
        panic!("not a block device");
    };
    assert_same(&fs::read(path).unwrap(), &disk.content, "the head");
    last.detach(&disk.head).await.unwrap();
    ground.assert_content(&other).await;

    // Somebody else's of the same name.
    let name = top_name(ground, &disk);
    run(Command::new("dmsetup").args(["create", &name, "--table", "0 8 zero"]));
    let error = ground
        .driver
        .attach(&disk.head, &disk.chain)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert!(error.to_string().contains(&name), "{error}");
    let error = ground.driver.detach(&disk.head).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    run(Command::new("dmsetup").args(["remove", &name]));
    ground.assert_content(&disk).await;
}

/// A kernel may say that it has no memory for a snapshot that comes while another one goes.
pub(crate) async fn inv_21_dm_snapshot_heads_come_while_others_go(ground: &Ground) {
    const ROUNDS: usize = 25;
    let disk = ground.disk().await;
    let other = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let come_and_go = async |disk: &Disk| {
        for _ in 0..ROUNDS {
            attach(ground, disk).await;
            assert_eq!(
                ground.driver.detach(&disk.head).await.unwrap(),
                Removed::Removed
            );
        }
    };
    tokio::join!(come_and_go(&disk), come_and_go(&other));
    ground.assert_content(&disk).await;
    ground.assert_content(&other).await;
}

pub(crate) async fn inv_15_dm_snapshot_heads_share_one_origin(ground: &Ground) {
    let disk = ground.disk().await;
    let image = ground.layout.base_image(disk.chain.base.as_ref().unwrap());
    let sibling = ground.disk_on(disk.chain.clone(), &disk.content).await;
    assert_eq!(loops_on(&image), 0);
    // Two first users at once.
    let (one, two) = tokio::join!(attach(ground, &disk), attach(ground, &sibling));
    assert_ne!(one, two);
    assert_eq!(loops_on(&image), 1);
    let vmm = open(&two);
    ground.driver.detach(&disk.head).await.unwrap();
    assert_eq!(loops_on(&image), 1);
    let mut first = [0; 4096];
    vmm.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first[..], disk.content[..4096]);
    drop(vmm);
    ground.driver.detach(&sibling.head).await.unwrap();
    assert_eq!(loops_on(&image), 0);
    // One that was never attached.
    let never = ground.disk_on(disk.chain.clone(), &disk.content).await;
    assert_eq!(
        ground.driver.detach(&never.head).await.unwrap(),
        Removed::AlreadyAbsent
    );
}

pub(crate) async fn inv_30_dm_snapshot_a_freeze_that_was_killed_ends_one_way_or_the_other(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    let vmm = open(&attach(ground, &disk).await);
    write(&vmm, &mut disk, MIB, 1);
    let name = top_name(ground, &disk);
    let to = HeadId {
        number: 2,
        ..disk.head.clone()
    };
    let layer = LayerId::random();
    let object = Object::Layer(layer.clone());
    let staging = ground.store.staged(&object).await.unwrap();
    // Killed when guest I/O had been stopped, with a table waiting that must never take effect.
    run(Command::new("dmsetup").args(["load", &name, "--table", "0 32768 zero"]));
    run(Command::new("dmsetup").args(["suspend", &name]));
    assert!(!by_host(ground).is_frozen(&disk.head, &to).await.unwrap());
    write(&vmm, &mut disk, 2 * MIB, 2);

    // Killed when the file had been moved, and nothing else.
    let from = ground.head_file(&disk);
    let next = ground.layout.head(&to, "cow");
    let length = fs::metadata(&from).unwrap().len();
    File::create(next).unwrap().set_len(length).unwrap();
    run(Command::new("dmsetup").args(["suspend", &name]));
    fs::rename(&from, staging.join(LAYER_DISK)).unwrap();
    assert!(by_host(ground).is_frozen(&disk.head, &to).await.unwrap());
    assert!(by_host(ground).is_frozen(&disk.head, &to).await.unwrap());
    ground.store.publish(&object, b"{}").await.unwrap();
    let before = disk.content.clone();
    disk.chain = ground.chain_over(&layer, &disk);
    disk.head = to;
    write(&vmm, &mut disk, 3 * MIB, 3);
    drop(vmm);
    ground.assert_content(&disk).await;
    let flat = ground.flattened(&disk.chain).await;
    assert_same(&flat, &before, "the layer");
}
