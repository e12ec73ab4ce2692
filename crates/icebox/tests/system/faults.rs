//! What holds when something fails: a VMM's command, a write, a file that has gone, the guest's agent, the VMM itself.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::marks::entries;
use crate::monitor::Refuse;
use crate::site::{Count, Driver, Site, WARM, kill, patience, run, wedge};

tests! {
    every:
        inv_01_a_capture_that_fails_at_any_command_leaves_the_guest_running,
        inv_01_inv_11_a_capture_that_cannot_be_written_fails_and_the_guest_runs_on,
        inv_16_a_resume_that_fails_anywhere_leaves_it_paused;
    qcow2:
        inv_02_vcpus_that_cannot_be_resumed_break_the_sandbox;
    reflink:
        inv_05_a_wedged_agent_does_not_block_a_pause,
        inv_06_inv_21_a_wedged_vmm_holds_nobody_up;
}

/// The port of the agent in every guest.
const AGENT: u16 = 49983;

/// The guest goes on from `count`, and everything that serves a running sandbox does: the proxy's gate is open, its ports
/// are reached, its use is measured.
pub(crate) fn assert_runs(site: &Site, sandbox: &str, count: &Count) -> Count {
    assert_eq!(site.state(sandbox), "running");
    let now = site.count(sandbox);
    now.assert_goes_on_from(count);
    TcpStream::connect((site.address(sandbox), AGENT)).unwrap();
    // Of a machine that was adopted a moment ago, nothing may be measured yet.
    let until = Instant::now() + patience(Duration::from_secs(60));
    let used = loop {
        let shown = site.run(&["stats", sandbox, "--json"]);
        if shown.status.success() {
            break serde_json::from_slice::<Value>(&shown.stdout).unwrap();
        }
        assert!(Instant::now() < until, "{shown:?}");
    };
    assert!(used["metrics"]["mem_used"].as_u64() > Some(0), "{used}");
    now
}

pub(crate) fn staged(site: &Site) -> Vec<PathBuf> {
    entries(&site.traces.data.join("staging"))
}

fn inv_01_a_capture_that_fails_at_any_command_leaves_the_guest_running(site: &mut Site) {
    let id = site.create(WARM, "stubborn");
    let mut count = site.count("stubborn");
    let sum = "sha256sum /root/data";
    site.exec("stubborn", "head -c 1M /dev/urandom >/root/data; sync");
    let data = site.exec("stubborn", sum);
    for verb in [
        &["snapshot", "stubborn", "--name", "at-last"][..],
        &["pause", "stubborn"],
    ] {
        let monitor = site.monitor(&id);
        let mut refused = Vec::new();
        loop {
            monitor.refuse(Refuse::Nth(refused.len()));
            let done = site.run(verb).status.success();
            let now = monitor.refused();
            assert_eq!(
                done,
                now.is_empty(),
                "{verb:?} with {now:?} refused\n{}",
                site.said()
            );
            if done {
                break;
            }
            refused.extend(now);
            count = assert_runs(site, "stubborn", &count);
            assert!(staged(site).is_empty(), "{refused:?}: {:?}", staged(site));
        }
        // Stop the vCPUs, save, and freeze if that is the VMM's.
        let must = ["stop", "xen-save-devices-state", "blockdev-snapshot"];
        let must = &must[..if site.driver == Driver::Qcow2 { 3 } else { 2 }];
        for command in must {
            assert!(
                refused.iter().any(|refused| refused == command),
                "{refused:?}"
            );
        }
    }
    site.get(&["resume", "stubborn"]);
    assert_runs(site, "stubborn", &count);
    assert_eq!(site.exec("stubborn", &dropping_caches(sum)), data);
    site.create("at-last", "copy");
    assert_eq!(site.exec("copy", sum), data);
    site.get(&["rm", "stubborn", "copy"]);
    site.get(&["template", "rm", "at-last"]);
}

/// Reads what is on the disk, not what the guest remembers of it.
fn dropping_caches(script: &str) -> String {
    format!("echo 3 >/proc/sys/vm/drop_caches; {script}")
}

