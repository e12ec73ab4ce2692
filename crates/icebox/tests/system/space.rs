//! What holds when the disk under running guests is full (INV-28).
//!
//! On the site whose file system is its own: both drivers that keep disks in files work there, so sandboxes of both meet
//! the same full disk at once.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;

use rustix::fs::FallocateFlags;

use crate::marks::entries;
use crate::site::{COLD, Site, WARM};

tests! {
    reflink:
        inv_28_a_full_disk_holds_guests_of_reflink_and_qcow2_until_there_is_room,
        inv_28_a_pause_without_room_leaves_guests_of_reflink_and_qcow2_running_and_no_files;
}

const MIB: u64 = 1 << 20;

/// Takes all the room of a site's file system but so much, until it is dropped.
struct Filler(PathBuf);

impl Filler {
    fn leaving(site: &Site, left: u64) -> Self {
        let filler = Self(site.traces.data.with_file_name("filler"));
        let file = File::create(&filler.0).unwrap();
        rustix::fs::syncfs(&file).unwrap();
        let (mut at, mut piece) = (0, 1 << 30);
        while piece >= 4096 {
            let stat = rustix::fs::statvfs(&site.traces.data).unwrap();
            let free = stat.f_bavail * stat.f_frsize;
            if free < left + piece {
                piece /= 2;
                continue;
            }
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(_) => piece /= 2,
            }
        }
        filler
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let file = File::options().write(true).open(&self.0).unwrap();
        file.set_len(0).unwrap();
        rustix::fs::syncfs(&file).unwrap();
        fs::remove_file(&self.0).unwrap();
    }
}

/// A sandbox of each driver: one that was restored, and one that has booted.
fn both(site: &Site) -> [&'static str; 2] {
    site.build(COLD, &[]);
    site.create(WARM, "of-reflink");
    site.get(&["create", COLD, "--name", "of-qcow2", "--driver", "qcow2"]);
    assert_eq!(site.inspect("of-qcow2")["volumeDriver"], "qcow2");
    ["of-reflink", "of-qcow2"]
}

fn staged(site: &Site) -> Vec<PathBuf> {
    entries(&site.traces.data.join("staging"))
}

/// Counts into a file, each line on the disk before the next. It has begun when that answers.
const RECORD: &str = "setsid sh -c 'n=0; until [ -e /root/enough ]; do n=$((n+1)); echo $n >>/root/records; sync; done; \
                      touch /root/done' >/dev/null 2>&1 </dev/null & \
                      until grep -qsx 3 /root/records; do sleep 0.1; done";
/// Ends that.
const ENOUGH: &str = "touch /root/enough; until [ -e /root/done ]; do sleep 0.1; done";
/// How many lines there are on the disk, if none is missing.
const RECORDS: &str =
    "echo 3 >/proc/sys/vm/drop_caches; awk '$1 != NR {exit 1} END {print NR}' /root/records";

fn inv_28_a_full_disk_holds_guests_of_reflink_and_qcow2_until_there_is_room(site: &mut Site) {
    let sandboxes = both(site);
    let count = site.count("of-reflink");
    let mut events = site.events();
    for sandbox in sandboxes {
        site.exec(sandbox, RECORD);
    }
    let full = Filler::leaving(site, 0);
    // One may find a little room again, and stall twice before the other does.
    let mut held = BTreeSet::new();
    while held.len() < sandboxes.len() {
        let sandbox = &events.wait_for("sandbox.stalled")["sandboxID"];
        held.insert(sandbox.as_str().unwrap().to_owned());
    }
    for sandbox in sandboxes {
        let detail = site.inspect(sandbox);
        assert_eq!(detail["state"], "running");
        let why = detail["stalled"].as_str().expect("it says that it stands");
        assert!(why.contains("room"), "{why}");
        let said = site.refused(&["pause", sandbox]);
        assert!(
            said.contains("stands still") && said.contains("hint:"),
            "{said}"
        );
        let said = site.refused(&["fork", sandbox]);
        assert!(
            said.contains("less than the") && said.contains("hint:"),
            "{said}"
        );
    }
    let listed = String::from_utf8(site.run(&["ls"]).stdout).unwrap();
    let standing = listed.matches("running (stalled: no space)").count();
    assert_eq!(standing, 2, "{listed}");
    assert!(staged(site).is_empty(), "{:?}", staged(site));

    // Another daemon finds them standing, and waits for room like this one.
    site.end_daemon(rustix::process::Signal::KILL);
    site.start_daemon();
    let mut events = site.events();
    while site.inspect("of-qcow2")["stalled"].is_null() {
        std::thread::yield_now();
    }
    drop(full);
    for _ in sandboxes {
        events.wait_for("sandbox.continued");
    }
    for sandbox in sandboxes {
        assert!(site.inspect(sandbox)["stalled"].is_null());
        site.exec(sandbox, ENOUGH);
        let records = site.exec(sandbox, RECORDS);
        assert!(records.parse::<u32>().unwrap() >= 3, "{records}");
        site.get(&["pause", sandbox]);
        site.get(&["resume", sandbox]);
        assert_eq!(site.exec(sandbox, RECORDS), records, "nothing is lost");
    }
    site.count("of-reflink").assert_goes_on_from(&count);
    site.get(&["rm", "of-reflink", "of-qcow2"]);
    site.get(&["template", "rm", COLD]);
}

fn inv_28_a_pause_without_room_leaves_guests_of_reflink_and_qcow2_running_and_no_files(
    site: &mut Site,
) {
    let sandboxes = both(site);
    let mut count = site.count("of-reflink");
    for sandbox in sandboxes {
        // More than is left, and nothing that a memory could share.
        site.exec(
            sandbox,
            "mkdir -p /tmp/m && mount -t tmpfs none /tmp/m && head -c 100M /dev/urandom >/tmp/m/held",
        );
    }
    let sums = sandboxes.map(|sandbox| site.exec(sandbox, "sha256sum </tmp/m/held; sync"));
    let full = Filler::leaving(site, 64 * MIB);
    let before = site.traces.look();
    for sandbox in sandboxes {
        let pid = site.vmm_pid(sandbox);
        let said = site.refused(&["pause", sandbox]);
        assert!(
            said.contains("No space left") && said.contains("hint:"),
            "{said}"
        );
        assert_eq!(site.state(sandbox), "running");
        assert_eq!(site.vmm_pid(sandbox), pid, "the same guest");
        assert_eq!(site.exec(sandbox, "echo alive"), "alive");
        before.assert_same(&site.traces.look());
    }
    count = {
        let now = site.count("of-reflink");
        now.assert_goes_on_from(&count);
        now
    };
    drop(full);
    for (sandbox, sum) in sandboxes.into_iter().zip(&sums) {
        site.get(&["pause", sandbox]);
        assert_eq!(site.state(sandbox), "paused");
        site.get(&["resume", sandbox]);
        assert_eq!(site.exec(sandbox, "sha256sum </tmp/m/held"), *sum);
    }
    site.count("of-reflink").assert_goes_on_from(&count);
    site.get(&["rm", "of-reflink", "of-qcow2"]);
    site.get(&["template", "rm", COLD]);
}
