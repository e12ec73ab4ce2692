//! What breaks under a head of the `dm-snapshot` driver, and what others do to it meanwhile.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use futures_util::future::join_all;
use icebox_engine::host::{ErrorKind, Removed, Store as _, Trouble, VolumeDriver as _};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::{BASE_IMAGE, LAYER_DISK, Layout, Object};
use icebox_host::instance::Instance;
use icebox_host::volume::DmSnapshot;

use crate::devices::{another_process, attach, by_host, loops_on, open, write};
use crate::ground::{Ground, assert_same, run};

const MIB: u64 = 1 << 20;

/// What a tool says; its failure fails the test.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn dmsetup(arguments: &[&str]) {
    run(Command::new("dmsetup").args(arguments));
}

fn device_name(ground: &Ground, rest: &str) -> String {
    let instance = Instance::of_data_directory(ground.layout.data());
    format!("icebox-{instance}-{rest}")
}

fn head_name(ground: &Ground, head: &HeadId) -> String {
    device_name(ground, &format!("head-{}-{}", head.sandbox, head.number))
}

/// Names of the devices of this installation.
pub(crate) fn devices(ground: &Ground) -> Vec<String> {
    let ours = device_name(ground, "");
    let listed = said(Command::new("dmsetup").args(["ls"]));
    let names = listed.lines().filter_map(|line| line.split('\t').next());
    names
        .filter(|name| name.starts_with(&ours))
        .map(ToOwned::to_owned)
        .collect()
}

/// Gives a device that is in use another table.
fn replace_table(name: &str, table: &str) {
    dmsetup(&["suspend", "--nolockfs", name]);
    dmsetup(&["load", name, "--table", table]);
    dmsetup(&["resume", name]);
}

/// What the driver has to say of a head that is attached.
async fn trouble(ground: &Ground, head: &HeadId) -> Option<String> {
    let watch = ground.driver.watch().unwrap();
    let mut troubled = watch
        .look(std::slice::from_ref(head))
        .await
        .unwrap()
        .troubled;
    assert!(troubled.len() < 2, "{troubled:?}");
    let (of, trouble) = troubled.pop()?;
    assert_eq!(of, *head);
    match trouble {
        Trouble::Lost { why } => Some(why),
        Trouble::Starved { why } => panic!("{why}"),
    }
}

/// Tries a freeze that must not happen: it is refused, and the head is where it was.
async fn assert_no_freeze(ground: &Ground, head: &HeadId) {
    let to = HeadId {
        number: head.number + 1,
        ..head.clone()
    };
    let layer = Object::Layer(LayerId::random());
    let staging = ground.store.staged(&layer).await.unwrap();
    let error = by_host(ground)
        .freeze(head, &to, &staging)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(
        error.hint_text().unwrap().contains("--generation"),
        "{error:?}"
    );
    assert!(!by_host(ground).is_frozen(head, &to).await.unwrap());
    assert!(!staging.join(LAYER_DISK).exists());
    ground.driver.remove_head(&to).await.unwrap();
    ground.store.discard(&layer).await.unwrap();
}

/// A device between a head and its store, to break.
struct Between {
    name: String,
    store: String,
    sectors: String,
}

impl Between {
    fn under(ground: &Ground, head: &HeadId) -> Self {
        let head = head_name(ground, head);
        let table = said(Command::new("dmsetup").args(["table", &head]));
        // 0 LENGTH snapshot ORIGIN STORE P 8
        let fields: Vec<&str> = table.split(' ').collect();
        let store = fields[4].to_owned();
        let size = Path::new("/sys/dev/block").join(&store).join("size");
        let between = Self {
            name: device_name(ground, "between"),
            sectors: fs::read_to_string(size).unwrap().trim().to_owned(),
            store,
        };
        let linear = format!("0 {} linear {} 0", between.sectors, between.store);
        dmsetup(&["create", &between.name, "--table", &linear]);
        let node = format!("/dev/mapper/{}", between.name);
        let through = table.replace(&format!(" {} P", between.store), &format!(" {node} P"));
        replace_table(&head, &through);
        between
    }

