//! Sandboxes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What to create. E2B's `NewSandbox`, with our fields added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewSandbox {
    /// The template's name, id or unique prefix.
    #[serde(rename = "templateID", default = "base")]
    pub template_id: String,
    /// A name for the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Virtual CPUs. Signed so that a negative number is refused by us, with words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<i64>,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// Disk size in MiB; at least the template's.
    #[serde(
        rename = "diskSizeMB",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub disk_size_mb: Option<i64>,
    /// The volume driver to use and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_driver: Option<String>,
    /// The VMM to use and no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// Boot its disk, also of a snapshot: without what the guest had in memory, on any VMM, with any CPUs and memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold: bool,
    /// Variables of every later command.
    #[serde(
        default,
        deserialize_with = "super::nullable",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub env_vars: BTreeMap<String, String>,
    /// Labels; the daemon keeps and returns them.
    #[serde(
        default,
        deserialize_with = "super::nullable",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub metadata: BTreeMap<String, String>,
    /// What becomes of its past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<super::HistoryPolicy>,
    /// Whether the sandbox reaches public addresses. Absent: the daemon's default.
    #[serde(
        rename = "allow_internet_access",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub allow_internet_access: Option<bool>,
    /// When it ends by itself, and when it begins to.
    #[serde(flatten)]
    pub lifetime: super::ChangeLifetime,
    /// E2B's other way to say that it is paused when its time is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_pause: Option<bool>,
    /// Whether its memory is kept then. If not, it is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_pause_memory: Option<bool>,
    /// Whether its agent asks for a token. It does unless this says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secure: Option<bool>,
    /// What it may reach, and who may reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<super::NetworkConfig>,
    /// E2B's MCP gateway, which there is none of here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcp: Option<serde_json::Value>,
    /// E2B's workload identities, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iam: Option<serde_json::Value>,
    /// E2B's volumes, likewise.
    #[serde(
        default,
        deserialize_with = "super::nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub volume_mounts: Vec<serde_json::Value>,
}

impl NewSandbox {
    /// Whether it reaches public addresses, if the request says so: E2B has three ways to say no.
    #[must_use]
    pub fn internet(&self) -> Option<bool> {
        let network = self
            .network
            .as_ref()
            .and_then(super::NetworkConfig::internet);
        match network {
            Some(false) => Some(false),
            other => self.allow_internet_access.or(other),
        }
    }
}

fn base() -> String {
    "base".to_owned()
}

/// Where a sandbox rests. E2B knows the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A VMM runs it.
    Running,
    /// Memory on disk, no process.
    Paused,
    /// Disk only.
    Stopped,
    /// A failure could not be undone: only `inspect` and `destroy` work.
    Broken,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Broken => "broken",
        })
    }
}

/// A sandbox in a list. E2B's `ListedSandbox`, with our fields added; `endAt` is absent while a sandbox has no end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ListedSandbox {
    /// The sandbox's id.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// The id of the template it was created from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The node that serves it; E2B's clients need one, and it says nothing here.
    #[serde(rename = "clientID")]
    pub client_id: String,
    /// The name of the template it was created from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// The sandbox's name within its team.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whose it is.
    pub team: String,
    /// When it was created.
    pub started_at: Timestamp,
    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_at: Option<Timestamp>,
    /// Virtual CPUs.
    pub cpu_count: u8,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// The size of the disk that the guest sees, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u64,
    /// Where it rests.
    pub state: State,
    /// The verb under way, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verb: Option<String>,
    /// Why its guest stands still though it runs, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled: Option<String>,
    /// That its guest does not answer though it runs, and what that means, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unanswering: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// The agent's contract version.
    pub envd_version: String,
    /// Where the host reaches the guest, on any port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
}

