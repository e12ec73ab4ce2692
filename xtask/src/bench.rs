//! `cargo xtask bench`: what Icebox costs, beside what QEMU alone costs on the same machine in the same run.
//!
//! ```text
//!   floor (half) → boots → pause, resume, pause … → snapshot → create from it → fork × N → sizes → flatten → floor (half)
//! ```
//!
//! The floor is measured before and after, since the machine may not be the same at both ends of a run that takes
//! minutes. Ratios are of medians. Everything is removed in the end, and what stays is a failure.

mod daemon;
mod host;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::daemon::Daemon;
use self::report::{Budget, Report, Row, Series};
use crate::run::{Failure, build_agent, cargo, root, run, target};

/// What the guest does nothing for, before each pause.
const IDLE: Duration = Duration::from_secs(3);
/// For which the daemon's use of the processor is watched.
const REST: Duration = Duration::from_secs(10);
/// One tick in [`REST`]: as close to nothing as the kernel's counting shows.
const TICK_PERCENT: f64 = 0.1;
const MEMORY_MIB: u64 = 512;
const KIB: f64 = 1024.0;

pub(crate) const USAGE: &str = "\
usage: cargo xtask bench [--quick] [--json FILE] [--image FILE] [--programs DIR]
       cargo xtask soak [-n BOOTS] [-j AT_ONCE] [--image FILE] [--programs DIR]
  --quick          fewer repetitions, four forks, one disk size
  --json FILE      write everything that was measured
  --image FILE     a raw ext4 image for the guests, instead of a minimal Debian
  --programs DIR   measure DIR/icebox with DIR/icebox-agent instead of building
";

#[derive(Default)]
struct Options {
    quick: bool,
    json: Option<PathBuf>,
    image: Option<PathBuf>,
    programs: Option<PathBuf>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let mut options = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut file = || {
                let value = arguments.next();
                value
                    .map(|path| Some(PathBuf::from(path)))
                    .ok_or_else(|| Failure(format!("{argument} needs a value\n{USAGE}")))
            };
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--json" => options.json = file()?,
                "--image" => options.image = file()?,
                "--programs" => options.programs = file()?,
                _ => return Err(Failure(format!("unknown option {argument}\n{USAGE}"))),
            }
        }
        Ok(options)
    }

    fn repetitions(&self) -> usize {
        if self.quick { 3 } else { 10 }
    }

    fn forks(&self) -> usize {
        if self.quick { 4 } else { 20 }
    }
}

pub(crate) fn bench(arguments: &[String]) -> Result<(), Failure> {
    let options = Options::parse(arguments)?;
    let programs = match &options.programs {
        Some(directory) => directory.clone(),
        None => build()?,
    };
    let (daemon, place) = start(&programs)?;
    let measured = measure(&daemon, &options, &place);
    let cleaned = clean(&daemon);
    daemon.stop()?;
    let (report, accelerator) = measured?;
    cleaned?;

    let conditions = json!({
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "accelerator": accelerator,
        "memoryMib": MEMORY_MIB,
        "repetitions": options.repetitions(),
        "loadAverage": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    });
    println!("\n{conditions}\n\n{}", report.table());
    if let Some(path) = &options.json {
        let text = format!("{:#}\n", report.json(conditions));
        fs::write(path, text)
            .map_err(|error| Failure(format!("write {}: {error}", path.display())))?;
    }
    match report.missed() {
        0 => Ok(()),
        missed => Err(Failure(format!("{missed} budgets are not kept"))),
    }
}

/// `cargo xtask bench volumes`: each driver, beside the raw disk and the tools that copy disks.
pub(crate) fn volumes(options: &[String]) -> Result<(), Failure> {
    let mut command = cargo([
        "bench",
        "--package",
        "icebox-host",
        "--bench",
        "volumes",
        "--",
    ]);
    run("volumes", command.args(options))
}

/// The programs that are installed: release, and the static agent beside it.
fn build() -> Result<PathBuf, Failure> {
    let mut icebox = cargo(["build", "--release", "--package", "icebox"]);
    run("the daemon, release", &mut icebox)?;
    build_agent()?;
    let release = target().join("release");
    let agent = target().join("x86_64-unknown-linux-gnu/agent/icebox-agent");
    fs::copy(&agent, release.join("icebox-agent"))
        .map_err(|error| Failure(format!("copy {}: {error}", agent.display())))?;
    Ok(release)
}

