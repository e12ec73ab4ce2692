//! Events: what happened to sandboxes, in order.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One event. Numbers have no holes, and go on across restarts of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Its place in the order.
    pub sequence: u64,
    /// When.
    pub time: Timestamp,
    /// What: `sandbox.paused`, `template.created`, `stray.removed`… `events.missed` stands for older ones that are no
    /// longer kept.
    pub event: String,
    /// To which sandbox.
    #[serde(rename = "sandboxID", default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// More about it, for people. Never tokens, keys or environment values.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// How long each step of a verb took, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepTime>,
}

/// How long one step of a verb took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StepTime {
    /// The step.
    pub step: String,
    /// Its time in microseconds.
    pub micros: u64,
}
