//! Freezes while the disk is open, and what a driver refuses.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use icebox_engine::host::{BlockDevice, ErrorKind, HostError, LiveFreeze, Store as _};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::Object;
use serde_json::{Value, json};

use crate::ground::{Ground, assert_same, blockdev, run};
use crate::pool::patiently;

const MIB: u64 = 1 << 20;

/// QEMU's block layer with a disk open and a monitor: a VMM as far as a volume can tell.
struct StorageDaemon {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl StorageDaemon {
    fn start(device: &BlockDevice, ground: &Ground) -> Self {
        let socket = ground.mount.join("nbd");
        let mut node = blockdev(device);
        node["node-name"] = json!("disk");
        let mut process = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node.to_string()])
            .arg("--nbd-server")
            .arg(format!(
                "addr.type=unix,addr.path={},max-connections=4",
                socket.display()
            ))
            .args([
                "--export",
                "type=nbd,id=export,node-name=disk,name=disk,writable=on",
            ])
            .args([
                "--chardev",
                "stdio,id=monitor",
                "--monitor",
                "chardev=monitor",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut daemon = Self {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()),
            process,
            socket,
        };
        daemon.next("QMP");
        daemon.execute("qmp_capabilities", &json!({}));
        daemon
    }

    /// The next message that has `key`.
    fn next(&mut self, key: &str) -> Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "it ended");
            let message: Value = serde_json::from_str(&line).unwrap();
            assert!(message.get("error").is_none(), "{message}");
            if message.get(key).is_some() {
                return message;
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) {
        // At once: it acts on the last brace, and after `quit` there is nobody to take a line's end.
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.input.write_all(line.as_bytes()).unwrap();
        self.next("return");
    }

    /// A client that writes `byte` for `length` at each offset and flushes.
    fn client(&self, writes: impl IntoIterator<Item = (u64, u64, u8)>) -> Command {
        let mut client = Command::new("qemu-io");
        client.args(["-f", "raw"]);
        for (offset, length, byte) in writes {
            client.args(["-c", &format!("write -P {byte} {offset} {length}")]);
        }
        client
            .args(["-c", "flush"])
            .arg(format!("nbd+unix:///disk?socket={}", self.socket.display()));
        client
    }

    fn quit(mut self) {
        self.execute("quit", &json!({}));
        assert!(self.process.wait().unwrap().success());
        if self.socket.exists() {
            fs::remove_file(&self.socket).unwrap();
        }
    }
}

pub(crate) async fn inv_03_qemu_switches_to_a_qcow2_head_under_load(ground: &Ground) {
    let mut disk = ground.disk().await;
    let device = ground.driver.attach(&disk.head, &disk.chain).await.unwrap();
    let mut daemon = StorageDaemon::start(&device, ground);
    disk.content[..usize::try_from(MIB).unwrap()].fill(1);
    run(&mut daemon.client([(0, MIB, 1)]));
    let before = disk.content.clone();

    // Three times, with a write after each and a hundred of them in flight across the last.
    let mut layers = Vec::new();
    let mut chain = disk.chain.clone();
    for round in 0..3_u32 {
        let layer = LayerId::random();
        let object = Object::Layer(layer.clone());
        let to = HeadId {
            number: disk.head.number + 1,
            ..disk.head.clone()
        };
        chain.layers.insert(0, layer.clone());
        ground.driver.ensure_head(&to, &chain).await.unwrap();
        let BlockDevice::Qcow2 { head, .. } = ground.driver.attach(&to, &chain).await.unwrap()
        else {
            panic!("not a qcow2 device");
        };
        let in_flight: Vec<_> = (0..if round == 2 { 100 } else { 0 })
            .map(|write| (8192 * u64::from(write), 4096, 100 + write))
            .collect();
        for (at, length, byte) in &in_flight {
            let start = usize::try_from(*at).unwrap();
            disk.content[start..][..usize::try_from(*length).unwrap()].fill(*byte);
        }
        let mut writer = daemon
            .client(in_flight)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let node = format!("head-{round}");
        daemon.execute(
            "blockdev-add",
            &json!({"driver": "qcow2", "node-name": node, "backing": null, "file": {"driver": "file", "filename": head}}),
        );
        let top = round
            .checked_sub(1)
            .map_or("disk".to_owned(), |last| format!("head-{last}"));
        daemon.execute("blockdev-snapshot", &json!({"node": top, "overlay": node}));
        assert!(writer.wait().unwrap().success());
        let at = u64::from(round + 2) * MIB;
        let byte = u8::try_from(round).unwrap() + 50;
        disk.content[usize::try_from(at).unwrap()..][..4096].fill(byte);
        run(&mut daemon.client([(at, 4096, byte)]));
        let staging = ground.store.staged(&object).await.unwrap();
        ground.driver.seal(&disk.head, &staging).await.unwrap();
        ground.store.publish(&object, b"{}").await.unwrap();
        disk.head = to;
        layers.push(layer);
    }
    daemon.quit();

    let mut first = disk.chain.clone();
    first.layers = vec![layers[0].clone()];
    assert_same(&ground.flattened(&first).await, &before, "the first layer");
    disk.chain = chain;
    ground.assert_content(&disk).await;
    // The switched heads are still overlays that only this chain gives a backing to.
    ground.freeze(&mut disk).await;
    assert_same(
        &ground.flattened(&disk.chain).await,
        &disk.content,
        "the last layer",
    );
}

