//! What every driver must do.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::{Command, Stdio};

use icebox_engine::host::{Chain, Ensured, ErrorKind, LiveFreeze, Removed, Store as _};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{LAYER_DISK, Object};
use icebox_engine::unit::Bytes;
use icebox_host::fs::{allocated, allocated_tree};
use icebox_host::volume::{Scratch, exercise};
use rustix::fs::FallocateFlags;

use crate::ground::{BASE_SIZE, Ground, assert_same};

const MIB: u64 = 1 << 20;

pub(crate) async fn inv_03_a_layer_holds_what_was_written_before_the_freeze(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.assert_content(&disk).await;
    // Over data, over stored zeros, over holes, across the base's end, beyond it; zeros over data.
    let writes = [
        (0, 4096, 0xa1),
        (5 * 4096 + 512, 1024, 0xa2),
        (BASE_SIZE - 4096, 8192, 0xa3),
        (2 * BASE_SIZE - 512, 512, 0xa4),
        (MIB, MIB, 0),
    ];
    ground.write_all(&mut disk, &writes).await;
    let before = disk.clone();
    let layer = ground.freeze(&mut disk).await;
    ground.assert_content(&disk).await;
    ground.write(&mut disk, 0, 4096, 0xb1).await;
    ground.write(&mut disk, 3 * MIB, 4096, 0xb2).await;
    ground.assert_content(&disk).await;
    let flat = ground.flattened(&ground.chain_over(&layer, &before)).await;
    assert_same(&flat, &before.content, "the layer");
}

pub(crate) async fn inv_09_a_freeze_is_finished_from_wherever_it_stopped(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, MIB, 4096, 1).await;
    let layer = LayerId::random();
    let object = Object::Layer(layer.clone());
    // Killed in the middle of the clone: a part of it is there under another name.
    let staging = ground.store.staged(&object).await.unwrap();
    if let LiveFreeze::ByHost(host) = ground.driver.live_freeze() {
        let to = HeadId {
            number: 2,
            ..disk.head.clone()
        };
        assert!(!host.is_frozen(&disk.head, &to).await.unwrap());
        if ground.is_in_files() {
            fs::write(staging.join(format!("{LAYER_DISK}.new")), b"half").unwrap();
        }
        // Killed between the clone and the rename, and the guest went on before the repetition.
        if ground.driver.layers_are_whole() && ground.is_in_files() {
            fs::copy(ground.head_file(&disk), staging.join(LAYER_DISK)).unwrap();
        }
        ground.write(&mut disk, 2 * MIB, 4096, 2).await;
    }
    let to = ground.freeze_unpublished(&disk, &layer).await;
    // Killed before it was published.
    assert_eq!(ground.freeze_unpublished(&disk, &layer).await, to);
    if ground.is_in_files() {
        let disk = ground.staging(&layer).join(LAYER_DISK);
        let mode = fs::metadata(disk).unwrap().mode();
        assert_eq!(mode & 0o222, 0, "nobody writes to it: {mode:o}");
    }
    ground.store.publish(&object, b"{}").await.unwrap();
    // Killed before anyone wrote down that it was.
    assert_eq!(ground.freeze_unpublished(&disk, &layer).await, to);
    ground.store.publish(&object, b"{}").await.unwrap();
    if let LiveFreeze::ByHost(host) = ground.driver.live_freeze() {
        assert!(host.is_frozen(&disk.head, &to).await.unwrap());
    }
    assert_eq!(
        ground.driver.list_heads().await.unwrap(),
        std::slice::from_ref(&to)
    );
    let chain = ground.chain_over(&layer, &disk);
    assert_same(&ground.flattened(&chain).await, &disk.content, "the layer");
    disk.head = to;
    disk.chain = chain;
    ground.assert_content(&disk).await;

    // One that never was cannot be finished, and says so.
    let never = HeadId {
        number: 99,
        ..disk.head.clone()
    };
    let other = Object::Layer(LayerId::random());
    let staging = ground.store.staged(&other).await.unwrap();
    let error = ground.driver.seal(&never, &staging).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    if let LiveFreeze::ByHost(host) = ground.driver.live_freeze() {
        for to in [
            &disk.head,
            &HeadId {
                number: 100,
                ..never.clone()
            },
        ] {
            let error = host.freeze(&never, to, &staging).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        }
    }
    ground.store.discard(&other).await.unwrap();
}

