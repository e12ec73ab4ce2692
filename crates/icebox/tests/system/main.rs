//! The whole system, black box: the real daemon, the real command line, real guests.
//!
//! What has to do with disks runs with every volume driver, on ground of its own (`ground.rs`). Tests of one driver share
//! a data directory and run one after the other, since each ends with a leak diff of the host: what was there before is
//! there afterwards, and nothing else.
//!
//! Needs root, QEMU, mkfs.xfs and nft. A test that cannot run says why by name, where `cargo xtask check` reads it. In the
//! test host the tests of `drivers.rs` run, with all drivers, and those of `power_cut.rs`, which run nowhere else.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

/// A test by its name, and the drivers that it runs with.
type Test = (&'static str, fn(&mut Site), &'static [Driver]);

/// A table of tests: those that every driver must pass, and those that have nothing to do with disks, shared out.
macro_rules! tests {
    (@drivers every) => { &$crate::Driver::ALL };
    (@drivers qcow2) => { &[$crate::Driver::Qcow2] };
    (@drivers reflink) => { &[$crate::Driver::Reflink] };
    ($($drivers:ident: $($test:ident),+;)+) => {
        pub(crate) const TESTS: &[$crate::Test] =
            &[$($((stringify!($test), $test, tests!(@drivers $drivers))),+),+];
    };
}

mod chains;
mod conductor;
mod crash;
mod drivers;
mod faults;
mod ground;
mod hardships;
mod history;
mod lifecycle;
mod marks;
mod monitor;
#[path = "../../../icebox-host/tests/support/mounts.rs"]
mod mounts;
mod power_cut;
mod sdk;
mod site;
mod space;
mod steps;
mod time;

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};

use site::{Driver, Site};

/// The shared site of each driver, started by the first test that needs it.
static SHARED: [Mutex<Option<Site>>; Driver::ALL.len()] = [const { Mutex::new(None) }; _];

fn main() -> ExitCode {
    if let Some(half) = power_cut::half() {
        return half.run();
    }
    let mut arguments = Arguments::from_args();
    // Each with a driver of its own. More would make guests so slow that deadlines mean nothing.
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    arguments.test_threads.get_or_insert(processors.min(2));
    let mut trials = Vec::new();
    let suites = [
        ("drivers", drivers::TESTS),
        ("lifecycle", lifecycle::TESTS),
        ("faults", faults::TESTS),
        ("crash", crash::TESTS),
        ("chains", chains::TESTS),
        ("space", space::TESTS),
        ("hardships", hardships::TESTS),
        ("history", history::TESTS),
        (steps::NAME, steps::TESTS),
        ("time", time::TESTS),
        ("sdk", sdk::TESTS),
    ];
    let tests = suites
        .iter()
        .flat_map(|(suite, tests)| tests.iter().map(move |test| (suite, test)));
    for (suite, &(name, test, drivers)) in tests {
        for &driver in drivers {
            let name = format!("{suite}::{}::{name}", driver.name());
            let runs =
                driver.can_run(&name) && (*suite != steps::NAME || steps::runs(driver, &name));
            let trial = Trial::test(name.clone(), move || {
                let begun = Instant::now();
                shared(driver, test);
                println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
                Ok(())
            });
            trials.push(trial.with_ignored_flag(!runs));
        }
    }
    power_cut::skip();
    let conclusion = libtest_mimic::run(&arguments, trials);
    for site in &SHARED {
        let mut site = site.lock().unwrap_or_else(PoisonError::into_inner);
        // A failed test's site is only removed: what is left there is told already.
        let finish = if conclusion.has_failed() {
            drop
        } else {
            Site::finish
        };
        site.take().into_iter().for_each(finish);
    }
    conclusion.exit_code()
}

/// Runs `test` on its driver's shared site, between two looks at the host.
fn shared(driver: Driver, test: fn(&mut Site)) {
    let slot = &SHARED[driver as usize];
    let mut slot = slot.lock().unwrap_or_else(|poison| {
        slot.clear_poison();
        let mut slot = poison.into_inner();
        // What a failed test has left is no ground for the next.
        *slot = None;
        slot
    });
    let site = slot.get_or_insert_with(|| Site::with_templates(driver));
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let before = site.marks();
        test(site);
        before.assert_same(&site.marks());
    }));
    if let Err(panic) = tried {
        let said = site.said();
        let lines: Vec<_> = said.lines().collect();
        let last = lines.len().saturating_sub(40);
        eprintln!("the daemon's last words:\n{}", lines[last..].join("\n"));
        resume_unwind(panic);
    }
}
