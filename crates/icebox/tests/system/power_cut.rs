//! INV-32: what was reported done before the power went is there when it is back.
//!
//! In two halves, each in a machine of its own. The first works on a disk until all that it wants to happen is under way,
//! and asks for the power cut, by a line on its standard output that the test host's maker waits for
//! (`xtask/src/test_host/machine.rs`). Of what it wrote, the second finds what was flushed.
//!
//! Usually with every driver at once, in the middle of a pause. Where a driver is named, with that one, and the power is cut
//! at every flush of a pause, first to last: there are as many second halves, each of which finds another disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use icebox_host::skip;
use serde_json::Value;

use crate::crash::rests;
use crate::lifecycle::{SUMS, write};
use crate::site::{COLD, Driver, Site, run};

/// Which half to run. Empty in a test host that cuts no power; missing everywhere else.
const HALF: &str = "ICEBOX_TEST_POWER_CUT";
/// Names the driver whose power is cut at every flush of a pause. Empty where that is not done.
const CUTS: &str = "ICEBOX_TEST_POWER_CUTS";
/// The disk that is there in both halves.
const DISK: &str = "/dev/vdc";
const PLACE: &str = "/run/power";
/// The file in a guest that says what must be on its disk.
const TRUTH: &str = "cat /root/sums";
const REQUEST: &str = "cut the power now";
const REQUESTS: &str = "cut the power at every flush from here";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Before,
    After,
    /// After the pause was reported done.
    AfterAll,
}

pub(crate) fn half() -> Option<Half> {
    match std::env::var(HALF).ok()?.as_str() {
        "before" => Some(Half::Before),
        "after" => Some(Half::After),
        "after-all" => Some(Half::AfterAll),
        _ => None,
    }
}

fn name(driver: Driver) -> String {
    format!(
        "inv_32_what_was_reported_done_survives_a_power_cut::{}",
        driver.name()
    )
}

/// Says that this does not run here.
pub(crate) fn skip() {
    if std::env::var_os(HALF).is_none() {
        for driver in Driver::ALL {
            skip::skip(
                &name(driver),
                "needs a machine whose power can be cut: `make test-host`",
            );
        }
    }
}

impl Half {
    /// Runs this half with every driver, or the one that is named.
    pub(crate) fn run(self) -> ExitCode {
        if self == Self::Before {
            run(Command::new("mkfs.ext4").args(["-q", DISK]));
        }
        std::fs::create_dir_all(PLACE).unwrap();
        run(Command::new("mount").args([DISK, PLACE]));
        let only = std::env::var(CUTS).unwrap_or_default();
        let drivers = Driver::ALL
            .into_iter()
            .filter(|driver| only.is_empty() || only == driver.name())
            .filter(|driver| driver.can_run(&name(*driver)));
        let mut failed = false;
        let mut under_way = Vec::new();
        for driver in drivers {
            let begun = Instant::now();
            let done = catch_unwind(AssertUnwindSafe(|| match self {
                Self::Before => under_way.push(prepare(driver)),
                Self::After => check(driver, &["paused", "stopped"], only.is_empty()),
                Self::AfterAll => check(driver, &["paused"], true),
            }));
            failed |= done.is_err();
            println!(
                "{}, {self:?}: {:.1} s",
                name(driver),
                begun.elapsed().as_secs_f64()
            );
        }
        if failed {
            return ExitCode::FAILURE;
        }
        if self != Self::Before {
            return ExitCode::SUCCESS;
        }
        if under_way.is_empty() {
            println!("there is no driver {only} here");
            return ExitCode::FAILURE;
        }
        if !only.is_empty() {
            println!("{REQUESTS}");
        }
        let pauses: Vec<_> = under_way.iter().map(begin_pause).collect();
        if only.is_empty() {
            println!("{REQUEST}");
        }
        for mut pause in pauses {
            let status = pause.wait().unwrap();
            assert!(status.success(), "{status}");
        }
        println!("{REQUEST}");
        // The end of this machine.
        loop {
            std::thread::park();
        }
    }
}