pub(crate) async fn inv_24_heads_go_in_any_order(ground: &Ground) {
    let mut parent = ground.disk().await;
    ground.write(&mut parent, 0, MIB, 7).await;
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let layer = ground.freeze(&mut parent).await;
        let chain = ground.chain_over(&layer, &parent);
        let chain = Chain {
            // The parent's chain has the layer on top already.
            layers: parent.chain.layers.clone(),
            ..chain
        };
        let mut forks = Vec::new();
        for byte in 1..=3 {
            let mut fork = ground.disk_on(chain.clone(), &parent.content).await;
            ground
                .write(&mut fork, u64::from(byte) * MIB, 4096, byte)
                .await;
            forks.push(fork);
        }
        let mut gone = Vec::new();
        for next in order {
            assert_eq!(
                ground.driver.remove_head(&forks[next].head).await.unwrap(),
                Removed::Removed
            );
            assert_eq!(
                ground.driver.remove_head(&forks[next].head).await.unwrap(),
                Removed::AlreadyAbsent
            );
            gone.push(next);
            for (index, fork) in forks.iter().enumerate() {
                if !gone.contains(&index) {
                    ground.assert_content(fork).await;
                }
            }
        }
        ground.assert_content(&parent).await;
    }
    assert_eq!(ground.driver.list_heads().await.unwrap(), [parent.head]);
}

pub(crate) async fn inv_25_what_is_below_never_changes(ground: &Ground) {
    let mut parent = ground.disk().await;
    let chain = parent.chain.clone();
    let content = parent.content.clone();
    ground.write(&mut parent, 4 * MIB, MIB, 0xee).await;
    ground.freeze(&mut parent).await;
    let before = ground.immutable().await;
    assert_eq!(
        before.len(),
        4,
        "two manifests, an image and a layer's data"
    );
    for round in 0..6_u8 {
        let on = if round % 2 == 0 {
            &chain
        } else {
            &parent.chain
        };
        let below = if round % 2 == 0 {
            &content
        } else {
            &parent.content
        };
        let mut on = on.clone();
        on.size = Bytes(on.size.0 + u64::from(round) * MIB);
        let mut disk = ground.disk_on(on, below).await;
        ground
            .write_all(&mut disk, &[(0, BASE_SIZE, round + 1), (MIB, MIB, 0)])
            .await;
        ground.assert_content(&disk).await;
        // What a VMM does with its head, and what goes wrong with it, stays in the head.
        ground.spoil(&disk);
        let error = ground
            .driver
            .attach(&disk.head, &disk.chain)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        ground.driver.remove_head(&disk.head).await.unwrap();
    }
    assert_eq!(ground.immutable().await, before);
    ground.assert_content(&parent).await;
}

/// What the uid of a VMM's box can do with a descriptor that the launcher opened to read.
pub(crate) async fn inv_25_another_uid_cannot_change_what_is_below(ground: &Ground) {
    const ATTEMPTS: [&str; 6] = [
        "echo x >&0",
        "echo x >> /proc/self/fd/0",
        "truncate -s 0 /proc/self/fd/0",
        "fallocate -p -o 0 -l 4096 /proc/self/fd/0",
        "chmod 666 /proc/self/fd/0",
        "cat \"$0\"",
    ];
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 1).await;
    ground.freeze(&mut disk).await;
    let before = ground.immutable().await;
    for (path, _) in &before {
        for attempt in ATTEMPTS {
            let status = Command::new("setpriv")
                .args(["--reuid=10001", "--regid=10001", "--clear-groups", "--"])
                .args(["sh", "-c", attempt])
                .arg(path)
                .stdin(fs::File::open(path).unwrap())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert!(!status.success(), "{attempt} on {}", path.display());
        }
    }
    assert_eq!(ground.immutable().await, before);
    ground.assert_content(&disk).await;
}

