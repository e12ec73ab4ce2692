//! What works on this host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// It works.
    Works,
    /// It does not, and something else serves instead or it is optional.
    Absent,
    /// It does not, and sandboxes need it.
    Fails,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What.
    pub name: String,
    /// How it came out.
    pub result: CheckResult,
    /// What was found, or why it does not work.
    pub detail: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// All checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// In the order to read them.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether sandboxes can run here.
    #[must_use]
    pub fn healthy(&self) -> bool {
        self.checks
            .iter()
            .all(|check| check.result != CheckResult::Fails)
    }
}
