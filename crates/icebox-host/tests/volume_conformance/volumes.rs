//! What the `zfs` driver does in a pool: with its own volumes, with what others made, and with a pool that is not there.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, Removed,
    Store as _, VolumeDriver,
};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::Object;
use icebox_engine::unit::Bytes;
use icebox_host::instance::Instance;
use icebox_host::volume::Zfs;

use crate::ground::{BASE_SIZE, Disk, Ground};
use crate::pool::{Pool, patiently};

const MIB: u64 = 1 << 20;

fn pool(ground: &Ground) -> &Pool {
    ground.pool.as_ref().unwrap()
}

/// The name of our part of the dataset.
fn root(ground: &Ground) -> String {
    let instance = Instance::of_data_directory(ground.layout.data());
    format!("{}/{instance}", pool(ground).dataset())
}

fn by_host(ground: &Ground) -> &dyn FreezeByHost {
    match ground.driver.live_freeze() {
        LiveFreeze::ByHost(host) => host,
        LiveFreeze::ByVmm => panic!("this driver does not freeze"),
    }
}

async fn open(ground: &Ground, disk: &Disk) -> fs::File {
    let BlockDevice::Raw { path } = ground.driver.attach(&disk.head, &disk.chain).await.unwrap()
    else {
        panic!("not a raw device");
    };
    patiently(|| OpenOptions::new().read(true).write(true).open(&path))
}

fn with_prefix(ground: &Ground, prefix: &str) -> Vec<String> {
    let volumes = pool(ground).volumes().into_iter();
    volumes.filter(|name| name.starts_with(prefix)).collect()
}

pub(crate) async fn inv_12_a_zfs_head_in_use_is_an_error_and_stays(ground: &Ground) {
    let whole = ground.disk().await;
    let mut frozen = ground.disk_on(whole.chain.clone(), &whole.content).await;
    ground.write(&mut frozen, 0, MIB, 1).await;
    ground.freeze(&mut frozen).await;
    for disk in [whole, frozen] {
        let vmm = open(ground, &disk).await;
        let error = ground.driver.remove_head(&disk.head).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.hint_text().unwrap().contains("fuser"), "{error}");
        let mut first = [0; 512];
        vmm.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first[..], disk.content[..512]);
        drop(vmm);
        ground.assert_content(&disk).await;
        assert_eq!(
            ground.driver.remove_head(&disk.head).await.unwrap(),
            Removed::Removed
        );
    }
}

pub(crate) async fn inv_15_two_first_users_import_one_zfs_base(ground: &Ground) {
    let (base, _) = ground.base().await;
    ground.driver.remove_base(&base).await.unwrap();
    assert_eq!(pool(ground).volumes(), Vec::<String>::new());
    let (one, two) = tokio::join!(
        ground.driver.ensure_base(&base),
        ground.driver.ensure_base(&base)
    );
    let mut made = [one.unwrap(), two.unwrap()];
    made.sort_by_key(|it| *it == Ensured::AlreadyPresent);
    assert_eq!(made, [Ensured::Created, Ensured::AlreadyPresent]);
    assert_eq!(pool(ground).volumes(), [format!("base-{base}")]);
}

pub(crate) async fn inv_24_zfs_layers_go_in_any_order(ground: &Ground) {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]] {
        let mut disk = ground.disk().await;
        let base = disk.chain.base.clone().unwrap();
        let mut layers = Vec::new();
        let mut forks = Vec::new();
        for byte in 1..=3_u8 {
            ground
                .write(&mut disk, u64::from(byte) * MIB, MIB, byte)
                .await;
            layers.push(ground.freeze(&mut disk).await);
            let mut fork = ground.disk_on(disk.chain.clone(), &disk.content).await;
            ground.write(&mut fork, 0, 4096, 0x10 + byte).await;
            forks.push(fork);
        }
        // The base goes first: nothing names it any more.
        ground.driver.remove_base(&base).await.unwrap();
        ground.store.trash(&Object::Base(base)).await.unwrap();
        for next in order {
            ground.drop_layer(&layers[next]).await;
            assert_eq!(
                ground.driver.remove_layer(&layers[next]).await.unwrap(),
                Removed::AlreadyAbsent
            );
            for disk in forks.iter().chain([&disk]) {
                ground.assert_content(disk).await;
            }
        }
        assert_eq!(ground.driver.list_layers().await.unwrap(), []);
        // The line that the others came from goes before them.
        ground.driver.remove_head(&disk.head).await.unwrap();
        for _ in 0..3 {
            for fork in &forks {
                ground.assert_content(fork).await;
            }
            let names = pool(ground).volumes();
            assert_eq!(names.len(), forks.len(), "{names:?}");
            let fork = forks.swap_remove(forks.len() / 2);
            ground.driver.remove_head(&fork.head).await.unwrap();
        }
        assert_eq!(pool(ground).volumes(), Vec::<String>::new());
    }
}