/// Sandboxes that write, are killed with their disks open, or are copied, and go.
pub(crate) async fn inv_25_fifty_heads_leave_a_base_as_it_was(ground: &Ground) {
    let mut first = ground.disk().await;
    let (chain, content) = (first.chain.clone(), first.content.clone());
    let image = ground.layout.base_image(chain.base.as_ref().unwrap());
    let digest = ground.store.digest(&image).await.unwrap();
    assert_eq!(Some(&digest), chain.base.as_ref());
    for number in 1..=50_u8 {
        let mut disk = ground.disk_on(chain.clone(), &content).await;
        let at = u64::from(number % 8) * MIB;
        let writes = [(at, 16384, number), (2 * BASE_SIZE - 512, 512, number)];
        ground.write_all(&mut disk, &writes).await;
        if number % 10 == 0 {
            let layer = ground.freeze(&mut disk).await;
            ground.driver.remove_head(&disk.head).await.unwrap();
            ground.drop_layer(&layer).await;
        } else {
            ground.driver.remove_head(&disk.head).await.unwrap();
        }
    }
    ground.assert_content(&first).await;
    assert_eq!(ground.store.digest(&image).await.unwrap(), digest);
    assert_same(&ground.flattened(&chain).await, &content, "the base");
    assert_eq!(
        ground.driver.list_heads().await.unwrap(),
        std::slice::from_ref(&first.head)
    );
    ground.write(&mut first, 0, MIB, 0xff).await;
    let fresh = ground.disk_on(chain, &content).await;
    ground.assert_content(&fresh).await;
}

pub(crate) async fn inv_26_the_driver_proves_itself_and_leaves_nothing(ground: &Ground) {
    // What stays after a first use is there.
    ground.base().await;
    let before = (
        allocated_tree(ground.layout.data()).unwrap(),
        ground.names(),
    );
    ground.driver.probe().await.unwrap();
    // One that keeps disks elsewhere did that by itself.
    if ground.is_in_files() {
        let scratch = Scratch::new(ground.layout.data()).unwrap();
        let twin = ground.another_in(scratch.layout());
        exercise(twin.as_ref(), &scratch).await.unwrap();
    }
    let after = (
        allocated_tree(ground.layout.data()).unwrap(),
        ground.names(),
    );
    assert_eq!(after, before);
}