/// The benchmark's own daemon, and where its files are.
fn start(programs: &Path) -> Result<(Daemon, PathBuf), Failure> {
    let place = root().join("target/bench");
    fs::create_dir_all(&place)
        .map_err(|error| Failure(format!("make {}: {error}", place.display())))?;
    let run = PathBuf::from("/run/icebox-bench");
    let daemon = Daemon::start(&programs.join("icebox"), place.join("data"), run)?;
    Ok((daemon, place))
}

/// `cargo xtask soak`: boots, several at a time, each of which must bring a guest with all of its devices.
pub(crate) fn soak(arguments: &[String]) -> Result<(), Failure> {
    let (mut boots, mut at_once, mut rest) = (200_usize, 2_usize, Vec::new());
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let number = match word.as_str() {
            "-n" => &mut boots,
            "-j" => &mut at_once,
            _ => {
                rest.push(word.clone());
                continue;
            }
        };
        let value = words.next().and_then(|word| word.parse().ok());
        *number = value.ok_or_else(|| Failure(format!("{word} needs a number\n{USAGE}")))?;
    }
    let options = Options::parse(&rest)?;
    let programs = match &options.programs {
        Some(directory) => directory.clone(),
        None => build()?,
    };
    let (daemon, _) = start(&programs)?;
    let soaked = ensure_template(&daemon, &options).and_then(|_| boot_all(&daemon, boots, at_once));
    let cleaned = clean(&daemon);
    daemon.stop()?;
    soaked?;
    cleaned
}

fn boot_all(daemon: &Daemon, boots: usize, at_once: usize) -> Result<(), Failure> {
    /// The root disk and the network are proven by running at all.
    const DEVICES: &str = "test -n \"$(cat /sys/class/misc/hw_random/rng_current)\" \
         && ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* \
         && grep -q vda /proc/partitions";
    let next = std::sync::atomic::AtomicUsize::new(0);
    let boot_some = || -> Result<Series, Failure> {
        let mut times = Series::default();
        while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < boots {
            let begun = Instant::now();
            let sandbox = create(daemon, "bench", None)?;
            daemon.exec(&sandbox, "/bin/sh", &["-c", DEVICES])?;
            times.push(ms(begun));
            destroy(daemon, &sandbox)?;
        }
        Ok(times)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(boot_some)).collect();
        threads
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect()
    });
    let mut times = Series::default();
    for result in results {
        times.extend(&result.map_err(|_| Failure("a thread panicked".into()))??);
    }
    let mut report = Report::default();
    report.add(
        Row::new("boot → devices checked", "ms", times)
            .note(format!("{boots} boots, {at_once} at a time, none failed")),
    );
    println!("\n{}", report.table());
    Ok(())
}

fn measure(daemon: &Daemon, options: &Options, place: &Path) -> Result<(Report, String), Failure> {
    let base = ensure_template(daemon, options)?;
    let image = only_file(&daemon.data.join("bases").join(&base))?;
    let mut report = Report::default();

    // A first sandbox also makes the initramfs that the floor needs.
    let warm_up = create(daemon, "bench", None)?;
    let accelerator = text(&inspect(daemon, &warm_up)?["vmm"]["accelerator"]);
    destroy(daemon, &warm_up)?;
    eprintln!("\n── the floor, first half");
    let mut floor = Floor::default();
    floor.measure(daemon, &image, &accelerator, options, place)?;
    let ours = ours(daemon, options, &mut report)?;
    if !options.quick {
        sizes(daemon, options, place, &image, &mut report)?;
    }
    eprintln!("\n── the floor, second half");
    floor.measure(daemon, &image, &accelerator, options, place)?;
    compare(&ours, &floor, &mut report);
    Ok((report, accelerator))
}

/// What `bench/floor.py` found, both times.
#[derive(Default)]
struct Floor {
    boot: Series,
    restore: Series,
    boot_save: Series,
    save: Series,
    boot_changed: Series,
    changed: Series,
}

