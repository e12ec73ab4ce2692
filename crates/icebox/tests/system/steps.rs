//! kill -9 at every step, on real sandboxes: of the daemon, and of the VMM. And a full disk at every write.
//!
//! Each verb is walked: killed after its first step, after its second, and so on until it ends before it is killed. After
//! each kill what `docs/ARCHITECTURE.md` says in "Commit points" must be so: the verb has not happened up to one certain
//! write, and has happened from there on. Killed before a step is killed after the one before it, so one side is enough.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use icebox_host::skip::skip;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::conductor::{Conductor, Plan, Reached, Say, Side};
use crate::crash::{rests, wake};
use crate::faults::{assert_runs, staged};
use crate::marks::Marks;
use crate::site::{Count, Driver, Site, WARM, is_slow};

tests! {
    every:
        inv_09_inv_10_inv_30_a_daemon_is_killed_at_every_step_of_pause,
        inv_30_inv_38_a_daemon_is_killed_at_every_step_of_fork,
        inv_22_inv_30_a_daemon_is_killed_at_every_step_of_snapshot,
        inv_16_inv_30_a_daemon_is_killed_at_every_step_of_resume,
        inv_30_inv_33_a_daemon_is_killed_at_every_step_of_create,
        inv_23_inv_30_a_daemon_is_killed_at_every_step_of_a_paused_ones_snapshot,
        inv_06_inv_31_inv_51_a_vmm_is_killed_at_every_step_of_pause,
        inv_30_inv_50_a_daemon_is_killed_at_every_step_of_rm,
        inv_31_inv_51_a_vmm_is_killed_at_every_step_of_snapshot,
        inv_16_inv_31_a_vmm_is_killed_at_every_step_of_resume,
        inv_01_inv_11_inv_28_a_capture_that_finds_the_disk_full_at_any_write_fails_and_the_guest_runs_on;
}

/// Of these tests.
pub(crate) const NAME: &str = "steps";
/// Set where there is time to run them with every driver.
const EVERY_PAIR: &str = "ICEBOX_TEST_EVERY_PAIR";

/// Whether this is the run that leaves nothing out.
pub(crate) fn takes_its_time() -> bool {
    std::env::var_os(EVERY_PAIR).is_some()
}

/// Whether these tests run with a driver. If not, that is said.
pub(crate) fn runs(driver: Driver, test: &str) -> bool {
    let runs = (driver == Driver::Qcow2 && !is_slow()) || takes_its_time();
    if !runs {
        skip(
            test,
            "takes minutes with each driver: `cargo xtask soak pairs`",
        );
    }
    runs
}

/// What is on the subject's disk, read from there.
const SUM: &str = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /root/data";
/// How often a disk is frozen before its sandbox is made anew, so that no merge of its layers comes between.
const FREEZES: usize = 10;
/// After how many steps the daemon is killed once more, and must find nothing to do. At every step of a simulation it is.
const SECOND_STARTS: usize = 4;
/// How often a verb may end before the step that makes it happen was held: what a capture has to do depends on those before
/// it.
const MISSED_MAX: usize = 5;
/// The sandbox that verbs are done to.
const SUBJECT: &str = "subject";
/// What is made by a verb that makes something.
const MADE: &str = "made";

/// A verb, and how to see that it happened.
struct Verb {
    words: &'static [&'static str],
    /// Where the subject rests before it.
    from: &'static str,
    /// Whether it has happened.
    has_happened: fn(&Site) -> bool,
    /// The step that makes it happen.
    commit: &'static str,
}

const PAUSE: Verb = Verb {
    words: &["pause", SUBJECT],
    from: "running",
    has_happened: |site| site.state(SUBJECT) == "paused",
    commit: "store.commit",
};
const RESUME: Verb = Verb {
    words: &["resume", SUBJECT],
    from: "paused",
    has_happened: |site| site.state(SUBJECT) == "running",
    commit: "store.commit",
};
const SNAPSHOT: Verb = Verb {
    words: &["snapshot", SUBJECT, "--name", MADE],
    from: "running",
    has_happened: |site| template(site).is_some(),
    commit: "store.publish",
};
const FORK: Verb = Verb {
    words: &["fork", SUBJECT, "-n", "1"],
    from: "running",
    has_happened: |site| !others(site).is_empty(),
    commit: "store.commit",
};
const CREATE: Verb = Verb {
    words: &["create", WARM, "--name", MADE],
    from: "running",
    has_happened: |site| !others(site).is_empty(),
    commit: "store.commit",
};
const REMOVE: Verb = Verb {
    words: &["rm", MADE],
    from: "running",
    has_happened: |site| others(site).is_empty(),
    commit: "store.commit",
};