pub(crate) async fn inv_25_a_hostile_qcow2_layer_is_refused(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, MIB, 1).await;
    let layer = ground.freeze(&mut disk).await;
    // A guest that broke out of its VMM wrote the name of a file of the host's into the overlay before it was frozen.
    let path = ground.layout.layer_disk(&layer);
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"/etc/shadow", 4096).unwrap();
    file.write_all_at(&4096_u64.to_be_bytes(), 8).unwrap();
    file.write_all_at(&11_u32.to_be_bytes(), 16).unwrap();
    let refuse = |error: HostError| {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(layer.as_str()), "{error}");
    };
    refuse(
        ground
            .driver
            .attach(&disk.head, &disk.chain)
            .await
            .unwrap_err(),
    );
    let out = ground.mount.join("flat");
    refuse(ground.driver.flatten(&disk.chain, &out).await.unwrap_err());
    assert!(!out.exists());
    let fork = HeadId {
        number: 9,
        ..disk.head.clone()
    };
    refuse(
        ground
            .driver
            .ensure_head(&fork, &disk.chain)
            .await
            .unwrap_err(),
    );
}

/// What a VMM does: it opens the head once, and keeps the descriptor across the freeze.
async fn freeze_under_an_open_descriptor(ground: &Ground) {
    let mut disk = ground.disk().await;
    let BlockDevice::Raw { path } = ground.driver.attach(&disk.head, &disk.chain).await.unwrap()
    else {
        panic!("not a raw device");
    };
    let open = patiently(|| fs::OpenOptions::new().write(true).open(&path));
    let mut layers = Vec::new();
    for round in 0..5_u8 {
        // Not flushed by the writer: the freeze must see it all the same.
        let at = u64::from(round) * MIB / 2;
        let start = usize::try_from(at).unwrap();
        disk.content[start..][..MIB.try_into().unwrap()].fill(round + 1);
        open.write_all_at(&vec![round + 1; MIB.try_into().unwrap()], at)
            .unwrap();
        let layer = ground.freeze(&mut disk).await;
        layers.push((ground.chain_over(&layer, &disk), disk.content.clone()));
    }
    open.write_all_at(&[0xcc; 512], 0).unwrap();
    disk.content[..512].fill(0xcc);
    drop(open);
    ground.assert_content(&disk).await;
    for (chain, content) in layers {
        assert_same(&ground.flattened(&chain).await, &content, "a layer");
    }
}

pub(crate) async fn inv_03_dm_snapshot_freezes_under_an_open_descriptor(ground: &Ground) {
    freeze_under_an_open_descriptor(ground).await;
}

