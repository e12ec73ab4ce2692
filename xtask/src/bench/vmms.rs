//! `cargo xtask bench vmms`: what Cloud Hypervisor and Firecracker cost under Icebox, beside what each costs alone.
//!
//! ```text
//!   a kernel, an image ── daemon, volume driver reflink, on an XFS in a file
//!   for each VMM that is named, some rounds of:
//!     floor:  boot → save while it runs → save → (restore → first exec → save while it runs → save) × 2
//!     ours:   the same → forks
//! ```
//!
//! The floor is `bench/floor_vmms.py`, on the same file system. Needs KVM, and fetches nothing that it is given: so it runs in
//! the test host, too (`cargo xtask test-host --bench -- vmms`). What reaches the disk is counted where the XFS is.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::daemon::Daemon;
use super::files::{newest_with, only_directory, only_file};
use super::guests::{destroy, last_downtime, last_steps, post, verb};
use super::report::{Budget, Report, Row, Series};
use super::{IDLE, KIB, array, build, build_template, clean, float, idle, ms, text};
use crate::run::{Failure, run, target};

const USAGE: &str = "\
usage: cargo xtask bench vmms [--vmm NAME] [--rounds N] [--json FILE] [--image FILE --kernels DIR] [--programs DIR] [--directory DIR]
  --vmm NAME       one VMM: cloud-hypervisor or firecracker; by default, both if both are named
  --rounds N       how often everything is done; 3 by default
  --json FILE      write everything that was measured
  --image FILE     a raw ext4 image for the guests, instead of a minimal Debian that is fetched
  --kernels DIR    kernels as they are in a data directory, instead of one that is fetched
  --programs DIR   measure DIR/icebox with DIR/icebox-agent instead of building
  --directory DIR  where the file system goes, as large as the guests' memories are together
ICEBOX_CLOUD_HYPERVISOR and ICEBOX_FIRECRACKER name the programs.
";

const MEMORY_MIB: u64 = 256;
/// Of the file system; sparse.
const FILE_SYSTEM: u64 = 12 << 30;
/// Restores in a round.
const RESTORES: usize = 2;
const FORKS: usize = 10;
/// As block devices count what they write (the kernel's Documentation/block/stat.rst).
const SECTOR: f64 = 512.0;
/// What the floor is made by: one imports the other.
const SCRIPTS: [(&str, &str); 2] = [
    ("floor.py", include_str!("../../../bench/floor.py")),
    (
        "floor_vmms.py",
        include_str!("../../../bench/floor_vmms.py"),
    ),
];

/// A VMM that can be measured.
struct Kind {
    name: &'static str,
    /// The setting that names its program.
    setting: &'static str,
    /// The variable that does.
    variable: &'static str,
    /// Which file of a kernel's directory it boots.
    kernel: &'static str,
    /// Whether it can save what has changed.
    differential: bool,
}

const KINDS: [Kind; 2] = [
    Kind {
        name: "cloud-hypervisor",
        setting: "cloud_hypervisor",
        variable: "ICEBOX_CLOUD_HYPERVISOR",
        kernel: "vmlinuz",
        differential: false,
    },
    Kind {
        name: "firecracker",
        setting: "firecracker",
        variable: "ICEBOX_FIRECRACKER",
        kernel: "vmlinux",
        differential: true,
    },
];