pub(crate) async fn pauses_and_resumes_leave_few_zfs_volumes(ground: &Ground) {
    let mut disk = ground.disk().await;
    let mut paused: Option<LayerId> = None;
    let mut slowest = Duration::ZERO;
    for cycle in 1..=20_u8 {
        ground
            .write(&mut disk, u64::from(cycle % 8) * MIB, MIB, cycle)
            .await;
        let begun = Instant::now();
        let layer = ground.freeze(&mut disk).await;
        slowest = slowest.max(begun.elapsed());
        ground.driver.remove_head(&disk.head).await.unwrap();
        disk.head.number += 1;
        ground
            .driver
            .ensure_head(&disk.head, &disk.chain)
            .await
            .unwrap();
        if let Some(old) = paused.replace(layer) {
            ground.drop_layer(&old).await;
        }
        let volumes = pool(ground).volumes();
        assert!(volumes.len() <= 3, "{volumes:?}");
    }
    ground.assert_content(&disk).await;
    let names = ground.names();
    assert!(names.len() <= 8, "{names:?}");
    eprintln!("the slowest of 20 freezes took {slowest:?}");
}

pub(crate) async fn inv_25_a_zfs_import_that_was_killed_is_no_base(ground: &Ground) {
    let (base, content) = ground.base().await;
    let chain = Chain {
        layers: Vec::new(),
        base: Some(base.clone()),
        size: Bytes(BASE_SIZE),
    };
    let (whole, import) = (
        format!("{}/base-{base}", root(ground)),
        format!("{}/import-{base}", root(ground)),
    );
    // Killed before it was given its name, before its snapshot, in the middle of the copy, before the copy.
    for step in 0..4 {
        let pool = pool(ground);
        pool.zfs(&["rename", &whole, &import]);
        if step > 0 {
            pool.zfs(&["destroy", &format!("{import}@image")]);
        }
        if step > 1 {
            pool.zfs(&["destroy", &import]);
            pool.zfs(&["create", "-s", "-b", "16K", "-V", "8M", &import]);
        }
        let again = ground.another();
        let disk = Disk {
            head: ground.disk_id().await,
            chain: chain.clone(),
            content: content.clone(),
        };
        let error = again.ensure_head(&disk.head, &chain).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_eq!(again.ensure_base(&base).await.unwrap(), Ensured::Created);
        assert_eq!(pool.volumes(), [format!("base-{base}")]);
        again.ensure_head(&disk.head, &chain).await.unwrap();
        let BlockDevice::Raw { path } = again.attach(&disk.head, &chain).await.unwrap() else {
            panic!("not a raw device");
        };
        assert!(patiently(|| fs::read(&path)) == content, "step {step}");
        again.remove_head(&disk.head).await.unwrap();
    }
    // And one that nobody needs any more goes with the next start.
    pool(ground).zfs(&["rename", &whole, &import]);
    assert_eq!(ground.another().list_layers().await.unwrap(), []);
    assert_eq!(pool(ground).volumes(), Vec::<String>::new());
    ground.driver.remove_base(&base).await.unwrap();
}

/// Nothing that a box could be given shows a base or a layer.
pub(crate) async fn inv_25_zfs_bases_and_layers_have_no_device(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 1).await;
    ground.freeze(&mut disk).await;
    ground.driver.remove_head(&disk.head).await.unwrap();
    let shown = pool(ground).zfs(&[
        "list",
        "-H",
        "-r",
        "-t",
        "volume",
        "-o",
        "name,volmode",
        &root(ground),
    ]);
    assert_eq!(shown.lines().count(), 2, "{shown}");
    assert!(
        shown.lines().all(|line| line.ends_with("\tnone")),
        "{shown}"
    );
    let error = ground
        .driver
        .attach(&disk.head, &disk.chain)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

