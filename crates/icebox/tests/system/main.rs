//! The whole system, black box: the real daemon, the real command line, real guests.
//!
//! What has to do with disks runs with every volume driver, on ground of its own (`ground.rs`). Tests of one driver share
//! a data directory and run one after the other (`lane.rs`), since each ends with a leak diff of the host: what was there
//! before is there afterwards, and nothing else.
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
    (@drivers by_host) => {
        &[$crate::Driver::DmSnapshot, $crate::Driver::Zfs, $crate::Driver::Reflink]
    };
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
mod lane;
mod lifecycle;
mod marks;
mod monitor;
#[path = "../../../icebox-host/tests/support/mounts.rs"]
mod mounts;
mod power_cut;
mod record;
mod sdk;
mod site;
mod space;
mod steps;
mod time;
mod vmms;

use std::num::NonZero;
use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};

use site::{Driver, Site};

fn main() -> ExitCode {
    if let Some(half) = power_cut::half() {
        return half.run();
    }
    let mut arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let suites = [
        ("drivers", drivers::TESTS),
        ("lifecycle", lifecycle::TESTS),
        ("faults", faults::TESTS),
        ("crash", crash::TESTS),
        (chains::NAME, chains::TESTS),
        ("space", space::TESTS),
        ("hardships", hardships::TESTS),
        ("history", history::TESTS),
        (steps::NAME, steps::TESTS),
        ("time", time::TESTS),
        (sdk::NAME, sdk::TESTS),
        (vmms::NAME, vmms::TESTS),
    ];
    let tests = suites
        .iter()
        .flat_map(|(suite, tests)| tests.iter().map(move |test| (suite, test)));
    for (suite, &(name, test, drivers)) in tests {
        for &driver in drivers {
            let name = format!("{suite}::{}::{name}", driver.name());
            let runs = driver.can_run(&name)
                && match *suite {
                    steps::NAME => steps::runs(driver, &name),
                    vmms::NAME => vmms::can_run(&name),
                    _ => true,
                };
            let lane = match *suite {
                sdk::NAME => lane::of_programs(),
                steps::NAME | chains::NAME => lane::of_long_tests(driver),
                _ => lane::of_driver(driver),
            };
            let number = trials.len();
            let trial = Trial::test(name.clone(), move || {
                lane.run(number, &name, |site| {
                    let begun = Instant::now();
                    test(site);
                    println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
                });
                Ok(())
            });
            trials.push(trial.with_ignored_flag(!runs));
        }
    }
    power_cut::skip();
    // Most of them wait for their turn: one guest or a few work in each lane. Where there is one processor, one lane does.
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = if processors == 1 { 1 } else { trials.len() };
    arguments.test_threads.get_or_insert(threads);
    let conclusion = libtest_mimic::run(&arguments, trials);
    lane::finish(conclusion.has_failed());
    conclusion.exit_code()
}
