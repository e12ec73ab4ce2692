//! `cargo xtask soak boots`: boots, several at a time, each of which must bring a guest with all of its devices.

use std::time::Instant;

use super::daemon::Daemon;
use super::guests::{create, destroy};
use super::report::{Report, Row, Series};
use super::{Options, USAGE, build, clean, ensure_template, ms, start};
use crate::run::Failure;

/// Boots that many guests, and says how that went.
pub(crate) fn soak(arguments: &[String]) -> Result<String, Failure> {
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
    let (mut daemon, _) = start(&programs)?;
    let soaked = ensure_template(&daemon, &options).and_then(|_| boot_all(&daemon, boots, at_once));
    let cleaned = clean(&daemon);
    daemon.end()?;
    let seen = soaked?;
    cleaned.map(|()| seen)
}

fn boot_all(daemon: &Daemon, boots: usize, at_once: usize) -> Result<String, Failure> {
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
    let seen = format!("{boots} boots, {at_once} at a time, none failed");
    let median = times.median();
    let mut report = Report::default();
    report.add(Row::new("boot → devices checked", "ms", times).note(seen.clone()));
    println!("\n{}", report.table());
    Ok(format!("{seen}; {median:.0} ms each at the median"))
}
