//! What everything occupies. All sizes are allocated bytes, not the lengths of sparse files (INV-27).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One object that a sandbox or template needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// What it is, in words: `layer l…`.
    pub object: String,
    /// Its allocated bytes.
    pub allocated_bytes: u64,
    /// Who else needs it: `sandbox web`, `template python`. Empty: it goes with what this is a part of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_with: Vec<String>,
}

/// A place where data are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// In words: `the file system of /var/lib/icebox`.
    pub place: String,
    /// All of it.
    pub total_bytes: u64,
    /// What can still be written, whoever uses the rest.
    pub free_bytes: u64,
    /// With less than this free, nothing new begins.
    pub keep_free_bytes: u64,
}

/// All objects of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Kind {
    /// `bases`, `layers`, `memories`, `sandboxes` (their heads and directories), `templates`.
    pub kind: String,
    /// How many there are.
    pub count: usize,
    /// What they occupy together.
    pub allocated_bytes: u64,
}

/// A sandbox or template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// Its id.
    pub id: String,
    /// What people call it: `sandbox web`, `template python`.
    pub name: String,
    /// What nothing else needs: removing it gives so much back.
    pub allocated_bytes: u64,
    /// What it needs and others need, too.
    pub shared_bytes: u64,
}

/// What the whole installation occupies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Where data are kept, and how much room is there.
    pub places: Vec<Place>,
    /// Objects by kind.
    pub kinds: Vec<Kind>,
    /// Sandboxes and templates.
    pub owners: Vec<Owner>,
    /// Of objects that nothing needs: the next collection removes them.
    pub unneeded_bytes: u64,
}
