//! The suite: what is built here and run in the test host, and the disk it travels on.
//!
//! ```text
//!   init, kernel_check.sh          what runs in the machine
//!   settings, suite                what it is told
//!   target/…                       test executables and what they start, at their places in the build directory
//!   cache/…, agent                 what guests are made of
//!   vmm/…                          the VMMs that were given
//!   vmlinuz                        the machine's own kernel, for a guest in it
//!   out/status, skipped, conformance    what it says
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use super::image::{Image, remove_tree, scripts};
use super::machine::Mode;
use super::{Options, at};
use crate::bench;
use crate::run::{Failure, built_by, cargo, run, target};

/// A run of a test executable: its name, and the tests in it.
type Call = (&'static str, &'static [&'static str]);

const CONFORMANCE: &str = "volume_conformance";
/// With real guests, each driver by itself.
const SYSTEM: &str = "system";

/// With QEMU and no engine.
const QEMU: &str = "qemu";

/// What runs where nobody says what: what each machine does, so that they take about as long as each other. Of the black-box
/// suite, what every volume driver has to carry and how sandboxes live, with those drivers that the machine that this is built
/// on may not have, and what its kernel's Landlock refuses; the rest of it is run there.
const USUAL: &[&[Call]] = &[
    &[(CONFORMANCE, &[]), (SYSTEM, &["lifecycle::dm-snapshot"])],
    &[
        (SYSTEM, &["drivers::dm-snapshot"]),
        (SYSTEM, &["drivers::zfs"]),
        (SYSTEM, &["lifecycle::zfs"]),
        (QEMU, &["inv_25_a_box"]),
    ],
];
/// Everything.
const FULL: &[&[Call]] = &[
    &[
        (CONFORMANCE, &[]),
        (QEMU, &["inv_25_a_box"]),
        (SYSTEM, &["::qcow2::"]),
    ],
    &[
        (SYSTEM, &["::dm-snapshot::"]),
        (SYSTEM, &["::zfs::"]),
        (SYSTEM, &["::reflink::"]),
    ],
];
/// What names a VMM to bring, and what it is called there; without one, its tests are skipped.
const VMMS: [(&str, &str); 2] = [
    ("ICEBOX_CLOUD_HYPERVISOR", "cloud-hypervisor"),
    ("ICEBOX_FIRECRACKER", "firecracker"),
];
/// The one with the tests of power cuts.
const POWER_CUT: &str = SYSTEM;
/// What a test executable is told before everything else: its lines go to a console.
const NO_COLOR: &str = "--color=never";
/// Makes what guests are made of.
const FIXTURES: &str = "fixtures";

/// The C library of the release that the root disk is made of. Programs need what they were linked with, or newer.
const LIBC: (u32, u32) = (2, 36);

/// A side of a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Before,
    After,
    /// After everything was done.
    AfterAll,
}

impl Side {
    /// As tests know it.
    fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
            Self::AfterAll => "after-all",
        }
    }
}

/// Tests on one side of a power cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Half<'a> {
    pub(super) side: Side,
    /// With this driver, whose power is cut at every flush of a pause; with all of them, and once, if it is empty.
    pub(super) driver: &'a str,
}

/// What a machine is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task<'a> {
    /// This share of the suite.
    Share(usize),
    /// Half of the tests of power cuts.
    Half(Half<'a>),
}

/// What was built, and what came of it.
pub(super) struct Suite {
    /// What each machine runs: test executables with their arguments.
    shares: Vec<Vec<(PathBuf, Vec<String>)>>,
    power_cut: Option<PathBuf>,
    /// What tests start.
    programs: Vec<PathBuf>,
    /// What guests are made of, if there will be any.
    fixtures: Option<Fixtures>,
    skipped: Mutex<BTreeSet<String>>,
    /// What was seen of VMMs with volume drivers, in the words of the tests.
    seen: Mutex<String>,
}

/// What each machine is to run, by the names of tests. Whoever wants something in particular, or a shell, gets one machine.
fn shares(options: &Options) -> Vec<Vec<(String, Vec<String>)>> {
    if !options.tests.is_empty() || !options.arguments.is_empty() {
        let usual = [CONFORMANCE.to_owned()];
        let names = match &options.tests[..] {
            [] => &usual,
            named => named,
        };
        let calls = names.iter().cloned();
        return vec![
            calls
                .map(|name| (name, options.arguments.clone()))
                .collect(),
        ];
    }
    let table = if options.full { FULL } else { USUAL };
    let words = |arguments: &[&str]| arguments.iter().map(ToString::to_string).collect();
    let shares = table.iter().map(|share| {
        let calls = share.iter();
        calls.map(|(name, arguments)| ((*name).to_owned(), words(arguments)))
    });
    match options.mode {
        Mode::Run => shares.map(Iterator::collect).collect(),
        Mode::Keep | Mode::Shell => vec![shares.flatten().collect()],
    }
}

