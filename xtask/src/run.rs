//! Running other programs: said before, timed after, and a failure named.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

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

/// A program that cargo built: with tests in it, or a benchmark, an example, or a program that one of them starts.
pub(crate) struct Built {
    /// As cargo names it: `lib`, `bin`, `test`, `bench`, `example`.
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    /// Its package's.
    pub(crate) directory: PathBuf,
    /// Whether it runs tests.
    pub(crate) is_test: bool,
}

/// Runs a cargo that builds programs, and says which.
pub(crate) fn built_by(command: &mut Command) -> Result<Vec<Built>, Failure> {
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure(format!("cargo: {error}")))?;
    if !output.status.success() {
        return Err(Failure(format!("building it failed: {}", output.status)));
    }
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let built = messages.filter_map(|line| {
        let message: Value = serde_json::from_slice(line).ok()?;
        let target = &message["target"];
        let manifest = Path::new(message["manifest_path"].as_str()?);
        Some(Built {
            kind: target["kind"][0].as_str()?.to_owned(),
            name: target["name"].as_str()?.to_owned(),
            executable: message["executable"].as_str()?.into(),
            directory: manifest.parent()?.to_owned(),
            is_test: message["profile"]["test"].as_bool()?,
        })
    });
    Ok(built.collect())
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