impl Floor {
    fn measure(
        &mut self,
        daemon: &Daemon,
        image: &Path,
        accelerator: &str,
        options: &Options,
        place: &Path,
    ) -> Result<(), Failure> {
        let half = options.repetitions().div_ceil(2).to_string();
        let kernel = only_directory(&daemon.data.join("kernels"))?;
        let mut command = Command::new("python3");
        command
            .arg(root().join("bench/floor.py"))
            .args([
                "--accelerator",
                accelerator,
                "--rounds",
                &half,
                "--boots",
                &half,
            ])
            .args(["--memory-mib", &MEMORY_MIB.to_string()])
            .args(["--idle", &IDLE.as_secs().to_string()])
            .arg("--directory")
            .arg(place)
            .arg("--image")
            .arg(image)
            .arg("--kernel")
            .arg(kernel.join("vmlinuz"))
            .arg("--initramfs")
            .arg(newest_with(&kernel, "initramfs-")?);
        let output = command
            .output()
            .map_err(|error| Failure(format!("bench/floor.py: {error}")))?;
        let found: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
            Failure(format!(
                "bench/floor.py: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ))
        })?;
        for time in array(&found["boot"]["firstExecMs"]) {
            self.boot.push(float(time));
        }
        let save = &found["boot"]["save"];
        self.boot_save.push(float(&save["ms"]["durable"]));
        self.boot_changed.push(float(&save["changedPages"]));
        for round in array(&found["restores"]) {
            self.restore.push(float(&round["firstExecMs"]));
            self.save.push(float(&round["save"]["ms"]["durable"]));
            self.changed.push(float(&round["save"]["changedPages"]));
        }
        Ok(())
    }
}

/// Our side of what has a floor.
#[derive(Default)]
struct Ours {
    boot: Series,
    first_pause: Series,
    first_changed: Series,
    pause: Series,
    changed: Series,
    resume: Series,
    from_snapshot: Series,
}

fn ours(daemon: &Daemon, options: &Options, report: &mut Report) -> Result<Ours, Failure> {
    let mut ours = Ours::default();
    eprintln!("\n── boots");
    for _ in 0..options.repetitions() {
        let begun = Instant::now();
        let sandbox = create(daemon, "bench", None)?;
        daemon.exec_true(&sandbox)?;
        ours.boot.push(ms(begun));
        destroy(daemon, &sandbox)?;
    }

    eprintln!("\n── pause, resume");
    let (mut first_bytes, mut second_bytes) = (Series::default(), Series::default());
    for _ in 0..options.repetitions().div_ceil(5) {
        let sandbox = create(daemon, "bench", None)?;
        idle(IDLE);
        ours.first_pause.push(pause(daemon, &sandbox)?);
        verb(daemon, &sandbox, "resume")?;
        idle(IDLE);
        // Not among the others: nothing ran in it, which is what the budget of bytes is about.
        pause(daemon, &sandbox)?;
        let generations = inspect(daemon, &sandbox)?["generations"].clone();
        ours.first_changed
            .push(float(&generations[0]["changedPages"]));
        first_bytes.push(float(&generations[0]["allocatedBytes"]));
        second_bytes.push(float(&generations[1]["allocatedBytes"]));
        destroy(daemon, &sandbox)?;
    }
    report.add(Row::new(
        "first pause writes",
        "MiB",
        first_bytes.median() / KIB / KIB,
    ));
    report.add(
        Row::new(
            "second pause writes",
            "MiB",
            second_bytes.median() / KIB / KIB,
        )
        .floor((first_bytes.median() / KIB / KIB).into())
        .budget(Budget::TimesFloor(0.1))
        .note("its floor is the first pause"),
    );

    let sandbox = create(daemon, "bench", None)?;
    idle(IDLE);
    ours.first_pause.push(pause(daemon, &sandbox)?);
    for _ in 0..options.repetitions() {
        let begun = Instant::now();
        verb(daemon, &sandbox, "resume")?;
        daemon.exec_true(&sandbox)?;
        ours.resume.push(ms(begun));
        idle(IDLE);
        ours.pause.push(pause(daemon, &sandbox)?);
        let generations = inspect(daemon, &sandbox)?["generations"].clone();
        if let Some(newest) = array(&generations).last() {
            ours.changed.push(float(&newest["changedPages"]));
        }
    }
    verb(daemon, &sandbox, "resume")?;

    eprintln!("\n── snapshots");
    let mut downtime = Series::default();
    for number in 0..options.repetitions().div_ceil(2) {
        let name = format!("bench-{number}");
        post(daemon, &sandbox, "snapshots", &json!({"name": name}))?;
        downtime.push(last_downtime(daemon, &sandbox)?);
    }
    report.add(
        Row::new("live snapshot, vCPUs stand still", "ms", downtime)
            .note("from pausing the vCPUs to letting them run"),
    );
    let begun = Instant::now();
    post(daemon, &sandbox, "flatten", &json!({"name": "bench-flat"}))?;
    report.add(Row::new("flatten, whole command", "ms", ms(begun)));
    destroy(daemon, &sandbox)?;

    for _ in 0..options.repetitions() {
        let begun = Instant::now();
        let sandbox = create(daemon, "bench-0", None)?;
        daemon.exec_true(&sandbox)?;
        ours.from_snapshot.push(ms(begun));
        destroy(daemon, &sandbox)?;
    }
    forks(daemon, options.forks(), report)?;
    Ok(ours)
}