pub(crate) async fn inv_26_a_zfs_pool_that_cannot_be_used_is_a_typed_error(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 1).await;
    let layer = ground.freeze(&mut disk).await;
    let refused = |error: HostError, says: &str| {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(
            error.hint_text().is_some_and(|hint| hint.contains(says)),
            "{error:?}"
        );
    };
    let (layout, instance) = (
        ground.layout.clone(),
        Instance::of_data_directory(ground.layout.data()),
    );
    let driver = |dataset: Option<&str>| Zfs::new(layout.clone(), &instance, dataset);
    refused(
        driver(None).unwrap().probe().await.unwrap_err(),
        "zfs.dataset",
    );
    let missing = format!("{}/none", pool(ground).name());
    refused(
        driver(Some(&missing)).unwrap().probe().await.unwrap_err(),
        "zfs create",
    );
    let volume = format!("{}/other/disk", pool(ground).name());
    refused(
        driver(Some(&volume)).unwrap().probe().await.unwrap_err(),
        "file system",
    );
    let error = driver(Some("-r")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);

    // Exported under a running daemon: nothing is taken for absent.
    pool(ground).export();
    for driver in [&ground.driver, &ground.another()] {
        refused(driver.probe().await.unwrap_err(), "zpool import");
        refused(driver.list_heads().await.unwrap_err(), "zpool import");
        refused(driver.list_layers().await.unwrap_err(), "zpool import");
        refused(
            driver.remove_head(&disk.head).await.unwrap_err(),
            "zpool import",
        );
        refused(
            driver.remove_layer(&layer).await.unwrap_err(),
            "zpool import",
        );
    }
    pool(ground).import(pool(ground).file(), &["-o", "readonly=on"]);
    for driver in [&ground.driver, &ground.another()] {
        refused(driver.probe().await.unwrap_err(), "read-only");
        let next = ground.disk_id().await;
        refused(
            driver.ensure_head(&next, &disk.chain).await.unwrap_err(),
            "read-only",
        );
        refused(driver.remove_layer(&layer).await.unwrap_err(), "read-only");
        assert_eq!(
            driver.list_heads().await.unwrap(),
            std::slice::from_ref(&disk.head)
        );
    }
    pool(ground).export();
    pool(ground).import(pool(ground).file(), &[]);
    ground.driver.probe().await.unwrap();
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_28_a_full_zfs_pool_is_a_typed_error_without_remains(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 3).await;
    ground.freeze(&mut disk).await;
    let filler = format!("{}/other/disk", pool(ground).name());
    // A reservation is as good as data.
    let left = pool(ground).zfs(&["get", "-H", "-p", "-o", "value", "available", &root(ground)]);
    let reserved = left.trim().parse::<u64>().unwrap() - (128 << 10);
    pool(ground).zfs(&["set", &format!("reservation={reserved}"), &filler]);

    let (base, before) = (disk.chain.base.clone(), ground.names());
    assert_eq!(base, None, "a layer stands alone");
    let image = ground.layout.data().join("staging/large");
    fs::write(&image, vec![7; 4 << 20]).unwrap();
    let digest = ground.store.digest(&image).await.unwrap();
    let object = Object::Base(digest.clone());
    ground.store.stage(&object).await.unwrap();
    ground
        .store
        .move_into_staging(&image, &object, icebox_engine::layout::BASE_IMAGE)
        .await
        .unwrap();
    ground.store.publish(&object, b"{}").await.unwrap();
    let error = ground.driver.ensure_base(&digest).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    assert!(error.hint_text().is_some());
    assert_eq!(ground.names(), before);
    ground.assert_content(&disk).await;

    pool(ground).zfs(&["set", "reservation=none", &filler]);
    ground.driver.ensure_base(&digest).await.unwrap();
    ground.write(&mut disk, MIB, MIB, 4).await;
    ground.freeze(&mut disk).await;
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_33_what_was_killed_in_a_zfs_pool_is_finished(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 1).await;
    let to = HeadId {
        number: 2,
        ..disk.head.clone()
    };
    // A freeze that was done, and nobody heard of it.
    let layer = LayerId::random();
    let line = format!("{}-{}", disk.head.sandbox, disk.head.number);
    let volume = format!("{}/head-{line}", root(ground));
    assert!(!by_host(ground).is_frozen(&disk.head, &to).await.unwrap());
    pool(ground).zfs(&["snapshot", &format!("{volume}@{layer}.{line}.2")]);
    assert!(by_host(ground).is_frozen(&disk.head, &to).await.unwrap());
    let object = Object::Layer(layer.clone());
    let staging = ground.store.staged(&object).await.unwrap();
    by_host(ground)
        .freeze(&disk.head, &to, &staging)
        .await
        .unwrap();
    ground.store.publish(&object, b"{}").await.unwrap();
    disk.chain = ground.chain_over(&layer, &disk);
    disk.head = to;
    ground.assert_content(&disk).await;

    // A head that was sealed, and its volume not set aside.
    let sealed = LayerId::random();
    ground.write(&mut disk, 0, MIB, 2).await;
    pool(ground).zfs(&["snapshot", &format!("{volume}@{sealed}.{line}.end")]);
    // A layer that gave up its name, with nothing over it; and a trial of a process that is gone.
    let trial = format!("{}/probe-4194305-0", root(ground));
    pool(ground).zfs(&["create", "-s", "-V", "1M", &trial]);
    pool(ground).zfs(&["snapshot", &format!("{trial}@image")]);
    pool(ground).zfs(&[
        "rename",
        &format!("{volume}@{layer}.{line}.2"),
        &format!("{volume}@gone.{line}.2"),
    ]);
    let next = ground.another();
    assert_eq!(next.list_heads().await.unwrap(), []);
    assert_eq!(
        next.list_layers().await.unwrap(),
        std::slice::from_ref(&sealed)
    );
    assert_eq!(with_prefix(ground, "kept-"), [format!("kept-{line}")]);
    assert_eq!(with_prefix(ground, "probe-"), Vec::<String>::new());
    let names = ground.names();
    assert!(
        !names.iter().any(|name| name.contains("@gone")),
        "{names:?}"
    );
    assert_eq!(
        next.list_layers().await.unwrap(),
        std::slice::from_ref(&sealed)
    );
    assert_eq!(ground.names(), names, "a second start changes nothing");
    let chain = ground.chain_over(&sealed, &disk);
    let fork = ground.disk_id().await;
    next.ensure_head(&fork, &chain).await.unwrap();
    assert_eq!(next.remove_layer(&sealed).await.unwrap(), Removed::Removed);
    assert_eq!(with_prefix(ground, "kept-"), Vec::<String>::new());
    next.remove_head(&fork).await.unwrap();
}