#[derive(Default)]
struct Options {
    vmm: Option<String>,
    rounds: Option<usize>,
    json: Option<PathBuf>,
    image: Option<PathBuf>,
    kernels: Option<PathBuf>,
    programs: Option<PathBuf>,
    directory: Option<PathBuf>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let mut options = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let missing = || Failure(format!("{argument} needs a value\n{USAGE}"));
                arguments.next().ok_or_else(missing)
            };
            match argument.as_str() {
                "--vmm" => options.vmm = Some(value()?.clone()),
                "--rounds" => {
                    let given = value()?;
                    let rounds = given.parse().ok().filter(|rounds| *rounds > 0);
                    let wrong = || Failure(format!("--rounds {given}: no number above 0\n{USAGE}"));
                    options.rounds = Some(rounds.ok_or_else(wrong)?);
                }
                "--json" => options.json = Some(value()?.into()),
                "--image" => options.image = Some(value()?.into()),
                "--kernels" => options.kernels = Some(value()?.into()),
                "--programs" => options.programs = Some(value()?.into()),
                "--directory" => options.directory = Some(value()?.into()),
                _ => return Err(Failure(format!("unknown option {argument}\n{USAGE}"))),
            }
        }
        Ok(options)
    }

    /// The VMMs to measure, with their programs.
    fn kinds(&self) -> Result<Vec<(&'static Kind, PathBuf)>, Failure> {
        let wanted = |kind: &&Kind| self.vmm.as_ref().is_none_or(|name| name == kind.name);
        let program = |kind: &'static Kind| {
            let named = std::env::var_os(kind.variable).filter(|named| !named.is_empty());
            named.map(|named| (kind, PathBuf::from(named)))
        };
        let found: Vec<_> = KINDS.iter().filter(wanted).filter_map(program).collect();
        if found.is_empty() {
            let named = self.vmm.as_deref().unwrap_or("VMM");
            return Err(Failure(format!("no {named} is named\n{USAGE}")));
        }
        Ok(found)
    }
}

pub(crate) fn vmms(arguments: &[String]) -> Result<(), Failure> {
    let options = Options::parse(arguments)?;
    let kinds = options.kinds()?;
    let programs = match &options.programs {
        Some(directory) => directory.clone(),
        None => build()?,
    };
    let place = options
        .directory
        .clone()
        .unwrap_or_else(|| target().join("bench-vmms"));
    let ground = Ground::make(&place)?;
    let mut daemon = start(&programs, &ground, &kinds)?;
    let measured = measure(&mut daemon, &options, &kinds, &ground);
    let cleaned = clean(&daemon);
    daemon.end()?;
    let (reports, conditions) = measured?;
    cleaned?;

    println!("\n{conditions}");
    let mut missed = 0;
    let mut all = Vec::new();
    for (kind, report) in &reports {
        println!("\n{}\n\n{}", kind.name, report.table());
        missed += report.missed();
        all.push(json!({"vmm": kind.name, "report": report.json(Value::Null)}));
    }
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", json!({"conditions": conditions, "vmms": all}));
        fs::write(path, text)
            .map_err(|error| Failure(format!("write {}: {error}", path.display())))?;
    }
    match missed {
        0 => Ok(()),
        missed => Err(Failure(format!("{missed} budgets are not kept"))),
    }
}

/// An XFS in a file, with the data directory and the scripts on it; gone when it is dropped.
struct Ground {
    file: PathBuf,
    mount: PathBuf,
}

impl Ground {
    fn make(place: &Path) -> Result<Self, Failure> {
        let ground = Self {
            file: place.join("ground"),
            mount: place.join("fs"),
        };
        let failed = |error| Failure(format!("make {}: {error}", place.display()));
        fs::create_dir_all(&ground.mount).map_err(failed)?;
        let made = File::create(&ground.file).and_then(|file| file.set_len(FILE_SYSTEM));
        made.map_err(failed)?;
        let mut make = Command::new("mkfs.xfs");
        run("a file system", make.args(["-q", "-f"]).arg(&ground.file))?;
        // What is removed gives its blocks back, to a file that may be in memory.
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,discard"]);
        run("mount it", mount.args([&ground.file, &ground.mount]))?;
        for (name, content) in SCRIPTS {
            fs::write(ground.mount.join(name), content).map_err(failed)?;
        }
        Ok(ground)
    }

    /// How many MiB `work` writes to the disk, until what it has written is there.
    fn written(&self, work: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
        let before = self.sectors()?;
        work()?;
        Ok((self.sectors()? - before) * SECTOR / KIB / KIB)
    }

