//! Running other programs: said before, timed after, and a failure named.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What the agent is built for: static, and without musl.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Why a chore did not end well, for people.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A cargo of the same toolchain, in the repository.
pub(crate) fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).current_dir(root());
    command
}

/// Runs a command to its end.
pub(crate) fn run(what: &str, command: &mut Command) -> Result<(), Failure> {
    eprintln!("\n── {what}");
    let begun = Instant::now();
    let status = command
        .status()
        .map_err(|error| Failure(format!("{what}: {error}")))?;
    eprintln!("── {what}: {:.1} s", begun.elapsed().as_secs_f64());
    if status.success() {
        Ok(())
    } else {
        Err(Failure(format!("{what} failed: {status}")))
    }
}

/// Builds the guest agent. With a target named, build scripts and procedural macros stay dynamic.
pub(crate) fn build_agent() -> Result<(), Failure> {
    let mut build = cargo([
        "build",
        "--profile",
        "agent",
        "--target",
        TRIPLE,
        "--package",
        "icebox-agent",
    ]);
    build.env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "-C target-feature=+crt-static",
    );
    run("the guest agent", &mut build)
}
