//! What holds when daemons end, are killed, are kept from writing, and start again.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::site::{SLOTS, Site, WARM, quietly, run};

tests! {
    every:
        inv_30_a_killed_daemon_leaves_everything_at_rest;
    qcow2:
        inv_33_inv_48_strays_of_ours_are_removed_and_nothing_else,
        a_second_daemon_is_refused;
    reflink:
        inv_44_other_versions_are_refused_with_an_explanation,
        inv_46_guests_outlive_their_daemon,
        inv_47_slots_are_used_up_and_never_shared;
}

/// Each sandbox by name, with where it rests. Fails if one does not rest.
pub(crate) fn rests(site: &Site) -> Vec<(String, String)> {
    let listed = site.get(&["ls"]);
    let mut rests = Vec::new();
    for sandbox in listed.as_array().unwrap() {
        assert!(sandbox["verb"].is_null(), "{sandbox}");
        let state = sandbox["state"].as_str().unwrap().to_owned();
        assert_ne!(state, "broken", "{sandbox}\n{}", site.said());
        let id = sandbox["sandboxID"].as_str().unwrap().to_owned();
        rests.push((sandbox["name"].as_str().map_or(id, str::to_owned), state));
    }
    rests.sort();
    rests
}

fn inv_30_a_killed_daemon_leaves_everything_at_rest(site: &mut Site) {
    let verbs: [&[&str]; 6] = [
        &["create", WARM, "--name", "extra"],
        &["pause", "steady"],
        &["resume", "steady"],
        &["snapshot", "steady", "--name", "moment"],
        &["fork", "steady", "-n", "1"],
        &["rm", "extra"],
    ];
    site.create(WARM, "steady");
    site.exec(
        "steady",
        "dd if=/dev/urandom of=/root/data bs=64k count=16 status=none && sync",
    );
    let sum = site.exec("steady", "sha256sum /root/data");
    for after_ms in [3, 90, 350] {
        for verb in verbs {
            bring_to(site, verb);
            let told = format!("{verb:?}, killed after {after_ms} ms");
            let mut client = site.command(verb);
            let mut client = client
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let (ended, end) = mpsc::channel();
            let waiting = std::thread::spawn(move || {
                client.wait().unwrap();
                ended.send(()).unwrap_or_default();
            });
            // The time is the experiment: verbs end before it or are under way.
            end.recv_timeout(Duration::from_millis(after_ms))
                .unwrap_or_default();
            site.end_daemon(Signal::KILL);
            waiting.join().unwrap();

            site.start_daemon();
            let first = rests(site);
            let marks = site.marks();
            site.end_daemon(Signal::KILL);
            site.start_daemon();
            assert_eq!(
                rests(site),
                first,
                "a second restart changed something: {told}"
            );
            marks.assert_same(&site.marks());

            assert!(
                first.iter().any(|(name, _)| name == "steady"),
                "{told}: {first:?}"
            );
            for (name, _) in first
                .iter()
                .filter(|(name, _)| name != "steady" && name != "extra")
            {
                site.get(&["rm", name]);
            }
            if site
                .run(&["template", "inspect", "moment"])
                .status
                .success()
            {
                site.get(&["template", "rm", "moment"]);
            }
            wake(site, "steady");
            assert_eq!(site.exec("steady", "sha256sum /root/data"), sum, "{told}");
        }
    }
    for (name, _) in rests(site) {
        site.get(&["rm", &name]);
    }
}

/// Brings the sandboxes to where `verb` has something to do.
fn bring_to(site: &Site, verb: &[&str]) {
    let extra = rests(site).iter().any(|(name, _)| name == "extra");
    match verb[0] {
        "create" if extra => drop(site.get(&["rm", "extra"])),
        "rm" if !extra => drop(site.create(WARM, "extra")),
        "resume" => drop(site.get(&["pause", "steady"])),
        _ => {}
    }
}

/// Makes a sandbox run, wherever it rests.
pub(crate) fn wake(site: &Site, sandbox: &str) {
    match site.state(sandbox).as_str() {
        "paused" => drop(site.get(&["resume", sandbox])),
        "stopped" => drop(site.get(&["start", sandbox])),
        state => assert_eq!(state, "running"),
    }
}

/// A namespace, a link and a table as those of an installation that is not the one with `tag`.
struct Foreign {
    name: String,
    table: String,
}

impl Foreign {
    fn add(tag: &str) -> Self {
        let (first, rest) = tag.split_at(1);
        let other = format!("{}{rest}", if first == "0" { "1" } else { "0" });
        let foreign = Self {
            name: format!("ibx{other}-77"),
            table: format!("icebox_{other}"),
        };
        let Self { name, table } = &foreign;
        let peer = format!("{name}p");
        run(Command::new("ip").args(["netns", "add", name]));
        run(Command::new("ip").args(["link", "add", name, "type", "veth", "peer", "name", &peer]));
        run(Command::new("nft").args(["add", "table", "inet", table]));
        foreign
    }

    fn removals(&self) -> [Command; 3] {
        let command = |words: &[&str], name| {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]).arg(name);
            command
        };
        [
            command(&["ip", "netns", "delete"], &self.name),
            command(&["ip", "link", "delete"], &self.name),
            command(&["nft", "delete", "table", "inet"], &self.table),
        ]
    }

    /// Fails if one of them is not there.
    fn remove(&self) {
        self.removals().iter_mut().for_each(run);
    }
}

impl Drop for Foreign {
    /// A test that failed leaves nothing either.
    fn drop(&mut self) {
        self.removals().iter_mut().for_each(quietly);
    }
}