    fn breaks(&self, how: &str) {
        let Self {
            name,
            store,
            sectors,
        } = self;
        let table = match how {
            "flakey" => format!("0 {sectors} flakey {store} 0 0 3600 1 error_writes"),
            how => format!("0 {sectors} {how}"),
        };
        replace_table(name, &table);
    }
}

pub(crate) async fn inv_03_inv_28_dm_snapshot_a_store_that_fails_is_seen_and_no_layer(
    ground: &Ground,
) {
    let first = ground.disk().await;
    for how in ["error", "flakey"] {
        let mut disk = ground.disk_on(first.chain.clone(), &first.content).await;
        ground.write(&mut disk, 0, 4096, 1).await;
        ground.freeze(&mut disk).await;
        let vmm = open(&attach(ground, &disk).await);
        write(&vmm, &mut disk, MIB, 2);
        let between = Between::under(ground, &disk.head);
        write(&vmm, &mut disk, 2 * MIB, 3);
        assert_eq!(trouble(ground, &disk.head).await, None);

        between.breaks(how);
        // In the host's cache as yet: the flush is what fails, and so the freeze never begins.
        vmm.write_all_at(&[4; 4096], 3 * MIB).unwrap();
        let error = ground.driver.flush(&disk.head).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        let why = trouble(ground, &disk.head).await.unwrap();
        assert!(why.contains("gave up") && why.contains(".cow"), "{why}");
        assert_no_freeze(ground, &disk.head).await;
        drop(vmm);
        assert_eq!(
            ground.driver.detach(&disk.head).await.unwrap(),
            Removed::Removed,
            "{how}"
        );
        assert_eq!(
            trouble(ground, &disk.head).await,
            None,
            "it is not attached"
        );
        dmsetup(&["remove", &between.name]);
        // The store could not be told that it is given up: what was written before is there.
        ground.assert_content(&disk).await;
    }
}

pub(crate) async fn inv_28_dm_snapshot_a_full_file_system_is_seen_and_costs_one_head(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, 4096, 1).await;
    let layer = ground.freeze(&mut disk).await;
    let kept = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let vmm = open(&attach(ground, &disk).await);
    write(&vmm, &mut disk, MIB, 2);
    // All but a little is taken.
    let ballast = ground.mount.join("ballast");
    let file = File::create(&ballast).unwrap();
    let mut length = 0;
    while file.write_all_at(&vec![7; 1 << 20], length).is_ok() {
        length += MIB;
    }
    file.set_len(length - MIB).unwrap();
    file.sync_all().unwrap();
    let written = (0..8).try_for_each(|n| {
        vmm.write_all_at(&vec![3; 1 << 20], n * MIB)
            .and_then(|()| vmm.sync_all())
    });
    written.unwrap_err();
    let why = trouble(ground, &disk.head).await.unwrap();
    assert!(why.contains("are free on its file system"), "{why}");
    drop(file);
    fs::remove_file(&ballast).unwrap();
    assert_no_freeze(ground, &disk.head).await;
    drop(vmm);
    ground.driver.detach(&disk.head).await.unwrap();
    // For good: it is refused from now on, also by a daemon that did not see it happen.
    let error = another_process(ground)
        .attach(&disk.head, &disk.chain)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(
        error.hint_text().unwrap().contains("--generation"),
        "{error:?}"
    );
    assert_no_freeze(ground, &disk.head).await;
    // Set aside, it can be kept, and is refused below another head as well.
    let aside = LayerId::random();
    let object = Object::Layer(aside.clone());
    let staging = ground.store.staged(&object).await.unwrap();
    ground.driver.seal(&disk.head, &staging).await.unwrap();
    ground.store.publish(&object, b"{}").await.unwrap();
    let over = ground.chain_over(&aside, &disk);
    let head = ground.disk_on(over.clone(), &[]).await.head;
    for error in [
        ground.driver.attach(&head, &over).await.unwrap_err(),
        ground
            .driver
            .flatten(&over, &ground.mount.join("flat"))
            .await
            .unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    assert_eq!(devices(ground), Vec::<String>::new());
    // What it was based on is whole.
    assert_eq!(disk.chain.layers, [layer]);
    ground.assert_content(&kept).await;
}

