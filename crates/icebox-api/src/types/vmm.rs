//! VMMs: what can run sandboxes here.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a VMM can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmmAbilities {
    /// A guest that was saved can run on: snapshots, forks and checkpoints of running sandboxes.
    pub live_save: bool,
    /// A save costs what changed since the restore, not all memory.
    pub differential_save: bool,
    /// A restored guest runs before its memory has been read.
    pub lazy_restore: bool,
    /// It can put a running guest on another disk, as some volume drivers need.
    pub disk_switch: bool,
    /// A running guest can be given more or less memory, or more or fewer CPUs.
    pub resize: bool,
    /// The most virtual CPUs of a guest.
    pub max_vcpus: u8,
}

/// A VMM that runs sandboxes here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostVmm {
    /// What to ask for when a sandbox is created: `qemu`, `cloud-hypervisor`, `firecracker`.
    pub name: String,
    /// Whether it runs sandboxes that ask for none.
    pub default: bool,
    /// Its version. What was saved by one version is not restored by another.
    pub version: String,
    /// The machine that guests see, as far as a saved state depends on it.
    pub machine: String,
    /// The CPU model that guests see.
    pub cpu: String,
    /// The features of that CPU that depend on the host: what was saved is restored where all that its guest has are there.
    pub cpu_features: Vec<String>,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why that accelerator.
    pub accelerator_reason: String,
    /// What it can do.
    pub abilities: VmmAbilities,
}
