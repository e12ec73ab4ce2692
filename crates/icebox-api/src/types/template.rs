//! Templates.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What creating from it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateKind {
    /// A disk: sandboxes boot from it.
    Image,
    /// Disk, memory and device state: sandboxes are restored from it.
    Snapshot,
}

impl std::fmt::Display for TemplateKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Image => "image",
            Self::Snapshot => "snapshot",
        })
    }
}

/// An immutable thing to create sandboxes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Its id.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Its names within its team.
    pub names: Vec<String>,
    /// Whose it is.
    pub team: String,
    /// Whether every team may create sandboxes from it.
    pub public: bool,
    /// Image or snapshot.
    pub kind: TemplateKind,
    /// When it was made.
    pub created_at: Timestamp,
    /// Virtual CPUs: of a snapshot what it has, of an image the default.
    pub cpu_count: u8,
    /// Guest memory in MiB, likewise.
    #[serde(rename = "memoryMB")]
    pub memory_mb: u32,
    /// The size of the disk that the guest sees, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mb: u64,
    /// The digest of an image template's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The digest of the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// What a snapshot needs in order to be restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<super::Vmm>,
    /// The sandbox that a snapshot is of.
    #[serde(rename = "sandboxID", default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Allocated bytes of what nothing else needs: removing the template gives so much back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    /// Allocated bytes of what it needs and others need, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_bytes: Option<u64>,
    /// What these are made of: a base, or a memory and layers down to one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<super::Part>,
    /// How many sandboxes made from it are to wait for somebody to create one.
    #[serde(default)]
    pub warm: u16,
    /// How many do.
    #[serde(default)]
    pub waiting: usize,
    /// Why nothing can be created from it, if so: what is missing or cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
    /// In words, where it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
}

/// How many sandboxes made from a template are to wait for somebody to create one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Warm {
    /// That; none with 0.
    pub count: u16,
}
