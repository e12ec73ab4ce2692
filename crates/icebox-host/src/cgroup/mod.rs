//! Control groups: what one VMM may use of the host, and where it is found again.
//!
//! A group `icebox-<tag>/<sandbox>` per VMM, in the unified hierarchy (version 2) where that offers the controllers,
//! else in version 1's, else none, which is said wherever limits are shown. It stands at the root of its hierarchy,
//! like those of LXC, and not under the daemon's own group: its path must derive from the sandbox alone, whoever
//! starts the daemon the next time, and a service manager that stops the daemon must leave the VMMs alone.
//!
//! A group is also the record of last resort: a VMM whose daemon died before it could write a pid down is found by
//! [`Cgroups::pids`].
//!
//! What this part deliberately does not do: put processes into groups (the launcher writes itself into
//! [`Cgroups::join_files`] before it becomes the VMM), and kill (that needs a start time to compare).

mod detect;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use icebox_engine::host::{Ensured, ErrorKind, HostError, Limits, LimitsInForce, Removed};
use icebox_engine::id::SandboxId;
use icebox_engine::unit::Bytes;
use strum::IntoEnumIterator as _;

use crate::instance::Instance;
use detect::{Controller, Mechanism};

/// What a VMM that emulates the CPU (TCG) needs beside the guest's memory: its translation buffer above all.
pub const OVERHEAD_TCG: Bytes = Bytes::mib(384);
/// What a VMM that runs guests on KVM needs beside the guest's memory.
pub const OVERHEAD_KVM: Bytes = Bytes::mib(128);

/// The period that CPU quotas are counted in; the kernel's default (sched-bwc.rst).
const CPU_PERIOD_US: u64 = 100_000;
/// How long to wait between attempts to remove a group: one whose last process has just exited is busy for a moment.
const REMOVE_BACKOFF_MS: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// What the processes of a group use. What this host does not account for is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time since the group was made.
    pub cpu: Option<Duration>,
    /// Memory charged to the group, page cache included.
    pub memory: Option<Bytes>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// How often the kernel killed a process of the group for its memory limit.
    pub oom_kills: Option<u64>,
}

/// The control groups of one installation.
///
/// Calls do a few small file operations and do not wait, except [`Cgroups::release`].
#[derive(Debug)]
pub struct Cgroups {
    group: String,
    mechanism: Mechanism,
    /// Held while the common parent is made or removed.
    parent: Mutex<()>,
}

/// Limits as the kernel counts them.
#[derive(Clone, Copy, Debug)]
struct Quota {
    cpu_us_per_period: u64,
    memory: Bytes,
    pids: u32,
}

impl Cgroups {
    /// Finds out what this host offers. Changes nothing and never fails: a host without control groups is one on
    /// which nothing is limited, and says so.
    #[must_use]
    pub fn detect(instance: &Instance) -> Self {
        Self::with(instance, detect::detect())
    }

    fn with(instance: &Instance, mechanism: Mechanism) -> Self {
        Self {
            group: format!("icebox-{instance}"),
            mechanism,
            parent: Mutex::new(()),
        }
    }

    /// Makes the sandbox's group, or finds it made, with exactly these limits: `vcpus` × 100 % of a CPU, the guest's
    /// memory and `overhead`, and the number of processes and threads. Does nothing where nothing can be limited.
    ///
    /// # Errors
    /// When the kernel refuses; nothing that this call made is left then.
    pub fn ensure(
        &self,
        sandbox: &SandboxId,
        limits: Limits,
        overhead: Bytes,
    ) -> Result<Ensured, HostError> {
        let quota = Quota {
            cpu_us_per_period: u64::from(limits.geometry.vcpus) * CPU_PERIOD_US,
            memory: limits.geometry.memory() + overhead,
            pids: limits.pids_max,
        };
        self.ensure_quota(sandbox, quota)
    }

