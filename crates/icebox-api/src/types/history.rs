//! A sandbox's past, and going back to it.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{State, Vmm};

/// What becomes of a sandbox's past. What it does not say is the daemon's to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryPolicy {
    /// How many of the newest generations are kept, and of the newest branches. At least 1. Signed so that a negative
    /// number is refused by us, with words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<i64>,
    /// For how many seconds they are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_seconds: Option<i64>,
    /// How many seconds a guest runs from one automatic checkpoint to the next. None are made unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every_seconds: Option<i64>,
}

/// Every point that a sandbox can go back to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// The sandbox's id.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// Its generations, oldest first.
    pub generations: Vec<PastGeneration>,
    /// Its branches, oldest first.
    pub branches: Vec<PastBranch>,
    /// Where it is.
    pub now: Now,
}

/// Where a sandbox is in its history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Now {
    /// Where it rests.
    pub state: State,
    /// The generation at which it is paused, or from which its newest disk goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u32>,
    /// Allocated bytes of what was written to its newest disk since the last capture. Absent if it has no newer disk
    /// than its generation's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}

/// A generation: memory, devices and disk of one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PastGeneration {
    /// Its number within the sandbox.
    pub number: u32,
    /// Whether the sandbox is paused at it.
    pub current: bool,
    /// Why it cannot be resumed, if so. What follows is absent where it cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
    /// What wrote it: `pause`, `checkpoint`, `fork`, `create`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<String>,
    /// When the guest stood still for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// The generation that the guest had gone on from, which may not be there any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u32>,
    /// Allocated bytes of device state and memory that were written for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Memory pages that had changed since what the guest was restored from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_pages: Option<u64>,
    /// Allocated bytes of its layer, without those under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What ran the guest, and can resume it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<Vmm>,
}

/// A branch: a disk that was set aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PastBranch {
    /// Its name within the sandbox.
    pub name: String,
    /// When it was set aside.
    pub created_at: Timestamp,
    /// The generation that it had gone on from, which may not be there any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u32>,
    /// Allocated bytes of its layer, without those under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}

/// Where to go back to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RollbackRequest {
    /// A generation's number, or a branch's name.
    pub to: String,
    /// Whether to go on from there at once: to resume the generation, or to boot the branch's disk.
    #[serde(default)]
    pub resume: bool,
}
