//! Each VMM with each volume driver: that sandboxes live the same life on them, verb by verb. What is seen of a pair is
//! recorded (`record.rs`).
//!
//! They run where KVM runs guests, which is in the test host; those beside QEMU where they are named
//! (`ICEBOX_CLOUD_HYPERVISOR`, `ICEBOX_FIRECRACKER`).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use icebox_host::skip::skip;
use rustix::process::Signal;
use serde_json::Value;

use crate::drivers::sums_on_disk;
use crate::lifecycle::{SUMS, path_of, write};
use crate::record::Record;
use crate::site::{COLD, COUNTER, SLOTS, Site, kill, patience, ticking, wedge};

tests! {
    every:
        inv_08_inv_10_inv_18_inv_29_inv_44_on_qemu_memory_and_disk_come_back,
        inv_06_inv_31_inv_46_on_qemu_guests_outlive_daemons_and_their_end_is_noticed;
    by_host:
        inv_08_inv_10_inv_18_inv_29_inv_44_on_cloud_hypervisor_memory_and_disk_come_back,
        inv_06_inv_31_inv_46_on_cloud_hypervisor_guests_outlive_daemons_and_their_end_is_noticed,
        inv_08_inv_10_inv_18_inv_29_inv_44_on_firecracker_memory_and_disk_come_back,
        inv_06_inv_31_inv_46_on_firecracker_guests_outlive_daemons_and_their_end_is_noticed,
        inv_06_inv_08_inv_29_inv_31_on_firecracker_a_pager_fills_memory;
}

pub(crate) const NAME: &str = "vmms";

/// A VMM that these tests are of.
struct Kind {
    /// As users call it.
    name: &'static str,
    /// As names of tests and settings do.
    word: &'static str,
    /// The variable that names its program; none for the one that is always there.
    variable: Option<&'static str>,
    /// What a guest turns itself off with.
    off: &'static str,
}

const QEMU: Kind = Kind {
    name: "qemu",
    word: "qemu",
    variable: None,
    off: "sync; echo o >/proc/sysrq-trigger",
};
const CLOUD_HYPERVISOR: Kind = Kind {
    name: "cloud-hypervisor",
    word: "cloud_hypervisor",
    variable: Some("ICEBOX_CLOUD_HYPERVISOR"),
    off: "sync; echo o >/proc/sysrq-trigger",
};
const FIRECRACKER: Kind = Kind {
    name: "firecracker",
    word: "firecracker",
    variable: Some("ICEBOX_FIRECRACKER"),
    // It has nothing to turn a machine off with; the agent knows that, and resets it.
    off: "sync; kill -PWR 1",
};
const KINDS: [Kind; 3] = [QEMU, CLOUD_HYPERVISOR, FIRECRACKER];

impl Kind {
    /// Why it cannot run here, if it cannot.
    fn absent(&self) -> Option<String> {
        if let Some(variable) = self.variable
            && self.named().is_none()
        {
            return Some(format!("{variable} names no {}", self.name));
        }
        let kvm = std::env::var("ICEBOX_TEST_ACCELERATOR").is_ok_and(|it| it == "kvm");
        let why = "KVM is not known to run guests here (ICEBOX_TEST_ACCELERATOR=kvm)";
        (!kvm).then(|| why.to_owned())
    }

    fn named(&self) -> Option<PathBuf> {
        let program = std::env::var_os(self.variable?)?;
        (!program.is_empty()).then(|| program.into())
    }
}

/// The VMMs of these tests that are named and can run: the settings that name them, and their programs.
pub(crate) fn programs() -> impl Iterator<Item = (&'static str, PathBuf)> {
    let kinds = KINDS.iter().filter(|kind| kind.absent().is_none());
    kinds.filter_map(|kind| Some((kind.word, kind.named()?)))
}

/// Whether `test` can run here. If not, the reason is said.
pub(crate) fn can_run(test: &str) -> bool {
    let kind = KINDS
        .iter()
        .find(|kind| test.contains(&format!("_on_{}_", kind.word)));
    let kind = kind.expect("a test of this suite is named after its VMM");
    match kind.absent() {
        Some(why) => skip(test, &why),
        None => return true,
    }
    false
}

