//! `cargo xtask test-host`: the tests that need a kernel of their own.
//!
//! Device-mapper, ZFS and a working KVM are not there on every machine that Icebox is developed on. So this boots a
//! virtual Debian with all three and runs the tests inside:
//!
//! ```text
//!   this machine ── QEMU, emulating ── the test host ── QEMU, its KVM ── a sandbox's guest
//!                        root disk: packages, from the cache, never written
//!                        suite disk: test executables in, status and the list of skipped tests out
//!                        power disk: outlives a power cut, with what was flushed
//! ```
//!
//! It needs nothing of the kernel that it is started on. What is built from packages is kept under `target/test-host/`
//! by the digest of the scripts that build it. A machine has one processor, so two of them share the suite; who starts a
//! second test host waits for the first.

mod image;
mod machine;
mod power;
mod suite;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::run::{Failure, target};

use self::image::Image;
use self::machine::{Ended, Machine, Mode};
use self::power::PowerDisk;
use self::suite::{Half, Suite, SuiteDisk, Task};

const USAGE: &str = "usage: cargo xtask test-host [--keep | --shell | --power-cut | --bench] [--full] [--test NAME]… [-- ARGUMENTS OF THE TESTS…]";

/// Longer than a machine's share of the usual suite takes on a busy host. One that runs into it is hung.
const LONGEST: Duration = Duration::from_secs(40 * 60);
/// The same of everything.
const LONGEST_FULL: Duration = Duration::from_secs(3 * 60 * 60);

struct Options {
    mode: Mode,
    /// The tests that need no power cut.
    suite: bool,
    power_cut: bool,
    /// Every test of sandboxes with every driver, and a power cut: too slow for each change.
    full: bool,
    /// What volume drivers cost, in place of the tests.
    bench: bool,
    /// Test executables to run; the usual ones if empty.
    tests: Vec<String>,
    /// Handed to each of them, in place of what they are usually given.
    arguments: Vec<String>,
}

/// Boots the test host, runs the suite in it, and fails if a test failed, or if the machine did not live to the end.
pub(crate) fn test_host(options: &[String]) -> Result<(), Failure> {
    let options = parse(options)?;
    // Tests run as they were built: in a release with this machine's C library or a newer one.
    suite::require_old_enough_libc()?;
    let begun = Instant::now();
    let suite = Suite::build(&options)?;
    let cache = cache();
    fs::create_dir_all(&cache).map_err(at("make", &cache))?;
    let _turn = take_turn(&cache)?;
    let image = image::ensure(&cache)?;
    let mut outcome = Ok(());
    if options.suite {
        outcome = run_suite(&cache, &image, &suite, &options);
    }
    if options.power_cut {
        // Both are worth knowing.
        outcome = outcome.and(cut_power(&cache, &image, &suite));
    }
    suite.print_skipped();
    eprintln!("── test host: {:.1} s", begun.elapsed().as_secs_f64());
    outcome
}

/// Runs the suite on as many machines as share it, at the same time.
fn run_suite(cache: &Path, image: &Image, suite: &Suite, options: &Options) -> Result<(), Failure> {
    let mode = options.mode;
    let longest = if options.full { LONGEST_FULL } else { LONGEST };
    let shares = (0..suite.machines()).map(|number| {
        let name = match suite.machines() {
            1 => String::new(),
            _ => format!("{}│ ", number + 1),
        };
        Ok((name, suite.pack(cache, image, mode, Task::Share(number))?))
    });
    let shares = shares.collect::<Result<Vec<_>, Failure>>()?;
    let run = |(name, disk): &(String, SuiteDisk)| {
        let machine = Machine {
            name,
            image,
            suite: disk.path(),
            power: None,
        };
        machine.run(mode, longest)?;
        match mode {
            Mode::Shell => Ok(()),
            Mode::Run | Mode::Keep => suite.outcome(disk),
        }
    };
    thread::scope(|scope| {
        let running: Vec<_> = shares
            .iter()
            .map(|share| scope.spawn(move || run(share)))
            .collect();
        let mut outcome = Ok(());
        for machine in running {
            let ended = machine.join();
            let ended = ended.unwrap_or_else(|_| Err(Failure("a machine was lost".to_owned())));
            // All are worth knowing.
            outcome = outcome.and(ended);
        }
        outcome
    })
}

/// Runs the first half of the tests of power cuts until they say so, and the second half on what is left of the disk.
fn cut_power(cache: &Path, image: &Image, suite: &Suite) -> Result<(), Failure> {
    let mut power = PowerDisk::new(cache)?;
    let half = |half, power: &PowerDisk| {
        let disk = suite.pack(cache, image, Mode::Run, Task::Half(half))?;
        let machine = Machine {
            name: "",
            image,
            suite: disk.path(),
            power: Some(power),
        };
        Ok((machine.run(Mode::Run, LONGEST)?, disk))
    };
    let (ended, disk) = half(Half::Before, &power)?;
    if ended == Ended::PoweredOff {
        suite.outcome(&disk)?;
        return Err(Failure("the power was never cut".to_owned()));
    }
    power.lose_what_was_not_flushed()?;
    let (_, disk) = half(Half::After, &power)?;
    suite.outcome(&disk)
}

fn parse(options: &[String]) -> Result<Options, Failure> {
    let mut parsed = Options {
        mode: Mode::Run,
        suite: true,
        power_cut: false,
        full: false,
        bench: false,
        tests: Vec::new(),
        arguments: Vec::new(),
    };
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--keep" => parsed.mode = Mode::Keep,
            "--shell" => parsed.mode = Mode::Shell,
            "--power-cut" => (parsed.suite, parsed.power_cut) = (false, true),
            "--full" => (parsed.full, parsed.power_cut) = (true, true),
            "--bench" => parsed.bench = true,
            "--test" => {
                let name = options
                    .next()
                    .ok_or_else(|| Failure(format!("--test needs a name\n{USAGE}")))?;
                parsed.tests.push(name.clone());
            }
            "--" => parsed.arguments.extend(options.by_ref().cloned()),
            other => return Err(Failure(format!("unknown option {other}\n{USAGE}"))),
        }
    }
    if parsed.power_cut && parsed.mode != Mode::Run {
        return Err(Failure(format!(
            "a machine whose power is cut keeps no shell\n{USAGE}"
        )));
    }
    Ok(parsed)
}

/// `$ICEBOX_TEST_HOST_CACHE`, for who has several checkouts, or `test-host` in the build directory.
fn cache() -> PathBuf {
    std::env::var_os("ICEBOX_TEST_HOST_CACHE")
        .map_or_else(|| target().join("test-host"), PathBuf::from)
}

/// Waits until no other test host of this cache is built or runs; ours until the file is dropped.
fn take_turn(cache: &Path) -> Result<File, Failure> {
    let path = cache.join("lock");
    let file = File::create(&path).map_err(at("create", &path))?;
    if file.try_lock().is_err() {
        eprintln!("another test host is running; waiting for it to end");
        file.lock().map_err(at("lock", &path))?;
    }
    Ok(file)
}

/// Names what was done to which file.
fn at(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.to_owned();
    move |error| Failure(format!("cannot {operation} {}: {error}", path.display()))
}
