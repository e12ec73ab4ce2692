//! VMMs: the processes that run guests.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{BlockDevice, HostError, Removed, Secret, SlotNetwork};
use crate::id::{SandboxId, Slot};
use crate::unit::{Bytes, Geometry};

/// What a VMM is, as far as a saved state depends on it. Compared before a restore (INV-44), shown by `inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmIdentity {
    /// `qemu`, `cloud-hypervisor`, `firecracker`.
    pub name: String,
    /// The VMM's own version text.
    pub version: String,
    /// Machine type and whatever else of the configuration a saved state depends on.
    pub machine: String,
    /// The CPU model that the guest sees.
    pub cpu: String,
    /// The features of that CPU, as far as they depend on the host. A guest is restored where all of them are, whatever else
    /// is there. What was recorded before they were known names none.
    #[serde(default, skip_serializing_if = "CpuFeatures::is_empty")]
    pub cpu_features: CpuFeatures,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why this accelerator: the result of the live probe, in words.
    pub accelerator_reason: String,
}

/// Features of a CPU, by names that mean the same on every host and do not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct CpuFeatures(BTreeSet<String>);

impl CpuFeatures {
    /// Adds one, which is a single word.
    pub fn insert(&mut self, name: &str) {
        self.0.insert(name.to_owned());
    }

    /// Whether it names none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their names.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Those that are not among `others`.
    #[must_use]
    pub fn without(&self, others: &Self) -> Self {
        Self(self.0.difference(&others.0).cloned().collect())
    }
}

/// The names with spaces between them.
impl fmt::Display for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().collect::<Vec<_>>().join(" "))
    }
}

impl From<String> for CpuFeatures {
    fn from(names: String) -> Self {
        Self(names.split_whitespace().map(ToOwned::to_owned).collect())
    }
}

impl From<CpuFeatures> for String {
    fn from(features: CpuFeatures) -> Self {
        features.to_string()
    }
}

/// What a VMM can do. The engine asks this, never names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Can switch a running guest's disk to a new head ([`Machine::disk_switch`]). Without it, only volume drivers whose
    /// heads [the host freezes](super::LiveFreeze::ByHost) serve its sandboxes.
    pub disk_switch: bool,
    /// A guest that was saved can run on.
    pub live_save: bool,
    /// Writes and restores a memory that is a base with a diff: a save costs what changed since the restore.
    pub differential_save: bool,
    /// A restored guest runs before its memory has been read: pages come when it touches them.
    pub lazy_restore: bool,
    /// A restored guest sees the CPU features that it was saved with. Without it, it sees those of the host that it is on,
    /// and begins to depend on them.
    pub keeps_cpu_features: bool,
    /// Can give a running guest more or less memory, or more or fewer CPUs.
    pub resize: bool,
    /// The most virtual CPUs.
    pub max_vcpus: u8,
}

/// A process that can be told from a later one with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat`, proc(5).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started.
    pub boot_id: String,
}

/// An immutable guest memory, as files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySource {
    /// Full, sparse, as long as the guest's memory. Mapped privately; never written.
    pub base: PathBuf,
    /// Pages that differ from the base, all of them (cumulative).
    pub diff: Option<PathBuf>,
}

/// How a guest comes to life.
#[derive(Clone, Debug)]
pub enum Start {
    /// From its disk. vCPUs run when [`Vmm::launch`] returns.
    Boot {
        /// Kernel image that the VMM can load.
        kernel: PathBuf,
        /// Our initramfs.
        initramfs: PathBuf,
        /// The token that the agent accepts until its first welcome. Never part of a command line (INV-43).
        token: Secret,
    },
    /// From memory and device state. vCPUs stand still when [`Vmm::launch`] returns.
    Restore {
        /// What [`Machine::save`] wrote.
        device_state: PathBuf,
        /// The memory that belongs to it.
        memory: MemorySource,
    },
}

/// Everything one launch needs. The box and the network exist already; the disk is attached.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// Whose VMM it is: names the runtime directory, the cgroup and the console log.
    pub sandbox: SandboxId,
    /// Decides the uid of the box.
    pub slot: Slot,
    /// CPUs and memory.
    pub geometry: Geometry,
    /// The root disk.
    pub disk: BlockDevice,
    /// The slot's network.
    pub network: SlotNetwork,
    /// Boot or restore.
    pub start: Start,
}

/// What the vCPUs are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest stands still because a write to its disk found no room. The VMM keeps that write, and does it again
    /// when the vCPUs are told to run.
    Stalled,
}

/// Why a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitReason {
    /// The guest asked for it (poweroff, reboot), as far as the VMM tells.
    pub by_guest: bool,
    /// What the guest asked for was to begin anew (reboot), as far as the VMM tells that from an end.
    pub reset: bool,
    /// Exit status, signal and the last words on stderr, for people.
    pub detail: String,
}

/// Where a save goes.
#[derive(Clone, Debug)]
pub struct SavePlan {
    /// The file to write device state to. Does not exist yet.
    pub device_state: PathBuf,
    /// The memory object's staging directory: receives [`base`](crate::layout::MEMORY_BASE) or
    /// [`diff`](crate::layout::MEMORY_DIFF).
    pub memory: PathBuf,
    /// The memory that this guest was restored from, if it was: what a diff may refer to.
    pub restored_from: Option<MemorySource>,
}

