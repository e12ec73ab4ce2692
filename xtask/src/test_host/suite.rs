//! The suite: what is built here and run in the test host, and the disk it travels on.
//!
//! ```text
//!   init, kernel_check.sh          what runs in the machine
//!   settings, suite                what it is told
//!   target/…                       test executables and what they start, at their places in the build directory
//!   cache/…, agent                 what guests are made of
//!   vmlinuz                        the machine's own kernel, for a guest in it
//!   out/status, out/skipped        what it says
//! ```

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::image::{Image, remove_tree, scripts};
use super::machine::Mode;
use super::{Options, at};
use crate::run::{Failure, cargo, run, target};

/// A test executable.
struct Test {
    name: &'static str,
    /// Whether it runs where nobody asks for it.
    usual: bool,
    /// What it is given where nobody says what.
    arguments: &'static [&'static str],
}

const TESTS: &[Test] = &[
    Test {
        name: "volume_conformance",
        usual: true,
        arguments: &[],
    },
    // What every volume driver has to carry. The rest of it is run on the machine that this is built on.
    Test {
        name: "system",
        usual: false,
        arguments: &["drivers::"],
    },
];
/// The one with the tests of power cuts.
const POWER_CUT: &str = "system";
/// Makes what guests are made of.
const FIXTURES: &str = "fixtures";

/// The C library of the release that the root disk is made of. Programs need what they were linked with, or newer.
const LIBC: (u32, u32) = (2, 36);

/// A test on both sides of a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Before,
    After,
}

/// What was built, and what came of it.
pub(super) struct Suite {
    /// Test executables with their arguments.
    tests: Vec<(PathBuf, Vec<String>)>,
    power_cut: Option<PathBuf>,
    /// What tests start.
    programs: Vec<PathBuf>,
    /// What guests are made of, if there will be any.
    fixtures: Option<Fixtures>,
    skipped: RefCell<BTreeSet<String>>,
}

/// What guests are made of.
#[derive(Default)]
struct Fixtures {
    agent: PathBuf,
    /// The cache, and what of it is needed.
    cache: PathBuf,
    cached: Vec<PathBuf>,
}

/// Removed when it is dropped.
pub(super) struct SuiteDisk(PathBuf);

impl SuiteDisk {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SuiteDisk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
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

impl Suite {
    /// Builds the tests, and what the guests in them are made of.
    pub(super) fn build(options: &Options) -> Result<Self, Failure> {
        let known = |name: &String| TESTS.iter().any(|test| name == test.name);
        if let Some(unknown) = options.tests.iter().find(|name| !known(name)) {
            let names: Vec<_> = TESTS.iter().map(|test| test.name).collect();
            return Err(Failure(format!(
                "there is no test {unknown} in the test host's suite: {}",
                names.join(", ")
            )));
        }
        eprintln!("\n── building the suite");
        let mut suite = Self {
            tests: Vec::new(),
            power_cut: None,
            programs: Vec::new(),
            fixtures: None,
            skipped: RefCell::default(),
        };
        if options.bench {
            let mut command = cargo(["bench", "--no-run", "--package", "icebox-host"]);
            let built = built_by(command.args(["--bench", "volumes"]))?;
            let bench = built.into_iter().find(|built| built.kind == "bench");
            let bench = bench.ok_or_else(|| Failure("cargo built no benchmark".to_owned()))?;
            suite
                .tests
                .push((bench.executable, options.arguments.clone()));
            return Ok(suite);
        }
        // The whole workspace's, as `cargo xtask check` builds them: others would need everything built twice.
        let mut command = cargo(["test", "--workspace", "--no-run"]);
        for test in TESTS {
            command.args(["--test", test.name]);
        }
        command.args(["--example", FIXTURES]);
        for built in built_by(&mut command)? {
            match built.kind.as_str() {
                "example" => suite.fixtures = Some(Fixtures::make(&built.executable)?),
                "test" => suite.add(&built.name, built.executable, options),
                _ => suite.programs.push(built.executable),
            }
        }
        match suite.fixtures {
            Some(_) => Ok(suite),
            None => Err(Failure(format!("cargo built no {FIXTURES}"))),
        }
    }

    fn add(&mut self, name: &str, executable: PathBuf, options: &Options) {
        if name == POWER_CUT {
            self.power_cut = Some(executable.clone());
        }
        let Some(test) = TESTS.iter().find(|test| test.name == name) else {
            return;
        };
        let wanted = match &options.tests[..] {
            [] => test.usual || options.full,
            named => named.iter().any(|named| named == name),
        };
        if wanted {
            let arguments = match &options.arguments[..] {
                [] => test.arguments.iter().map(ToString::to_string).collect(),
                given => given.to_vec(),
            };
            self.tests.push((executable, arguments));
        }
    }

