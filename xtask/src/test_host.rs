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

use crate::documents;
use crate::run::{Failure, target};

use self::image::Image;
use self::machine::{Ended, Machine, Mode, Power};
use self::power::PowerDisk;
use self::suite::{Half, Side, Suite, SuiteDisk, Task};

const USAGE: &str = "usage: cargo xtask test-host [--keep | --shell | --power-cut | --power-cuts DRIVER | --bench] [--full] [--record] [--test NAME]… [-- ARGUMENTS OF THE TESTS…]";

/// Longer than a machine's share of the usual suite takes on a busy host. One that runs into it is hung.
const LONGEST: Duration = Duration::from_secs(40 * 60);
/// The same of everything.
const LONGEST_FULL: Duration = Duration::from_secs(3 * 60 * 60);

struct Options {
    mode: Mode,
    /// The tests that need no power cut.
    suite: bool,
    power_cut: bool,
    /// The power cut at every flush of a pause, with this volume driver.
    power_cuts: Option<String>,
    /// Every test of sandboxes with every driver, and a power cut: too slow for each change.
    full: bool,
    /// Whether what is seen of VMMs with volume drivers goes into the documents.
    record: bool,
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
    if let Some(driver) = &options.power_cuts {
        outcome = outcome.and(cut_power_everywhere(&cache, &image, &suite, driver));
    }
    suite.print_skipped();
    if options.record && outcome.is_ok() {
        documents::record(&suite.seen())?;
    }
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
    let power = PowerDisk::new(cache)?;
    let half = |side, power| run_half(cache, image, suite, Half { side, driver: "" }, power);
    let (ended, disk) = half(Side::Before, Power::Noted(&power))?;
    must_be_cut(suite, ended, &disk)?;
    power.lose_what_was_not_flushed()?;
    let (_, disk) = half(Side::After, Power::AfterCut(&power))?;
    suite.outcome(&disk)
}

/// The same with one driver, and the second half once for each flush from where the tests say.
fn cut_power_everywhere(
    cache: &Path,
    image: &Image,
    suite: &Suite,
    driver: &str,
) -> Result<(), Failure> {
    let power = PowerDisk::new(cache)?;
    let half = |side, power| run_half(cache, image, suite, Half { side, driver }, power);
    let (ended, disk) = half(Side::Before, Power::Noted(&power))?;
    must_be_cut(suite, ended, &disk)?;
    drop(disk);
    let mut cuts = power.cuts()?;
    let stretch = power.stretch(&cuts);
    let (count, last) = (stretch.clone().count(), *stretch.end());
    for (number, flush) in (1..).zip(stretch) {
        eprintln!("── power cut {number} of {count}, at flush {flush}");
        cuts.go_to(flush)?;
        // What was said to be done before the power went has to be.
        let side = if flush == last {
            Side::AfterAll
        } else {
            Side::After
        };
        let (_, disk) = half(side, Power::AfterCut(&power))?;
        suite.outcome(&disk)?;
    }
    println!("the power was cut at {count} flushes of a pause with {driver}");
    Ok(())
}

fn must_be_cut(suite: &Suite, ended: Ended, disk: &SuiteDisk) -> Result<(), Failure> {
    match ended {
        Ended::PowerCut => Ok(()),
        Ended::PoweredOff => {
            suite.outcome(disk)?;
            Err(Failure("the power was never cut".to_owned()))
        }
    }
}

/// Runs half of the tests of power cuts.
fn run_half(
    cache: &Path,
    image: &Image,
    suite: &Suite,
    half: Half<'_>,
    power: Power<'_>,
) -> Result<(Ended, SuiteDisk), Failure> {
    let disk = suite.pack(cache, image, Mode::Run, Task::Half(half))?;
    let machine = Machine {
        name: "",
        image,
        suite: disk.path(),
        power: Some(power),
    };
    Ok((machine.run(Mode::Run, LONGEST)?, disk))
}

fn parse(options: &[String]) -> Result<Options, Failure> {
    let mut parsed = Options {
        mode: Mode::Run,
        suite: true,
        power_cut: false,
        power_cuts: None,
        full: false,
        record: false,
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
            "--power-cuts" => {
                let driver = options.next().ok_or_else(|| {
                    Failure(format!("--power-cuts needs a volume driver\n{USAGE}"))
                })?;
                (parsed.suite, parsed.power_cuts) = (false, Some(driver.clone()));
            }
            "--full" => (parsed.full, parsed.power_cut) = (true, true),
            "--record" => parsed.record = true,
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
    if (parsed.power_cut || parsed.power_cuts.is_some()) && parsed.mode != Mode::Run {
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