    fn sectors(&self) -> Result<f64, Failure> {
        let failed = |error: std::io::Error| Failure(format!("count writes: {error}"));
        Command::new("sync").status().map_err(failed)?;
        let device = fs::metadata(&self.mount).map_err(failed)?.dev();
        // As glibc's gnu_dev_major and gnu_dev_minor, for numbers of loop devices.
        let (major, minor) = (
            (device >> 8) & 0xfff,
            (device & 0xff) | ((device >> 12) & !0xff),
        );
        let path = format!("/sys/dev/block/{major}:{minor}/stat");
        let stat = fs::read_to_string(&path).map_err(failed)?;
        let written = stat.split_ascii_whitespace().nth(6);
        let written = written.and_then(|sectors| sectors.parse().ok());
        written.ok_or_else(|| Failure(format!("{path} does not say what was written")))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.mount).status();
        let removed = fs::remove_file(&self.file);
        if !unmounted.is_ok_and(|status| status.success()) || removed.is_err() {
            eprintln!("{} and its mount are left", self.file.display());
        }
    }
}

fn start(programs: &Path, ground: &Ground, kinds: &[(&Kind, PathBuf)]) -> Result<Daemon, Failure> {
    let mut settings = "accelerator = \"kvm\"\nvolume_driver = \"reflink\"\n".to_owned();
    for (kind, program) in kinds {
        settings.push_str(&format!("{} = {program:?}\n", kind.setting));
    }
    Daemon::start(
        &programs.join("icebox"),
        ground.mount.join("data"),
        PathBuf::from("/run/icebox-bench"),
        settings,
    )
}