fn inv_33_inv_48_strays_of_ours_are_removed_and_nothing_else(site: &mut Site) {
    let id = site.create(WARM, "resident");
    let count = site.count("resident");
    let before = site.marks();
    site.end_daemon(Signal::TERM);
    let tag = site.traces.tag();
    let last = if id.ends_with('a') { 'b' } else { 'a' };
    let stray_id = format!("{}{last}", &id[..id.len() - 1]);
    let ours = format!("ibx{tag}-77");
    run(Command::new("ip").args(["netns", "add", &ours]));
    let foreign = Foreign::add(&tag);
    let forwards = || fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let forwarded = forwards();
    let groups = site.traces.cgroups();
    let group = groups.first().map(|group| group.with_file_name(&stray_id));
    if let Some(group) = &group {
        fs::create_dir(group).unwrap();
    }
    let runtime = site.traces.run.join("vm").join(&stray_id);
    fs::create_dir(&runtime).unwrap();
    let staged = site.traces.data.join("staging").join("memory-of-nobody");
    fs::create_dir_all(&staged).unwrap();

    site.start_daemon();
    assert!(
        !Path::new("/run/netns").join(&ours).exists(),
        "{}",
        site.said()
    );
    assert!(group.is_none_or(|group| !group.exists()), "{}", site.said());
    assert!(!runtime.exists(), "{}", site.said());
    if staged.exists() {
        // Its name is not one of ours: it is left alone.
        fs::remove_dir(&staged).unwrap();
    }
    site.count("resident").assert_goes_on_from(&count);
    before.assert_same(&site.marks());
    site.get(&["rm", "resident"]);

    foreign.remove();
    assert_eq!(forwards(), forwarded);
}

/// Changes a manifest while no daemon runs, and returns what it was.
fn edit(manifest: &Path, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let before = fs::read(manifest).unwrap();
    let mut document: Value = serde_json::from_slice(&before).unwrap();
    change(&mut document);
    fs::write(manifest, serde_json::to_vec(&document).unwrap()).unwrap();
    before
}

fn inv_44_other_versions_are_refused_with_an_explanation(site: &mut Site) {
    let id = site.create(WARM, "old");
    let count = site.count("old");
    site.get(&["pause", "old"]);
    site.end_daemon(Signal::TERM);
    let directory = site.traces.data.join("sandboxes").join(id);
    let generation = directory.join("generations/1/manifest.json");
    let original = edit(&generation, |document| {
        assert!(replace(document, "version", "7.2.0"), "{document}");
    });
    site.start_daemon();
    let said = site.refused(&["resume", "old"]);
    assert!(said.contains("7.2.0"), "{said}");
    assert_eq!(site.state("old"), "paused");
    site.end_daemon(Signal::TERM);
    fs::write(&generation, original).unwrap();

    let manifest = directory.join("manifest.json");
    let original = edit(&manifest, |document| document["format"] = 99.into());
    let said = site
        .try_daemon()
        .expect_err("a manifest is newer than this build");
    fs::write(&manifest, original).unwrap();
    assert!(said.contains("99") && said.contains('1'), "{said}");

    site.start_daemon();
    site.get(&["resume", "old"]);
    site.count("old").assert_goes_on_from(&count);
    site.get(&["rm", "old"]);
}

/// Sets every field called `key` that holds a string.
fn replace(value: &mut Value, key: &str, with: &str) -> bool {
    match value {
        Value::Object(fields) => {
            let mut found = false;
            for (name, field) in fields {
                if name == key && field.is_string() {
                    *field = with.into();
                    found = true;
                } else {
                    found |= replace(field, key, with);
                }
            }
            found
        }
        _ => false,
    }
}

fn inv_46_guests_outlive_their_daemon(site: &mut Site) {
    site.create(WARM, "survivor");
    let vmm = site.vmm_pid("survivor");
    let mut count = site.count("survivor");
    for signal in [Signal::TERM, Signal::KILL] {
        site.end_daemon(signal);
        site.start_daemon();
        assert_eq!(site.vmm_pid("survivor"), vmm);
        let now = site.count("survivor");
        now.assert_goes_on_from(&count);
        count = now;
    }
    // An adopted guest is as good as any.
    site.get(&["pause", "survivor"]);
    site.get(&["resume", "survivor"]);
    site.count("survivor").assert_goes_on_from(&count);
    site.get(&["rm", "survivor"]);
}

fn inv_47_slots_are_used_up_and_never_shared(site: &mut Site) {
    site.end_daemon(Signal::TERM);
    site.configure(2);
    site.start_daemon();
    for name in ["first", "second"] {
        site.create(WARM, name);
        // It keeps its addresses.
        site.get(&["pause", name]);
    }
    let addresses = ["first", "second"].map(|name| site.address(name));
    assert_ne!(addresses[0], addresses[1]);
    for _ in 0..2 {
        let said = site.refused(&["create", WARM, "--name", "third"]);
        assert!(said.contains("slot") && said.contains("hint:"), "{said}");
        site.refused(&["inspect", "third"]);
    }
    site.get(&["rm", "first"]);
    site.create(WARM, "third");
    assert_eq!(site.address("third"), addresses[0]);
    site.get(&["resume", "second"]);
    assert_eq!(site.address("second"), addresses[1]);
    site.exec("second", "true");
    site.exec("third", "true");
    site.get(&["rm", "second", "third"]);
    site.end_daemon(Signal::TERM);
    site.configure(SLOTS);
    site.start_daemon();
}

fn a_second_daemon_is_refused(site: &mut Site) {
    let pid = site.daemon_pid().to_string();
    let second = site.serve().output().unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains(&pid), "{said}");
    // With sockets of its own it meets the lock of the data directory.
    let second = site
        .serve()
        .arg("--run-dir")
        .arg(site.scratch("run2"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains(site.traces.data.to_str().unwrap()), "{said}");
    site.get(&["ls"]);
}