pub(crate) async fn inv_33_a_zfs_dataset_of_another_data_directory_is_refused(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.freeze(&mut disk).await;
    let (owner, before) = (ground.layout.zfs_owner_file(), ground.names());
    // As when the daemon starts while the data directory is not mounted: an empty one at the same path.
    let kept = fs::read(&owner).unwrap();
    fs::remove_file(&owner).unwrap();
    for content in [None, Some("another\n")] {
        if let Some(content) = content {
            fs::write(&owner, content).unwrap();
        }
        let driver = ground.another();
        for error in [
            driver.probe().await.unwrap_err(),
            driver.list_layers().await.unwrap_err(),
            driver.list_heads().await.unwrap_err(),
            driver.remove_head(&disk.head).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(
                error.to_string().contains("another data directory"),
                "{error}"
            );
        }
    }
    fs::write(&owner, kept).unwrap();
    assert_eq!(ground.names(), before);
    assert_eq!(ground.another().list_heads().await.unwrap(), [disk.head]);
}

pub(crate) async fn inv_48_what_others_made_in_a_zfs_pool_stays(ground: &Ground) {
    let mut disk = ground.disk().await;
    let volume = pool(ground).volume_of(&disk);
    ground.write(&mut disk, 0, MIB, 1).await;
    let layer = ground.freeze(&mut disk).await;
    let frozen = ground
        .names()
        .into_iter()
        .find(|name| name.contains(layer.as_str()))
        .unwrap();
    let frozen = format!("{}/{frozen}", pool(ground).dataset());
    // Somebody's clone of our layer, snapshot of our volume, and another installation's volumes.
    let clone = format!("{}/other/clone", pool(ground).name());
    pool(ground).zfs(&["clone", &frozen, &clone]);
    pool(ground).zfs(&["snapshot", &format!("{volume}@daily")]);
    let neighbour = format!("{}/abcdef", pool(ground).dataset());
    pool(ground).zfs(&["create", &neighbour]);
    let theirs = format!("{neighbour}/head-{}-1", disk.head.sandbox);
    pool(ground).zfs(&["create", "-s", "-V", "1M", &theirs]);

    assert_eq!(
        ground.driver.list_heads().await.unwrap(),
        std::slice::from_ref(&disk.head)
    );
    ground.driver.remove_head(&disk.head).await.unwrap();
    ground.driver.remove_layer(&layer).await.unwrap();
    assert_eq!(ground.driver.list_heads().await.unwrap(), []);
    assert_eq!(ground.driver.list_layers().await.unwrap(), []);
    let there = |name: &str| pool(ground).zfs(&["list", "-H", "-o", "name", name]);
    there(&clone);
    there(&theirs);
    let kept = volume.replace("/head-", "/kept-");
    there(&format!("{kept}@daily"));
    // When they let go, the next removal takes what was kept for them.
    pool(ground).zfs(&["destroy", &clone]);
    pool(ground).zfs(&["destroy", &format!("{kept}@daily")]);
    ground.driver.list_layers().await.unwrap();
    assert_eq!(with_prefix(ground, "kept-"), Vec::<String>::new());
    pool(ground).zfs(&["destroy", "-r", &neighbour]);
}