/// What was measured of each VMM, and under which conditions.
type Measured = (Vec<(&'static Kind, Report)>, Value);

fn measure(
    daemon: &mut Daemon,
    options: &Options,
    kinds: &[(&'static Kind, PathBuf)],
    ground: &Ground,
) -> Result<Measured, Failure> {
    if let Some(kernels) = &options.kernels {
        // To be there before anything asks for one.
        daemon.end()?;
        let mut copy = Command::new("cp");
        copy.arg("-aT")
            .args([kernels, &daemon.data.join("kernels")]);
        run("a kernel", &mut copy)?;
        daemon.start_again("")?;
    }
    let source = match &options.image {
        Some(image) => json!({"image": image.display().to_string()}),
        None => json!({"debian": {"suite": "bookworm", "include": []}}),
    };
    let size = options.image.is_none().then_some(1024);
    let new = json!({"name": "bench", "source": source, "diskSizeMB": size});
    let base = text(&build_template(daemon, &new)?["base"]);
    let image = only_file(&daemon.data.join("bases").join(base))?;
    let rounds = options.rounds.unwrap_or(3);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut reports = Vec::new();
    for (kind, program) in kinds {
        // A first sandbox also makes what the floor needs of the kernel.
        let warm_up = create(daemon, kind)?;
        destroy(daemon, &warm_up)?;
        let (mut ours, mut floor) = (Ours::default(), Floor::default());
        for round in 1..=rounds {
            eprintln!("\n── {}, round {round} of {rounds}: the floor", kind.name);
            floor.measure(daemon, kind, program, &image, ground)?;
            eprintln!("── {}, round {round} of {rounds}: ours", kind.name);
            ours.measure(daemon, kind, ground)?;
        }
        reports.push((*kind, ours.report(kind, &floor, processors)));
    }
    let listed = daemon.request("GET", "/vmms", &Value::Null)?;
    let versions = array(&listed).iter();
    let versions = versions.map(|vmm| format!("{} {}", text(&vmm["name"]), text(&vmm["version"])));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let conditions = json!({
        "processors": processors,
        "kernel": kernel.trim(),
        "vmms": versions.collect::<Vec<_>>(),
        "memoryMib": MEMORY_MIB,
        "rounds": rounds,
        "loadAverage": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    });
    Ok((reports, conditions))
}

fn create(daemon: &Daemon, kind: &Kind) -> Result<String, Failure> {
    let made = daemon.post(
        "/sandboxes",
        &json!({"templateID": "bench", "memoryMB": MEMORY_MIB, "vmm": kind.name}),
    )?;
    let sandbox = text(&made["sandboxID"]);
    daemon.exec_true(&sandbox)?;
    Ok(sandbox)
}

/// What a VMM takes by itself.
#[derive(Default)]
struct Floor {
    boot: Series,
    restore: Series,
    booted_still: Series,
    restored_still: Series,
    at_once: Series,
}

impl Floor {
    fn measure(
        &mut self,
        daemon: &Daemon,
        kind: &Kind,
        program: &Path,
        image: &Path,
        ground: &Ground,
    ) -> Result<(), Failure> {
        let kernel = only_directory(&daemon.data.join("kernels"))?;
        let mut command = Command::new("python3");
        command.arg(ground.mount.join("floor_vmms.py"));
        command.args(["--vmm", kind.name]);
        for (option, path) in [
            ("--program", program),
            ("--kernel", &kernel.join(kind.kernel)),
            ("--initramfs", &newest_with(&kernel, "initramfs-")?),
            ("--image", image),
            ("--directory", &ground.mount),
        ] {
            command.arg(option).arg(path);
        }
        command.args(["--memory-mib", &MEMORY_MIB.to_string()]);
        command.args(["--rounds", &RESTORES.to_string()]);
        command.args(["--at-once", &FORKS.to_string()]);
        command.args(["--idle", &IDLE.as_secs().to_string()]);
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let output = command.stderr(Stdio::inherit()).output();
        let output = output.map_err(|error| Failure(format!("bench/floor_vmms.py: {error}")))?;
        let found: Value = serde_json::from_slice(&output.stdout)
            .map_err(|_| Failure(format!("bench/floor_vmms.py: {}", output.status)))?;
        self.boot.push(float(&found["bootMs"]));
        self.booted_still.push(float(&found["bootedStillMs"]));
        self.at_once.push(float(&found["atOnceMs"]));
        for (series, values) in [
            (&mut self.restore, &found["restoreMs"]),
            (&mut self.restored_still, &found["restoredStillMs"]),
        ] {
            array(values)
                .iter()
                .for_each(|value| series.push(float(value)));
        }
        eprintln!("   {found}");
        Ok(())
    }
}

/// What it takes under Icebox.
#[derive(Default)]
struct Ours {
    boot: Series,
    restore: Series,
    booted_still: Series,
    restored_still: Series,
    /// Where the time of the last of them went.
    restore_steps: String,
    booted_still_steps: String,
    restored_still_steps: String,
    /// What a pause writes, in MiB: of a guest that was booted, and of one that was restored.
    first_pause: Series,
    later_pause: Series,
    forks: Series,
    /// Of the last of the last forks.
    fork_steps: String,
}

impl Ours {
    fn measure(&mut self, daemon: &Daemon, kind: &Kind, ground: &Ground) -> Result<(), Failure> {
        let begun = Instant::now();
        let sandbox = create(daemon, kind)?;
        self.boot.push(ms(begun));
        idle(IDLE);
        self.booted_still.push(still(daemon, &sandbox)?);
        self.booted_still_steps = last_steps(daemon, &sandbox)?;
        idle(IDLE);
        let pause = || verb(daemon, &sandbox, "pause");
        self.first_pause.push(ground.written(pause)?);
        eprintln!("   {self}");
        for _ in 0..RESTORES {
            let begun = Instant::now();
            verb(daemon, &sandbox, "resume")?;
            daemon.exec_true(&sandbox)?;
            self.restore.push(ms(begun));
            self.restore_steps = last_steps(daemon, &sandbox)?;
            idle(IDLE);
            self.restored_still.push(still(daemon, &sandbox)?);
            self.restored_still_steps = last_steps(daemon, &sandbox)?;
            idle(IDLE);
            self.later_pause.push(ground.written(pause)?);
            eprintln!("   {self}");
        }
        verb(daemon, &sandbox, "resume")?;
        idle(IDLE);
        let begun = Instant::now();
        let forked = post(daemon, &sandbox, "fork", &json!({"count": FORKS}))?;
        let (mut forks, mut failed) = (Vec::new(), None);
        for fork in array(&forked) {
            match fork["sandbox"]["sandboxID"].as_str() {
                Some(id) => forks.push(id.to_owned()),
                None => failed = Some(text(&fork["error"]["message"])),
            }
        }
        for fork in &forks {
            daemon.exec_true(fork)?;
            self.fork_steps = last_steps(daemon, fork)?;
        }
        // What takes too long for the daemon is a measurement, too: a budget that is not kept.
        match failed {
            None => self.forks.push(ms(begun)),
            Some(why) => {
                let living = forks.len();
                eprintln!("   {living} of {FORKS} forks: {why}");
                self.forks.push(f64::INFINITY);
            }
        }
        eprintln!("   {self}");
        for sandbox in forks.iter().chain([&sandbox]) {
            destroy(daemon, sandbox)?;
        }
        Ok(())
    }

    fn report(self, kind: &Kind, floor: &Floor, processors: usize) -> Report {
        let mut report = Report::default();
        let per_core = floor.restore.median() * FORKS as f64 / processors as f64;
        report
            .add(Row::new("create (boot) → first exec", "ms", self.boot).floor(floor.boot.clone()));
        report.add(
            Row::new("resume → first exec", "ms", self.restore)
                .floor(floor.restore.clone())
                .budget(Budget::TimesFloor(1.3))
                .note(format!("the last resume: {}", self.restore_steps)),
        );
        for (what, ours, steps, floor) in [
            (
                "live save of a booted guest, vCPUs stand still",
                self.booted_still,
                self.booted_still_steps,
                &floor.booted_still,
            ),
            (
                "live save of a restored guest, vCPUs stand still",
                self.restored_still,
                self.restored_still_steps,
                &floor.restored_still,
            ),
        ] {
            let row = Row::new(what, "ms", ours).floor(floor.clone());
            let row = row.budget(Budget::TimesFloor(1.2));
            report.add(row.note(format!("the last save: {steps}")));
        }
        let later = Row::new(
            "later pause of an idle guest writes",
            "MiB",
            self.later_pause,
        )
        .floor(self.first_pause)
        .note("its floor is the first pause, which writes all");
        report.add(if kind.differential {
            later.budget(Budget::TimesFloor(0.1))
        } else {
            later
        });
        report.add(
            Row::new("forks at once, all have run a command", "ms", self.forks)
                .floor(per_core.into())
                .budget(Budget::TimesFloor(2.0))
                .note(format!(
                    "{FORKS} forks; their floor is so many times a bare restore, over {processors} processors; bare ones at once: {:.0} ms; the last fork: {}",
                    floor.at_once.median(),
                    self.fork_steps
                )),
        );
        report
    }
}

/// How far it has come: a run takes minutes.
impl std::fmt::Display for Ours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let medians = [
            ("boot", &self.boot),
            ("booted still", &self.booted_still),
            ("first pause", &self.first_pause),
            ("restore", &self.restore),
            ("restored still", &self.restored_still),
            ("later pause", &self.later_pause),
            ("forks", &self.forks),
        ];
        for (what, series) in medians {
            write!(f, "{what} {:.1}  ", series.median())?;
        }
        Ok(())
    }
}

/// For how long the vCPUs stand still in the second of two live captures, as the floor measures it.
fn still(daemon: &Daemon, sandbox: &str) -> Result<f64, Failure> {
    post(daemon, sandbox, "checkpoints", &json!({}))?;
    idle(IDLE);
    post(daemon, sandbox, "checkpoints", &json!({}))?;
    last_downtime(daemon, sandbox)
}