/// Many at once, from one parent.
fn forks(daemon: &Daemon, count: usize, report: &mut Report) -> Result<(), Failure> {
    eprintln!("\n── {count} forks at once");
    let parent = create(daemon, "bench-0", None)?;
    let begun = Instant::now();
    let forked = post(daemon, &parent, "fork", &json!({"count": count}))?;
    let mut sandboxes = Vec::new();
    for fork in array(&forked) {
        let id = &fork["sandbox"]["sandboxID"];
        if id.is_null() {
            return Err(Failure(format!("a fork failed: {fork}")));
        }
        sandboxes.push(text(id));
    }
    for sandbox in &sandboxes {
        daemon.exec_true(sandbox)?;
    }
    report.add(
        Row::new("forks at once, all have run a command", "ms", ms(begun))
            .note(format!("{count} forks")),
    );
    let (processor, resting) = (host::cpu_ticks(daemon.pid())?, Instant::now());
    idle(REST);
    let ticks = host::cpu_ticks(daemon.pid())?.saturating_sub(processor);
    let percent = ticks as f64 * 1000.0 / ms(resting);
    report.add(
        Row::new("daemon at rest, processor", "%", percent)
            .budget(Budget::AtMost(TICK_PERCENT))
            .note(format!(
                "over {} s; one tick of 10 ms is {TICK_PERCENT} %",
                REST.as_secs()
            )),
    );
    let resident = host::rss_kib(daemon.pid())? as f64 / KIB;
    report.add(
        Row::new("daemon at rest, resident", "MiB", resident)
            .budget(Budget::AtMost(40.0))
            .note(format!("{} sandboxes", count + 1)),
    );
    let (mut disk, mut anonymous, mut process) =
        (Series::default(), Series::default(), Series::default());
    for sandbox in &sandboxes {
        let inspected = inspect(daemon, sandbox)?;
        let usage = host::usage(inspected["pid"].as_u64().unwrap_or_default())?;
        disk.push(directory_of(daemon, sandbox) / KIB / KIB);
        anonymous.push(usage.guest_anonymous_kib as f64 / KIB);
        process.push(usage.pss_kib as f64 / KIB);
    }
    report.add(Row::new("a fork's disk", "MiB", disk).budget(Budget::AtMost(1.0)));
    report.add(
        Row::new("a fork's own guest memory at rest", "MiB", anonymous)
            .budget(Budget::AtMost(8.0))
            .note("anonymous pages of the mapping"),
    );
    report.add(
        Row::new("a fork's whole VMM, PSS", "MiB", process)
            .note("with the emulator and its translated code"),
    );
    for sandbox in sandboxes.iter().chain([&parent]) {
        destroy(daemon, sandbox)?;
    }
    Ok(())
}

