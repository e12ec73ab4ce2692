//! Lifetimes: when sandboxes end by themselves, and begin to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What becomes of a sandbox whose time is over. E2B's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// It is paused.
    Pause,
    /// It is destroyed.
    Kill,
    /// It is stopped: its disk is kept. Not E2B's word.
    Stop,
}

impl std::fmt::Display for OnTimeout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pause => "pause",
            Self::Kill => "kill",
            Self::Stop => "stop",
        })
    }
}

/// A time: whole seconds, or `"never"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Limit {
    /// So many seconds. Signed so that a negative number is refused by us, with words.
    Seconds(i64),
    /// For ever.
    Word(Never),
}

impl Limit {
    /// For ever.
    pub const NEVER: Self = Self::Word(Never::Never);
}

/// The word for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Never {
    /// `never`
    Never,
}

/// Whether a request for a paused sandbox resumes it, as E2B writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AutoResume {
    /// Whether it does.
    #[serde(default)]
    pub enabled: bool,
}

/// What to change of a sandbox's lifetime. What is absent stays; times that are given begin anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChangeLifetime {
    /// How long the sandbox runs, from now and from each later start or resume on, whatever happens in it. E2B's time-out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Limit>,
    /// After how long without any activity it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Limit>,
    /// What becomes of it then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// Whether a request for it resumes it when it is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_resume: Option<AutoResume>,
}

/// A sandbox's lifetime, in E2B's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lifecycle {
    /// Whether a request for it resumes it when it is paused.
    pub auto_resume: bool,
    /// What becomes of it when its time is over.
    pub on_timeout: OnTimeout,
    /// How many seconds it runs, whatever happens in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// After how many seconds without any activity it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<u64>,
}

/// What a drain did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrainReport {
    /// The sandboxes that were paused, by name or else id.
    pub paused: Vec<String>,
    /// Those that could not be, and run on.
    pub failed: Vec<NotDrained>,
}

/// A sandbox that runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NotDrained {
    /// Its name, or else its id.
    pub sandbox: String,
    /// Why.
    pub error: crate::ErrorBody,
}