/// A directory in which nothing can be made, renamed or removed until this is dropped.
struct Immutable(PathBuf);

impl Immutable {
    fn make(directory: &Path) -> Self {
        run(Command::new("chattr").arg("+i").arg(directory));
        Self(directory.to_owned())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        run(Command::new("chattr").arg("-i").arg(&self.0));
    }
}

fn inv_01_inv_11_a_capture_that_cannot_be_written_fails_and_the_guest_runs_on(site: &mut Site) {
    let id = site.create(WARM, "unwritten");
    let mut count = site.count("unwritten");
    // So that it has a generation, and where those are.
    site.get(&["pause", "unwritten"]);
    site.get(&["resume", "unwritten"]);
    let data = site.traces.data.clone();
    let own = data.join("sandboxes").join(&id);
    for directory in [
        own.clone(),
        own.join("heads"),
        own.join("generations"),
        data.join("staging"),
        data.join("memories"),
        data.join("layers"),
    ] {
        for verb in [
            &["pause", "unwritten"][..],
            &["snapshot", "unwritten", "--name", "never"],
        ] {
            // A snapshot writes no generation.
            if verb[0] == "snapshot" && directory.ends_with("generations") {
                continue;
            }
            let closed = Immutable::make(&directory);
            let said = site.refused(verb);
            assert!(said.contains("not permitted"), "{directory:?}: {said}");
            count = assert_runs(site, "unwritten", &count);
            drop(closed);
            site.refused(&["template", "inspect", "never"]);
        }
    }
    site.get(&["pause", "unwritten"]);
    assert!(staged(site).is_empty(), "{:?}", staged(site));
    site.get(&["resume", "unwritten"]);
    assert_runs(site, "unwritten", &count);
    site.get(&["rm", "unwritten"]);
}

/// What is somewhere else until this is dropped.
struct Away {
    path: PathBuf,
    aside: PathBuf,
}

impl Away {
    fn put(path: PathBuf) -> Self {
        let mut aside = path.clone().into_os_string();
        aside.push(".aside");
        let aside = PathBuf::from(aside);
        fs::rename(&path, &aside).unwrap();
        Self { path, aside }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        fs::rename(&self.aside, &self.path).unwrap();
    }
}

fn inv_16_a_resume_that_fails_anywhere_leaves_it_paused(site: &mut Site) {
    let id = site.create(WARM, "asleep");
    let count = site.count("asleep");
    let before = site.traces.look();
    site.get(&["pause", "asleep"]);
    let rests = |site: &Site| {
        let detail = site.inspect("asleep");
        assert_eq!(detail["state"], "paused");
        ["address", "generations", "holds", "branches"].map(|key| detail[key].clone())
    };
    let (at_rest, marks) = (rests(site), site.traces.look());
    let new = |area: &str| marks.came_since(&before, area);
    let (layer, memory) = (new("/layers/"), new("/memories/"));
    let own = site.traces.data.join("sandboxes").join(&id);
    let device_state = own.join("generations/1/device-state");
    let runtime = site.traces.run.join("vm");

    let check = |site: &Site, obstacle: &str| {
        let said = site.refused(&["resume", "asleep"]);
        assert!(!said.is_empty());
        assert_eq!(rests(site), at_rest, "{obstacle}: {said}");
        marks.assert_same(&site.traces.look());
    };
    for path in [layer, memory, device_state.clone()] {
        let away = Away::put(path);
        let said = site.refused(&["resume", "asleep"]);
        drop(away);
        assert_eq!(rests(site), at_rest, "{said}");
        marks.assert_same(&site.traces.look());
    }
    {
        let _away = Away::put(device_state.clone());
        fs::write(&device_state, "no state of any device").unwrap();
        check(site, "a device state that is none");
    }
    for directory in [own.join("heads"), own.clone(), runtime] {
        let _closed = Immutable::make(&directory);
        check(site, &directory.display().to_string());
    }
    site.get(&["resume", "asleep"]);
    assert_runs(site, "asleep", &count);
    site.get(&["rm", "asleep"]);
}

