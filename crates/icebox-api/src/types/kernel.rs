//! Kernels.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ErrorBody;

/// Where a kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum KernelSource {
    /// The distribution's own package, downloaded and unpacked, never installed.
    Debian,
    /// A kernel image on the daemon's machine.
    #[serde(rename_all = "camelCase")]
    File {
        /// The image: `bzImage` or ELF.
        path: String,
        /// Its modules, if virtio and ext4 are not built in.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        modules: Option<String>,
    },
}

/// What to import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewKernel {
    /// From where.
    pub source: KernelSource,
}

/// An imported kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    /// Its digest.
    pub digest: String,
    /// Its version, as far as the import knew.
    pub version: String,
    /// Where it came from, in words.
    pub origin: String,
    /// Allocated bytes of the kernel and its modules.
    pub allocated_bytes: u64,
    /// Whether new templates use it.
    pub default: bool,
}

/// One line of an import's response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", tag = "event")]
pub enum KernelEvent {
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
    /// The last line: it is there.
    Done {
        /// It.
        kernel: Kernel,
    },
    /// The last line: nothing was imported.
    Error {
        /// Why.
        error: ErrorBody,
    },
}
