//! The suite's disk: test executables go in, their outcome comes back.
//!
//! ```text
//!   init, kernel_check.sh          what runs in the machine
//!   settings, arguments, suite     what it is told
//!   target/…                       test executables and what they start, at their places in the build directory
//!   vmlinuz                        the machine's own kernel, for a guest in it
//!   out/status, out/skipped        what it says
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::image::{Image, remove_tree, scripts};
use super::{Options, at};
use crate::run::{Failure, cargo, run, target};

/// Package and test of what runs in the test host.
const SUITE: &[(&str, &str)] = &[("icebox-host", "volume_conformance")];

/// The C library of the release that the root disk is made of. Programs need what they were linked with, or newer.
const LIBC: (u32, u32) = (2, 36);

/// What cargo built.
struct Built {
    tests: Vec<PathBuf>,
    /// What tests start.
    programs: Vec<PathBuf>,
}

/// Refuses a machine whose programs do not run in the test host.
pub(super) fn require_old_enough_libc() -> Result<(), Failure> {
    let output = Command::new("getconf")
        .arg("GNU_LIBC_VERSION")
        .output()
        .map_err(|error| Failure(format!("getconf: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.trim().strip_prefix("glibc ").and_then(|version| {
        let (major, minor) = version.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    });
    match version {
        Some(version) if version <= LIBC => Ok(()),
        _ => Err(Failure(format!(
            "programs built here need {}; the test host is Debian 12 and has glibc {}.{}: run this on Debian 12",
            said.trim(),
            LIBC.0,
            LIBC.1
        ))),
    }
}

/// Builds the tests and makes the disk. A file that the caller removes.
pub(super) fn pack(cache: &Path, image: &Image, options: &Options) -> Result<PathBuf, Failure> {
    let built = build(&options.tests)?;
    let staging = target().join("test-host-suite");
    remove_tree(&staging)?;
    let target = target();
    let target = target.canonicalize().map_err(at("find", &target))?;
    let mut list = String::new();
    for executable in built.tests.iter().chain(&built.programs) {
        let inside = executable.strip_prefix(&target).map_err(|_| {
            Failure(format!(
                "{} is not in {}",
                executable.display(),
                target.display()
            ))
        })?;
        bring(executable, &staging.join("target").join(inside))?;
    }
    for test in &built.tests {
        list.push_str(&format!("{}\n", test.display()));
    }
    bring(&image.vmlinuz(), &staging.join("vmlinuz"))?;
    let write = |name: &str, text: &str| {
        let path = staging.join(name);
        fs::write(&path, text).map_err(at("write", &path))
    };
    write("suite", &list)?;
    let arguments: String = options
        .arguments
        .iter()
        .flat_map(|argument| [argument, "\n"])
        .collect();
    write("arguments", &arguments)?;
    let quoted = target.display().to_string().replace('\'', r"'\''");
    let mode = options.mode.name();
    write("settings", &format!("TARGET='{quoted}'\nMODE={mode}\n"))?;
    for (script, name) in [("init.sh", "init"), ("kernel_check.sh", "kernel_check.sh")] {
        let (from, to) = (scripts().join(script), staging.join(name));
        fs::copy(&from, &to).map_err(at("copy", &from))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&to, mode).map_err(at("set the mode of", &to))?;
    }
    let out = staging.join("out");
    fs::create_dir(&out).map_err(at("make", &out))?;

    let disk = cache.join("suite.ext4");
    remove_tree(&disk)?;
    let bytes = size(&staging)?;
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
        .arg(&staging)
        .arg(&disk);
    // A quarter more than what is in it, and room for what comes back.
    make.arg(format!("{}K", bytes / 1024 * 5 / 4 + (64 << 10)));
    run("the suite's disk", &mut make)?;
    remove_tree(&staging)?;
    Ok(disk)
}

fn build(only: &[String]) -> Result<Built, Failure> {
    let chosen: Vec<_> = SUITE
        .iter()
        .filter(|(_, test)| only.is_empty() || only.iter().any(|name| name == test))
        .collect();
    if let Some(unknown) = only
        .iter()
        .find(|name| !SUITE.iter().any(|(_, test)| name == test))
    {
        let names: Vec<_> = SUITE.iter().map(|(_, test)| *test).collect();
        return Err(Failure(format!(
            "there is no test {unknown} in the test host's suite: {}",
            names.join(", ")
        )));
    }
    let mut built = Built {
        tests: Vec::new(),
        programs: Vec::new(),
    };
    for (package, test) in chosen {
        eprintln!("\n── building {test}");
        let mut command = cargo([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ]);
        let output = command
            .args(["--package", package, "--test", test])
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| Failure(format!("cargo: {error}")))?;
        if !output.status.success() {
            return Err(Failure(format!(
                "building {test} failed: {}",
                output.status
            )));
        }
        for line in output.stdout.split(|byte| *byte == b'\n') {
            let message: Value = serde_json::from_slice(line).unwrap_or_default();
            let Some(executable) = message["executable"].as_str().map(PathBuf::from) else {
                continue;
            };
            let kind = if message["profile"]["test"] == true {
                &mut built.tests
            } else {
                &mut built.programs
            };
            if !kind.contains(&executable) {
                kind.push(executable);
            }
        }
    }
    Ok(built)
}

/// A file at another place, without copying where that can be.
fn bring(from: &Path, to: &Path) -> Result<(), Failure> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory).map_err(at("make", directory))?;
    }
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).map_err(at("copy", from))?;
    }
    Ok(())
}

/// Bytes of everything in a directory.
fn size(directory: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).map_err(at("read", directory))? {
        let path = entry.map_err(at("read", directory))?.path();
        bytes += if path.is_dir() {
            size(&path)?
        } else {
            fs::metadata(&path).map_err(at("look at", &path))?.len()
        };
    }
    Ok(bytes)
}

/// What the machine left on the disk. Prints what was skipped.
///
/// # Errors
/// A test failed, or there is no status: the machine crashed.
pub(super) fn outcome(disk: &Path) -> Result<(), Failure> {
    let skipped = read(disk, "/out/skipped")?;
    let mut lines: Vec<&str> = skipped.lines().collect();
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
    match read(disk, "/out/status")?.trim() {
        "0" => Ok(()),
        "" => Err(Failure(
            "the test host crashed: it left no status".to_owned(),
        )),
        _ => Err(Failure("tests failed in the test host".to_owned())),
    }
}

/// A file on the disk; empty if it is not there.
fn read(disk: &Path, path: &str) -> Result<String, Failure> {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(disk)
        .output()
        .map_err(|error| Failure(format!("debugfs: {error}")))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Failure(format!(
            "cannot read {path} on the suite's disk: {}",
            String::from_utf8_lossy(&output.stderr)
        )))
    }
}
