//! What holds for a sandbox that is frozen again and again.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::drivers::{WRITER, check_disk, synced};
use crate::lifecycle::{SUMS, write};
use crate::site::{Site, WARM, ticking};
use crate::steps::takes_its_time;

tests! {
    qcow2:
        inv_04_inv_10_inv_52_a_long_life_has_a_short_chain;
}

/// Of these tests.
pub(crate) const NAME: &str = "chains";

/// How many times longer a pause and a resume may take late in a long life than early. Merges, and whatever else runs on
/// the machine, are in it; a chain that every round makes longer would be.
const SLOWER: u32 = 3;

/// How many layers may lie under a disk for longer than it takes to merge some of them.
const MAX_LAYERS: usize = 16;

/// What is written down of what lies in `directory`, if it is there.
fn manifest(directory: &Path) -> Option<Value> {
    let text = fs::read_to_string(directory.join("manifest.json")).ok()?;
    Some(serde_json::from_str::<Value>(&text).unwrap()["payload"].clone())
}

/// How many layers lie under the head of a sandbox.
fn depth(site: &Site, id: &str) -> usize {
    // What a merge makes needless may go while it is counted: then the chain is another one by now.
    let counted = (0..10).find_map(|_| count_layers(site, id));
    counted.expect("a layer of the chain is not there")
}

/// How deep a chain is, unless a layer of it is not there.
fn count_layers(site: &Site, id: &str) -> Option<usize> {
    let record = manifest(&site.traces.data.join("sandboxes").join(id))?;
    let holds = record["holds"].as_array().unwrap();
    let head = holds.iter().find(|hold| hold["kind"] == "head").unwrap();
    let mut next = head["over"]["layer"].as_str().map(str::to_owned);
    let mut depth = 0;
    while let Some(layer) = next {
        depth += 1;
        let layer = manifest(&site.traces.data.join("layers").join(layer))?;
        next = layer["parent"].as_str().map(str::to_owned);
    }
    Some(depth)
}

fn stored(site: &Site) -> usize {
    fs::read_dir(site.traces.data.join("layers"))
        .unwrap()
        .count()
}

fn inv_04_inv_10_inv_52_a_long_life_has_a_short_chain(site: &mut Site) {
    // Enough for a merge, and for what comes after it.
    let rounds = if takes_its_time() { 30 } else { 20 };
    let others = stored(site);
    let before = site.newest_event();
    let id = site.create(WARM, "long");
    let mut count = site.count("long");
    write(site, "long", "s");
    let kept = site.exec("long", SUMS);
    site.exec("long", &ticking(WRITER));
    let (mut known, mut took) = (0, Vec::new());
    for round in 0..rounds {
        let file = round % 4;
        site.exec(
            "long",
            &format!("dd if=/dev/urandom of=/root/data-{file} bs=64k count=16 status=none && sync"),
        );
        let sums = site.exec("long", SUMS);
        if round == 18 {
            // The daemon goes, the guest and what it has open stay, and so does what it has open after one more freeze.
            site.end_daemon(Signal::KILL);
            site.start_daemon();
            site.get(&["snapshot", "long", "--name", "passing"]);
            site.get(&["template", "rm", "passing"]);
            site.exec("long", "echo 3 >/proc/sys/vm/drop_caches");
            assert_eq!(site.exec("long", SUMS), sums, "after the restart");
        }
        if takes_its_time() {
            site.get(&["flatten", "long", "--name", "moment"]);
            check_disk(site, "moment", known, &kept);
            site.get(&["template", "rm", "moment"]);
        }
        let mut events = site.events();
        let begun = Instant::now();
        site.get(&["pause", "long"]);
        site.get(&["resume", "long"]);
        took.push(begun.elapsed());
        // A merge may as well be over before the sandbox is back.
        if depth(site, &id) > MAX_LAYERS {
            events.wait_for("layers.merged");
        }
        assert!(depth(site, &id) <= MAX_LAYERS, "in round {round}");
        site.exec("long", "echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(site.exec("long", SUMS), sums, "after round {round}");
        let now = site.count("long");
        now.assert_goes_on_from(&count);
        count = now;
        let written = synced(site, "long");
        assert!(
            written >= known,
            "{written} records, and {known} before round {round}"
        );
        known = written;
    }
    let happened = site.happened(before);
    assert!(
        happened.iter().any(|kind| kind == "layers.merged"),
        "nothing was merged"
    );
    // What else runs on the machine has made all others longer.
    let shortest = |of: &[Duration]| *of.iter().min().unwrap();
    let early = shortest(&took[..rounds / 3]);
    let late = shortest(&took[rounds * 2 / 3..]);
    println!("a pause and a resume: {early:?} early, {late:?} late");
    assert!(late < early * SLOWER, "{early:?} early, {late:?} late");
    site.get(&["pause", "long"]);
    site.get(&["flatten", "long", "--name", "lived"]);
    check_disk(site, "lived", known, &kept);
    site.get(&["template", "rm", "lived"]);
    site.get(&["gc"]);
    let own = stored(site) - others;
    assert!(own <= MAX_LAYERS + 1, "{own} layers are stored");
    site.get(&["resume", "long"]);
    site.count("long").assert_goes_on_from(&count);
    site.get(&["rm", "long"]);
}