/// Builds these tests, and what makes what guests are made of. The whole workspace's, as `cargo xtask check` builds them: others
/// would need everything built twice.
fn fixtures_and_tests(tests: &[&str]) -> Command {
    let mut command = cargo(["test", "--workspace", "--no-run"]);
    for test in tests {
        command.args(["--test", test]);
    }
    command.args(["--example", FIXTURES]);
    command
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
        let known = [CONFORMANCE, SYSTEM, QEMU];
        let mut names = options.tests.iter();
        if let Some(unknown) = names.find(|name| !known.contains(&name.as_str())) {
            return Err(Failure(format!(
                "there is no test {unknown} in the test host's suite: {}",
                known.join(", ")
            )));
        }
        eprintln!("\n── building the suite");
        let mut suite = Self {
            shares: Vec::new(),
            power_cut: None,
            programs: Vec::new(),
            fixtures: None,
            skipped: Mutex::default(),
            seen: Mutex::default(),
        };
        if options.bench
            && options
                .arguments
                .first()
                .is_some_and(|first| first == "vmms")
        {
            suite.bench_vmms(&options.arguments)?;
            return Ok(suite);
        }
        if options.bench {
            let mut command = cargo(["bench", "--no-run", "--package", "icebox-host"]);
            let built = built_by(command.args(["--bench", "volumes"]))?;
            let bench = built.into_iter().find(|built| built.kind == "bench");
            let bench = bench.ok_or_else(|| Failure("cargo built no benchmark".to_owned()))?;
            let call = (bench.executable, options.arguments.clone());
            suite.shares.push(vec![call]);
            return Ok(suite);
        }
        let mut command = fixtures_and_tests(&known);
        let mut tests = BTreeMap::new();
        for built in built_by(&mut command)? {
            match built.kind.as_str() {
                "example" => suite.fixtures = Some(Fixtures::make(&built.executable)?),
                "test" => drop(tests.insert(built.name, built.executable)),
                _ => suite.programs.push(built.executable),
            }
        }
        suite.power_cut = tests.get(POWER_CUT).cloned();
        for share in shares(options) {
            let calls = share.into_iter().map(|(name, arguments)| {
                let missing = || Failure(format!("cargo built no {name}"));
                let executable = tests.get(&name).ok_or_else(missing)?.clone();
                Ok((executable, [vec![NO_COLOR.to_owned()], arguments].concat()))
            });
            suite.shares.push(calls.collect::<Result<_, Failure>>()?);
        }
        match suite.fixtures {
            Some(_) => Ok(suite),
            None => Err(Failure(format!("cargo built no {FIXTURES}"))),
        }
    }

    /// The benchmark of VMMs is this very program, with a daemon as it is installed.
    fn bench_vmms(&mut self, arguments: &[String]) -> Result<(), Failure> {
        let programs = bench::build()?;
        self.programs = ["icebox", "icebox-agent"]
            .map(|it| programs.join(it))
            .into();
        for built in built_by(&mut fixtures_and_tests(&[]))? {
            if built.kind == "example" {
                self.fixtures = Some(Fixtures::make(&built.executable)?);
            }
        }
        let missing = || Failure(format!("cargo built no {FIXTURES}"));
        let image = self.fixtures.as_ref().and_then(Fixtures::image);
        let image = image.ok_or_else(missing)?;
        let this =
            std::env::current_exe().map_err(|error| Failure(format!("find xtask: {error}")))?;
        let programs = programs.canonicalize().map_err(at("find", &programs))?;
        let mut words = vec!["bench".to_owned()];
        words.extend(arguments.iter().cloned());
        for (option, path) in [
            ("--programs", programs),
            ("--image", image),
            ("--kernels", "/mnt/cache/kernels".into()),
            ("--directory", "/tmp/bench".into()),
        ] {
            words.extend([option.to_owned(), path.to_string_lossy().into_owned()]);
        }
        self.shares.push(vec![(this, words)]);
        Ok(())
    }

    /// How many machines share it.
    pub(super) fn machines(&self) -> usize {
        self.shares.len()
    }

    /// Makes the disk of a machine that does its share of the suite, or half of the tests of power cuts.
    pub(super) fn pack(
        &self,
        cache: &Path,
        image: &Image,
        mode: Mode,
        task: Task<'_>,
    ) -> Result<SuiteDisk, Failure> {
        let staging = target().join("test-host-suite");
        remove_tree(&staging)?;
        let target = target();
        let target = target.canonicalize().map_err(at("find", &target))?;
        let tests = self.shares.iter().flatten();
        let tests = tests.map(|(executable, _)| executable);
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
        let vmms = bring_vmms(&staging)?;
        let write = |name: &str, text: &str| {
            let path = staging.join(name);
            fs::write(&path, text).map_err(at("write", &path))
        };
        write("suite", &self.script(task))?;
        let (side, driver) = match task {
            Task::Share(_) => ("", ""),
            Task::Half(half) => (half.side.name(), half.driver),
        };
        let settings = [
            ("TARGET", &*target.to_string_lossy()),
            ("MODE", mode.name()),
            ("ICEBOX_TEST_POWER_CUT", side),
            ("ICEBOX_TEST_POWER_CUTS", driver),
        ];
        let vmms = vmms.iter().map(|(name, path)| (*name, path.as_str()));
        let settings = settings.into_iter().chain(vmms);
        let settings = settings.map(|(name, value)| format!("{name}={}\n", quoted(value)));
        write("settings", &settings.collect::<String>())?;
        for (script, name) in [("init.sh", "init"), ("kernel_check.sh", "kernel_check.sh")] {
            let (from, to) = (scripts().join(script), staging.join(name));
            fs::copy(&from, &to).map_err(at("copy", &from))?;
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&to, mode).map_err(at("set the mode of", &to))?;
        }
        let out = staging.join("out");
        fs::create_dir(&out).map_err(at("make", &out))?;

        let disk = cache.join(match task {
            Task::Share(number) => format!("suite-{number}.ext4"),
            Task::Half(_) => "suite.ext4".to_owned(),
        });
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
    fn script(&self, task: Task<'_>) -> String {
        let line = |executable: &Path, arguments: &[String]| {
            let words = [executable.to_string_lossy().as_ref()]
                .into_iter()
                .chain(arguments.iter().map(String::as_str))
                .map(quoted)
                .collect::<Vec<_>>();
            format!("run {}\n", words.join(" "))
        };
        match task {
            Task::Half(_) => self
                .power_cut
                .iter()
                .map(|executable| line(executable, &[NO_COLOR.to_owned()]))
                .collect(),
            Task::Share(number) => {
                let lines = self.shares[number].iter();
                let lines = lines.map(|(executable, arguments)| line(executable, arguments));
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
        self.skipped().extend(lines);
        let seen = read(disk, "/out/conformance")?;
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&seen);
        match read(disk, "/out/status")?.trim() {
            "0" => Ok(()),
            "" => Err(Failure(
                "the test host crashed: it left no status".to_owned(),
            )),
            _ => Err(Failure("tests failed in the test host".to_owned())),
        }
    }

    fn skipped(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.skipped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What machines have seen of VMMs with volume drivers: lines as tests write them.
    pub(super) fn seen(&self) -> String {
        let seen = self.seen.lock();
        seen.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says which tests could not run, and why.
    pub(super) fn print_skipped(&self) {
        let skipped = self.skipped();
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

    /// Where the machine has the image.
    fn image(&self) -> Option<PathBuf> {
        let mut cached = self.cached.iter();
        let image = cached.find(|path| path.extension().is_some_and(|it| it == "ext4"))?;
        Some(Path::new("/mnt/cache").join(image.strip_prefix(&self.cache).ok()?))
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

/// Brings the VMMs that were given. For each there is, what names it, and where it is in the machine; nowhere, if it was not
/// given.
fn bring_vmms(staging: &Path) -> Result<Vec<(&'static str, String)>, Failure> {
    let brought = VMMS.into_iter().map(|(name, program)| {
        let given = std::env::var_os(name).filter(|given| !given.is_empty());
        let Some(given) = given else {
            return Ok((name, String::new()));
        };
        let inside = format!("vmm/{program}");
        bring(Path::new(&given), &staging.join(&inside))?;
        Ok((name, format!("/mnt/{inside}")))
    });
    brought.collect()
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
