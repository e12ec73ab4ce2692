//! Captures of a guest that runs on, by how much of its memory has changed; and a life of many pauses.

use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::guests::{create, destroy, inspect, last_downtime, pause, post, verb};
use super::report::{Budget, Report, Row, Series};
use super::{IDLE, KIB, MEMORY_MIB, Options, array, float, idle, ms};
use crate::run::Failure;

const PAGE: f64 = 4.0 * KIB;
/// How many changed pages a capture takes along in [`STANDS_STILL`].
const QUICK_PAGES: f64 = 2_000.0;
/// For so many milliseconds the vCPUs may stand still.
const STANDS_STILL: f64 = 20.0;
/// And longer by what copying the other changed pages takes, in bytes per millisecond: 1 GiB/s.
const COPIED: f64 = KIB * KIB * KIB / 1000.0;
const ROUNDS: usize = 30;
/// Rounds at either end that are compared.
const COMPARED: usize = 10;
/// Pages are changed in rounds; once in a while the kernel reclaims some.
const SETTLE: Duration = Duration::from_millis(300);

/// What the vCPUs may stand still for, with so many changed pages.
fn allowed(pages: f64) -> f64 {
    STANDS_STILL + (pages - QUICK_PAGES).max(0.0) * PAGE / COPIED
}

/// For how long the vCPUs stand still, with the pages changed that an idle guest changes, and with many more.
pub(super) fn downtimes(
    daemon: &Daemon,
    options: &Options,
    report: &mut Report,
) -> Result<(), Failure> {
    const SIZES: [(&str, u64); 3] = [
        ("live capture, vCPUs stand still, idle guest", 0),
        ("live capture, vCPUs stand still, 32 MiB changed", 32),
        ("live capture, vCPUs stand still, 96 MiB changed", 96),
    ];
    eprintln!("\n── live captures of {MEMORY_MIB} MiB");
    let sandbox = create(daemon, "bench", None)?;
    idle(IDLE);
    for (what, mib) in SIZES {
        // Not zeros: those are not stored.
        let change = format!("tr '\\0' x </dev/zero | head -c {mib}M >/dev/shm/changed");
        let (mut still, mut changed) = (Series::default(), Series::default());
        for _ in 0..options.repetitions() {
            // What has changed is counted from here.
            pause(daemon, &sandbox)?;
            verb(daemon, &sandbox, "resume")?;
            daemon.exec(&sandbox, "/bin/sh", &["-c", &change])?;
            idle(SETTLE);
            post(daemon, &sandbox, "checkpoints", &serde_json::json!({}))?;
            still.push(last_downtime(daemon, &sandbox)?);
            let generations = inspect(daemon, &sandbox)?["generations"].clone();
            if let Some(newest) = array(&generations).last() {
                changed.push(float(&newest["changedPages"]));
            }
        }
        let pages = changed.median();
        report.add(
            Row::new(what, "ms", still)
                .budget(Budget::AtMost(allowed(pages)))
                .note(format!("{pages:.0} changed pages")),
        );
    }
    destroy(daemon, &sandbox)
}

/// Whether a sandbox gets slower by being written to, paused and resumed again and again.
pub(super) fn rounds(daemon: &Daemon, report: &mut Report) -> Result<(), Failure> {
    const WRITE: &str = "head -c 1M /dev/urandom >/root/round && sync";
    eprintln!("\n── {ROUNDS} rounds of write, pause, resume");
    let sandbox = create(daemon, "bench", None)?;
    // The first pause writes the whole memory.
    pause(daemon, &sandbox)?;
    verb(daemon, &sandbox, "resume")?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        daemon.exec(&sandbox, "/bin/sh", &["-c", WRITE])?;
        let begun = Instant::now();
        verb(daemon, &sandbox, "pause")?;
        verb(daemon, &sandbox, "resume")?;
        times.push(ms(begun));
    }
    destroy(daemon, &sandbox)?;
    let late: Series = times.iter().rev().take(COMPARED).copied().collect();
    let early: Series = times.iter().take(COMPARED).copied().collect();
    report.add(
        Row::new("pause and resume, the last 10 of 30 rounds", "ms", late)
            .floor(early)
            .budget(Budget::TimesFloor(super::NOISE))
            .note("its floor is the first 10"),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_grows_with_what_has_to_be_copied() {
        assert!((allowed(500.0) - 20.0).abs() < 1e-9);
        // 1 GiB.
        assert!((allowed(2_000.0 + 262_144.0) - 1020.0).abs() < 1e-6);
    }
}