pub(crate) async fn inv_27_sizes_are_what_is_allocated(ground: &Ground) {
    let mut disk = ground.disk().await;
    let empty = ground.usage(&disk).await;
    assert!(empty < Bytes(64 << 10), "an empty head: {empty}");
    ground.write(&mut disk, 4 * MIB, MIB, 9).await;
    // The data, and a cluster each of the metadata that came with it.
    let written = ground.usage(&disk).await;
    assert!(
        (Bytes(MIB)..Bytes(MIB + (512 << 10))).contains(&written),
        "{written}"
    );
    let layer = ground.freeze(&mut disk).await;
    let fresh = ground.usage(&disk).await;
    assert!(fresh < Bytes(64 << 10), "a head after a freeze: {fresh}");
    let fork = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let fresh = ground.usage(&fork).await;
    assert!(fresh < Bytes(64 << 10), "a fork: {fresh}");
    let stored = ground.driver.layer_usage(&layer).await.unwrap();
    let least = if ground.shares_with_layers() { 0 } else { MIB };
    assert!(
        (Bytes(least)..Bytes(MIB + (512 << 10))).contains(&stored),
        "{stored}"
    );
    let absent = LayerId::random();
    let error = ground.driver.layer_usage(&absent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

pub(crate) async fn inv_28_a_full_file_system_is_a_typed_error_without_remains(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 3).await;
    let layer = ground.freeze(&mut disk).await;
    let sandbox = Object::Sandbox(disk.head.sandbox.clone());
    let merged = Object::Layer(LayerId::random());
    let staging = ground.store.stage(&merged).await.unwrap();
    let filler = ground.mount.join("filler");
    let file = fs::File::create(&filler).unwrap();
    // Down to the last block, so that what follows has nothing.
    let (mut size, mut at) = (256 << 20, 0);
    while size >= 4096 {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), at, size) {
            Ok(()) => at += size,
            Err(_) => size /= 2,
        }
    }
    file.sync_all().unwrap();
    let left = ground.store.space().await.unwrap().available;
    assert!(left < Bytes(MIB), "{left}");

    let snapshot = || async {
        (
            ground.driver.list_heads().await.unwrap(),
            fs::read_dir(&ground.mount).unwrap().count(),
        )
    };
    let before = snapshot().await;
    let mut failures = 0;
    // Sharing needs little room or none; whatever cannot be done must fail as what it is, and leave nothing.
    let out = ground.mount.join("flat");
    match ground.driver.flatten(&disk.chain, &out).await {
        Ok(()) => fs::remove_file(&out).unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
            failures += 1;
        }
    }
    if let Some(merging) = ground.driver.merges_layers() {
        let made = merging.merge(&[layer], disk.chain.size, &staging).await;
        let error = made.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
        failures += 1;
    }
    ground.store.discard(&merged).await.unwrap();
    for number in 10..15 {
        let head = HeadId {
            number,
            ..disk.head.clone()
        };
        match ground.driver.ensure_head(&head, &disk.chain).await {
            Ok(_) => assert_eq!(
                ground.driver.remove_head(&head).await.unwrap(),
                Removed::Removed
            ),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
                assert!(error.hint_text().is_some());
                failures += 1;
            }
        }
    }
    let mut committed = b"{}".to_vec();
    for length in [1 << 20, 100_000] {
        let manifest = vec![b' '; length];
        match ground.store.commit(&sandbox, &manifest).await {
            Ok(()) => committed = manifest,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
                assert!(error.hint_text().is_some());
                failures += 1;
            }
        }
    }
    assert!(failures > 0, "the file system was not full");
    assert_eq!(snapshot().await, before);
    let kept = fs::read(ground.store.path(&sandbox, "manifest.json")).unwrap();
    assert!(
        kept == committed,
        "the manifest is the last that was committed"
    );

    // Unlinked files are freed in the background; truncated ones at once, or with the next transaction.
    file.set_len(0).unwrap();
    rustix::fs::syncfs(&file).unwrap();
    fs::remove_file(&filler).unwrap();
    let left = ground.store.space().await.unwrap().available;
    assert!(left > Bytes(MIB), "{left}");
    ground.store.commit(&sandbox, b"{}").await.unwrap();
    ground.assert_content(&disk).await;
    ground.write(&mut disk, MIB, MIB, 4).await;
    ground.freeze(&mut disk).await;
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_33_unfinished_heads_are_listed_and_go(ground: &Ground) {
    let disk = ground.disk().await;
    let heads = ground.layout.heads(&disk.head.sandbox);
    let whole = ground.layout.head(&disk.head, "x");
    let format = fs::read_dir(&heads)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_stem() == whole.file_stem())
        .unwrap()
        .extension()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let unfinished = HeadId {
        number: 7,
        ..disk.head.clone()
    };
    let remains = ground.layout.head(&unfinished, &format!("{format}.new"));
    fs::write(&remains, b"half").unwrap();
    // Neither ours nor this driver's.
    for foreign in ["7", "07.raw", "+8.qcow2", "9.img", ".10.raw", "notes.txt"] {
        fs::write(heads.join(foreign), b"foreign").unwrap();
    }
    let other = if format == "raw" { "qcow2" } else { "raw" };
    fs::write(heads.join(format!("11.{other}")), b"another driver's").unwrap();
    fs::create_dir(ground.layout.data().join("sandboxes/lost+found")).unwrap();

    let listed = ground.driver.list_heads().await.unwrap();
    assert_eq!(listed, [disk.head.clone(), unfinished.clone()]);
    assert_eq!(
        ground.driver.remove_head(&unfinished).await.unwrap(),
        Removed::Removed
    );
    assert!(!remains.exists());
    // And a head can be made over the remains of an earlier attempt.
    fs::write(&remains, b"half").unwrap();
    assert_eq!(
        ground
            .driver
            .ensure_head(&unfinished, &disk.chain)
            .await
            .unwrap(),
        Ensured::Created
    );
    assert!(!remains.exists());
    assert_eq!(fs::read_dir(&heads).unwrap().count(), 9);
    ground.assert_content(&disk).await;
}