/// Everything about one sandbox. E2B's `SandboxDetail` and `Sandbox`, with our fields added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxDetail {
    /// What a list shows.
    #[serde(flatten)]
    pub listed: ListedSandbox,
    /// The token that the sandbox's agent asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<String>,
    /// The token that its other ports ask for, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_access_token: Option<String>,
    /// How much of it is kept while it is paused, in E2B's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_mode: Option<super::PauseMode>,
    /// The domain of `<port>-<id>.<domain>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Whether it reaches public addresses.
    pub allow_internet_access: bool,
    /// The volume driver.
    pub volume_driver: String,
    /// What runs it, while it runs, or what its last generation needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<Vmm>,
    /// The digest of its kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// The VMM's process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Which limits the host enforces on it, or why none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<String>,
    /// Allocated bytes of what nothing else needs: removing the sandbox gives so much back. Only if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    /// Allocated bytes of what it needs and others need, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// What these are made of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<super::Part>,
    /// What its pauses wrote, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub generations: Vec<Generation>,
    /// Generations of which something is missing or cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unusable: Vec<Unusable>,
    /// Disks that were set aside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<Branch>,
    /// What becomes of its past, as far as it was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<super::HistoryPolicy>,
    /// Host resources it holds, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<String>,
    /// When it ends by itself, and when it begins to, if that was ever said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<super::Lifecycle>,
    /// How its VMM last ended without being asked to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
    /// The last verb that had something to do with it, since the daemon started. Not in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_verb: Option<LastVerb>,
    /// Why its newest disk cannot be read any more; its pauses can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_lost: Option<String>,
    /// Why it is broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// How a verb went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastVerb {
    /// Which.
    pub verb: String,
    /// When its turn came.
    pub began_at: Timestamp,
    /// How long it took from then on, in microseconds.
    pub micros: u64,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How long its steps took, in the order in which they ended. Steps that are done at the same time count each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<super::StepTime>,
}

/// What runs a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Vmm {
    /// `qemu`, `cloud-hypervisor`, `firecracker`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why that accelerator.
    pub accelerator_reason: String,
}

/// What one pause wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    /// Its number within the sandbox.
    pub number: u32,
    /// When it was committed.
    pub created_at: Timestamp,
    /// Allocated bytes of device state and memory that this pause wrote.
    pub allocated_bytes: u64,
    /// Memory pages that had changed since what the guest was restored from.
    pub changed_pages: u64,
}

/// A generation that cannot be resumed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Unusable {
    /// Its number within the sandbox.
    pub number: u32,
    /// What it lacks.
    pub why: String,
    /// Whether the sandbox rests at it.
    pub current: bool,
}

/// A disk that was set aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Branch {
    /// Its name.
    pub name: String,
    /// When it was set aside.
    pub created_at: Timestamp,
}

/// Whether a verb changed anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It did.
    Changed,
    /// The sandbox rested there already.
    AlreadyThere,
}

/// What our own verbs answer, and E2B's when asked with `Prefer: return=representation`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerbResult {
    /// Whether anything changed.
    pub outcome: Outcome,
    /// The sandbox afterwards.
    pub sandbox: SandboxDetail,
    /// What else the user could have done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// How to resume. An empty body means the newest generation.
///
/// E2B's clients ask with the last three, and are those who have a key and do not ask for the sandbox in the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResumeRequest {
    /// The generation to resume. One older than the newest disk sets that disk aside as a branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// For how many seconds it runs. Absent: 15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<i64>,
    /// Whether it is paused when its time is over, or killed. Absent: as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_pause: Option<bool>,
    /// Whether what its memory was goes on. If not, its disk is booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// What to call a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewSnapshot {
    /// The new template's name. Never overwrites one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it holds the memory. If not, it is flattened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<bool>,
}

/// A snapshot that was taken: a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Snapshot {
    /// The template's id.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Its names.
    pub names: Vec<String>,
    /// The template.
    pub template: super::Template,
}

/// How many forks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewFork {
    /// From 1 to 100.
    #[serde(default = "one")]
    pub count: i64,
    /// How many seconds each of them runs, from now on. Absent: as long as the sandbox that they are forks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<i64>,
}

fn one() -> i64 {
    1
}

/// One fork: made, or why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Forked {
    /// It runs.
    Sandbox(Box<SandboxDetail>),
    /// It could not be made; the others are not affected.
    Error(crate::ErrorBody),
}
