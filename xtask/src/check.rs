//! `cargo xtask check`: everything that must hold before a change lands.
//!
//! Tests that cannot run on a machine say so by appending a line, `<test>: <why>`, to the file that
//! `ICEBOX_SKIPPED` names; they are listed at the end, never counted as passed in silence.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use crate::documents;
use crate::run::{Built, Failure, build_agent, built_by, cargo, root, run, target};

/// The black-box suite. It takes about as long as all others, which leave a processor idle here and there.
const LONGEST: &str = "system";

/// What runs before it, and by itself: a browser drops its requests when a network interface comes or goes anywhere on the
/// machine, as those of sandboxes do.
const ALONE: &str = "cli";

pub(crate) fn check() -> Result<(), Failure> {
    let skipped = root().join("target/skipped-tests");
    let io = |error| Failure(format!("{}: {error}", skipped.display()));
    fs::create_dir_all(root().join("target")).map_err(io)?;
    fs::write(&skipped, "").map_err(io)?;

    run("format", &mut cargo(["fmt", "--all", "--check"]))?;
    let mut lints = cargo([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    run("lints", &mut lints)?;
    build_agent()?;
    let tested = test(&skipped);

    let list = fs::read_to_string(&skipped).map_err(io)?;
    let mut lines: Vec<&str> = list.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() {
        println!("\nskipped: nothing");
    } else {
        println!("\nskipped, and why:");
        for line in lines {
            println!("  {line}");
        }
    }
    tested?;
    documents::check()
}

/// Builds every test program and runs them: one after the other, as cargo would, and the longest beside most of them.
fn test(skipped: &Path) -> Result<(), Failure> {
    eprintln!("\n── building the tests");
    let begun = Instant::now();
    let mut built = built_by(&mut cargo(["test", "--quiet", "--workspace", "--no-run"]))?;
    eprintln!("── building the tests: {:.1} s", seconds_since(begun));
    built.retain(|program| program.is_test);
    // Not in the order in which they happened to be built.
    built.sort_by(|one, other| one.executable.cmp(&other.executable));
    let called = |name| move |program: &Built| program.kind == "test" && program.name == name;
    let (alone, others): (Vec<_>, Vec<_>) = built.into_iter().partition(called(ALONE));
    let (longest, others): (Vec<_>, Vec<_>) = others.into_iter().partition(called(LONGEST));

    let mut failed = failures(&alone, skipped);
    let beside = thread::scope(|scope| {
        let longest = scope.spawn(|| failures(&longest, skipped));
        let mut failed = failures(&others, skipped);
        let mut examples = cargo(["test", "--quiet", "--workspace", "--doc"]);
        failed.extend(run("examples of documentation", &mut examples).err());
        let longest = longest.join();
        failed.extend(longest.unwrap_or_else(|_| vec![Failure("a thread was lost".to_owned())]));
        failed
    });
    failed.extend(beside);
    match failed.len() {
        0 => Ok(()),
        1 => Err(failed.remove(0)),
        _ => {
            let failed: Vec<_> = failed.iter().map(ToString::to_string).collect();
            Err(Failure(failed.join("\nxtask: ")))
        }
    }
}

/// Runs all of these, whatever fails.
fn failures(programs: &[Built], skipped: &Path) -> Vec<Failure> {
    let failed = programs.iter().map(|program| run_tests(program, skipped));
    failed.filter_map(Result::err).collect()
}

/// Runs a test program, and prints what it said in one piece when it has ended: another one runs beside it. What was started
/// by it may outlive it, so it writes to a file, which does not wait for that.
fn run_tests(program: &Built, skipped: &Path) -> Result<(), Failure> {
    let package = program.directory.file_name().unwrap_or_default();
    let name = format!("{}, {}", package.display(), program.name);
    let fail = |error| Failure(format!("tests of {name}: {error}"));
    let log = target().join(format!("tests-of-{name}.log").replace(", ", "-"));
    let (out, begun) = (File::create(&log).map_err(fail)?, Instant::now());
    let status = Command::new(&program.executable)
        .arg("--quiet")
        .current_dir(&program.directory)
        .env("ICEBOX_SKIPPED", skipped)
        .stdin(Stdio::null())
        .stdout(out.try_clone().map_err(fail)?)
        .stderr(out)
        .status()
        .map_err(fail)?;
    let said = fs::read(&log).map_err(fail)?;
    fs::remove_file(&log).map_err(fail)?;
    eprint!(
        "\n── tests of {name}: {:.1} s\n{}",
        seconds_since(begun),
        String::from_utf8_lossy(&said)
    );
    if status.success() {
        Ok(())
    } else {
        Err(Failure(format!("tests of {name} failed: {status}")))
    }
}

fn seconds_since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64()
}
