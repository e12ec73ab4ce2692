//! New disk heads under a guest that writes.

use std::fs;
use std::path::Path;

use icebox_engine::host::{BlockDevice, Machine};

use crate::lab::{Lab, output};

/// Appends records, and says which ones are safe: an fsync has returned.
const WRITER: &str = r#"
import os
records = open("/root/log", "ab", buffering=0)
number = 0
while True:
    number += 1
    records.write(b"%08d %s\n" % (number, b"x" * 1000))
    os.fsync(records.fileno())
    if number % 20 == 0:
        with open(f"/root/many-{number}", "wb") as f: f.write(os.urandom(50000))
    with open("/run/safe.new", "w") as f: f.write(f"{number}\n")
    os.rename("/run/safe.new", "/run/safe")
"#;

/// Paths that the process can write to.
fn writable(machine: &dyn Machine) -> Vec<String> {
    let pid = machine.process().pid;
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap();
        let Ok(target) = fs::read_link(format!("/proc/{pid}/fd/{number}")) else {
            continue;
        };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap()
            .trim();
        if i32::from_str_radix(flags, 8).unwrap() & libc::O_ACCMODE != libc::O_RDONLY {
            found.push(target.display().to_string());
        }
    }
    found
}

/// Records in an image, after what a mount would do: replay the journal.
fn records(raw: &Path) -> u64 {
    let raw = raw.to_str().unwrap();
    output("e2fsck", &["-fy", "-E", "journal_only", raw]);
    let check = output("e2fsck", &["-fn", raw]);
    assert!(
        check
            .lines()
            .last()
            .is_some_and(|line| line.contains(" files ("))
            && !check.contains("WARNING"),
        "the file system is not clean: {check}"
    );
    let log = output("debugfs", &["-R", "cat /root/log", raw]);
    let mut count = 0;
    for line in log.lines() {
        let number: u64 = line[..8].parse().unwrap();
        assert_eq!(number, count + 1, "records are in order");
        count = number;
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_03_inv_04_heads_change_under_a_writing_guest() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let machine = guest.boot().await;
    guest.spawn("writer.py", WRITER).await;
    guest.sh("until [ -s /run/safe ]; do sleep 0.1; done").await;

    let mut last = 0;
    for round in 0..4 {
        // The capture window of a snapshot: vCPUs stand still, the head changes, they go on.
        let old = guest.head_path();
        let safe: u64 = guest.sh("cat /run/safe").await.parse().unwrap();
        machine.pause_vcpus().await.unwrap();
        guest.freeze(Some(&*machine)).await;
        machine.resume_vcpus().await.unwrap();

        let open = writable(&*machine);
        let head = guest.head_path().display().to_string();
        assert!(open.contains(&head), "the new head is open: {open:?}");
        let BlockDevice::Qcow2 { layers, .. } = guest.disk().await else {
            unreachable!()
        };
        let frozen = layers.iter().map(|layer| layer.display().to_string());
        for path in frozen.chain([old.display().to_string()]) {
            assert!(
                !open.contains(&path),
                "round {round}: {path} is still writable"
            );
        }

        // The layer is of one instant, and has all that was safe before.
        let raw = guest.flatten(&format!("round-{round}")).await;
        let found = records(&raw);
        println!("round {round}: {found} records, {safe} were safe");
        assert!(
            found >= safe && found > last,
            "{found} records of {safe} safe ones"
        );
        last = found;
        // Idempotent: the head is there already.
        let now = guest.disk().await;
        machine.disk_switch().unwrap().switch(&now).await.unwrap();
        guest
            .sh(&format!(
                "until [ $(cat /run/safe) -gt {} ]; do sleep 0.1; done",
                last + 5
            ))
            .await;
    }

    // And the guest never noticed: everything it wrote is there.
    let safe: u64 = guest.sh("cat /run/safe").await.parse().unwrap();
    guest.pause(machine).await;
    let raw = guest.flatten("end").await;
    assert!(records(&raw) >= safe);
    let machine = guest.restore().await;
    guest
        .sh(&format!(
            "until [ $(cat /run/safe) -gt {} ]; do sleep 0.1; done",
            safe + 5
        ))
        .await;
    let seen = guest
        .sh("dmesg | grep -iE 'I/O error|EXT4-fs error' || true")
        .await;
    assert_eq!(seen, "");
    drop(machine);
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_cannot_be_opened_leaves_the_old_one_in_use() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let machine = guest.boot().await;
    let now = guest.disk().await;
    let BlockDevice::Qcow2 { head, base, .. } = now.clone() else {
        unreachable!()
    };
    let missing = BlockDevice::Qcow2 {
        head: lab.path().join("missing"),
        layers: vec![head.clone()],
        base: base.clone(),
    };
    let switch = machine.disk_switch().unwrap();
    assert!(switch.switch(&missing).await.is_err());
    // Not an overlay at all.
    let damaged = lab.path().join("damaged");
    fs::write(&damaged, [0; 65536]).unwrap();
    let damaged = BlockDevice::Qcow2 {
        head: damaged,
        layers: vec![head],
        base,
    };
    let error = switch.switch(&damaged).await.unwrap_err();
    assert!(error.to_string().contains("blockdev-add"), "{error}");
    assert!(switch.is_on(&now).await.unwrap());
    assert!(!switch.is_on(&damaged).await.unwrap());
    guest.sh("echo still > /root/here && sync").await;
    // What the failed attempts passed in is gone again.
    assert!(
        !writable(&*machine)
            .iter()
            .any(|path| path.contains("damaged"))
    );
    lab.close().await;
}