fn inv_08_inv_10_inv_18_inv_29_inv_44_on_qemu_memory_and_disk_come_back(site: &mut Site) {
    memory_and_disk_come_back(site, &QEMU);
}

fn inv_06_inv_31_inv_46_on_qemu_guests_outlive_daemons_and_their_end_is_noticed(site: &mut Site) {
    guests_outlive_daemons_and_their_end_is_noticed(site, &QEMU);
}

fn inv_08_inv_10_inv_18_inv_29_inv_44_on_cloud_hypervisor_memory_and_disk_come_back(
    site: &mut Site,
) {
    memory_and_disk_come_back(site, &CLOUD_HYPERVISOR);
}

fn inv_06_inv_31_inv_46_on_cloud_hypervisor_guests_outlive_daemons_and_their_end_is_noticed(
    site: &mut Site,
) {
    guests_outlive_daemons_and_their_end_is_noticed(site, &CLOUD_HYPERVISOR);
}

fn inv_08_inv_10_inv_18_inv_29_inv_44_on_firecracker_memory_and_disk_come_back(site: &mut Site) {
    memory_and_disk_come_back(site, &FIRECRACKER);
}

fn inv_06_inv_31_inv_46_on_firecracker_guests_outlive_daemons_and_their_end_is_noticed(
    site: &mut Site,
) {
    guests_outlive_daemons_and_their_end_is_noticed(site, &FIRECRACKER);
}

/// What the daemon says of a VMM.
fn listed(site: &Site, vmm: &Kind) -> Value {
    let vmms = site.get(&["vmm", "ls"]);
    let listed = vmms.as_array().unwrap().iter();
    let mut named = listed.filter(|it| it["name"] == vmm.name);
    let one = named.next().cloned();
    one.unwrap_or_else(|| panic!("{vmms}\n{}", site.said()))
}

/// A sandbox on a VMM, with a process that counts in it.
fn boot(site: &Site, vmm: &Kind, name: &str) {
    site.build(COLD, &[]);
    let made = site.get(&["create", COLD, "--name", name, "--vmm", vmm.name]);
    let shown = site.get(&["inspect", path_of(&made, &["sandboxID"])]);
    assert_eq!(path_of(&shown, &["vmm", "name"]), vmm.name);
    let script = format!(
        "cat >/root/count.sh <<'END'\n{}\nEND\nsetsid sh /root/count.sh </dev/null >/dev/null 2>&1 &\nuntil [ -s /tmp/count ]; do sleep 0.1; done",
        ticking(COUNTER)
    );
    site.exec(name, &script);
}

