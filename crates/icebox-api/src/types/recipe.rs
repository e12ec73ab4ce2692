//! Templates that are built by steps in a sandbox: E2B's third version of builds.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A template that is to be built.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewRecipe {
    /// Its name, which may have a tag: `name:tag`.
    pub name: String,
    /// More tags of what is built.
    #[serde(default)]
    pub tags: Option<Vec<String>>,
    /// Virtual CPUs. Absent: those of what it is made from.
    #[serde(default)]
    pub cpu_count: Option<i64>,
    /// Memory in MiB, likewise.
    #[serde(rename = "memoryMB", default)]
    pub memory_mb: Option<i64>,
}

/// A build that waits for its steps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RequestedBuild {
    /// The template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The build, a UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Whether others may use it.
    pub public: bool,
    /// The template's names.
    pub names: Vec<String>,
    /// The tags of what is built.
    pub tags: Vec<String>,
    /// The same as the names; the word that older clients know.
    pub aliases: Vec<String>,
}

/// What a build is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StartBuild {
    /// The image to begin with: there has to be a template of that name.
    pub from_image: Option<String>,
    /// The template to begin with.
    pub from_template: Option<String>,
    /// How to get into the registry that the image is in, which nothing is taken from here.
    pub from_image_registry: Option<serde_json::Value>,
    /// What to do, in order.
    #[serde(deserialize_with = "super::nullable")]
    pub steps: Vec<BuildStep>,
    /// What runs in every sandbox that is made from the template.
    pub start_cmd: Option<String>,
    /// What succeeds once that is ready.
    pub ready_cmd: Option<String>,
}

/// One thing that a build does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildStep {
    /// `COPY`, `RUN`, `ENV`, `WORKDIR` or `USER`.
    #[serde(rename = "type")]
    pub kind: String,
    /// To what, with what.
    #[serde(default)]
    pub args: Vec<String>,
    /// The archive that `COPY` takes its files from.
    #[serde(default)]
    pub files_hash: Option<String>,
}

/// Where to put an archive that a build needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FilesUpload {
    /// Whether it is there already.
    pub present: bool,
    /// Where it is to be `PUT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BuildState {
    /// It has not been told what to do.
    Waiting,
    /// It does it.
    Building,
    /// The template is there.
    Ready,
    /// It failed.
    Error,
}

/// A line of a build's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuildLogEntry {
    /// When it was written.
    pub timestamp: Timestamp,
    /// What it says.
    pub message: String,
    /// `debug`, `info`, `warn`, `error`.
    pub level: String,
    /// What it is about: the number of a step, `base` or `finalize`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuildReason {
    /// For people.
    pub message: String,
    /// At what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// How a build goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BuildStatus {
    /// Always empty: the lines are in [`log_entries`](Self::log_entries).
    pub logs: Vec<String>,
    /// The lines from the one that was asked for on.
    pub log_entries: Vec<BuildLogEntry>,
    /// The template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The build.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: BuildState,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<BuildReason>,
}

/// A tag of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateTag {
    /// The tag.
    pub tag: String,
    /// The build that it leads to.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Since when.
    pub created_at: Timestamp,
}

/// Gives tags to what another tag leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AssignTags {
    /// `name:tag`; without a tag the default one.
    pub target: String,
    /// The tags.
    pub tags: Vec<String>,
}

/// Tags that were given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AssignedTags {
    /// All of them.
    pub tags: Vec<String>,
    /// The build that they lead to.
    #[serde(rename = "buildID")]
    pub build_id: String,
}

/// Takes tags from a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoveTags {
    /// The template's name.
    pub name: String,
    /// The tags.
    pub tags: Vec<String>,
}
