//! Removing what nothing reaches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GcRequest {
    /// Only tell.
    #[serde(default)]
    pub dry_run: bool,
}

/// One thing that nothing reaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Garbage {
    /// What it is, in words: `layer l…`.
    pub object: String,
    /// Its allocated bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
}

/// What was removed, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GcReport {
    /// Whether it only tells.
    pub dry_run: bool,
    /// The things.
    pub garbage: Vec<Garbage>,
}
