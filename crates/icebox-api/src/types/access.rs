//! Teams, keys and the audit log.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// What a team may have at once. What is left out is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TeamLimits {
    /// Sandboxes, whether or not they run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandboxes: Option<u64>,
    /// Sandboxes that run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<u64>,
    /// Virtual CPUs of sandboxes that run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u64>,
    /// Guest memory of sandboxes that run, in MiB.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// The sizes of all sandboxes' disks, as their guests see them, in MiB.
    #[serde(
        rename = "diskSizeMB",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub disk_size_mb: Option<u64>,
}

/// What a team has, counted as [`TeamLimits`] are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TeamUse {
    /// Sandboxes, whether or not they run.
    pub sandboxes: u64,
    /// Sandboxes that run, or are being brought to.
    pub running: u64,
    /// Their virtual CPUs.
    pub cpu_count: u64,
    /// Their memory, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u64,
    /// The sizes of all sandboxes' disks, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u64,
}

/// A team: whose sandboxes, templates and keys are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Team {
    /// Its name, which is its identity and never changes.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
    /// What it may have.
    pub limits: TeamLimits,
    /// What it has.
    pub used: TeamUse,
    /// How many keys it has.
    pub keys: u64,
}

/// A team to create.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewTeam {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// What it may have.
    #[serde(flatten)]
    pub limits: TeamLimits,
}

/// Other limits for a team: a number bounds, `null` bounds no longer, what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChangeTeam {
    /// See [`TeamLimits::sandboxes`].
    #[serde(
        default,
        deserialize_with = "said",
        skip_serializing_if = "Option::is_none"
    )]
    pub sandboxes: Option<Option<u64>>,
    /// See [`TeamLimits::running`].
    #[serde(
        default,
        deserialize_with = "said",
        skip_serializing_if = "Option::is_none"
    )]
    pub running: Option<Option<u64>>,
    /// See [`TeamLimits::cpu_count`].
    #[serde(
        default,
        deserialize_with = "said",
        skip_serializing_if = "Option::is_none"
    )]
    pub cpu_count: Option<Option<u64>>,
    /// See [`TeamLimits::memory_mb`].
    #[serde(
        rename = "memoryMB",
        default,
        deserialize_with = "said",
        skip_serializing_if = "Option::is_none"
    )]
    pub memory_mb: Option<Option<u64>>,
    /// See [`TeamLimits::disk_size_mb`].
    #[serde(
        rename = "diskSizeMB",
        default,
        deserialize_with = "said",
        skip_serializing_if = "Option::is_none"
    )]
    pub disk_size_mb: Option<Option<u64>>,
}

impl ChangeTeam {
    /// The limits that `before` become.
    #[must_use]
    pub fn applied(&self, before: TeamLimits) -> TeamLimits {
        TeamLimits {
            sandboxes: self.sandboxes.unwrap_or(before.sandboxes),
            running: self.running.unwrap_or(before.running),
            cpu_count: self.cpu_count.unwrap_or(before.cpu_count),
            memory_mb: self.memory_mb.unwrap_or(before.memory_mb),
            disk_size_mb: self.disk_size_mb.unwrap_or(before.disk_size_mb),
        }
    }
}

#[expect(
    clippy::option_option,
    reason = "serde leaves a missing field to its default, so what comes here was said"
)]
fn said<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// A key, as it is kept: what it is cannot be had from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Key {
    /// Its id.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// Whose it is.
    pub team: String,
    /// How it begins, to tell keys apart by.
    pub mask: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was used last, within a few minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<Timestamp>,
}

/// A key to make.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewKey {
    /// What to call it.
    #[serde(default)]
    pub name: String,
}

/// A key that was made just now: the only time that it is told.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MadeKey {
    /// The key itself.
    pub key: String,
    /// What is kept of it.
    #[serde(flatten)]
    pub kept: Key,
}

impl std::fmt::Debug for MadeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MadeKey")
            .field("kept", &self.kept)
            .finish_non_exhaustive()
    }
}

/// Whether every team may create sandboxes from a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeTemplate {
    /// That.
    pub public: bool,
}

/// Which entries of the audit log to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRange {
    /// Those after this number.
    #[serde(default)]
    pub since: u64,
    /// Those from this time on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Timestamp>,
    /// At most so many. Absent: 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One change that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Its place in the order. Numbers are never used again.
    pub sequence: u64,
    /// When it was asked for.
    pub time: Timestamp,
    /// Who asked: `key:<id>`, or `local:<uid>` on the socket.
    pub actor: String,
    /// The team that they asked for, if for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// What for: `sandbox.create`, `sandbox.pause`, `key.remove`…
    pub verb: String,
    /// Of what: an id where there is one, else what was asked for.
    pub target: String,
    /// `done`, or why not: an error code. Absent while it is under way, and for ever if the daemon ended before it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
}