pub(crate) async fn inv_38_forks_share_nothing_they_write(ground: &Ground) {
    let mut parent = ground.disk().await;
    ground.write(&mut parent, 0, 2 * MIB, 0x50).await;
    ground.freeze(&mut parent).await;
    let mut forks = Vec::new();
    for byte in 1..=4_u8 {
        let mut fork = ground.disk_on(parent.chain.clone(), &parent.content).await;
        ground
            .write_all(
                &mut fork,
                &[(0, 4096, byte), (u64::from(byte) * MIB, MIB, byte)],
            )
            .await;
        forks.push(fork);
    }
    ground.write(&mut parent, 512, 512, 0x99).await;
    for disk in forks.iter().chain([&parent]) {
        ground.assert_content(disk).await;
    }
    // A fork of a fork, after its parents are gone.
    let mut fork = forks.swap_remove(1);
    ground.freeze(&mut fork).await;
    let mut child = ground.disk_on(fork.chain.clone(), &fork.content).await;
    ground.driver.remove_head(&fork.head).await.unwrap();
    ground.driver.remove_head(&parent.head).await.unwrap();
    ground.write(&mut child, 5 * MIB, 4096, 0x77).await;
    for disk in forks.iter().chain([&child]) {
        ground.assert_content(disk).await;
    }
}

pub(crate) async fn a_flattened_disk_is_equal_sparse_and_independent(ground: &Ground) {
    let mut disk = ground.disk().await;
    let out = ground.mount.join("flat");
    // A base alone.
    ground.driver.flatten(&disk.chain, &out).await.unwrap();
    assert_same(&fs::read(&out).unwrap(), &disk.content, "the base");
    let error = ground.driver.flatten(&disk.chain, &out).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert_same(&fs::read(&out).unwrap(), &disk.content, "what was there");
    fs::remove_file(&out).unwrap();
    // Layers that overwrite each other, with data and with zeros.
    ground.write(&mut disk, MIB, 2 * MIB, 1).await;
    ground.freeze(&mut disk).await;
    ground.write(&mut disk, 2 * MIB, 2 * MIB, 2).await;
    ground.freeze(&mut disk).await;
    ground.write(&mut disk, 3 * MIB, MIB / 2, 3).await;
    ground.freeze(&mut disk).await;
    ground.driver.flatten(&disk.chain, &out).await.unwrap();
    assert_same(&fs::read(&out).unwrap(), &disk.content, "the disk");
    let size = allocated(&out).unwrap();
    assert!(
        size < Bytes(BASE_SIZE),
        "{size} of {}",
        Bytes(2 * BASE_SIZE)
    );
    // The copy is nobody's layer.
    let before = ground.immutable().await;
    let file = fs::OpenOptions::new().write(true).open(&out).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 8192], MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(ground.immutable().await, before);
    fs::remove_file(&out).unwrap();
    ground.assert_content(&disk).await;
}

