//! Events: what happened to sandboxes, in order.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One event. Numbers have no holes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Its place in the order.
    pub sequence: u64,
    /// When.
    pub time: Timestamp,
    /// What: `created`, `paused`, `vmm-exited`…
    pub event: String,
    /// To which sandbox.
    #[serde(rename = "sandboxID", default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// More about it. Never tokens, keys or environment values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, String>,
}
