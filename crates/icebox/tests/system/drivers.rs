//! What every volume driver has to carry: the life of sandboxes as it shows in their disks, with as few guests as that
//! takes, since the test host boots them slowly and runs all of this four times.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::crash::{rests, wake};
use crate::lifecycle::{SUMS, digests, path_of, write};
use crate::site::{COLD, Site, WARM, is_slow, kill, patience, ticking};

tests! {
    every:
        inv_03_inv_04_a_capture_of_a_writing_guest_is_one_instant,
        inv_09_inv_10_ten_rounds_of_pause_and_resume_lose_nothing,
        inv_18_a_snapshot_of_a_snapshot_of_a_snapshot_restores,
        inv_24_inv_38_things_go_in_any_order_and_what_others_need_stays,
        inv_25_fifty_sandboxes_change_nothing_that_they_stand_on,
        inv_27_sizes_are_allocated_bytes,
        inv_30_inv_33_killed_daemons_lose_nothing_and_leave_nothing,
        inv_31_inv_51_a_dead_vmm_is_noticed_and_both_disks_are_kept,
        inv_52_the_collector_removes_what_nothing_reaches_and_nothing_else;
}

/// Reads what is on the disk, not what the guest remembers of it.
pub(crate) fn sums_on_disk(site: &Site, sandbox: &str) -> String {
    site.exec(
        sandbox,
        &format!("echo 3 >/proc/sys/vm/drop_caches; {SUMS}"),
    )
}