    fn ensure_quota(&self, sandbox: &SandboxId, quota: Quota) -> Result<Ensured, HostError> {
        let mut made = Vec::new();
        match self.make(sandbox, quota, &mut made) {
            Ok(()) if made.is_empty() => Ok(Ensured::AlreadyPresent),
            Ok(()) => Ok(Ensured::Created),
            Err(error) => {
                // Nothing has joined them yet, so they go at once.
                for group in made.iter().rev() {
                    if let Err(left) = fs::remove_dir(group) {
                        tracing::warn!(error = %left, group = %group.display(), "left a control group behind");
                    }
                }
                self.remove_parents();
                Err(error)
            }
        }
    }

    fn make(
        &self,
        sandbox: &SandboxId,
        quota: Quota,
        made: &mut Vec<PathBuf>,
    ) -> Result<(), HostError> {
        for root in self.roots() {
            let parent = root.join(&self.group);
            let group = parent.join(sandbox.as_str());
            let _lock = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
            make_group(&parent)?;
            self.offer_controllers(root)?;
            self.offer_controllers(&parent)?;
            if make_group(&group)? == Ensured::Created {
                made.push(group);
            }
        }
        for (file, value) in self.settings(sandbox, quota) {
            fs::write(&file, &value).map_err(|error| {
                HostError::io(format!("set {} to {value}", file.display()), error)
            })?;
        }
        Ok(())
    }

    /// Lets the children of a group of the unified hierarchy use our controllers.
    fn offer_controllers(&self, group: &Path) -> Result<(), HostError> {
        let Mechanism::V2 { controllers, .. } = &self.mechanism else {
            return Ok(());
        };
        if controllers.is_empty() {
            return Ok(());
        }
        let wanted: Vec<_> = controllers.iter().map(|c| format!("+{c}")).collect();
        let file = group.join("cgroup.subtree_control");
        fs::write(&file, wanted.join(" ")).map_err(|error| {
            HostError::io(format!("enable {} in {}", wanted.join(" "), file.display()), error).hint(
                "control groups must be delegated to the daemon: on the host itself they are; in a container, run the \
                 daemon in a child group, since a group with processes of its own cannot have limited children",
            )
        })
    }