fn memory_and_disk_come_back(site: &mut Site, vmm: &Kind) {
    let listed = listed(site, vmm);
    println!("{listed}");
    let is_default = vmm.variable.is_none();
    assert_eq!(listed["default"], is_default);
    assert_eq!(listed["abilities"]["diskSwitch"], is_default);
    let record = Record::of(site, &listed, vmm.named());

    let begun = Instant::now();
    boot(site, vmm, "first");
    println!("booted and counting after {:.1?}", begun.elapsed());
    write(site, "first", "a");
    let mut sums = site.exec("first", SUMS);
    record.saw(&["create", "exec"]);
    // Much that is random, much that was and is zero now.
    site.exec(
        "first",
        "head -c 24M /dev/urandom >/dev/shm/random; head -c 24M /dev/urandom >/dev/shm/zero; sha256sum /dev/shm/random >/dev/shm/sum",
    );
    let whole = "cd /dev/shm && sha256sum -c sum >&2 && tr -d '\\000' <zero | wc -c";

    let early = site.count("first");
    let begun = Instant::now();
    site.get(&["pause", "first"]);
    println!("paused after {:.1?}", begun.elapsed());
    site.get(&["flatten", "first", "--name", "flat"]);
    let begun = Instant::now();
    site.get(&["resume", "first"]);
    println!("resumed after {:.1?}", begun.elapsed());
    site.exec(
        "first",
        "head -c 24M /dev/zero | dd of=/dev/shm/zero conv=notrunc bs=1M status=none",
    );
    let count = site.count("first");
    // Before all of its memory can have been loaded; and once more, of what was saved then.
    for round in 0..2 {
        site.get(&["pause", "first"]);
        site.get(&["resume", "first"]);
        if round == 0 {
            continue;
        }
        assert_eq!(site.exec("first", whole), "0");
        assert_eq!(site.exec("first", SUMS), sums);
        site.count("first").assert_goes_on_from(&count);
    }
    record.saw(&["pause", "resume"]);

    // The disk alone.
    site.get(&["create", "flat", "--name", "flat", "--vmm", vmm.name]);
    assert_eq!(sums_on_disk(site, "flat"), sums);
    site.get(&["rm", "flat"]);
    record.saw(&["flatten"]);

    // A snapshot of a snapshot of a snapshot.
    for (from, to) in [
        ("first", "second"),
        ("second", "third"),
        ("third", "fourth"),
    ] {
        let template = format!("of-{from}");
        site.get(&["snapshot", from, "--name", &template]);
        site.create(&template, to);
        site.count(to).assert_goes_on_from(&count);
        assert_eq!(site.exec(to, SUMS), sums);
        write(site, to, to);
        sums = site.exec(to, SUMS);
        // The first is needed again; until then a machine with one processor has enough to do.
        let done = if from == "first" { "pause" } else { "rm" };
        site.get(&[done, from]);
    }
    assert_eq!(site.exec("fourth", whole), "0");
    record.saw(&["snapshot", "create from a snapshot"]);
    let both = site.get(&["fork", "fourth", "-n", "2"]);
    let both = [0, 1].map(|n| path_of(&both[n], &["sandbox", "sandboxID"]).to_owned());
    for fork in &both {
        site.count(fork).assert_goes_on_from(&count);
        assert_eq!(site.exec(fork, SUMS), sums);
    }
    record.saw(&["fork"]);

    // What was random before it was zero.
    site.get(&["rollback", "first", "--to", "1", "--resume"]);
    site.count("first").assert_goes_on_from(&early);
    assert_ne!(site.exec("first", whole), "0");
    record.saw(&["rollback"]);

    // Another can make nothing of it.
    let other = KINDS.iter().find(|it| {
        let named = it.variable.is_none() || it.named().is_some();
        it.name != vmm.name && named
    });
    if let Some(other) = other {
        let said = site.refused(&["create", "of-third", "--vmm", other.name]);
        assert!(said.contains("VMM"), "{said}");
    }
    if !is_default {
        let said = site.refused(&["create", COLD, "--vmm", vmm.name, "--driver", "qcow2"]);
        assert!(said.contains("cannot switch disks"), "{said}");
        record.never("qcow2", "refused: it cannot switch disks");
    }

    site.get(&["rm", "first", "fourth", &both[0], &both[1]]);
    record.saw(&["rm"]);
    let templates = ["of-first", "of-second", "of-third", "flat", COLD];
    site.get(&[&["template", "rm"][..], &templates].concat());
}

fn guests_outlive_daemons_and_their_end_is_noticed(site: &mut Site, vmm: &Kind) {
    let record = Record::of(site, &listed(site, vmm), vmm.named());
    boot(site, vmm, "hardy");
    write(site, "hardy", "a");
    let (count, sums) = (site.count("hardy"), site.exec("hardy", SUMS));
    for signal in [Signal::KILL, Signal::TERM] {
        site.end_daemon(signal);
        site.start_daemon();
        site.count("hardy").assert_goes_on_from(&count);
    }
    site.get(&["pause", "hardy"]);
    site.get(&["resume", "hardy"]);
    site.end_daemon(Signal::KILL);
    site.start_daemon();
    site.get(&["pause", "hardy"]);
    site.get(&["resume", "hardy"]);
    site.count("hardy").assert_goes_on_from(&count);
    record.saw(&["daemon killed"]);

    // One that does not answer holds nobody up, and goes on when it does.
    let wedged = site.vmm_pid("hardy");
    wedge(wedged);
    let begun = Instant::now();
    let said = site.refused(&["pause", "hardy"]);
    assert!(
        begun.elapsed() < patience(Duration::from_secs(25)),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        said.contains("did not answer") || said.contains("did not finish"),
        "{said}"
    );
    kill(wedged, Signal::CONT);
    site.count("hardy").assert_goes_on_from(&count);
    record.saw(&["VMM wedged"]);

    // A guest that ends, one that resets its machine after a boot and after a restore, and a VMM that is killed.
    for (end, has_booted) in [
        (vmm.off, true),
        ("sync; echo b >/proc/sysrq-trigger", true),
        ("sync; echo b >/proc/sysrq-trigger", false),
    ] {
        if !has_booted {
            site.get(&["pause", "hardy"]);
            site.get(&["resume", "hardy"]);
        }
        let mut events = site.events();
        site.run(&["exec", "-n", "-u", "root", "hardy", "--", "sh", "-c", end]);
        events.wait_for("sandbox.stopped");
        let shown = site.get(&["inspect", "hardy"]);
        println!("{end}: {}", shown["lastExit"]);
        site.get(&["start", "hardy"]);
        assert_eq!(site.exec("hardy", SUMS), sums);
    }
    record.saw(&["guest off", "guest reset", "start"]);
    let mut events = site.events();
    kill(site.vmm_pid("hardy"), Signal::KILL);
    events.wait_for("sandbox.crashed");
    assert_eq!(site.state("hardy"), "stopped");
    site.get(&["start", "hardy"]);
    assert_eq!(site.exec("hardy", SUMS), sums);
    record.saw(&["VMM killed"]);
    site.get(&["stop", "hardy"]);
    record.saw(&["stop"]);
    site.get(&["rm", "hardy"]);
    site.get(&["template", "rm", COLD]);
}