/// What outlives a power cut, and what does not.
fn places(driver: Driver) -> (PathBuf, PathBuf) {
    let run = Path::new("/run").join(format!("icebox-{}", driver.name()));
    (Path::new(PLACE).join(driver.name()), run)
}

/// A sandbox for each way to rest, and one to pause.
fn prepare(driver: Driver) -> Site {
    let (directory, run) = places(driver);
    std::fs::create_dir(&directory).unwrap();
    let site = Site::make_in(&directory, driver, run);
    site.build(COLD, &[]);
    site.create(COLD, "paused");
    write(&site, "paused", "d");
    site.exec("paused", &format!("sh -c '{SUMS}' >/root/sums && sync"));
    site.get(&["snapshot", "paused", "--name", "kept"]);
    for sandbox in ["running", "halfway"] {
        site.create("kept", sandbox);
    }
    // On the disk, and not in a generation.
    site.get(&["pause", "running"]);
    site.get(&["resume", "running"]);
    write(&site, "running", "e");
    site.exec("running", &format!("sh -c '{SUMS}' >/root/sums && sync"));
    site.get(&["pause", "paused"]);
    site
}

/// Returns when the pause is under way.
fn begin_pause(site: &Site) -> Child {
    let mut pause = site
        .command(&["pause", "halfway"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while site.inspect("halfway")["verb"].is_null() && pause.try_wait().unwrap().is_none() {}
    pause
}

/// Whether these files are on a sandbox's disk, as it says itself.
fn holds(site: &Site, sandbox: &str, files: usize) {
    let truth = site.exec(sandbox, TRUTH);
    assert_eq!(truth.lines().count(), files, "{sandbox}");
    assert_eq!(site.exec(sandbox, SUMS), truth, "{sandbox}");
}

/// `may_rest` is where the sandbox that was being paused may be.
fn check(driver: Driver, may_rest: &[&str], others_too: bool) {
    let (directory, run) = places(driver);
    let site = Site::take_up(&directory, driver, run);
    let found = rests(&site);
    let at = |name: &str| {
        let rest = found.iter().find(|(of, _)| of == name);
        rest.map(|(_, state)| state.as_str())
    };
    assert_eq!(at("paused"), Some("paused"), "{found:?}");
    assert_eq!(at("running"), Some("stopped"), "{found:?}");
    let state = at("halfway").unwrap_or_default();
    assert!(may_rest.contains(&state), "{found:?}");
    println!("the sandbox that was being paused is {state}");
    assert_eq!(found.len(), 3, "{found:?}");

    let halfway = site.inspect("halfway");
    // The first is the snapshot's that it was created from.
    let newest = halfway["generations"].as_array().and_then(|all| all.last());
    let newest = newest.and_then(|generation| generation["number"].as_u64());
    let expected = u64::from(state == "paused");
    assert_eq!(newest, Some(expected), "{halfway}");
    let wake = if state == "paused" { "resume" } else { "start" };
    site.get(&[wake, "halfway"]);
    holds(&site, "halfway", 1);
    site.get(&["rm", "halfway"]);
    if others_too {
        check_others(&site);
    }
    site.get(&["rm", "paused", "running"]);
    site.get(&["gc"]);
    assert_eq!(
        site.get(&["gc", "--dry-run"])["garbage"],
        Value::Array(Vec::new())
    );
    site.finish();
}

fn check_others(site: &Site) {
    site.get(&["resume", "paused"]);
    holds(site, "paused", 1);
    // The newest disk, and the pause before it.
    site.get(&["start", "running"]);
    holds(site, "running", 2);
    site.get(&["stop", "running"]);
    site.get(&["resume", "running", "--generation", "1"]);
    holds(site, "running", 1);
    site.create("kept", "another");
    holds(site, "another", 1);
    site.get(&["rm", "another"]);
}