/// Which form a saved memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavedPages {
    /// A full, sparse base was written.
    Full,
    /// A diff against the *base* of [`SavePlan::restored_from`] was written.
    Diff,
}

/// What a save wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMemory {
    /// Full or diff.
    pub pages: SavedPages,
    /// Pages that differ from what was restored, or from zero.
    pub changed_pages: u64,
    /// Of those, pages that are all zero and so not stored.
    pub zero_pages: u64,
    /// Allocated bytes of device state and memory.
    pub allocated: Bytes,
}

/// How far a save has come when the guest may run again.
pub enum Save {
    /// All has been written.
    Done(SavedMemory),
    /// What was saved is written once this completes: a copy of what the VMM has written, which is of the one instant,
    /// whatever the guest does meanwhile. It takes no more room than the VMM's save has taken. Dropped, it ends soon, and
    /// leaves nothing but what is in the plan's directories.
    Rest(BoxFuture<'static, Result<SavedMemory, HostError>>),
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(saved) => f.debug_tuple("Done").field(saved).finish(),
            Self::Rest(_) => f.debug_tuple("Rest").finish_non_exhaustive(),
        }
    }
}

impl Save {
    /// All of it.
    ///
    /// # Errors
    /// As [`Machine::save`].
    pub async fn finish(self) -> Result<SavedMemory, HostError> {
        match self {
            Self::Done(saved) => Ok(saved),
            Self::Rest(rest) => rest.await,
        }
    }
}

/// What a VMM has used since it began, and what it uses now. All of it, the guest's and its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// CPU time.
    pub cpu: Duration,
    /// Memory of the host that it occupies now. What it shares with others counts whole.
    pub memory: Bytes,
    /// What it has read from disks.
    pub disk_read: Bytes,
    /// What it has written to disks.
    pub disk_written: Bytes,
    /// What has been sent to the guest over its network.
    pub network_in: Bytes,
    /// What the guest has sent.
    pub network_out: Bytes,
}

/// Reads what one VMM uses.
pub trait Meter: Send {
    /// Does not wait for anything: some microseconds.
    ///
    /// # Errors
    /// The VMM has ended, or the host does not say.
    fn read(&mut self) -> Result<Counters, HostError>;
}

/// A kind of VMM.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// What it is: found once, by asking the real binary and, for the accelerator, by running a guest.
    fn identity(&self) -> &VmmIdentity;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Starts a VMM in its box. It lives in its own session and cgroup, and outlives this process (INV-46).
    /// On failure nothing of it is left running.
    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError>;

    /// Finds the running VMM of a sandbox that another process launched, by `recorded` if the manifest knew it, else
    /// by its box. `None` if it does not run.
    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError>;

    /// Ensures that no VMM of this sandbox runs, wedged or not: it is killed and waited for. Never signals a
    /// process whose start time differs from the recorded one.
    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError>;
}

/// One running VMM. Dropping it changes nothing for the process.
#[async_trait]
pub trait Machine: Send + Sync {
    /// The process, for the manifest.
    fn process(&self) -> ProcessIdentity;

    /// Asks the VMM what the vCPUs do. Fails fast if it is dead (INV-06).
    async fn probe(&self) -> Result<VcpuState, HostError>;

    /// Stops the vCPUs. Idempotent.
    async fn pause_vcpus(&self) -> Result<(), HostError>;

    /// Lets the vCPUs run. Idempotent.
    async fn resume_vcpus(&self) -> Result<(), HostError>;

    /// Writes device state and changed pages, with paused vCPUs. The guest is not changed by it. The files need not
    /// be durable, nor there, on return: what is left to do is returned, and [`super::Store::publish`] makes them durable,
    /// both after the guest may run again. A page not loaded yet is never saved as zero (INV-08).
    async fn save(&self, plan: SavePlan) -> Result<Save, HostError>;

    /// Completes when the guest [stalls](VcpuState::Stalled), at once if it has. Never, if it does not. Dropping it
    /// loses nothing.
    async fn stalled(&self);

    /// Begins to measure what it uses. The VMM itself is not asked, now or later.
    fn meter(&self) -> Result<Box<dyn Meter>, HostError>;

    /// The ability behind [`Capabilities::disk_switch`].
    fn disk_switch(&self) -> Option<&dyn DiskSwitch>;

    /// Completes when the process has ended, however it ended. May be awaited by several callers.
    async fn exited(&self) -> ExitReason;
}

/// Puts a new head under a running guest.
#[async_trait]
pub trait DiskSwitch: Send + Sync {
    /// Guest writes go to `to` (whose first layer is the old head) from now on, and the VMM holds no writable file
    /// descriptor of the old one. Idempotent: if `to` is the head already, nothing happens.
    async fn switch(&self, to: &BlockDevice) -> Result<(), HostError>;

    /// Whether guest writes go to `head` (its file is the VMM's active top).
    async fn is_on(&self, head: &BlockDevice) -> Result<bool, HostError>;
}
