//! What holds for a sandbox that is frozen again and again.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use crate::site::{Site, WARM};

tests! {
    qcow2:
        inv_10_inv_52_a_long_life_has_a_short_chain;
}

/// How many layers may lie under a disk for longer than it takes to merge some of them.
const MAX_LAYERS: usize = 16;

fn manifest(directory: &Path) -> Value {
    let text = fs::read_to_string(directory.join("manifest.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["payload"].clone()
}

/// How many layers lie under the head of a sandbox.
fn depth(site: &Site, id: &str) -> usize {
    let record = manifest(&site.traces.data.join("sandboxes").join(id));
    let holds = record["holds"].as_array().unwrap();
    let head = holds.iter().find(|hold| hold["kind"] == "head").unwrap();
    let mut next = head["over"]["layer"].as_str().map(str::to_owned);
    let mut depth = 0;
    while let Some(layer) = next {
        depth += 1;
        let layer = manifest(&site.traces.data.join("layers").join(layer));
        next = layer["parent"].as_str().map(str::to_owned);
    }
    depth
}

fn stored(site: &Site) -> usize {
    fs::read_dir(site.traces.data.join("layers"))
        .unwrap()
        .count()
}

fn inv_10_inv_52_a_long_life_has_a_short_chain(site: &mut Site) {
    const ROUNDS: usize = 24;
    const SUMS: &str = "cd /root && sha256sum data-*";
    let others = stored(site);
    let id = site.create(WARM, "long");
    let mut count = site.count("long");
    let mut merged = 0;
    for round in 0..ROUNDS {
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
        let mut events = site.events();
        site.get(&["pause", "long"]);
        site.get(&["resume", "long"]);
        if depth(site, &id) > MAX_LAYERS {
            events.wait_for("layers.merged");
            merged += 1;
        }
        assert!(depth(site, &id) <= MAX_LAYERS, "in round {round}");
        site.exec("long", "echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(site.exec("long", SUMS), sums, "after round {round}");
        let now = site.count("long");
        now.assert_goes_on_from(&count);
        count = now;
    }
    assert!(merged > 0);
    site.get(&["pause", "long"]);
    site.get(&["gc"]);
    let own = stored(site) - others;
    assert!(own <= MAX_LAYERS + 1, "{own} layers are stored");
    site.get(&["resume", "long"]);
    site.count("long").assert_goes_on_from(&count);
    site.get(&["rm", "long"]);
}
