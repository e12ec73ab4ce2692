//! Building templates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Template;
use crate::ErrorBody;

/// Where a root filesystem comes from. Paths are the daemon's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum BuildSource {
    /// A Debian suite, from packages.
    #[serde(rename_all = "camelCase")]
    Debian {
        /// `bookworm`, `trixie`.
        suite: String,
        /// Packages beside the essential ones.
        #[serde(default)]
        include: Vec<String>,
    },
    /// A tar archive of a root filesystem.
    Tar(String),
    /// A directory that holds a root filesystem.
    Directory(String),
    /// A raw ext4 image.
    Image(String),
}

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewBuild {
    /// The template's name. Never overwrites one.
    pub name: String,
    /// What the root filesystem is made from.
    pub source: BuildSource,
    /// The size of the disk in MiB. Absent: the daemon's default, or the image's own.
    #[serde(
        rename = "diskSizeMB",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub disk_size_mb: Option<i64>,
    /// Virtual CPUs of sandboxes created from it, unless they say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<i64>,
    /// Guest memory in MiB of sandboxes created from it, unless they say otherwise.
    #[serde(rename = "memoryMB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<i64>,
    /// A shell command that is started once; its running state is kept: the template becomes a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_cmd: Option<String>,
    /// A shell command that succeeds once the start command is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_cmd: Option<String>,
    /// With a start command: the VMM that it runs on, and so sandboxes created from the template. Absent: the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
}

/// One line of a build's response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", tag = "event")]
pub enum BuildEvent {
    /// A new stage began.
    Stage {
        /// What it does, for people.
        name: String,
    },
    /// How far the stage is.
    Progress {
        /// Units done.
        done: u64,
        /// Of how many, if known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
        /// Whether the units are bytes.
        #[serde(default)]
        bytes: bool,
    },
    /// Something worth telling.
    Message {
        /// What.
        text: String,
    },
    /// The last line: the template exists.
    Done {
        /// It.
        template: Box<Template>,
    },
    /// The last line: nothing was made.
    Error {
        /// Why.
        error: ErrorBody,
    },
}