/// Sandboxes besides the subject.
fn others(site: &Site) -> Vec<String> {
    let names = rests(site).into_iter().map(|(name, _)| name);
    names.filter(|name| name != SUBJECT).collect()
}

/// The template that a snapshot makes.
fn template(site: &Site) -> Option<Value> {
    let templates = site.get(&["template", "ls"]);
    let made = |template: &&Value| template.to_string().contains(&format!("\"{MADE}\""));
    templates.as_array().unwrap().iter().find(made).cloned()
}

/// The sandbox that verbs are done to, and what must not be lost of it.
struct Subject {
    sum: String,
    count: Count,
    /// How often its disk has been frozen.
    freezes: usize,
}

impl Subject {
    /// One that runs and has been paused once.
    fn make(site: &Site) -> Self {
        site.create(WARM, SUBJECT);
        let write = "dd if=/dev/urandom of=/root/data bs=64k count=16 status=none && sync";
        site.exec(SUBJECT, write);
        let sum = site.exec(SUBJECT, SUM);
        let count = site.count(SUBJECT);
        site.get(&["pause", SUBJECT]);
        site.get(&["resume", SUBJECT]);
        Self {
            sum,
            count,
            freezes: 1,
        }
    }

    /// Brings it to where a verb begins, with as few freezes of its disk as that takes.
    fn bring_to(&mut self, site: &Site, state: &str) {
        self.freezes += 1;
        if self.freezes > FREEZES {
            site.get(&["rm", SUBJECT]);
            *self = Self::make(site);
        }
        wake(site, SUBJECT);
        if state == "paused" {
            self.freezes += 1;
            site.get(&["pause", SUBJECT]);
        }
    }

    /// Wakes it: its memory and its disk are what they were.
    fn check(&mut self, site: &Site, told: &str) {
        wake(site, SUBJECT);
        let shown = site.exec(SUBJECT, &format!("cat /tmp/count; echo; {SUM}"));
        let (count, sum) = shown.split_once('\n').unwrap();
        let now = Count::of(count);
        now.assert_goes_on_from(&self.count);
        self.count = now;
        assert_eq!(sum, self.sum, "{told}");
    }
}

/// Looks at what a verb has made, and removes it.
fn check_made(site: &Site, subject: &Subject, told: &str) {
    if let Some(template) = template(site) {
        site.create(template["templateID"].as_str().unwrap(), MADE);
        assert_eq!(site.exec(MADE, SUM), subject.sum, "{told}");
        site.get(&["rm", MADE]);
        site.get(&["template", "rm", MADE]);
    }
    for other in others(site) {
        wake(site, &other);
        site.count(&other);
        site.get(&["rm", &other]);
    }
}