pub(crate) async fn inv_28_dm_snapshot_heads_starve_before_they_can_be_lost(ground: &Ground) {
    let mut disk = ground.disk().await;
    let vmm = open(&attach(ground, &disk).await);
    let look = async || {
        let watch = ground.driver.watch().unwrap();
        watch.look(std::slice::from_ref(&disk.head)).await.unwrap()
    };
    let plenty = look().await;
    assert_eq!(plenty.troubled, []);
    let ballast = File::create(ground.mount.join("ballast")).unwrap();
    let free = || icebox_host::fs::space(&ground.mount).unwrap();
    // A thirty-second part of the file system, and what a second's writes could take of it.
    let reserve = free().total.0 / 32;
    let take_all_but = |left: u64| {
        let length = ballast.metadata().unwrap().len() + free().available.0 - left;
        rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, length).unwrap();
    };
    take_all_but(2 * reserve);
    let close = look().await;
    assert_eq!(close.troubled, []);
    assert!(close.again_in < plenty.again_in, "{close:?}");
    take_all_but(reserve / 2);
    let starved = look().await;
    let [(head, Trouble::Starved { why })] = &starved.troubled[..] else {
        panic!("{starved:?}");
    };
    assert_eq!(*head, disk.head);
    assert!(why.contains("only") && why.contains("free"), "{why}");
    ballast.set_len(0).unwrap();
    assert_eq!(look().await.troubled, []);
    write(&vmm, &mut disk, MIB, 2);
    drop(vmm);
    ground.driver.detach(&disk.head).await.unwrap();
    fs::remove_file(ground.mount.join("ballast")).unwrap();
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_28_dm_snapshot_a_base_that_cannot_be_read_is_an_error_of_the_read(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    let vmm = open(&attach(ground, &disk).await);
    write(&vmm, &mut disk, MIB, 2);
    let base = devices(ground)
        .into_iter()
        .find(|name| name.contains("-base-"))
        .unwrap();
    let table = said(Command::new("dmsetup").args(["table", &base]));
    replace_table(&base, &format!("0 {} error", disk.chain.size.0 / 512));
    let mut sector = [0; 4096];
    // Nobody has read it yet, so it is in no cache.
    vmm.read_exact_at(&mut sector, 4 * MIB).unwrap_err();
    // Whole chunks need nothing from below.
    write(&vmm, &mut disk, 5 * MIB, 5);
    assert_eq!(trouble(ground, &disk.head).await, None);
    dmsetup(&["suspend", "--nolockfs", &base]);
    run(Command::new("sh").args([
        "-euc",
        r#"printf '%s\n' "$2" | dmsetup load --readonly "$1"; dmsetup resume "$1""#,
        "sh",
        &base,
        &table,
    ]));
    drop(vmm);
    ground.driver.detach(&disk.head).await.unwrap();
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_15_dm_snapshot_a_base_that_was_deleted_serves_who_has_it_and_nobody_else(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    let late = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let vmm = open(&attach(ground, &disk).await);
    let image = ground.layout.base_image(disk.chain.base.as_ref().unwrap());
    let aside = ground.mount.join("aside");
    fs::rename(&image, &aside).unwrap();
    write(&vmm, &mut disk, MIB, 2);
    let mut found = vec![0; disk.content.len()];
    vmm.read_exact_at(&mut found, 0).unwrap();
    assert_same(&found, &disk.content, "a disk whose base has no name");
    let error = ground
        .driver
        .attach(&late.head, &late.chain)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains(BASE_IMAGE), "{error}");
    drop(vmm);
    ground.driver.detach(&disk.head).await.unwrap();
    assert_eq!(devices(ground), Vec::<String>::new());
    assert_eq!(loops_on(&aside), 0);
    fs::rename(&aside, &image).unwrap();
    ground.assert_content(&disk).await;
    ground.assert_content(&late).await;
}