pub(crate) async fn inv_03_zfs_freezes_under_an_open_descriptor(ground: &Ground) {
    freeze_under_an_open_descriptor(ground).await;
}

pub(crate) async fn inv_03_reflink_freezes_under_an_open_descriptor_on_xfs(ground: &Ground) {
    freeze_under_an_open_descriptor(ground).await;
}

pub(crate) async fn inv_03_reflink_freezes_under_an_open_descriptor_on_btrfs(ground: &Ground) {
    freeze_under_an_open_descriptor(ground).await;
}

/// A loop device whose file is part of one of these layers, in place or removed.
fn loop_on(layers: &[LayerId]) -> Option<String> {
    let devices = fs::read_dir("/sys/block").unwrap();
    let mut backing = devices.filter_map(|device| {
        let path = device.unwrap().path().join("loop/backing_file");
        fs::read_to_string(path).ok()
    });
    backing.find(|path| layers.iter().any(|layer| path.contains(layer.as_str())))
}

/// Who was attached before reads through what it was attached to, who comes after it does not.
pub(crate) async fn inv_52_a_dm_snapshot_chain_is_merged_under_an_attached_disk(ground: &Ground) {
    let mut disk = ground.disk().await;
    for round in 0..6_u8 {
        let at = u64::from(round) * MIB / 2;
        ground.write(&mut disk, at, MIB, round + 1).await;
        ground.freeze(&mut disk).await;
    }
    let BlockDevice::Raw { path } = ground.driver.attach(&disk.head, &disk.chain).await.unwrap()
    else {
        panic!("not a raw device");
    };
    let open = fs::File::options().read(true).write(true).open(path);
    let open = open.unwrap();

    let (run, size) = (disk.chain.layers[1..5].to_vec(), disk.chain.size);
    assert!(loop_on(&run).is_some());
    let merging = ground.driver.merges_layers().unwrap();
    let merged = LayerId::random();
    let object = Object::Layer(merged.clone());
    let staging = ground.store.stage(&object).await.unwrap();
    merging.merge(&run, size, &staging).await.unwrap();
    merging.verify(&run, size, &staging).await.unwrap();
    ground.store.publish(&object, b"{}").await.unwrap();
    disk.chain.layers.splice(1..5, [merged]);

    let fork = ground.disk_on(disk.chain.clone(), &disk.content).await;
    let device = ground.driver.attach(&fork.head, &fork.chain).await.unwrap();
    // Earlier than the engine would: it waits until nobody has them open.
    for layer in &run {
        ground
            .store
            .trash(&Object::Layer(layer.clone()))
            .await
            .unwrap();
    }
    ground.store.empty_trash().await.unwrap();
    open.write_all_at(&[0xcc; 4096], MIB).unwrap();
    disk.content[MIB.try_into().unwrap()..][..4096].fill(0xcc);
    ground.freeze(&mut disk).await;
    open.write_all_at(&[0xdd; 4096], 2 * MIB).unwrap();
    disk.content[(2 * MIB).try_into().unwrap()..][..4096].fill(0xdd);
    let mut found = vec![0; disk.content.len()];
    open.read_exact_at(&mut found, 0).unwrap();
    assert_same(&found, &disk.content, "what was attached before");
    drop(open);
    ground.driver.detach(&disk.head).await.unwrap();

    assert_eq!(loop_on(&run), None, "the fork is on what has gone");
    let BlockDevice::Raw { path } = device else {
        panic!("not a raw device");
    };
    assert_same(&fs::read(path).unwrap(), &fork.content, "the fork");
    ground.driver.detach(&fork.head).await.unwrap();
    ground.assert_content(&disk).await;
    ground.assert_content(&fork).await;
}

pub(crate) async fn inv_26_reflink_is_refused_on_ext4(ground: &Ground) {
    assert!(matches!(ground.driver.live_freeze(), LiveFreeze::ByHost(_)));
    let error = ground.driver.probe().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains(ground.file_system.name()),
        "{error}"
    );
    let hint = error.hint_text().unwrap();
    assert!(hint.contains("XFS") && hint.contains("qcow2"), "{hint}");
}
