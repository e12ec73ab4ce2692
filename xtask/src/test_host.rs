//! `cargo xtask test-host`: the tests that need a kernel of their own.
//!
//! Device-mapper, ZFS and a working KVM are not there on every machine that Icebox is developed on. So this boots a
//! virtual Debian with all three and runs the tests inside:
//!
//! ```text
//!   this machine ── QEMU, emulating ── the test host ── QEMU, its KVM ── a sandbox's guest
//!                        root disk: packages, from the cache, never written
//!                        suite disk: test executables in, status and the list of skipped tests out
//! ```
//!
//! It needs nothing of the kernel that it is started on. What is built from packages is kept under `target/test-host/`
//! by the digest of the scripts that build it. One test host runs at a time: two on two cores are slower than one after
//! the other.

mod image;
mod machine;
mod suite;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::run::{Failure, target};

use self::machine::Mode;

const USAGE: &str =
    "usage: cargo xtask test-host [--keep | --shell] [--test NAME]… [-- ARGUMENTS OF THE TESTS…]";

/// Longer than the whole suite takes on two busy cores. A machine that runs into it is hung.
const LONGEST: Duration = Duration::from_secs(30 * 60);

struct Options {
    mode: Mode,
    /// Test executables to run; all if empty.
    tests: Vec<String>,
    /// Handed to each of them.
    arguments: Vec<String>,
}

/// Boots the test host, runs the suite in it, and fails if a test failed, or if the machine did not live to the end.
pub(crate) fn test_host(options: &[String]) -> Result<(), Failure> {
    let options = parse(options)?;
    // Tests run as they were built: in a release with this machine's C library or a newer one.
    suite::require_old_enough_libc()?;
    let begun = Instant::now();
    let cache = cache();
    fs::create_dir_all(&cache).map_err(at("make", &cache))?;
    let _turn = take_turn(&cache)?;

    let image = image::ensure(&cache)?;
    let disk = suite::pack(&cache, &image, &options)?;
    let ended = machine::run(&image, &disk, options.mode, LONGEST);
    let outcome = ended.and_then(|()| match options.mode {
        Mode::Shell => Ok(()),
        Mode::Run | Mode::Keep => suite::outcome(&disk),
    });
    fs::remove_file(&disk).map_err(at("remove", &disk))?;
    eprintln!("── test host: {:.1} s", begun.elapsed().as_secs_f64());
    outcome
}

fn parse(options: &[String]) -> Result<Options, Failure> {
    let mut parsed = Options {
        mode: Mode::Run,
        tests: Vec::new(),
        arguments: Vec::new(),
    };
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--keep" => parsed.mode = Mode::Keep,
            "--shell" => parsed.mode = Mode::Shell,
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