fn begin(site: &Site, words: &[&str]) -> Child {
    site.command(words)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Everything that a start must not change again.
fn picture(site: &Site) -> (Vec<(String, String)>, Marks) {
    (rests(site), site.marks())
}

/// Kills the daemon after each step of a verb.
fn walk(site: &mut Site, verb: &Verb) {
    let conductor = Conductor::at(&site.conductor());
    let mut subject = Subject::make(site);
    let mut happened_at: Option<String> = None;
    let (mut steps, mut made, mut missed) = (0, 0, 0);
    loop {
        subject.bring_to(site, verb.from);
        if verb.words == REMOVE.words && others(site).is_empty() {
            site.create(WARM, MADE);
        }
        conductor.plan(Some(Plan {
            at: steps,
            side: Side::After,
            say: Say::Hold,
            of: &[],
        }));
        let step = match conductor.watch(begin(site, verb.words)) {
            Reached::Held(step) => step,
            Reached::Ended(status) => {
                assert!(status.success(), "{:?}\n{}", verb.words, site.said());
                if happened_at.is_some() || missed == MISSED_MAX {
                    break;
                }
                // It took fewer steps than the last time, and the one that makes it happen was not reached: back to it.
                conductor.plan(None);
                missed += 1;
                steps -= missed.min(steps);
                check_made(site, &subject, "not killed");
                continue;
            }
        };
        let told = format!("{:?}, killed after step {steps}, {step}", verb.words);
        site.end_daemon(Signal::KILL);
        conductor.plan(None);
        site.start_daemon();
        let happened = (verb.has_happened)(site);
        match (&happened_at, happened) {
            (None, true) => happened_at = Some(step),
            (Some(at), false) => panic!("{told}: it had happened after {at}"),
            _ => {}
        }
        if steps % SECOND_STARTS == 0 {
            let before = picture(site);
            site.end_daemon(Signal::KILL);
            site.start_daemon();
            let after = picture(site);
            assert_eq!(
                before.0, after.0,
                "a second start changed something: {told}"
            );
            before.1.assert_same(&after.1);
        }
        subject.check(site, &told);
        if happened && verb.words != REMOVE.words {
            made += 1;
            check_made(site, &subject, &told);
        }
        steps += 1;
    }
    conductor.plan(None);
    println!(
        "{:?}: {steps} steps; it happens at {happened_at:?}, {made} times",
        verb.words
    );
    assert_eq!(
        happened_at.as_deref(),
        Some(verb.commit),
        "{:?}",
        verb.words
    );
    check_made(site, &subject, "at the end");
    site.get(&["rm", SUBJECT]);
}

fn inv_09_inv_10_inv_30_a_daemon_is_killed_at_every_step_of_pause(site: &mut Site) {
    walk(site, &PAUSE);
}

fn inv_16_inv_30_a_daemon_is_killed_at_every_step_of_resume(site: &mut Site) {
    walk(site, &RESUME);
}

fn inv_22_inv_30_a_daemon_is_killed_at_every_step_of_snapshot(site: &mut Site) {
    walk(site, &SNAPSHOT);
}

fn inv_23_inv_30_a_daemon_is_killed_at_every_step_of_a_paused_ones_snapshot(site: &mut Site) {
    let paused = Verb {
        from: "paused",
        ..SNAPSHOT
    };
    walk(site, &paused);
}

fn inv_30_inv_38_a_daemon_is_killed_at_every_step_of_fork(site: &mut Site) {
    walk(site, &FORK);
}

fn inv_30_inv_33_a_daemon_is_killed_at_every_step_of_create(site: &mut Site) {
    walk(site, &CREATE);
}

fn inv_30_inv_50_a_daemon_is_killed_at_every_step_of_rm(site: &mut Site) {
    walk(site, &REMOVE);
}

/// The VMMs of a site.
fn vmms(site: &Site) -> BTreeSet<u32> {
    let processes = site.traces.processes().into_iter();
    processes.map(|(pid, _)| pid).collect()
}

/// Kills a process, and returns when it has gone.
fn kill_and_wait(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    // One that has gone already is as good.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    pidfd_send_signal(&process, Signal::KILL).unwrap_or_default();
    wait_for_end(&process);
}

fn wait_for_end(process: &OwnedFd) {
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    poll(&mut ended, None).unwrap();
}

/// Kills the subject's VMM before each step of a verb. `may_rest` says where the subject may be then.
fn walk_vmm(site: &mut Site, verb: &Verb, may_rest: &[&str]) {
    /// Where what is on the disk at that moment is worth a boot.
    const BOOT: [&str; 4] = [
        "machine.save",
        "machine.switch",
        "volume.freeze",
        "volume.seal",
    ];
    let conductor = Conductor::at(&site.conductor());
    let mut subject = Subject::make(site);
    let mut seen = BTreeSet::new();
    let mut steps = 0;
    loop {
        subject.bring_to(site, verb.from);
        let others = if verb.from == "paused" {
            vmms(site)
        } else {
            BTreeSet::new()
        };
        let mut events = site.events();
        conductor.plan(Some(Plan {
            at: steps,
            side: Side::Before,
            say: Say::Hold,
            of: &[],
        }));
        let step = match conductor.watch(begin(site, verb.words)) {
            Reached::Held(step) => step,
            Reached::Ended(_) => break,
        };
        let told = format!("{:?}, VMM killed before step {steps}, {step}", verb.words);
        vmms(site)
            .difference(&others)
            .copied()
            .for_each(kill_and_wait);
        let status = conductor.go_on();
        conductor.plan(None);
        // The task that did the verb looks after its VMM between verbs, and is told of its end at once.
        if site.state(SUBJECT) == "running" {
            if vmms(site).difference(&others).next().is_some() {
                // The step was before there was one.
                assert!(status.success(), "{told}");
                seen.insert("running".to_owned());
                steps += 1;
                continue;
            }
            events.wait_for("sandbox.crashed");
        }
        let state = rests(site).into_iter().find(|(name, _)| name == SUBJECT);
        let state = state.expect("the subject is there").1;
        assert!(may_rest.contains(&state.as_str()), "{told}: {state}");
        seen.insert(state.clone());
        if state == "stopped" && BOOT.contains(&step.as_str()) {
            // The newest disk.
            site.get(&["start", SUBJECT]);
            assert_eq!(site.exec(SUBJECT, SUM), subject.sum, "{told}");
            site.get(&["rm", SUBJECT]);
            check_made(site, &subject, &told);
            subject = Subject::make(site);
        } else {
            if state == "stopped" {
                let detail = site.inspect(SUBJECT);
                let last = detail["generations"].as_array().and_then(|all| all.last());
                let number = last.expect("it has been paused")["number"].to_string();
                site.get(&["resume", SUBJECT, "--generation", &number]);
                assert_eq!(site.exec(SUBJECT, SUM), subject.sum, "{told}");
                let earlier = Count {
                    count: 0,
                    ..subject.count
                };
                subject.count = site.count(SUBJECT);
                subject.count.assert_goes_on_from(&earlier);
                subject.freezes += 1;
            } else {
                subject.check(site, &told);
            }
            check_made(site, &subject, &told);
        }
        steps += 1;
    }
    conductor.plan(None);
    println!("{:?}: {steps} steps; it rested {seen:?}", verb.words);
    let expected: BTreeSet<String> = may_rest.iter().map(|it| (*it).to_owned()).collect();
    assert_eq!(seen, expected, "{:?}", verb.words);
    check_made(site, &subject, "at the end");
    site.get(&["rm", SUBJECT]);
}

fn inv_06_inv_31_inv_51_a_vmm_is_killed_at_every_step_of_pause(site: &mut Site) {
    // Before the commit it has crashed; after it, it was to be killed anyway.
    walk_vmm(site, &PAUSE, &["paused", "stopped"]);
}

fn inv_31_inv_51_a_vmm_is_killed_at_every_step_of_snapshot(site: &mut Site) {
    walk_vmm(site, &SNAPSHOT, &["stopped"]);
}

fn inv_16_inv_31_a_vmm_is_killed_at_every_step_of_resume(site: &mut Site) {
    // Before there is a VMM nothing is killed; after the commit it has crashed.
    walk_vmm(site, &RESUME, &["paused", "running", "stopped"]);
}

fn inv_01_inv_11_inv_28_a_capture_that_finds_the_disk_full_at_any_write_fails_and_the_guest_runs_on(
    site: &mut Site,
) {
    /// Steps that write something which a full file system has no room for.
    const WRITES: [&str; 9] = [
        "store.commit",
        "store.stage",
        "store.publish",
        "store.copy_into_staging",
        "volume.ensure_head",
        "volume.freeze",
        "volume.seal",
        "machine.save",
        "machine.switch",
    ];
    let conductor = Conductor::at(&site.conductor());
    let subject = Subject::make(site);
    let mut count = site.count(SUBJECT);
    for verb in [&SNAPSHOT, &PAUSE] {
        let mut refused = Vec::new();
        for at in 0.. {
            conductor.plan(Some(Plan {
                at,
                side: Side::Before,
                say: Say::Full,
                of: &WRITES,
            }));
            let done = site.run(verb.words);
            let steps = conductor.steps();
            conductor.plan(None);
            let Some(step) = steps.get(at) else {
                assert!(done.status.success(), "{}", site.said());
                break;
            };
            if !done.status.success() {
                refused.push(step.clone());
                let said = String::from_utf8(done.stderr).unwrap();
                assert!(said.contains(&format!("injected at {step}")), "{said}");
                assert!(staged(site).is_empty(), "{step}: {:?}", staged(site));
                assert!(template(site).is_none(), "{step}");
            }
            if site.state(SUBJECT) == "paused" {
                site.get(&["resume", SUBJECT]);
            }
            count = assert_runs(site, SUBJECT, &count);
            check_made(site, &subject, step);
        }
        for write in [
            "store.commit",
            "store.stage",
            "store.publish",
            "machine.save",
        ] {
            assert!(refused.iter().any(|it| it == write), "{write}: {refused:?}");
        }
        check_made(site, &subject, "at the end");
    }
    site.get(&["resume", SUBJECT]);
    assert_eq!(site.exec(SUBJECT, SUM), subject.sum);
    site.get(&["rm", SUBJECT]);
}