pub(crate) async fn inv_15_dm_snapshot_an_attach_without_a_loop_device_leaves_nothing(
    ground: &Ground,
) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, MIB, 4096, 1).await;
    ground.freeze(&mut disk).await;
    // Only this test sees it: it has mounts of its own.
    run(Command::new("mount").args(["--bind", "/dev/null", "/dev/loop-control"]));
    let error = ground
        .driver
        .attach(&disk.head, &disk.chain)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("a free loop device"), "{error}");
    assert_eq!(devices(ground), Vec::<String>::new());
    run(Command::new("umount").arg("/dev/loop-control"));
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_15_dm_snapshot_users_come_and_go_at_once(ground: &Ground) {
    let first = ground.disk().await;
    let image = ground.layout.base_image(first.chain.base.as_ref().unwrap());
    let mut disks = vec![first];
    for _ in 1..6 {
        let next = ground
            .disk_on(disks[0].chain.clone(), &disks[0].content)
            .await;
        disks.push(next);
    }
    for round in 1..5_u8 {
        let visits = disks
            .iter_mut()
            .zip(1_u8..)
            .map(|(disk, number)| async move {
                let at = u64::from(number) * MIB;
                ground.write(disk, at, 4096, round * 10 + number).await;
                ground.assert_content(disk).await;
            });
        join_all(visits).await;
        assert_eq!(loops_on(&image), 0);
        assert_eq!(devices(ground), Vec::<String>::new());
    }
}

pub(crate) async fn inv_14_dm_snapshot_a_foreign_device_of_our_name_is_refused_and_stays(
    ground: &Ground,
) {
    let disk = ground.disk().await;
    let base = disk.chain.base.as_ref().unwrap();
    let base = format!("base-{base}-{}", disk.chain.size.0 / 512);
    for name in [head_name(ground, &disk.head), device_name(ground, &base)] {
        dmsetup(&["create", &name, "--table", "0 8 zero"]);
        let error = ground
            .driver
            .attach(&disk.head, &disk.chain)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(error.to_string().contains(&name), "{error}");
        assert_eq!(devices(ground), std::slice::from_ref(&name));
        let table = said(Command::new("dmsetup").args(["table", &name]));
        assert_eq!(table, "0 8 zero");
        dmsetup(&["remove", &name]);
    }
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_14_dm_snapshot_two_daemons_leave_each_other_alone(ground: &Ground) {
    let mut disk = ground.disk().await;
    let vmm = open(&attach(ground, &disk).await);
    let before = devices(ground);
    // Another data directory; the same names of sandboxes.
    let data = ground.mount.join("other");
    let other = DmSnapshot::new(
        Layout::new(&data, ground.mount.join("run")),
        &Instance::of_data_directory(&data),
    );
    fs::create_dir(&data).unwrap();
    other.probe().await.unwrap();
    assert_eq!(
        other.detach(&disk.head).await.unwrap(),
        Removed::AlreadyAbsent
    );
    // The same data directory: the store lets one daemon in. One that starts while the last ends tries its devices.
    another_process(ground).probe().await.unwrap();
    assert_eq!(devices(ground), before);
    write(&vmm, &mut disk, MIB, 2);
    drop(vmm);
    fs::remove_dir_all(data).unwrap();
    ground.assert_content(&disk).await;
}

pub(crate) async fn an_image_that_is_no_whole_number_of_sectors_is_refused_by_dm_snapshot(
    ground: &Ground,
) {
    let built: PathBuf = ground.layout.data().join("staging/built");
    fs::write(&built, vec![1; 1000]).unwrap();
    let digest = ground.store.digest(&built).await.unwrap();
    let object = Object::Base(digest.clone());
    ground.store.stage(&object).await.unwrap();
    ground
        .store
        .move_into_staging(&built, &object, BASE_IMAGE)
        .await
        .unwrap();
    ground.store.publish(&object, b"{}").await.unwrap();
    let error = ground.driver.ensure_base(&digest).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("1000 bytes"), "{error}");
    assert!(error.hint_text().unwrap().contains("truncate"), "{error:?}");
    ground.store.trash(&object).await.unwrap();
}
