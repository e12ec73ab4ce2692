//! VMMs beside the default one: that sandboxes live the same life on them. Each of them runs where it is named
//! (`ICEBOX_CLOUD_HYPERVISOR`, `ICEBOX_FIRECRACKER`) and KVM runs guests, which is in the test host.

use std::path::PathBuf;
use std::time::Instant;

use icebox_host::skip::skip;
use rustix::process::Signal;

use crate::lifecycle::{SUMS, path_of, write};
use crate::site::{COLD, COUNTER, Site, kill, ticking};

tests! {
    by_host:
        inv_08_inv_10_inv_18_inv_29_on_cloud_hypervisor_memory_and_disk_come_back,
        inv_31_inv_46_on_cloud_hypervisor_guests_outlive_daemons_and_their_end_is_noticed,
        inv_08_inv_10_inv_18_inv_29_on_firecracker_memory_and_disk_come_back,
        inv_31_inv_46_on_firecracker_guests_outlive_daemons_and_their_end_is_noticed;
}

pub(crate) const NAME: &str = "vmms";

/// A VMM that these tests are of.
struct Kind {
    /// As users call it.
    name: &'static str,
    /// As names of tests and settings do.
    word: &'static str,
    /// The variable that names its program.
    variable: &'static str,
    /// What a guest turns itself off with.
    off: &'static str,
}

const CLOUD_HYPERVISOR: Kind = Kind {
    name: "cloud-hypervisor",
    word: "cloud_hypervisor",
    variable: "ICEBOX_CLOUD_HYPERVISOR",
    off: "sync; echo o >/proc/sysrq-trigger",
};
const FIRECRACKER: Kind = Kind {
    name: "firecracker",
    word: "firecracker",
    variable: "ICEBOX_FIRECRACKER",
    // It has nothing to turn a machine off with; the agent knows that, and resets it.
    off: "sync; kill -PWR 1",
};
const KINDS: [Kind; 2] = [CLOUD_HYPERVISOR, FIRECRACKER];

impl Kind {
    fn named(&self) -> Option<PathBuf> {
        let program = std::env::var_os(self.variable)?;
        (!program.is_empty()).then(|| program.into())
    }

    fn program(&self) -> Option<PathBuf> {
        let kvm = std::env::var("ICEBOX_TEST_ACCELERATOR").is_ok_and(|it| it == "kvm");
        self.named().filter(|_| kvm)
    }
}

/// The VMMs of these tests that are named and can run: the settings that name them, and their programs.
pub(crate) fn programs() -> impl Iterator<Item = (&'static str, PathBuf)> {
    let kinds = KINDS.iter();
    kinds.filter_map(|kind| Some((kind.word, kind.program()?)))
}

/// Whether `test` can run here. If not, the reason is said.
pub(crate) fn can_run(test: &str) -> bool {
    let kind = KINDS.iter().find(|kind| test.contains(kind.word));
    let kind = kind.expect("a test of this suite is named after its VMM");
    if kind.program().is_some() {
        return true;
    }
    match kind.named() {
        Some(_) => skip(
            test,
            "KVM is not known to run guests here (ICEBOX_TEST_ACCELERATOR=kvm)",
        ),
        None => skip(test, &format!("{} names no {}", kind.variable, kind.name)),
    }
    false
}

fn inv_08_inv_10_inv_18_inv_29_on_cloud_hypervisor_memory_and_disk_come_back(site: &mut Site) {
    memory_and_disk_come_back(site, &CLOUD_HYPERVISOR);
}

fn inv_08_inv_10_inv_18_inv_29_on_firecracker_memory_and_disk_come_back(site: &mut Site) {
    memory_and_disk_come_back(site, &FIRECRACKER);
}

fn inv_31_inv_46_on_cloud_hypervisor_guests_outlive_daemons_and_their_end_is_noticed(
    site: &mut Site,
) {
    guests_outlive_daemons_and_their_end_is_noticed(site, &CLOUD_HYPERVISOR);
}

fn inv_31_inv_46_on_firecracker_guests_outlive_daemons_and_their_end_is_noticed(site: &mut Site) {
    guests_outlive_daemons_and_their_end_is_noticed(site, &FIRECRACKER);
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
    let vmms = site.get(&["vmm", "ls"]);
    let vmms: Vec<_> = vmms.as_array().unwrap().iter().collect();
    let listed = vmms.iter().find(|it| it["name"] == vmm.name);
    let listed = listed.unwrap_or_else(|| panic!("{vmms:?}\n{}", site.said()));
    println!("{listed}");
    assert_eq!(listed["default"], false);
    assert_eq!(listed["abilities"]["diskSwitch"], false);

    let begun = Instant::now();
    boot(site, vmm, "first");
    println!("booted and counting after {:.1?}", begun.elapsed());
    write(site, "first", "a");
    let mut sums = site.exec("first", SUMS);
    // Much that is random, much that was and is zero now.
    site.exec(
        "first",
        "head -c 24M /dev/urandom >/dev/shm/random; head -c 24M /dev/urandom >/dev/shm/zero; sha256sum /dev/shm/random >/dev/shm/sum",
    );
    let whole = "cd /dev/shm && sha256sum -c sum >&2 && tr -d '\\000' <zero | wc -c";

    let begun = Instant::now();
    site.get(&["pause", "first"]);
    println!("paused after {:.1?}", begun.elapsed());
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
        site.get(&["rm", from]);
    }
    assert_eq!(site.exec("fourth", whole), "0");
    let both = site.get(&["fork", "fourth", "-n", "2"]);
    let both = [0, 1].map(|n| path_of(&both[n], &["sandbox", "sandboxID"]).to_owned());
    for fork in &both {
        site.count(fork).assert_goes_on_from(&count);
    }
    // QEMU can make nothing of it.
    let refused = site.run(&["create", "of-third", "--vmm", "qemu"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("VMM"), "{said}");
    let refused = site.run(&["create", COLD, "--vmm", vmm.name, "--driver", "qcow2"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("cannot switch disks"), "{said}");

    site.get(&["rm", "fourth", &both[0], &both[1]]);
    site.get(&["template", "rm", "of-first", "of-second", "of-third", COLD]);
}

fn guests_outlive_daemons_and_their_end_is_noticed(site: &mut Site, vmm: &Kind) {
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
    let mut events = site.events();
    kill(site.vmm_pid("hardy"), Signal::KILL);
    events.wait_for("sandbox.crashed");
    assert_eq!(site.state("hardy"), "stopped");
    site.get(&["start", "hardy"]);
    assert_eq!(site.exec("hardy", SUMS), sums);
    site.get(&["rm", "hardy"]);
    site.get(&["template", "rm", COLD]);
}
