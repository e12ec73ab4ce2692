//! Going back in the history of sandboxes whose guests are real: memory and disk are those of the point, and what was
//! left for it comes back.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::site::{Site, WARM, kill};

tests! {
    every:
        inv_10_inv_51_a_rollback_brings_back_disk_and_memory_and_keeps_what_it_leaves;
    qcow2:
        inv_24_inv_51_what_is_removed_from_a_history_takes_nothing_else_with_it;
    reflink:
        inv_31_inv_51_automatic_checkpoints_are_there_after_a_crash;
}

/// Says in memory and on the disk what time it is.
fn mark(site: &Site, sandbox: &str, time: &str) {
    let script = format!("echo {time} >/dev/shm/time; echo {time} >/root/data-time; sync");
    site.exec(sandbox, &script);
}

/// What memory and disk say, the disk itself and not what the guest remembers of it.
fn marks(site: &Site, sandbox: &str) -> (String, String) {
    let script =
        "echo 3 >/proc/sys/vm/drop_caches; cat /dev/shm/time || echo none; cat /root/data-time";
    let shown = site.exec(sandbox, script);
    let (memory, disk) = shown.split_once('\n').unwrap();
    (memory.to_owned(), disk.to_owned())
}

fn both(time: &str) -> (String, String) {
    (time.to_owned(), time.to_owned())
}

/// Numbers of its generations and names of its branches, without the one that it began with.
fn points(site: &Site, sandbox: &str) -> (Vec<u64>, Vec<String>) {
    let history = site.get(&["history", sandbox]);
    let all = |key: &str| history[key].as_array().unwrap().clone();
    let number = |it: &Value| it["number"].as_u64().unwrap();
    let name = |it: &Value| it["name"].as_str().unwrap().to_owned();
    (
        all("generations")
            .iter()
            .map(number)
            .filter(|number| *number > 0)
            .collect(),
        all("branches").iter().map(name).collect(),
    )
}

fn inv_10_inv_51_a_rollback_brings_back_disk_and_memory_and_keeps_what_it_leaves(site: &mut Site) {
    site.create(WARM, "past");
    mark(site, "past", "first");
    let first = site.count("past");
    site.get(&["checkpoint", "past"]);
    assert_eq!(points(site, "past"), (vec![1], vec![]));
    mark(site, "past", "second");
    site.get(&["pause", "past"]);
    site.get(&["resume", "past"]);
    mark(site, "past", "third");

    // Running, and back to rest.
    site.get(&["rollback", "past", "--to", "1"]);
    assert_eq!(site.state("past"), "paused");
    let (numbers, branches) = points(site, "past");
    assert_eq!(numbers, [1, 2]);
    assert_eq!(branches.len(), 1, "{branches:?}");
    site.get(&["resume", "past"]);
    assert_eq!(marks(site, "past"), both("first"));
    site.count("past").assert_goes_on_from(&first);

    // Forward again, to memory and disk of the pause.
    site.get(&["rollback", "past", "--to", "2", "--resume"]);
    assert_eq!(marks(site, "past"), both("second"));
    site.count("past").assert_goes_on_from(&first);

    // The disk that was set aside is the newest that there was.
    site.get(&["rollback", "past", "--to", &branches[0], "--resume"]);
    let (memory, disk) = marks(site, "past");
    assert_eq!((memory.as_str(), disk.as_str()), ("none", "third"));
    // Each time that something newer was left it was kept.
    let (numbers, branches) = points(site, "past");
    assert_eq!((numbers.len(), branches.len()), (2, 3), "{branches:?}");
    site.get(&["gc"]);
    site.get(&["rollback", "past", "--to", "1", "--resume"]);
    assert_eq!(marks(site, "past"), both("first"));
    site.get(&["rm", "past"]);
}

fn inv_24_inv_51_what_is_removed_from_a_history_takes_nothing_else_with_it(site: &mut Site) {
    site.create(WARM, "pruned");
    for time in ["one", "two", "three"] {
        mark(site, "pruned", time);
        site.get(&["checkpoint", "pruned"]);
    }
    mark(site, "pruned", "aside");
    site.get(&["rollback", "pruned", "--to", "2"]);
    let (_, branches) = points(site, "pruned");
    let said = site.refused(&["history", "rm", "pruned", "2"]);
    assert!(said.contains("in use"), "{said}");
    // What the others stand on, and what stands on them.
    site.get(&["history", "rm", "pruned", "1"]);
    site.get(&["gc"]);
    site.get(&["resume", "pruned"]);
    assert_eq!(marks(site, "pruned"), both("two"));
    site.get(&["history", "rm", "pruned", "2"]);
    site.get(&["gc"]);
    assert_eq!(marks(site, "pruned"), both("two"));
    site.get(&["rollback", "pruned", "--to", "3", "--resume"]);
    assert_eq!(marks(site, "pruned"), both("three"));
    let said = site.refused(&["rollback", "pruned", "--to", "1"]);
    assert!(said.contains("no generation 1"), "{said}");
    site.get(&["rollback", "pruned", "--to", &branches[0]]);
    assert_eq!(site.state("pruned"), "stopped");
    site.get(&["history", "rm", "pruned", &branches[0], "3"]);
    site.get(&["gc"]);
    site.get(&["start", "pruned"]);
    assert_eq!(site.exec("pruned", "cat /root/data-time"), "aside");
    site.get(&["rm", "pruned"]);
}

fn inv_31_inv_51_automatic_checkpoints_are_there_after_a_crash(site: &mut Site) {
    /// As often as they may be.
    const EVERY: Duration = Duration::from_secs(10);
    let begun = Instant::now();
    let create = ["create", WARM, "--name", "careful"];
    site.get(&[&create[..], &["--checkpoint-every", "10s"]].concat());
    mark(site, "careful", "before");
    let before = site.count("careful");
    let mut events = site.events();
    if begun.elapsed() > EVERY / 2 {
        // Perhaps of a moment before the mark.
        events.wait_for("sandbox.checkpointed");
    }
    events.wait_for("sandbox.checkpointed");
    let (numbers, _) = points(site, "careful");
    let kept = numbers.last().expect("there is one").to_string();
    // On the disk alone, whether or not there is one more checkpoint before the crash.
    site.exec("careful", "echo after >/root/data-after; sync");
    kill(site.vmm_pid("careful"), Signal::KILL);
    let crashed = events.wait_for("sandbox.crashed");
    let detail = crashed["detail"].as_str().unwrap_or_default();
    // Both are offered: the newest disk, and the last generation.
    assert!(detail.contains("`start`"), "{crashed}");
    assert!(detail.contains("`resume --generation"), "{crashed}");
    let refused = site.refused(&["resume", "careful"]);
    assert!(
        refused.contains("`start` boots its newest disk"),
        "{refused}"
    );
    site.get(&["start", "careful"]);
    assert_eq!(site.exec("careful", "cat /root/data-after"), "after");
    site.get(&["stop", "careful"]);
    site.get(&["resume", "careful", "--generation", &kept]);
    assert_eq!(marks(site, "careful"), both("before"));
    site.count("careful").assert_goes_on_from(&before);
    site.get(&["rm", "careful"]);
}