    /// The files that limit a group, and what to write into them.
    fn settings(&self, sandbox: &SandboxId, quota: Quota) -> Vec<(PathBuf, String)> {
        let memory = quota.memory.0.to_string();
        let pids = quota.pids.to_string();
        let cpu = quota.cpu_us_per_period;
        let mut settings = Vec::new();
        for controller in Controller::iter() {
            let Some(group) = self.group_of(controller, sandbox) else {
                continue;
            };
            let is_unified = matches!(self.mechanism, Mechanism::V2 { .. });
            let files = match (controller, is_unified) {
                (Controller::Cpu, true) => vec![("cpu.max", format!("{cpu} {CPU_PERIOD_US}"))],
                (Controller::Cpu, false) => vec![
                    ("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
                    ("cpu.cfs_quota_us", cpu.to_string()),
                ],
                (Controller::Memory, true) => vec![
                    ("memory.max", memory.clone()),
                    // A VMM that lost a thread is of no use: all of it or nothing.
                    ("memory.oom.group", "1".to_owned()),
                ],
                (Controller::Memory, false) => vec![("memory.limit_in_bytes", memory.clone())],
                (Controller::Pids, _) => vec![("pids.max", pids.clone())],
                (Controller::CpuAcct, _) => vec![],
            };
            settings.extend(
                files
                    .into_iter()
                    .map(|(file, value)| (group.join(file), value)),
            );
        }
        settings
    }

    /// The files by which a process puts itself into the sandbox's group: it writes `0` into each. None where nothing
    /// can be limited.
    #[must_use]
    pub fn join_files(&self, sandbox: &SandboxId) -> Vec<PathBuf> {
        self.groups(sandbox)
            .map(|group| group.join("cgroup.procs"))
            .collect()
    }

    /// Removes the sandbox's group. Kills nothing; waits up to half a second for what is exiting. Tries every
    /// hierarchy and reports all failures.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when processes are still in it; the message names them.
    pub async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError> {
        let mut removed = Removed::AlreadyAbsent;
        let mut backoff = REMOVE_BACKOFF_MS.into_iter();
        let failures = loop {
            let mut failures = Vec::new();
            for group in self.groups(sandbox) {
                match fs::remove_dir(&group) {
                    Ok(()) => removed = Removed::Removed,
                    Err(error) if is_absent(&error) => {}
                    Err(error) => failures.push((group, error)),
                }
            }
            // Only what is busy can change by itself.
            match backoff.next() {
                Some(ms) if failures.iter().any(|(_, error)| is_busy(error)) => {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                }
                _ => break failures,
            }
        };
        self.remove_parents();
        if failures.is_empty() {
            return Ok(removed);
        }
        let kind = if failures.iter().all(|(_, error)| is_busy(error)) {
            ErrorKind::Busy
        } else {
            ErrorKind::Other
        };
        let details: Vec<_> = failures
            .iter()
            .map(|(group, error)| format!("{}: {error}", group.display()))
            .collect();
        let inside = match self.pids(sandbox) {
            Ok(pids) if !pids.is_empty() => format!("; processes {pids:?} are in it"),
            _ => String::new(),
        };
        Err(HostError::new(
            kind,
            format!(
                "remove control group of sandbox {sandbox}: {}{inside}",
                details.join("; ")
            ),
        ))
    }

    /// Removes the common parent of all groups where it is empty, which a daemon that was killed between making the two
    /// has left. It costs nothing to make again.
    pub fn remove_parents(&self) {
        let _lock = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        for root in self.roots() {
            let parent = root.join(&self.group);
            match fs::remove_dir(&parent) {
                Err(error) if !is_busy(&error) && error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, group = %parent.display(), "left a control group behind");
                }
                _ => {}
            }
        }
    }

    /// Sandboxes that have a group in any hierarchy, in order.
    ///
    /// # Errors
    /// When a hierarchy cannot be read.
    pub fn list(&self) -> Result<Vec<SandboxId>, HostError> {
        let mut found = BTreeSet::new();
        for root in self.roots() {
            let parent = root.join(&self.group);
            let fail = |error| HostError::io(format!("list {}", parent.display()), error);
            let entries = match fs::read_dir(&parent) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let name = entry.map_err(fail)?.file_name();
                found.extend(name.to_str().and_then(|name| name.parse().ok()));
            }
        }
        Ok(found.into_iter().collect())
    }

    /// The processes in the sandbox's group, in order; none if it has no group.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn pids(&self, sandbox: &SandboxId) -> Result<Vec<u32>, HostError> {
        let mut pids = BTreeSet::new();
        for file in self.join_files(sandbox) {
            match fs::read_to_string(&file) {
                // A process outside of our pid namespace reads as 0, and is none that we could do anything about.
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse::<u32>().ok())
                        .filter(|pid| *pid != 0),
                ),
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    return Err(HostError::io(format!("read {}", file.display()), error));
                }
            }
        }
        Ok(pids.into_iter().collect())
    }

    /// What the sandbox's processes use.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the sandbox has no group.
    pub fn usage(&self, sandbox: &SandboxId) -> Result<Usage, HostError> {
        let unified = matches!(self.mechanism, Mechanism::V2 { .. });
        // Version 2 counts CPU time in every group, whether or not the controller is there.
        let time = if unified {
            self.groups(sandbox).next()
        } else {
            self.group_of(Controller::CpuAcct, sandbox)
        };
        let memory = self.group_of(Controller::Memory, sandbox);
        let pids = self.group_of(Controller::Pids, sandbox);
        let read = |group: &Option<PathBuf>, file: &str| match group {
            None => Ok(None),
            Some(group) => {
                let file = group.join(file);
                fs::read_to_string(&file)
                    .map(Some)
                    .map_err(|error| HostError::io(format!("read {}", file.display()), error))
            }
        };
        let (cpu, memory_used, killed) = if unified {
            (
                read(&time, "cpu.stat")?
                    .and_then(|text| keyed(&text, "usage_usec"))
                    .map(Duration::from_micros),
                read(&memory, "memory.current")?,
                read(&memory, "memory.events")?,
            )
        } else {
            (
                read(&time, "cpuacct.usage")?
                    .and_then(|text| number(&text))
                    .map(Duration::from_nanos),
                read(&memory, "memory.usage_in_bytes")?,
                read(&memory, "memory.oom_control")?,
            )
        };
        Ok(Usage {
            cpu,
            memory: memory_used.and_then(|text| number(&text)).map(Bytes),
            pids: read(&pids, "pids.current")?
                .and_then(|text| number(&text))
                .and_then(|count| u32::try_from(count).ok()),
            oom_kills: killed.and_then(|text| keyed(&text, "oom_kill")),
        })
    }

    /// What this host enforces, in words.
    #[must_use]
    pub fn limits_in_force(&self) -> LimitsInForce {
        let limits = [
            (Controller::Cpu, "CPU"),
            (Controller::Memory, "memory"),
            (Controller::Pids, "processes"),
        ];
        let (mechanism, has): (_, Box<dyn Fn(Controller) -> bool>) = match &self.mechanism {
            Mechanism::V2 { controllers, .. } => {
                ("cgroup v2", Box::new(|c| controllers.contains(&c)))
            }
            Mechanism::V1 { roots } => ("cgroup v1", Box::new(|c| roots.contains_key(&c))),
            Mechanism::None { reason } => {
                return LimitsInForce {
                    mechanism: "none".to_owned(),
                    detail: format!("nothing is limited: {reason}"),
                };
            }
        };
        let (limited, not): (Vec<_>, Vec<_>) = limits.iter().partition(|(c, _)| has(*c));
        let names = |limits: &[&(Controller, &str)]| {
            let names: Vec<_> = limits.iter().map(|(_, name)| *name).collect();
            names.join(", ")
        };
        let detail = if not.is_empty() {
            format!("limited: {}", names(&limited))
        } else {
            format!(
                "limited: {}; not limited, because this host does not offer the controller: {}",
                names(&limited),
                names(&not)
            )
        };
        LimitsInForce {
            mechanism: mechanism.to_owned(),
            detail,
        }
    }

    /// The roots of the hierarchies we use, each once.
    fn roots(&self) -> impl Iterator<Item = &Path> {
        let roots: BTreeSet<&Path> = match &self.mechanism {
            Mechanism::V2 { root, .. } => BTreeSet::from([root.as_path()]),
            Mechanism::V1 { roots } => roots.values().map(PathBuf::as_path).collect(),
            Mechanism::None { .. } => BTreeSet::new(),
        };
        roots.into_iter()
    }

    fn groups(&self, sandbox: &SandboxId) -> impl Iterator<Item = PathBuf> {
        self.roots()
            .map(move |root| root.join(&self.group).join(sandbox.as_str()))
    }

    /// The sandbox's group in the hierarchy that has this controller.
    fn group_of(&self, controller: Controller, sandbox: &SandboxId) -> Option<PathBuf> {
        let root = match &self.mechanism {
            Mechanism::V2 { root, controllers } => {
                controllers.contains(&controller).then_some(root)
            }
            Mechanism::V1 { roots } => roots.get(&controller),
            Mechanism::None { .. } => None,
        };
        root.map(|root| root.join(&self.group).join(sandbox.as_str()))
    }
}

fn make_group(group: &Path) -> Result<Ensured, HostError> {
    match fs::create_dir(group) {
        Ok(()) => Ok(Ensured::Created),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Ensured::AlreadyPresent),
        Err(error) => Err(HostError::io(
            format!("make control group {}", group.display()),
            error,
        )),
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty
    )
}

/// Reading a file of a group that is being removed says `ENODEV`.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number after `key` in a flat keyed file.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
        .and_then(number)
}