fn inv_02_vcpus_that_cannot_be_resumed_break_the_sandbox(site: &mut Site) {
    for verb in [
        &["pause", "stuck"][..],
        &["snapshot", "stuck", "--name", "never"],
    ] {
        let id = site.create(WARM, "stuck");
        let monitor = site.monitor(&id);
        monitor.refuse(Refuse::Named(&["xen-save-devices-state", "cont"]));
        let said = site.refused(verb);
        assert!(said.contains("refused by the test"), "{said}");
        let detail = site.inspect("stuck");
        assert_eq!(detail["state"], "broken");
        let why = detail["broken"].as_str().unwrap();
        assert!(why.contains("vCPUs could not be resumed"), "{why}");
        for verb in [
            &["pause", "stuck"][..],
            &["resume", "stuck"],
            &["stop", "stuck"],
            &["fork", "stuck"],
            &["exec", "-n", "stuck", "--", "true"],
        ] {
            let said = site.refused(verb);
            assert!(said.contains("broken"), "{verb:?}: {said}");
        }
        site.get(&["rm", "stuck"]);
    }
}

/// Freezes a sandbox's agent, which process 1 of the guest cannot undo as it does a stop. Nobody answers for the command
/// that does it.
pub(crate) fn wedge_agent(site: &Site, sandbox: &str) -> Child {
    const FREEZE: &str = "mkdir /sys/fs/cgroup/wedged && cd /sys/fs/cgroup/wedged \
        && echo $PPID >cgroup.procs && echo 1 >cgroup.freeze";
    let command = [
        "exec", "-n", "-u", "root", sandbox, "--", "sh", "-c", FREEZE,
    ];
    let mut command = site.command(&command);
    let client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    client.unwrap()
}

fn inv_05_a_wedged_agent_does_not_block_a_pause(site: &mut Site) {
    site.create(WARM, "wedged");
    let count = site.count("wedged");
    let mut client = wedge_agent(site, "wedged");
    let begun = Instant::now();
    site.get(&["pause", "wedged"]);
    // 5 s for the command's connection, which does not end by itself, and 5 s for the guest's preparations.
    let took = begun.elapsed();
    assert!(took < patience(Duration::from_secs(25)), "{took:?}");
    client.kill().unwrap();
    client.wait().unwrap();
    assert_eq!(site.state("wedged"), "paused");
    assert!(count.count > 0);
    site.get(&["rm", "wedged"]);
}

fn inv_06_inv_21_a_wedged_vmm_holds_nobody_up(site: &mut Site) {
    for name in ["wedged", "free"] {
        site.create(WARM, name);
    }
    let (count, free) = (site.count("wedged"), site.count("free"));
    let vmm = site.vmm_pid("wedged");
    wedge(vmm);
    let begun = Instant::now();
    let said = site.refused(&["pause", "wedged"]);
    // 3 s for a VMM that does not answer, and at most 5 s for a guest that cannot prepare itself.
    let took = begun.elapsed();
    assert!(took < patience(Duration::from_secs(25)), "{took:?}");
    // The driver and the engine each have a bound for it.
    assert!(
        said.contains("did not answer") || said.contains("did not finish"),
        "{said}"
    );
    site.get(&["pause", "free"]);
    site.get(&["resume", "free"]);
    assert_runs(site, "free", &free);

    kill(vmm, Signal::CONT);
    let count = assert_runs(site, "wedged", &count);
    site.get(&["pause", "wedged"]);
    site.get(&["resume", "wedged"]);
    assert_runs(site, "wedged", &count);

    wedge(site.vmm_pid("wedged"));
    let begun = Instant::now();
    site.get(&["rm", "wedged"]);
    assert!(
        begun.elapsed() < patience(Duration::from_secs(25)),
        "{:?}",
        begun.elapsed()
    );
    site.get(&["rm", "free"]);
}