pub(crate) async fn a_head_is_made_once_and_keeps_its_content(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, 4096, 0x42).await;
    assert_eq!(
        ground
            .driver
            .ensure_head(&disk.head, &disk.chain)
            .await
            .unwrap(),
        Ensured::AlreadyPresent
    );
    ground.assert_content(&disk).await;
    assert_eq!(
        ground.driver.attach(&disk.head, &disk.chain).await.unwrap(),
        ground.driver.attach(&disk.head, &disk.chain).await.unwrap()
    );
    ground.driver.detach(&disk.head).await.unwrap();
}

pub(crate) async fn a_disk_may_be_larger_than_its_base_but_not_smaller(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 2 * BASE_SIZE - MIB, MIB, 8).await;
    ground.freeze(&mut disk).await;
    let mut larger = disk.chain.clone();
    larger.size = Bytes(3 * BASE_SIZE + ground.block());
    let mut grown = ground.disk_on(larger, &disk.content).await;
    ground.assert_content(&grown).await;
    ground.write(&mut grown, 3 * BASE_SIZE, 512, 6).await;
    ground.assert_content(&grown).await;
    ground.freeze(&mut grown).await;
    assert_same(
        &ground.flattened(&grown.chain).await,
        &grown.content,
        "the grown layer",
    );
    for size in [BASE_SIZE - 512, BASE_SIZE * 2 - 512, 2 * BASE_SIZE + 1] {
        let mut chain = disk.chain.clone();
        chain.size = Bytes(size);
        let head = HeadId {
            number: 50,
            ..disk.head.clone()
        };
        let error = ground.driver.ensure_head(&head, &chain).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{size}: {error}");
        assert!(!ground.driver.list_heads().await.unwrap().contains(&head));
    }
}

