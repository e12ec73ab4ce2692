//! INV-32, with every driver at once: what was reported done before the power went is there when it is back.
//!
//! In two halves, each in a machine of its own. The first works on a disk until all that it wants to happen is under way,
//! and asks for the power cut, by a line on its standard output that the test host's maker waits for
//! (`xtask/src/test_host/machine.rs`). Of what it wrote, the second finds what was flushed.

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
/// The disk that is there in both halves.
const DISK: &str = "/dev/vdc";
const PLACE: &str = "/run/power";
/// The file in a guest that says what must be on its disk.
const TRUTH: &str = "cat /root/sums";
const REQUEST: &str = "cut the power now";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Before,
    After,
}

pub(crate) fn half() -> Option<Half> {
    match std::env::var(HALF).ok()?.as_str() {
        "before" => Some(Half::Before),
        "after" => Some(Half::After),
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
    /// Runs this half with every driver.
    pub(crate) fn run(self) -> ExitCode {
        if self == Self::Before {
            run(Command::new("mkfs.ext4").args(["-q", DISK]));
        }
        std::fs::create_dir_all(PLACE).unwrap();
        run(Command::new("mount").args([DISK, PLACE]));
        let drivers = Driver::ALL
            .into_iter()
            .filter(|driver| driver.can_run(&name(*driver)));
        let mut failed = false;
        let mut under_way = Vec::new();
        for driver in drivers {
            let begun = Instant::now();
            let done = catch_unwind(AssertUnwindSafe(|| match self {
                Self::Before => under_way.push(prepare(driver)),
                Self::After => check(driver),
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
        if self == Self::Before {
            let pauses: Vec<_> = under_way.iter().map(begin_pause).collect();
            println!("{REQUEST}");
            // The end of this machine.
            for mut pause in pauses {
                pause.wait().unwrap();
            }
            loop {
                std::thread::park();
            }
        }
        ExitCode::SUCCESS
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

fn check(driver: Driver) {
    let (directory, run) = places(driver);
    let site = Site::take_up(&directory, driver, run);
    let found = rests(&site);
    let at = |name: &str| {
        let rest = found.iter().find(|(of, _)| of == name);
        rest.map(|(_, state)| state.as_str())
    };
    assert_eq!(at("paused"), Some("paused"), "{found:?}");
    assert_eq!(at("running"), Some("stopped"), "{found:?}");
    assert!(
        matches!(at("halfway"), Some("paused" | "stopped")),
        "{found:?}"
    );
    assert_eq!(found.len(), 3, "{found:?}");
    let holds = |sandbox: &str, files: usize| {
        let truth = site.exec(sandbox, TRUTH);
        assert_eq!(truth.lines().count(), files, "{sandbox}");
        assert_eq!(site.exec(sandbox, SUMS), truth, "{sandbox}");
    };
    site.get(&["resume", "paused"]);
    holds("paused", 1);
    // The newest disk, and the pause before it.
    site.get(&["start", "running"]);
    holds("running", 2);
    site.get(&["stop", "running"]);
    site.get(&["resume", "running", "--generation", "1"]);
    holds("running", 1);
    let halfway = site.inspect("halfway");
    let generations = halfway["generations"].as_array().map_or(0, Vec::len);
    assert_eq!(generations > 0, halfway["state"] == "paused", "{halfway}");
    if generations > 0 {
        site.get(&["resume", "halfway"]);
        holds("halfway", 1);
    }
    site.create("kept", "another");
    holds("another", 1);
    site.get(&["rm", "paused", "running", "halfway", "another"]);
    site.get(&["gc"]);
    assert_eq!(
        site.get(&["gc", "--dry-run"])["garbage"],
        Value::Array(Vec::new())
    );
    site.finish();
}
