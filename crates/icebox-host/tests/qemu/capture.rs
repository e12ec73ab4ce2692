//! Memory, disk and time of a guest that is saved and restored.

use icebox_engine::host::{ErrorKind, SavedPages, Start, VcpuState, Vmm};

use crate::lab::{Lab, output};

/// Counts, keeps memory whose content it knows, and writes records past every cache.
const WORKLOAD: &str = r#"
import hashlib, mmap, os, time

block = bytearray(os.urandom(4096)) * 4096          # 16 MiB
digest = hashlib.sha256(block).hexdigest()
scratch = mmap.mmap(-1, 8 << 20)                     # zeroed when told to
scratch.write(b"\xaa" * len(scratch))
buffer = mmap.mmap(-1, 4096)                         # aligned, as O_DIRECT wants it
disk = os.open("/root/records", os.O_CREAT | os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
count = 0
while True:
    count += 1
    buffer.seek(0)
    buffer.write((b"%08d\n" % count) * 455)
    os.pwritev(disk, [buffer], count % 256 * 4096)
    if os.path.exists("/root/zero"):
        scratch.seek(0)
        scratch.write(bytes(len(scratch)))
        os.unlink("/root/zero")
    state = "whole" if hashlib.sha256(block).hexdigest() == digest else "CORRUPT"
    kind = {b"\xaa": "filled", b"\0": "zero"}.get(scratch[:1], "CORRUPT")
    if scratch[:] != scratch[:1] * len(scratch): kind = "CORRUPT"
    last = os.pread(os.open("/root/records", os.O_RDONLY), 9, count % 256 * 4096)
    with open("/root/state.new", "w") as f:
        f.write(f"{os.getpid()} {count} {state} {kind} {int(last)}\n")
    os.rename("/root/state.new", "/root/state")
    time.sleep(0.05)
"#;

struct State {
    pid: u32,
    count: u64,
    scratch: String,
}

async fn state(guest: &crate::lab::Guest<'_>) -> State {
    let text = guest.sh("cat /root/state").await;
    let fields: Vec<&str> = text.split(' ').collect();
    assert_eq!(fields[2], "whole", "memory of the guest: {text}");
    assert_eq!(
        fields[1], fields[4],
        "what was written is what is read: {text}"
    );
    State {
        pid: fields[0].parse().unwrap(),
        count: fields[1].parse().unwrap(),
        scratch: fields[3].to_owned(),
    }
}

/// Waits until the workload has counted on.
async fn later(guest: &crate::lab::Guest<'_>, than: u64) -> State {
    guest
        .sh(&format!(
            "for i in $(seq 600); do [ $(cut -d' ' -f2 /root/state) -gt {} ] && exit 0; sleep 0.1; done; exit 1",
            than + 2
        ))
        .await;
    state(guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_08_inv_29_a_guest_comes_back_as_it_was_any_number_of_times() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let mut machine = guest.boot().await;
    guest.spawn("workload.py", WORKLOAD).await;
    guest
        .sh("until [ -e /root/state ]; do sleep 0.1; done")
        .await;
    let mut before = state(&guest).await;
    let boot_id = guest.sh("cat /proc/sys/kernel/random/boot_id").await;
    guest.sh("sync; echo 3 > /proc/sys/vm/drop_caches").await;

    let mut full = 0;
    for round in 1..=3 {
        let saved = guest.pause(machine).await;
        if round == 1 {
            assert_eq!(saved.pages, SavedPages::Full);
            full = saved.allocated.0;
        } else {
            assert_eq!(saved.pages, SavedPages::Diff);
        }
        println!("round {round}: {saved:?}");

        machine = guest.restore().await;
        let now = later(&guest, before.count).await;
        assert_eq!(now.pid, before.pid, "the same process");
        assert_eq!(
            guest.sh("cat /proc/sys/kernel/random/boot_id").await,
            boot_id
        );
        match round {
            1 => {
                assert_eq!(now.scratch, "filled");
                guest
                    .sh("touch /root/zero; while [ -e /root/zero ]; do sleep 0.1; done")
                    .await;
            }
            // Zeroed after the first save, so the base has something else there.
            _ => assert_eq!(now.scratch, "zero"),
        }
        before = state(&guest).await;
    }

    // An idle guest's second pause is small, on any file system: the first resumed it, and nothing happened since.
    guest.sh("kill $(cut -d' ' -f1 /root/state)").await;
    let idle = guest.pause(machine).await;
    println!("at the end: {idle:?}, first {full}");
    assert!(
        idle.allocated.0 * 10 <= full,
        "{} of {full} bytes",
        idle.allocated.0
    );
    let raw = guest.flatten("disk.raw").await;
    let checked = output("e2fsck", &["-fy", raw.to_str().unwrap()]);
    assert!(
        checked.contains("clean") || checked.contains("recovering journal"),
        "{checked}"
    );
    let again = output("e2fsck", &["-fn", raw.to_str().unwrap()]);
    assert!(
        !again.contains("FIXED") && !again.contains("errors"),
        "{again}"
    );
    lab.close().await;
}

/// Holds old memory, and when told to a lot of new; says whether all of it is what it was.
const HOARDER: &str = r#"
import os, time, zlib
MIB = 1 << 20
held = {"old": bytearray(os.urandom(MIB)) * 16}
sums = {}
while True:
    if os.path.exists("/root/more"):
        held["new"] = bytearray(80 * MIB)
        for at in range(0, 80 * MIB, MIB): held["new"][at:at + MIB] = os.urandom(MIB)
        held["old"][:8 * MIB] = bytes(8 * MIB)
        sums.clear()
        os.unlink("/root/more")
    for name, block in held.items():
        now = zlib.crc32(block)
        if sums.setdefault(name, now) != now: print("CORRUPT", name, flush=True)
    with open("/root/checked.new", "w") as f: f.write(f"{len(held)}\n")
    os.rename("/root/checked.new", "/root/checked")
    time.sleep(0.1)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_large_change_becomes_a_new_base() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let machine = guest.boot().await;
    guest.spawn("hoarder.py", HOARDER).await;
    guest
        .sh("until [ -e /root/checked ]; do sleep 0.1; done")
        .await;
    guest.pause(machine).await;
    let first = guest.memory.clone().unwrap().base;

    let machine = guest.restore().await;
    guest
        .sh("touch /root/more; until [ \"$(cat /root/checked)\" = 2 ]; do sleep 0.1; done")
        .await;
    let saved = guest.pause(machine).await;
    println!("{saved:?}");
    assert_eq!(
        saved.pages,
        SavedPages::Full,
        "80 of 256 MiB are more than a quarter"
    );
    assert!(saved.zero_pages >= 2000, "what was zeroed is not stored");
    assert_ne!(guest.memory.clone().unwrap().base, first);

    // The new base stands alone.
    std::fs::remove_file(first).unwrap();
    let machine = guest.restore().await;
    guest
        .sh("rm /root/checked; until [ -e /root/checked ]; do sleep 0.1; done")
        .await;
    guest
        .sh("rm /root/checked; until [ -e /root/checked ]; do sleep 0.1; done")
        .await;
    assert_eq!(guest.sh("cat /root/hoarder.py.log").await, "");
    drop(machine);
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_44_what_does_not_belong_together_is_refused() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let machine = guest.boot().await;
    guest.pause(machine).await;
    let machine = guest.restore().await;
    let second = guest.pause(machine).await;
    assert_eq!(second.pages, SavedPages::Diff);

    let mut other_size = guest.restore_plan().await;
    other_size.geometry.mem_mib *= 2;
    let error = lab.qemu.launch(other_size).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("256 MiB, not 512 MiB"),
        "{error}"
    );

    let mut damaged = guest.restore_plan().await;
    let Start::Restore { memory, .. } = &mut damaged.start else {
        unreachable!()
    };
    let diff = lab.path().join("damaged");
    std::fs::copy(memory.diff.as_ref().unwrap(), &diff).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&diff)
        .unwrap()
        .set_len(5000)
        .unwrap();
    memory.diff = Some(diff);
    let error = lab.qemu.launch(damaged).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);

    let mut foreign = guest.restore_plan().await;
    let Start::Restore { device_state, .. } = &mut foreign.start else {
        unreachable!()
    };
    *device_state = lab.path().join("foreign");
    std::fs::write(&device_state, "not device state").unwrap();
    let error = lab.qemu.launch(foreign).await.err().unwrap();
    assert!(error.to_string().contains("load device state"), "{error}");

    // Refused, and nothing of it runs; the right one still does.
    assert!(lab.qemu.adopt(&guest.id, None).await.unwrap().is_none());
    let machine = guest.restore().await;
    assert_eq!(machine.probe().await.unwrap(), VcpuState::Running);
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_cannot_be_written_leaves_a_healthy_guest() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let machine = guest.boot().await;
    // A file in the way of the memory's base.
    machine.pause_vcpus().await.unwrap();
    let stage = lab.path().join("taken");
    std::fs::create_dir_all(&stage).unwrap();
    std::fs::write(stage.join("base"), "mine").unwrap();
    let plan = icebox_engine::host::SavePlan {
        device_state: stage.join("device-state"),
        memory: stage.clone(),
        restored_from: None,
    };
    let error = machine.save(plan).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    machine.resume_vcpus().await.unwrap();
    assert_eq!(guest.sh("echo alive").await, "alive");

    // A save of a guest that runs would be of no instant.
    let plan = icebox_engine::host::SavePlan {
        device_state: stage.join("running"),
        memory: stage,
        restored_from: None,
    };
    assert_eq!(
        machine.save(plan).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );

    // And the next try works.
    guest.pause(machine).await;
    guest.restore().await;
    assert_eq!(guest.sh("echo alive").await, "alive");
    lab.close().await;
}