pub(crate) async fn what_is_missing_is_named(ground: &Ground) {
    let disk = ground.disk().await;
    let absent = Digest::from_bytes([9; 32]);
    let error = ground.driver.ensure_base(&absent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(absent.as_str()), "{error}");
    let chain = Chain {
        base: Some(absent.clone()),
        ..disk.chain.clone()
    };
    let head = HeadId {
        number: 2,
        ..disk.head.clone()
    };
    let error = ground.driver.ensure_head(&head, &chain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = ground.driver.attach(&head, &disk.chain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = ground.driver.flush(&head).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = ground.driver.head_usage(&head).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let nothing = Chain {
        layers: Vec::new(),
        base: None,
        size: disk.chain.size,
    };
    let error = ground
        .driver
        .ensure_head(&head, &nothing)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    // A head of a sandbox that is gone must not bring its directory back.
    let orphan = HeadId {
        sandbox: SandboxId::random(),
        number: 1,
    };
    let error = ground
        .driver
        .ensure_head(&orphan, &disk.chain)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(
        ground.driver.remove_head(&orphan).await.unwrap(),
        Removed::AlreadyAbsent
    );
    assert_eq!(
        ground.driver.remove_base(&absent).await.unwrap(),
        Removed::AlreadyAbsent
    );
    assert_eq!(ground.driver.list_heads().await.unwrap(), [disk.head]);
}

pub(crate) async fn a_deep_chain_reads_right(ground: &Ground) {
    let mut disk = ground.disk().await;
    for depth in 0..12_u8 {
        let at = u64::from(depth) * MIB / 2;
        ground.write(&mut disk, at, MIB, depth + 1).await;
        ground.freeze(&mut disk).await;
    }
    ground.assert_content(&disk).await;
    assert_same(
        &ground.flattened(&disk.chain).await,
        &disk.content,
        "the layers",
    );
}

/// Where layers stand alone, nothing is merged.
pub(crate) async fn inv_09_inv_25_a_merged_chain_reads_as_before(ground: &Ground) {
    let Some(merging) = ground.driver.merges_layers() else {
        assert!(ground.driver.layers_are_whole());
        return;
    };
    let mut disk = ground.disk().await;
    for depth in 0..8 {
        let n = u64::from(depth);
        let writes = [
            // Over the one before, over zeros and holes, across the base's end; zeros over data; the disk's last sectors.
            (n * MIB / 2, MIB, depth + 1),
            (BASE_SIZE - 2 * MIB + n * MIB / 2, MIB, depth + 0x40),
            (2 * MIB + n * 8192, 4096, 0),
            (2 * BASE_SIZE - 512 * (n + 1), 512, depth + 0x80),
        ];
        ground.write_all(&mut disk, &writes).await;
        ground.freeze(&mut disk).await;
    }
    // One that nothing was written to.
    ground.freeze(&mut disk).await;
    let (long, size) = (disk.chain.clone(), disk.chain.size);
    let before = ground.immutable().await;

    let merge = async |run: &[LayerId]| {
        let merged = LayerId::random();
        let object = Object::Layer(merged.clone());
        let staging = ground.store.stage(&object).await.unwrap();
        merging.merge(run, size, &staging).await.unwrap();
        merging.verify(run, size, &staging).await.unwrap();
        ground.store.publish(&object, b"{}").await.unwrap();
        merged
    };
    let allocated = async |layer: &LayerId| {
        let object = Object::Layer(layer.clone());
        ground.store.allocated(&object).await.unwrap()
    };
    let mut short = long.clone();
    // In the middle, from the base up, and what is merged already.
    for range in [2..5, 4..7, 1..4] {
        let run = short.layers[range.clone()].to_vec();
        let merged = merge(&run).await;
        let mut all = Bytes(0);
        for layer in &run {
            all = all + allocated(layer).await;
        }
        let found = allocated(&merged).await;
        assert!(found <= all, "{found} of {all}");
        short.layers.splice(range, [merged]);
        let flat = ground.flattened(&short).await;
        assert_same(&flat, &disk.content, "the merged chain");
    }
    assert_eq!(short.layers.len(), 3);
    let mut fork = ground.disk_on(short.clone(), &disk.content).await;
    ground.assert_content(&fork).await;
    ground.write(&mut fork, 5 * MIB, MIB, 0x77).await;
    ground.assert_content(&fork).await;
    let after = ground.immutable().await;
    assert!(before.iter().all(|file| after.contains(file)));

    // What was merged goes; the head that was made over it reads through the short chain.
    for layer in long.layers.iter().filter(|it| !short.layers.contains(it)) {
        ground
            .store
            .trash(&Object::Layer(layer.clone()))
            .await
            .unwrap();
    }
    disk.chain = short.clone();
    ground.assert_content(&disk).await;
    ground.assert_content(&fork).await;

    // A layer that came out wrong, or not at all, is found.
    let object = Object::Layer(LayerId::random());
    let staging = ground.store.stage(&object).await.unwrap();
    merging.merge(&short.layers, size, &staging).await.unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(staging.join(LAYER_DISK))
        .unwrap();
    let content = fs::read(staging.join(LAYER_DISK)).unwrap();
    let last = content
        .chunks(4096)
        .rposition(|it| it.iter().all(|byte| *byte == 8));
    file.write_all_at(&[0xff], last.unwrap() as u64 * 4096 + 17)
        .unwrap();
    let error = merging
        .verify(&short.layers, size, &staging)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    ground.store.discard(&object).await.unwrap();
    let staging = ground.store.stage(&object).await.unwrap();
    for run in [&long.layers[..], &[LayerId::random()]] {
        let error = merging.merge(run, size, &staging).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_eq!(
            fs::read_dir(&staging).unwrap().count(),
            0,
            "nothing is left"
        );
    }
    ground.store.discard(&object).await.unwrap();
}
