//! `cargo xtask bench`: what Icebox costs, beside what QEMU alone costs on the same machine in the same run.
//!
//! ```text
//!   floor (half) → boots → pause, resume, pause … → snapshot → flatten → create from it → fork × N
//!   → live captures → rounds → sizes → recovery → floor (half)
//! ```
//!
//! The floor is measured before and after, since the machine may not be the same at both ends of a run that takes
//! minutes. Ratios are of medians. Everything is removed in the end, and what stays is a failure.

mod captures;
mod daemon;
mod files;
mod floor;
mod forks;
mod guests;
mod host;
mod recovery;
mod report;
mod soak;
mod vmms;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::daemon::Daemon;
use self::files::only_file;
use self::floor::Floor;
use self::guests::{create, destroy, inspect, last_downtime, pause, post, verb};
use self::report::{Budget, Report, Row, Series};
pub(crate) use self::soak::soak;
pub(crate) use self::vmms::vmms;
use crate::run::{Failure, build_agent, cargo, root, run, target};

/// What the guest does nothing for, before each pause.
const IDLE: Duration = Duration::from_secs(3);
const MEMORY_MIB: u64 = 512;
const KIB: f64 = 1024.0;
/// How many times its floor something may take that is to be the same.
const NOISE: f64 = 1.2;

pub(crate) const USAGE: &str = "\
usage: cargo xtask bench [--quick] [--json FILE] [--image FILE] [--programs DIR]
       cargo xtask soak [-n BOOTS] [-j AT_ONCE] [--image FILE] [--programs DIR]
  --quick          fewer repetitions, four forks, one disk size, no long rounds
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
    let (mut daemon, place) = start(&programs)?;
    let measured = measure(&mut daemon, &options, &place);
    let cleaned = clean(&daemon);
    daemon.end()?;
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
pub(crate) fn build() -> Result<PathBuf, Failure> {
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
    let daemon = Daemon::start(
        &programs.join("icebox"),
        place.join("data"),
        run,
        String::new(),
    )?;
    Ok((daemon, place))
}

fn measure(
    daemon: &mut Daemon,
    options: &Options,
    place: &Path,
) -> Result<(Report, String), Failure> {
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
    captures::downtimes(daemon, options, &mut report)?;
    if !options.quick {
        captures::rounds(daemon, &mut report)?;
        forks::sizes(daemon, options, place, &image, &mut report)?;
        recovery::recovery(daemon, &mut report)?;
    }
    eprintln!("\n── the floor, second half");
    floor.measure(daemon, &image, &accelerator, options, place)?;
    compare(&ours, &floor, &mut report);
    Ok((report, accelerator))
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

fn ours(daemon: &mut Daemon, options: &Options, report: &mut Report) -> Result<Ours, Failure> {
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
    forks::forks(daemon, options.forks(), report)?;
    Ok(ours)
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
            .budget(Budget::TimesFloor(1.3)),
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
        .budget(Budget::TimesFloor(1.3))
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