/// The cost of a fork over a disk of 1 GiB and of 8 GiB, in turns.
fn sizes(
    daemon: &Daemon,
    options: &Options,
    place: &Path,
    image: &Path,
    report: &mut Report,
) -> Result<(), Failure> {
    eprintln!("\n── forks of 1 GiB and 8 GiB");
    let mut parents = Vec::new();
    for gib in [1_u64, 8] {
        let name = format!("bench-{gib}g");
        let copy = place.join(format!("{name}.ext4"));
        let grown = grow(image, &copy, gib << 30).and_then(|()| {
            let source = json!({"image": copy.display().to_string()});
            build_template(daemon, &json!({"name": name, "source": source}))
        });
        if copy.exists() {
            fs::remove_file(&copy)
                .map_err(|error| Failure(format!("remove {}: {error}", copy.display())))?;
        }
        grown?;
        parents.push(create(daemon, &name, None)?);
    }
    let mut times = [Series::default(), Series::default()];
    for _ in 0..options.repetitions() {
        for (parent, times) in parents.iter().zip(&mut times) {
            let begun = Instant::now();
            let forked = post(daemon, parent, "fork", &json!({"count": 1}))?;
            let fork = text(&forked[0]["sandbox"]["sandboxID"]);
            daemon.exec_true(&fork)?;
            times.push(ms(begun));
            destroy(daemon, &fork)?;
        }
    }
    for parent in &parents {
        destroy(daemon, parent)?;
    }
    let [small, large] = times;
    report.add(
        Row::new("fork → first exec, 8 GiB disk", "ms", large)
            .floor(small)
            .budget(Budget::TimesFloor(1.2))
            .note("its floor is the same with a disk of 1 GiB"),
    );
    Ok(())
}

/// A sparse copy of an image, with its file system grown to `bytes`.
fn grow(image: &Path, copy: &Path, bytes: u64) -> Result<(), Failure> {
    let mut cp = Command::new("cp");
    cp.args(["--sparse=always", "--no-preserve=mode"])
        .args([image, copy]);
    run("copy the image", &mut cp)?;
    let size = fs::metadata(copy).map_or(0, |metadata| metadata.len());
    if size >= bytes {
        return Ok(());
    }
    fs::OpenOptions::new()
        .write(true)
        .open(copy)
        .and_then(|file| file.set_len(bytes))
        .map_err(|error| Failure(format!("grow {}: {error}", copy.display())))?;
    run("grow its file system", Command::new("resize2fs").arg(copy))
}

fn compare(ours: &Ours, floor: &Floor, report: &mut Report) {
    let pages = |ours: &Series, floor: &Series| {
        format!(
            "changed pages: {:.0}, floor {:.0}",
            ours.median(),
            floor.median()
        )
    };
    let rows = [
        Row::new("create (boot) → first exec", "ms", ours.boot.clone()).floor(floor.boot.clone()),
        Row::new("resume → first exec", "ms", ours.resume.clone())
            .floor(floor.restore.clone())
            .budget(Budget::TimesFloor(1.5)),
        Row::new(
            "create from snapshot → first exec",
            "ms",
            ours.from_snapshot.clone(),
        )
        .floor(floor.restore.clone())
        .budget(Budget::TimesFloor(1.5)),
        Row::new(
            "first pause of an idle guest",
            "ms",
            ours.first_pause.clone(),
        )
        .floor(floor.boot_save.clone())
        .budget(Budget::TimesFloor(2.0))
        .note(pages(&ours.first_changed, &floor.boot_changed)),
        Row::new("later pause of an idle guest", "ms", ours.pause.clone())
            .floor(floor.save.clone())
            .note(pages(&ours.changed, &floor.changed)),
    ];
    for row in rows {
        report.add(row);
    }
}

/// The template all guests come from, made if it is not there; its base's digest.
fn ensure_template(daemon: &Daemon, options: &Options) -> Result<String, Failure> {
    let template = match daemon.request("GET", "/templates/bench", &Value::Null) {
        Ok(template) => template,
        Err(_) => {
            eprintln!("\n── a template");
            let source = match &options.image {
                Some(image) => json!({"image": image.display().to_string()}),
                None => json!({"debian": {"suite": "bookworm", "include": []}}),
            };
            let size = options.image.is_none().then_some(1024);
            build_template(
                daemon,
                &json!({"name": "bench", "source": source, "diskSizeMB": size}),
            )?
        }
    };
    Ok(text(&template["base"]))
}

fn build_template(daemon: &Daemon, new: &Value) -> Result<Value, Failure> {
    let last = daemon.post("/builds", new)?;
    match last["event"].as_str() {
        Some("done") => Ok(last["template"].clone()),
        _ => Err(Failure(format!("the template was not built: {last}"))),
    }
}

fn create(daemon: &Daemon, template: &str, memory_mib: Option<u64>) -> Result<String, Failure> {
    let is_snapshot = template == "bench-0";
    let memory = memory_mib.or((!is_snapshot).then_some(MEMORY_MIB));
    let made = daemon.post(
        "/sandboxes",
        &json!({"templateID": template, "memoryMB": memory}),
    )?;
    Ok(text(&made["sandboxID"]))
}

