//! `/metrics`: how much the guest uses.

use std::{
    fs, io,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{Json, extract::State};
use icebox_agent_api::control::Metrics;

use super::{error::HttpError, state::Agent};

/// Remembers the counters of the previous call, so that the next one can tell a rate.
#[derive(Default)]
pub(super) struct CpuMeter(Mutex<CpuTimes>);

/// Of all CPUs together, in ticks since boot.
#[derive(Clone, Copy, Default)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

pub(super) async fn get(State(agent): State<Arc<Agent>>) -> Result<Json<Metrics>, HttpError> {
    measure(&agent.cpu)
        .map(Json)
        .map_err(|error| HttpError::io("failed to measure", &error))
}

fn measure(cpu: &CpuMeter) -> io::Result<Metrics> {
    let stat = fs::read_to_string("/proc/stat")?;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let disk = rustix::fs::statvfs("/")?;
    let times = CpuTimes::parse(&stat);
    let previous = std::mem::replace(
        &mut *cpu.0.lock().unwrap_or_else(PoisonError::into_inner),
        times,
    );
    let memory = |name| bytes_of(&meminfo, name);
    let (total, cache) = (memory("MemTotal:"), memory("Cached:"));
    Ok(Metrics {
        ts: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        cpu_count: u32::try_from(stat.lines().filter(|line| is_one_cpu(line)).count())
            .unwrap_or(u32::MAX),
        cpu_used_pct: times.used_since(previous),
        mem_total: total,
        mem_used: total.saturating_sub(memory("MemAvailable:")),
        mem_cache: cache,
        disk_used: disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        disk_total: disk.f_blocks * disk.f_frsize,
    })
}

fn is_one_cpu(line: &str) -> bool {
    line.strip_prefix("cpu")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// A line of /proc/meminfo, which counts in KiB.
fn bytes_of(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

impl CpuTimes {
    /// The first line of /proc/stat: user nice system idle iowait irq softirq steal guest guest_nice. The last two
    /// are counted in the first two already.
    fn parse(stat: &str) -> Self {
        let ticks: Vec<u64> = stat
            .lines()
            .next()
            .into_iter()
            .flat_map(|line| line.split_whitespace().skip(1).take(8))
            .filter_map(|field| field.parse().ok())
            .collect();
        let total = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Self {
            busy: total - idle,
            total,
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "a percentage")]
    fn used_since(self, previous: Self) -> f32 {
        let total = self.total.saturating_sub(previous.total);
        let busy = self.busy.saturating_sub(previous.busy);
        if total == 0 {
            0.0
        } else {
            100.0 * busy as f32 / total as f32
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_use_is_of_the_time_between_two_calls() {
        let first = CpuTimes::parse("cpu  10 0 10 80 0 0 0 0 0 0\ncpu0 …");
        let second = CpuTimes::parse("cpu  40 0 30 120 10 0 0 0 5 0\n");
        assert!((second.used_since(first) - 50.0).abs() < 0.01);
        assert!(first.used_since(first).abs() < f32::EPSILON);
    }

    #[test]
    fn what_is_measured_here_is_plausible() {
        let metrics = measure(&CpuMeter::default()).unwrap();
        assert!(metrics.cpu_count >= 1 && metrics.mem_used < metrics.mem_total);
        assert!(metrics.disk_used <= metrics.disk_total && metrics.disk_total > 0);
    }
}
