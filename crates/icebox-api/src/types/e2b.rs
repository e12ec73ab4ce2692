//! What only E2B's API has: requests of its SDKs that our own commands never make.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::State;

/// What a new sandbox may reach and who may reach it, in E2B's words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkConfig {
    /// Whether its ports other than the agent's serve anybody. If not, they ask for a token.
    pub allow_public_traffic: Option<bool>,
    /// Addresses, networks and domains that it may reach although [`deny_out`](Self::deny_out) says otherwise.
    #[serde(deserialize_with = "super::nullable")]
    pub allow_out: Vec<String>,
    /// Addresses and networks that it may not reach.
    #[serde(deserialize_with = "super::nullable")]
    pub deny_out: Vec<String>,
    /// Its name servers.
    #[serde(deserialize_with = "super::nullable")]
    pub dns_servers: Vec<String>,
    /// What is done to its requests, by host.
    pub rules: Option<serde_json::Value>,
    /// What its requests go through.
    pub egress_proxy: Option<serde_json::Value>,
    /// The `Host` that its servers see.
    pub mask_request_host: Option<String>,
    /// Ports that speak TLS themselves.
    #[serde(deserialize_with = "super::nullable")]
    pub https_ports: Vec<u16>,
    /// Whether it reaches public addresses, where the network is replaced as a whole.
    #[serde(rename = "allow_internet_access")]
    pub allow_internet_access: Option<bool>,
}

impl NetworkConfig {
    /// The networks that are everything.
    pub const EVERYTHING: [&str; 2] = ["0.0.0.0/0", "::/0"];

    /// Whether nothing may be reached.
    #[must_use]
    pub fn denies_everything(&self) -> bool {
        self.deny_out
            .iter()
            .any(|it| Self::EVERYTHING.contains(&it.as_str()))
    }

    /// Whether something in particular may not be reached.
    #[must_use]
    pub fn denies_something_else(&self) -> bool {
        self.deny_out
            .iter()
            .any(|it| !Self::EVERYTHING.contains(&it.as_str()))
    }

    /// Whether public addresses are reached, if this says so.
    #[must_use]
    pub fn internet(&self) -> Option<bool> {
        match self.denies_everything() {
            true => Some(false),
            false => self.allow_internet_access,
        }
    }
}

/// Connects to a sandbox, which is resumed for that if it is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ConnectRequest {
    /// For how many seconds it runs at least, from now on.
    pub timeout: Option<i64>,
    /// Whether what its memory was goes on. If not, its disk is booted.
    pub memory: Option<bool>,
}

/// Makes a sandbox run longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RefreshRequest {
    /// For how many seconds it runs at least, from now on.
    pub duration: Option<i64>,
}

/// How to pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PauseRequest {
    /// Whether the memory is kept. If not, the sandbox is stopped.
    pub memory: Option<bool>,
}

/// How much of a paused sandbox is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PauseMode {
    /// Memory and disk.
    Full,
    /// The disk.
    Filesystem,
}

/// A snapshot in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotInfo {
    /// What a sandbox is created from it by.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Its names, with their tags.
    pub names: Vec<String>,
}

/// What happened to a sandbox, a line of its log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogEntry {
    /// When.
    pub timestamp: Timestamp,
    /// What, for people.
    pub message: String,
    /// `info`, `warn`, `error`.
    pub level: String,
    /// What, for programs.
    pub fields: std::collections::BTreeMap<String, String>,
}

/// What happened to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Logs {
    /// In the order that was asked for.
    pub logs: Vec<LogEntry>,
}

/// Which sandboxes a list has, in which order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxQuery {
    /// Labels that each has.
    pub metadata: Vec<(String, String)>,
    /// The states that each is in one of.
    pub states: Vec<State>,
    /// Created after this.
    pub started_after: Option<Timestamp>,
    /// The template that each was created from.
    pub template: Option<String>,
    /// The oldest first.
    pub ascending: bool,
}

/// What a name leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateAlias {
    /// The template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Whether others may use it.
    pub public: bool,
}
