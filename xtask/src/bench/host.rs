//! What the benchmark reads from the host: memory and time of processes, and what is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use super::daemon::Daemon;
use crate::run::Failure;

/// Where a box shows its VMM the memory that the guest was restored from.
const GUEST_MEMORY: &str = "/run/icebox/box/memory";

/// What processes of VMMs are called: their first 15 characters, at most.
const VMMS: [&str; 3] = ["qemu-system", "cloud-hypervis", "firecracker"];

/// Memory of a VMM, in KiB, from proc_pid_smaps(5).
#[derive(Default)]
pub(super) struct Usage {
    /// Pages of the guest's memory that are its own.
    pub(super) guest_anonymous_kib: u64,
    /// Of the whole process: shared pages count in proportion.
    pub(super) pss_kib: u64,
}

pub(super) fn usage(pid: u64) -> Result<Usage, Failure> {
    let path = format!("/proc/{pid}/smaps");
    let text =
        fs::read_to_string(&path).map_err(|error| Failure(format!("read {path}: {error}")))?;
    let (mut usage, mut in_guest_memory) = (Usage::default(), false);
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some(key) = fields.next() else { continue };
        if !key.ends_with(':') {
            in_guest_memory = line.ends_with(GUEST_MEMORY);
            continue;
        }
        let kib = || -> u64 {
            let mut fields = line.split_ascii_whitespace();
            fields
                .nth(1)
                .and_then(|field| field.parse().ok())
                .unwrap_or(0)
        };
        match key {
            "Pss:" => usage.pss_kib += kib(),
            "Anonymous:" if in_guest_memory => usage.guest_anonymous_kib += kib(),
            _ => {}
        }
    }
    Ok(usage)
}

/// Resident memory of a process in KiB.
pub(super) fn rss_kib(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/status");
    let text =
        fs::read_to_string(&path).map_err(|error| Failure(format!("read {path}: {error}")))?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .split_ascii_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .ok_or_else(|| Failure(format!("{path} has no VmRSS")))
}

/// Time that a process has computed, in ticks of 10 ms: fields 14 and 15 of proc_pid_stat(5).
pub(super) fn cpu_ticks(pid: u32) -> Result<u64, Failure> {
    let path = format!("/proc/{pid}/stat");
    let text =
        fs::read_to_string(&path).map_err(|error| Failure(format!("read {path}: {error}")))?;
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = after_name
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    Ok(fields.iter().sum())
}

/// Time that all threads of a process have computed: the first field of each `/proc/<pid>/task/<tid>/schedstat`, in
/// nanoseconds (the kernel's Documentation/scheduler/sched-stats.rst). Threads that have ended are not in it.
pub(super) fn cpu_time(pid: u32) -> Result<Duration, Failure> {
    let path = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&path).map_err(|error| Failure(format!("read {path}: {error}")))?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Ok(Duration::from_nanos(nanoseconds.sum()))
}

/// Everything of this daemon that would be a leak if it outlived its sandboxes.
pub(super) fn holdings(daemon: &Daemon) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for kind in ["sandboxes", "layers", "memories", "staging", "trash"] {
        add_entries(&mut found, &daemon.data.join(kind));
    }
    add_entries(&mut found, &daemon.run.join("vm"));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of_ours = |line: &&str| line.contains(&*daemon.run.to_string_lossy());
    found.extend(
        mounts
            .lines()
            .filter(of_ours)
            .map(|line| format!("mount {line}")),
    );
    let data = daemon.data.to_string_lossy().into_owned();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name().to_string_lossy().into_owned();
        let mapped = name.bytes().all(|byte| byte.is_ascii_digit())
            && fs::read_to_string(process.path().join("comm"))
                .is_ok_and(|comm| VMMS.iter().any(|vmm| comm.starts_with(vmm)))
            && fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|fd| fs::read_link(fd.path()).ok())
                .any(|target| target.to_string_lossy().starts_with(&data));
        if mapped {
            found.insert(format!("process {name}"));
        }
    }
    found
}

fn add_entries(found: &mut BTreeSet<String>, directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
    }
}

/// Allocated bytes of everything in a directory.
pub(super) fn allocated(directory: &Path) -> u64 {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}