fn inspect(daemon: &Daemon, sandbox: &str) -> Result<Value, Failure> {
    daemon.request("GET", &format!("/sandboxes/{sandbox}"), &Value::Null)
}

fn post(daemon: &Daemon, sandbox: &str, what: &str, body: &Value) -> Result<Value, Failure> {
    daemon.post(&format!("/sandboxes/{sandbox}/{what}"), body)
}

fn verb(daemon: &Daemon, sandbox: &str, verb: &str) -> Result<(), Failure> {
    post(daemon, sandbox, verb, &json!({})).map(drop)
}

fn pause(daemon: &Daemon, sandbox: &str) -> Result<f64, Failure> {
    let begun = Instant::now();
    verb(daemon, sandbox, "pause")?;
    Ok(ms(begun))
}

fn destroy(daemon: &Daemon, sandbox: &str) -> Result<(), Failure> {
    daemon
        .request("DELETE", &format!("/sandboxes/{sandbox}"), &Value::Null)
        .map(drop)
}

/// For how long the vCPUs stood still in a sandbox's newest snapshot, from the times of its steps.
fn last_downtime(daemon: &Daemon, sandbox: &str) -> Result<f64, Failure> {
    let events = daemon.request("GET", "/events?follow=false&since=0", &Value::Null)?;
    let step = |event: &Value, name: &str| {
        array(&event["steps"])
            .iter()
            .find(|step| step["step"] == name)
            .map(|step| float(&step["micros"]))
    };
    array(&events)
        .iter()
        .rev()
        .filter(|event| event["sandboxID"] == sandbox)
        .find_map(|event| {
            let still = ["pause-vcpus", "save", "freeze", "resume-vcpus"];
            still
                .iter()
                .map(|name| step(event, name))
                .sum::<Option<f64>>()
        })
        .map(|micros| micros / 1000.0)
        .ok_or_else(|| Failure("no event tells how long the snapshot took".into()))
}

/// Removes what the benchmark made, and fails if anything is left.
fn clean(daemon: &Daemon) -> Result<(), Failure> {
    for sandbox in array(&daemon.request("GET", "/sandboxes", &Value::Null)?) {
        destroy(daemon, &text(&sandbox["sandboxID"]))?;
    }
    for template in array(&daemon.request("GET", "/templates", &Value::Null)?) {
        let names = array(&template["names"]);
        if !names.iter().any(|name| name == "bench") {
            let id = text(&template["templateID"]);
            daemon.request("DELETE", &format!("/templates/{id}"), &Value::Null)?;
        }
    }
    daemon.post("/gc", &json!({}))?;
    let left = host::holdings(daemon);
    if left.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = left.into_iter().collect();
    Err(Failure(format!("left behind:\n  {}", list.join("\n  "))))
}

/// Allocated bytes of what is a sandbox's own.
fn directory_of(daemon: &Daemon, sandbox: &str) -> f64 {
    host::allocated(&daemon.data.join("sandboxes").join(sandbox)) as f64
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error| Failure(format!("read {}: {error}", directory.display()));
    fs::read_dir(directory)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
        .collect()
}

fn only_directory(directory: &Path) -> Result<PathBuf, Failure> {
    let found = entries(directory)?;
    found
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| Failure(format!("{} is empty", directory.display())))
}

/// The image of a base: its largest file.
fn only_file(directory: &Path) -> Result<PathBuf, Failure> {
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    entries(directory)?
        .into_iter()
        .max_by_key(size)
        .ok_or_else(|| Failure(format!("{} is empty", directory.display())))
}

fn newest_with(directory: &Path, prefix: &str) -> Result<PathBuf, Failure> {
    let fits = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    let age = |path: &PathBuf| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    entries(directory)?
        .into_iter()
        .filter(fits)
        .max_by_key(age)
        .ok_or_else(|| Failure(format!("no {prefix}… in {}", directory.display())))
}

/// Lets the machine be. Time is what is measured here, not a stand-in for an event.
#[allow(
    clippy::disallowed_methods,
    reason = "the guest is to be idle for a time"
)]
fn idle(time: Duration) {
    std::thread::sleep(time);
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
