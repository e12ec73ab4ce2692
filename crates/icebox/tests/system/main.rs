//! The whole system, black box: the real daemon, the real command line, real guests.
//!
//! What has to do with disks runs with every volume driver: qcow2 on the file system of the temporary directory, reflink
//! on an XFS of its own. Tests of one driver share a data directory and run one after the other, since each ends with a
//! leak diff of the host: what was there before is there afterwards, and nothing else.
//!
//! Needs root, QEMU, mkfs.xfs and nft. A test that cannot run says why by name, where `cargo xtask check` reads it.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

/// A test by its name, and the drivers that it runs with.
type Test = (&'static str, fn(&mut Site), &'static [Driver]);

/// A table of tests: those that both drivers must pass, and those that have nothing to do with disks, shared out.
macro_rules! tests {
    (@drivers both) => { &[$crate::Driver::Qcow2, $crate::Driver::Reflink] };
    (@drivers qcow2) => { &[$crate::Driver::Qcow2] };
    (@drivers reflink) => { &[$crate::Driver::Reflink] };
    ($($drivers:ident: $($test:ident),+;)+) => {
        pub(crate) const TESTS: &[$crate::Test] =
            &[$($((stringify!($test), $test, tests!(@drivers $drivers))),+),+];
    };
}

mod crash;
mod faults;
mod lifecycle;
mod marks;
mod monitor;
#[path = "../../../icebox-host/tests/support/mounts.rs"]
mod mounts;
mod site;

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use libtest_mimic::{Arguments, Trial};

use site::{Driver, Site};

/// The shared site of each driver, started by the first test that needs it.
static SHARED: [Mutex<Option<Site>>; 2] = [Mutex::new(None), Mutex::new(None)];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One for each driver's site. More would make guests so slow that deadlines mean nothing.
    arguments.test_threads.get_or_insert(2);
    let mut trials = Vec::new();
    let suites = [
        ("lifecycle", lifecycle::TESTS),
        ("faults", faults::TESTS),
        ("crash", crash::TESTS),
    ];
    let tests = suites
        .iter()
        .flat_map(|(suite, tests)| tests.iter().map(move |test| (suite, test)));
    for (suite, &(name, test, drivers)) in tests {
        for &driver in drivers {
            let name = format!("{suite}::{name}::{}", driver.name());
            let runs = driver == Driver::Qcow2 || mounts::can_mount("xfs", &name);
            let trial = Trial::test(name, move || {
                shared(driver, test);
                Ok(())
            });
            trials.push(trial.with_ignored_flag(!runs));
        }
    }
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
    let slot = &SHARED[usize::from(driver == Driver::Reflink)];
    let mut slot = slot.lock().unwrap_or_else(|poison| {
        slot.clear_poison();
        let mut slot = poison.into_inner();
        // What a failed test has left is no ground for the next.
        *slot = None;
        slot
    });
    let site = slot.get_or_insert_with(|| Site::with_templates(driver));
    let before = site.marks();
    test(site);
    before.assert_same(&site.marks());
}