    /// Makes the disk of a machine that runs the suite, or half of the tests of power cuts.
    pub(super) fn pack(
        &self,
        cache: &Path,
        image: &Image,
        mode: Mode,
        half: Option<Half>,
    ) -> Result<SuiteDisk, Failure> {
        let staging = target().join("test-host-suite");
        remove_tree(&staging)?;
        let target = target();
        let target = target.canonicalize().map_err(at("find", &target))?;
        let tests = self.tests.iter().map(|(executable, _)| executable);
        let executables = tests.chain(&self.power_cut).chain(&self.programs);
        for executable in executables.collect::<BTreeSet<_>>() {
            let inside = executable.strip_prefix(&target).map_err(|_| {
                Failure(format!(
                    "{} is not in {}",
                    executable.display(),
                    target.display()
                ))
            })?;
            bring(executable, &staging.join("target").join(inside))?;
        }
        if let Some(fixtures) = &self.fixtures {
            fixtures.pack(&staging)?;
        }
        bring(&image.vmlinuz(), &staging.join("vmlinuz"))?;
        let write = |name: &str, text: &str| {
            let path = staging.join(name);
            fs::write(&path, text).map_err(at("write", &path))
        };
        write("suite", &self.script(half))?;
        let settings = [
            ("TARGET", &*target.to_string_lossy()),
            ("MODE", mode.name()),
            (
                "ICEBOX_TEST_POWER_CUT",
                match half {
                    None => "",
                    Some(Half::Before) => "before",
                    Some(Half::After) => "after",
                },
            ),
        ];
        let settings = settings.map(|(name, value)| format!("{name}={}\n", quoted(value)));
        write("settings", &settings.concat())?;
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
        let bytes = allocated(&staging)?;
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
            .arg(&staging)
            .arg(&disk);
        // A quarter more than what is in it, and room for what comes back.
        make.arg(format!("{}K", bytes / 1024 * 5 / 4 + (64 << 10)));
        run("the suite's disk", &mut make)?;
        remove_tree(&staging)?;
        Ok(SuiteDisk(disk))
    }

    /// What the machine's init runs, in its words.
    fn script(&self, half: Option<Half>) -> String {
        let line = |executable: &Path, arguments: &[String]| {
            let words = [executable.to_string_lossy().as_ref()]
                .into_iter()
                .chain(arguments.iter().map(String::as_str))
                .map(quoted)
                .collect::<Vec<_>>();
            format!("run {}\n", words.join(" "))
        };
        match half {
            Some(_) => self
                .power_cut
                .iter()
                .map(|executable| line(executable, &[]))
                .collect(),
            None => {
                let tests = self.tests.iter();
                let lines = tests.map(|(executable, arguments)| line(executable, arguments));
                format!("check_kernel\n{}", lines.collect::<String>())
            }
        }
    }

    /// What the machine left on the disk.
    ///
    /// # Errors
    /// A test failed, or there is no status: the machine crashed.
    pub(super) fn outcome(&self, disk: &SuiteDisk) -> Result<(), Failure> {
        let skipped = read(disk, "/out/skipped")?;
        let lines = skipped.lines().map(str::to_owned);
        self.skipped.borrow_mut().extend(lines);
        match read(disk, "/out/status")?.trim() {
            "0" => Ok(()),
            "" => Err(Failure(
                "the test host crashed: it left no status".to_owned(),
            )),
            _ => Err(Failure("tests failed in the test host".to_owned())),
        }
    }

    /// Says which tests could not run, and why.
    pub(super) fn print_skipped(&self) {
        let skipped = self.skipped.borrow();
        if skipped.is_empty() {
            println!("\nskipped: nothing");
        } else {
            println!("\nskipped, and why:");
        }
        for line in skipped.iter() {
            println!("  {line}");
        }
    }
}

/// What cargo built: a test, a benchmark, an example, or a program that one of them starts.
struct Built {
    kind: String,
    name: String,
    executable: PathBuf,
}

fn built_by(command: &mut Command) -> Result<Vec<Built>, Failure> {
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
        Some(Built {
            kind: target["kind"][0].as_str()?.to_owned(),
            name: target["name"].as_str()?.to_owned(),
            executable: message["executable"].as_str()?.into(),
        })
    });
    Ok(built.collect())
}

impl Fixtures {
    /// Has them made by the program that knows how.
    fn make(program: &Path) -> Result<Self, Failure> {
        let output = Command::new(program)
            .stderr(Stdio::inherit())
            .output()
            .map_err(at("run", program))?;
        let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let path = |value: &Value| value.as_str().map(PathBuf::from);
        let made = (|| {
            Some(Self {
                agent: path(&said["agent"])?,
                cache: path(&said["cache"])?,
                cached: said["cached"].as_array()?.iter().filter_map(path).collect(),
            })
        })();
        made.filter(|_| output.status.success())
            .ok_or_else(|| Failure(format!("making what guests are made of: {}", output.status)))
    }

    fn pack(&self, staging: &Path) -> Result<(), Failure> {
        bring(&self.agent, &staging.join("agent"))?;
        for path in &self.cached {
            let inside = path.strip_prefix(&self.cache).unwrap_or(path);
            bring(path, &staging.join("cache").join(inside))?;
        }
        Ok(())
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A file or directory at another place, without copying where that can be.
fn bring(from: &Path, to: &Path) -> Result<(), Failure> {
    if from.is_dir() {
        for entry in fs::read_dir(from).map_err(at("read", from))? {
            let entry = entry.map_err(at("read", from))?;
            bring(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory).map_err(at("make", directory))?;
    }
    if fs::hard_link(from, to).is_err() {
        // Images are mostly holes.
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").args([from, to]);
        let status = copy.status().map_err(at("copy", from))?;
        if !status.success() {
            return Err(Failure(format!("cannot copy {}: {status}", from.display())));
        }
    }
    Ok(())
}

/// Bytes on disk of everything in a directory.
fn allocated(directory: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).map_err(at("read", directory))? {
        let path = entry.map_err(at("read", directory))?.path();
        bytes += if path.is_dir() {
            allocated(&path)?
        } else {
            // As stat(2) counts.
            fs::metadata(&path).map_err(at("look at", &path))?.blocks() * 512
        };
    }
    Ok(bytes)
}

/// A file on the disk; empty if it is not there.
fn read(disk: &SuiteDisk, path: &str) -> Result<String, Failure> {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(disk.path())
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