fn inv_06_inv_08_inv_29_inv_31_on_firecracker_a_pager_fills_memory(site: &mut Site) {
    boot(site, &FIRECRACKER, "first");
    write(site, "first", "a");
    let sums = site.exec("first", SUMS);
    site.exec(
        "first",
        "head -c 24M /dev/urandom >/dev/shm/random; head -c 24M /dev/urandom >/dev/shm/zero; sha256sum /dev/shm/random >/dev/shm/sum",
    );
    let whole = "cd /dev/shm && sha256sum -c sum >&2 && tr -d '\\000' <zero | wc -c";
    site.get(&["snapshot", "first", "--name", "memory"]);
    let count = site.count("first");
    site.get(&["rm", "first"]);
    let restored = |site: &Site, name: &str| {
        let begun = Instant::now();
        site.create("memory", name);
        let created = begun.elapsed();
        assert_eq!(site.exec(name, "echo there"), "there");
        println!(
            "{name}: created after {created:.2?}, answers after {:.2?}",
            begun.elapsed()
        );
    };
    restored(site, "mapped-first");
    restored(site, "mapped");
    site.get(&["rm", "mapped-first"]);
    site.end_daemon(Signal::TERM);
    site.set("firecracker_pager = true");
    site.start_daemon();
    // It stays as it was started, and so is saved.
    site.get(&["pause", "mapped"]);
    site.get(&["rm", "mapped"]);

    restored(site, "cold");
    // The working set is known after ten seconds.
    site.exec("cold", "sleep 12");
    restored(site, "ahead");
    for name in ["cold", "ahead"] {
        site.count(name).assert_goes_on_from(&count);
        assert_eq!(site.exec(name, SUMS), sums);
    }
    site.get(&["rm", "ahead"]);

    // Saved before all of its memory can have been loaded, when some was freed, and by another daemon.
    site.exec(
        "cold",
        "head -c 24M /dev/zero | dd of=/dev/shm/zero conv=notrunc bs=1M status=none; sync; echo 3 >/proc/sys/vm/drop_caches",
    );
    site.end_daemon(Signal::KILL);
    site.start_daemon();
    for _ in 0..2 {
        site.get(&["pause", "cold"]);
        site.get(&["resume", "cold"]);
    }
    assert_eq!(site.exec("cold", whole), "0");
    assert_eq!(site.exec("cold", SUMS), sums);
    site.count("cold").assert_goes_on_from(&count);

    let mut events = site.events();
    kill(site.pager_pid("cold"), Signal::KILL);
    events.wait_for("sandbox.crashed");
    let shown = site.get(&["inspect", "cold"]);
    assert!(shown["lastExit"].to_string().contains("pager"), "{shown}");
    site.get(&["start", "cold"]);
    assert_eq!(site.exec("cold", SUMS), sums);
    site.get(&["rm", "cold"]);
    site.get(&["template", "rm", "memory", COLD]);
    // As it was for the tests that follow.
    site.end_daemon(Signal::TERM);
    site.configure(SLOTS);
    site.start_daemon();
}
