//! Forks: many at once, what each of them occupies, what they cost the daemon, and over which disk.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::daemon::Daemon;
use super::guests::{create, destroy, inspect, last_downtime, post};
use super::report::{Budget, Report, Row, Series};
use super::{KIB, NOISE, Options, array, build_template, host, idle, ms, text};
use crate::run::{Failure, run};

/// For which the daemon's use of the processor is watched.
const REST: Duration = Duration::from_secs(10);
/// One tick in [`REST`]: as close to nothing as the kernel's counting shows.
const TICK_PERCENT: f64 = 0.1;
/// For which it is watched with the sampler and without it.
const SAMPLED: Duration = Duration::from_secs(60);

/// Many at once, from one parent.
pub(super) fn forks(daemon: &mut Daemon, count: usize, report: &mut Report) -> Result<(), Failure> {
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
    if count > 4 {
        sampler(daemon, count + 1, report)?;
    }
    for sandbox in sandboxes.iter().chain([&parent]) {
        destroy(daemon, sandbox)?;
    }
    Ok(())
}

/// What measuring guests costs while they are at rest. They run on under a daemon that does not measure them.
fn sampler(daemon: &mut Daemon, guests: usize, report: &mut Report) -> Result<(), Failure> {
    eprintln!("\n── the sampler");
    let percent = |daemon: &Daemon| -> Result<f64, Failure> {
        let (before, resting) = (host::cpu_time(daemon.pid())?, Instant::now());
        idle(SAMPLED);
        let took = host::cpu_time(daemon.pid())?.saturating_sub(before);
        Ok(took.as_secs_f64() * 100_000.0 / ms(resting))
    };
    daemon.restart("[metrics]\nenabled = false\n")?;
    // What a start does in the background is no rest.
    idle(REST);
    let without = percent(daemon)?;
    daemon.restart("")?;
    idle(REST);
    let with = percent(daemon)?;
    report.add(
        Row::new(
            "daemon at rest, of one processor, with the sampler",
            "%",
            with,
        )
        .floor(without.into())
        .note(format!(
            "{guests} guests, {} s; its floor is the daemon without it",
            SAMPLED.as_secs()
        )),
    );
    Ok(())
}

/// The cost of a fork over a disk of 1 GiB and of 8 GiB, in turns.
pub(super) fn sizes(
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
    let mut downtimes = [Series::default(), Series::default()];
    for _ in 0..options.repetitions() {
        for ((parent, times), downtimes) in parents.iter().zip(&mut times).zip(&mut downtimes) {
            let begun = Instant::now();
            let forked = post(daemon, parent, "fork", &json!({"count": 1}))?;
            let fork = text(&forked[0]["sandbox"]["sandboxID"]);
            daemon.exec_true(&fork)?;
            times.push(ms(begun));
            downtimes.push(last_downtime(daemon, parent)?);
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
            .budget(Budget::TimesFloor(NOISE))
            .note("its floor is the same with a disk of 1 GiB"),
    );
    let [small, large] = downtimes;
    report.add(
        Row::new("live capture, vCPUs stand still, 8 GiB disk", "ms", large)
            .floor(small)
            .budget(Budget::TimesFloor(NOISE))
            .note("its floor is the same with a disk of 1 GiB"),
    );
    Ok(())
}

/// A sparse copy of an image, with its file system grown to `bytes`.
pub(super) fn grow(image: &Path, copy: &Path, bytes: u64) -> Result<(), Failure> {
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

/// Allocated bytes of what is a sandbox's own.
fn directory_of(daemon: &Daemon, sandbox: &str) -> f64 {
    host::allocated(&daemon.data.join("sandboxes").join(sandbox)) as f64
}