/// Appends numbered records to a file, each of them on the disk before the next, and keeps the journal busy. Shows the
/// number of the last one whose fsync returned in a file that is not on the disk.
pub(crate) const WRITER: &str = r#"cat >/dev/shm/writer.py <<'END'
import os, time
records = os.open("/root/records", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.makedirs("/root/busy")
with open("/dev/shm/writer", "w") as pid:
    pid.write(str(os.getpid()))
number = 0
while True:
    number += 1
    os.write(records, b"%07d\n" % number)
    os.fsync(records)
    with open("/dev/shm/synced.new", "w") as synced:
        synced.write(str(number))
    os.rename("/dev/shm/synced.new", "/dev/shm/synced")
    with open("/root/busy/new", "wb") as file:
        file.write(os.urandom(20000))
    os.rename("/root/busy/new", "/root/busy/%d" % (number % 40))
    # Some of the processor is for others.
    time.sleep(TICK / 10)
END
setsid python3 /dev/shm/writer.py </dev/null >/dev/null 2>&1 &
until [ -e /dev/shm/synced ] && [ "$(cat /dev/shm/synced)" -ge 50 ]; do sleep 0.1; done"#;

/// How many records are known to be on the disk of a sandbox with a [`WRITER`].
pub(crate) fn synced(site: &Site, sandbox: &str) -> usize {
    site.exec(sandbox, "cat /dev/shm/synced").parse().unwrap()
}

/// Fails unless these are records without a gap, and at least so many.
fn assert_records(found: &str, at_least: usize, what: &str) {
    let mut lines = found.lines().collect::<Vec<_>>();
    // One was being written.
    if !found.ends_with('\n') {
        lines.pop();
    }
    assert!(
        lines.len() >= at_least,
        "{what}: {} records of {at_least}",
        lines.len()
    );
    for (number, line) in (1..).zip(lines) {
        assert_eq!(line.parse(), Ok(number), "{what}");
    }
}

fn inv_03_inv_04_a_capture_of_a_writing_guest_is_one_instant(site: &mut Site) {
    site.create(WARM, "scribe");
    write(site, "scribe", "s");
    let sums = site.exec("scribe", SUMS);
    site.exec("scribe", &ticking(WRITER));

    let rounds = if is_slow() { 1 } else { 2 };
    for round in 0..rounds {
        let before = synced(site, "scribe");
        site.get(&["snapshot", "scribe", "--name", "moment"]);
        site.create("moment", "copy");
        // What the memory knows to be on the disk is on the disk.
        let read = "cat /dev/shm/synced && echo && kill $(cat /dev/shm/writer); sync; echo 3 >/proc/sys/vm/drop_caches; cat /root/records";
        let shown = site.exec("copy", read);
        let (known, records) = shown.split_once('\n').unwrap();
        let known = known.parse::<usize>().unwrap();
        assert!(known >= before, "{known} records, {before} before it");
        assert_records(&format!("{records}\n"), known, &format!("snapshot {round}"));
        assert_eq!(sums_on_disk(site, "copy"), sums);
        site.get(&["rm", "copy"]);
        site.get(&["template", "rm", "moment"]);
    }

    // The disk alone, as a power cut at the instant of the capture would have left it.
    let before = synced(site, "scribe");
    site.get(&["flatten", "scribe", "--name", "live"]);
    check_disk(site, "live", before, &sums);
    let before = synced(site, "scribe");
    site.get(&["pause", "scribe"]);
    site.get(&["flatten", "scribe", "--name", "paused"]);
    check_disk(site, "paused", before, &sums);
    site.get(&["resume", "scribe"]);
    assert!(synced(site, "scribe") >= before);
    assert_eq!(sums_on_disk(site, "scribe"), sums);
    site.get(&["rm", "scribe"]);
    site.get(&["template", "rm", "live", "paused"]);
}

/// Looks at a copy of a template's disk: clean once its journal is replayed, and with all that was synced.
pub(crate) fn check_disk(site: &Site, template: &str, records: usize, sums: &str) {
    let base = site.get(&["template", "inspect", template]);
    let copy = site.scratch("copy");
    site.copy_base(path_of(&base, &["base"]), &copy);
    // The journal, and files that were deleted while they were open.
    let replayed = Command::new("e2fsck")
        .arg("-p")
        .arg(&copy)
        .output()
        .unwrap();
    assert!(
        matches!(replayed.status.code(), Some(0 | 1)),
        "{template}: {replayed:?}"
    );
    let checked = Command::new("e2fsck")
        .arg("-fn")
        .arg(&copy)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{template}: {checked:?}");
    let file = |path: &str| {
        let output = Command::new("debugfs")
            .args(["-R", &format!("cat {path}")])
            .arg(&copy)
            .stderr(Stdio::null())
            .output()
            .unwrap();
        output.stdout
    };
    let found = String::from_utf8(file("/root/records")).unwrap();
    assert_records(&found, records, template);
    let data = site.scratch("data-s");
    fs::write(&data, file("/root/data-s")).unwrap();
    let sum = Command::new("sha256sum")
        .arg(&data)
        .output()
        .unwrap()
        .stdout;
    let digest = sums.split(' ').next().unwrap();
    assert!(sum.starts_with(digest.as_bytes()), "{template}");
    fs::remove_file(data).unwrap();
    fs::remove_file(copy).unwrap();
}

fn inv_09_inv_10_ten_rounds_of_pause_and_resume_lose_nothing(site: &mut Site) {
    site.create(WARM, "rounds");
    let mut count = site.count("rounds");
    for round in 0..10 {
        write(site, "rounds", &round.to_string());
        let sums = site.exec("rounds", SUMS);
        site.get(&["pause", "rounds"]);
        assert_eq!(site.state("rounds"), "paused");
        site.get(&["resume", "rounds"]);
        assert_eq!(site.exec("rounds", SUMS), sums, "after round {round}");
        let now = site.count("rounds");
        now.assert_goes_on_from(&count);
        count = now;
    }
    assert_eq!(sums_on_disk(site, "rounds").lines().count(), 10);
    site.get(&["rm", "rounds"]);
}

fn inv_18_a_snapshot_of_a_snapshot_of_a_snapshot_restores(site: &mut Site) {
    let mut template = WARM.to_owned();
    let mut sums = Vec::new();
    for depth in 1..=3 {
        let (sandbox, name) = (format!("depth-{depth}"), format!("snap-{depth}"));
        site.create(&template, &sandbox);
        write(site, &sandbox, &depth.to_string());
        site.get(&["snapshot", &sandbox, "--name", &name]);
        sums.push((site.count(&sandbox), site.exec(&sandbox, SUMS)));
        site.get(&["rm", &sandbox]);
        template = name;
    }
    site.create(&template, "deepest");
    let (first, _) = &sums[0];
    let (_, last) = &sums[2];
    let count = site.count("deepest");
    assert_eq!((count.pid, count.memory), (first.pid, first.memory));
    assert_eq!(&site.exec("deepest", SUMS), last);
    site.get(&["rm", "deepest"]);
    site.get(&["template", "rm", "snap-1", "snap-2", "snap-3"]);
}

fn inv_24_inv_38_things_go_in_any_order_and_what_others_need_stays(site: &mut Site) {
    site.create(WARM, "parent");
    write(site, "parent", "p");
    let sums = site.exec("parent", SUMS);
    site.get(&["snapshot", "parent", "--name", "heir"]);
    let forks = site.get(&["fork", "parent", "-n", "2"]);
    let fork = |n: usize| path_of(&forks[n], &["sandbox", "sandboxID"]).to_owned();
    let (first, second) = (fork(0), fork(1));
    // What one writes, nobody else sees.
    write(site, &first, "p");
    let own = site.exec(&first, SUMS);
    assert_ne!(own, sums);
    site.get(&["rm", "parent"]);
    site.create("heir", "child");
    assert_eq!(site.exec("child", SUMS), sums);
    // Sandboxes name the templates that they need.
    let said = site.run(&["template", "rm", "heir"]);
    if !said.status.success() {
        let said = String::from_utf8(said.stderr).unwrap();
        assert!(said.contains("child"), "{said}");
    }
    site.get(&["pause", "child"]);
    site.get(&["rm", &first]);
    site.get(&["gc"]);
    site.get(&["resume", "child"]);
    assert_eq!(sums_on_disk(site, "child"), sums);
    assert_eq!(sums_on_disk(site, &second), sums);
    site.get(&["rm", "child"]);
    let templates = site.get(&["template", "ls"]).to_string();
    if templates.contains("heir") {
        site.get(&["template", "rm", "heir"]);
    }
    site.get(&["gc"]);
    assert_eq!(sums_on_disk(site, &second), sums);
    site.get(&["rm", &second]);
}

/// Everything that sandboxes stand on, by name, with a digest.
fn immutable(site: &Site) -> Vec<String> {
    let areas = ["bases", "layers", "memories"];
    let mut found: Vec<_> = areas
        .iter()
        .flat_map(|area| digests(&site.traces.data.join(area)))
        .collect();
    found.extend(site.traces.volume_digests());
    found
}

fn inv_25_fifty_sandboxes_change_nothing_that_they_stand_on(site: &mut Site) {
    // All of what may be written to, and more of it than is allocated.
    let scribble = "dd if=/dev/urandom of=/root/junk bs=256k count=8 conv=fsync status=none; \
                    dd if=/dev/urandom of=/usr/bin/perl bs=64k count=2 conv=notrunc,fsync status=none; \
                    rm /root/junk; sync";
    let before = immutable(site);
    assert!(!before.is_empty());
    for number in 0..50 {
        site.create(WARM, "one");
        site.exec("one", scribble);
        match number % 10 {
            3 => {
                site.get(&["pause", "one"]);
            }
            6 => {
                let mut events = site.events();
                kill(site.vmm_pid("one"), Signal::KILL);
                events.wait_for("sandbox.crashed");
            }
            _ => {}
        }
        site.get(&["rm", "one"]);
    }
    site.get(&["gc"]);
    assert_eq!(before, immutable(site));
}

/// Allocated bytes of all files below `path`, each counted once.
fn allocated(path: &Path) -> u64 {
    let metadata = fs::symlink_metadata(path).unwrap();
    if metadata.is_dir() {
        return fs::read_dir(path)
            .unwrap()
            .map(|entry| allocated(&entry.unwrap().path()))
            .sum();
    }
    metadata.blocks() * 512
}

fn inv_27_sizes_are_allocated_bytes(site: &mut Site) {
    site.build(COLD, &[]);
    let cold = site.get(&["template", "inspect", COLD]);
    // Its image is the other template's, too.
    let reported = cold["allocatedBytes"].as_u64().unwrap() + cold["sharedBytes"].as_u64().unwrap();
    let base = site
        .traces
        .data
        .join("bases")
        .join(path_of(&cold, &["base"]));
    let truth = allocated(&base);
    let apparent = fs::metadata(base.join("image")).unwrap().len();
    assert!(
        reported.abs_diff(truth) <= 64 << 10,
        "reported {reported}, allocated {truth}"
    );
    assert!(
        reported < apparent,
        "the image is sparse: {reported} of {apparent}"
    );

    let id = site.create(WARM, "small");
    site.get(&["pause", "small"]);
    let small = site.inspect("small");
    let generation = &small["generations"][0];
    let written = generation["allocatedBytes"].as_u64().unwrap();
    assert!(
        written > 0 && written < 128 << 20,
        "a generation of a guest with 256 MiB: {written}"
    );
    let own = small["allocatedBytes"].as_u64().unwrap();
    let directory = site.traces.data.join("sandboxes").join(id);
    assert!(
        own < 256 << 20,
        "{own}; its directory has {}",
        allocated(&directory)
    );
    site.get(&["rm", "small"]);
    site.get(&["template", "rm", COLD]);
}

fn inv_30_inv_33_killed_daemons_lose_nothing_and_leave_nothing(site: &mut Site) {
    site.create(WARM, "asleep");
    write(site, "asleep", "a");
    let asleep = (site.exec("asleep", SUMS), site.count("asleep"));
    site.get(&["pause", "asleep"]);
    site.create(WARM, "steady");
    write(site, "steady", "s");
    let sums = site.exec("steady", SUMS);

    for verb in [
        &["create", WARM, "--name", "extra"][..],
        &["snapshot", "steady", "--name", "moment"],
        &["pause", "steady"],
        &["rm", "asleep-copy"],
    ] {
        if verb[0] == "rm" {
            site.create(WARM, "asleep-copy");
        }
        let of = if verb[0] == "create" {
            "extra"
        } else {
            verb[1]
        };
        let mut client = site.command(verb);
        let mut client = client
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Under way, or done already.
        while client.try_wait().unwrap().is_none() {
            let seen = site.command(&["inspect", of, "--json"]).output().unwrap();
            let detail: Value = serde_json::from_slice(&seen.stdout).unwrap_or_default();
            if detail["verb"].is_string() {
                break;
            }
        }
        site.end_daemon(Signal::KILL);
        client.wait().unwrap();
        site.start_daemon();
        let found = rests(site);
        let at = |name: &str| {
            let rest = found.iter().find(|(of, _)| of == name);
            rest.map(|(_, state)| state.as_str())
        };
        assert_eq!(at("asleep"), Some("paused"), "{verb:?}");
        assert!(at("steady").is_some(), "{verb:?}: {found:?}");
        wake(site, "steady");
        assert_eq!(sums_on_disk(site, "steady"), sums, "{verb:?}");
        for extra in ["extra", "asleep-copy"] {
            if at(extra).is_some() {
                site.get(&["rm", extra]);
            }
        }
    }
    site.get(&["resume", "asleep"]);
    assert_eq!(sums_on_disk(site, "asleep"), asleep.0);
    site.count("asleep").assert_goes_on_from(&asleep.1);
    site.get(&["rm", "asleep", "steady"]);
    if site
        .run(&["template", "inspect", "moment"])
        .status
        .success()
    {
        site.get(&["template", "rm", "moment"]);
    }
}

fn inv_31_inv_51_a_dead_vmm_is_noticed_and_both_disks_are_kept(site: &mut Site) {
    site.create(WARM, "struck");
    site.exec("struck", "echo paused >/root/data-when; sync");
    let count = site.count("struck");
    site.get(&["pause", "struck"]);
    site.get(&["resume", "struck"]);
    site.exec("struck", "echo later >/root/data-when; sync");
    let vmm = site.vmm_pid("struck");
    let mut events = site.events();
    let struck = Instant::now();
    kill(vmm, Signal::KILL);
    events.wait_for("sandbox.crashed");
    assert!(
        struck.elapsed() < patience(Duration::from_secs(20)),
        "{:?}",
        struck.elapsed()
    );
    // A command waits for the verb under way: the holds are given back by then.
    let detail = site.inspect("struck");
    assert_eq!(detail["state"], "stopped");
    assert!(detail["lastExit"].is_string(), "{detail}");

    site.get(&["start", "struck"]);
    assert_eq!(site.exec("struck", "cat /root/data-when"), "later");
    let mut events = site.events();
    kill(site.vmm_pid("struck"), Signal::KILL);
    events.wait_for("sandbox.crashed");
    site.get(&["resume", "struck", "--generation", "1"]);
    assert_eq!(site.exec("struck", "cat /root/data-when"), "paused");
    site.count("struck").assert_goes_on_from(&count);
    let branches = site.inspect("struck")["branches"].clone();
    assert_eq!(branches.as_array().map(Vec::len), Some(1), "{branches}");
    // A generation that is older than another sets nothing aside, and the other stays.
    site.exec("struck", "echo second >/root/data-when; sync");
    site.get(&["pause", "struck"]);
    site.get(&["resume", "struck", "--generation", "1"]);
    assert_eq!(site.exec("struck", "cat /root/data-when"), "paused");
    let listed = site.inspect("struck")["generations"].clone();
    let numbers = listed.as_array().unwrap().iter().map(|one| &one["number"]);
    assert!(
        [1, 2]
            .iter()
            .all(|kept| numbers.clone().any(|number| number == kept)),
        "{listed}"
    );
    site.get(&["pause", "struck"]);
    site.get(&["resume", "struck", "--generation", "2"]);
    assert_eq!(site.exec("struck", "cat /root/data-when"), "second");
    site.get(&["rm", "struck"]);
}

fn inv_52_the_collector_removes_what_nothing_reaches_and_nothing_else(site: &mut Site) {
    site.create(WARM, "kept");
    write(site, "kept", "k");
    site.get(&["pause", "kept"]);
    site.get(&["resume", "kept"]);
    site.get(&["snapshot", "kept", "--name", "gone"]);
    let sums = site.exec("kept", SUMS);
    site.get(&["template", "rm", "gone"]);
    site.get(&["gc"]);
    let again = site.get(&["gc", "--dry-run"]);
    assert_eq!(
        again["garbage"],
        Value::Array(Vec::new()),
        "one collection is enough"
    );
    site.get(&["pause", "kept"]);
    site.get(&["resume", "kept"]);
    assert_eq!(sums_on_disk(site, "kept"), sums);
    site.get(&["rm", "kept"]);
    site.get(&["gc"]);
    let again = site.get(&["gc", "--dry-run"]);
    assert_eq!(again["garbage"], Value::Array(Vec::new()));
}
