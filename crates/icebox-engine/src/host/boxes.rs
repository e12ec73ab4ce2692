//! Boxes: what confines one VMM before it starts, and finds it again afterwards.
//!
//! A box is a cgroup with limits, a uid and a runtime directory. The mount namespace with the constant paths
//! belongs to the VMM's process (its launcher makes it) and goes with it, so it needs no undoing.

use async_trait::async_trait;

use super::{HostError, Removed};
use crate::id::{SandboxId, Slot};
use crate::unit::Geometry;

/// What a box is limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// CPU and memory of the guest; the implementation adds the VMM's own overhead.
    pub geometry: Geometry,
    /// The most processes and threads in the box.
    pub pids_max: u32,
}

/// Which limits the host enforces, in words for `inspect` and `doctor`: a promise not kept is said (promise 7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsInForce {
    /// `cgroup v2`, `cgroup v1` or `none`.
    pub mechanism: String,
    /// What is enforced, or why nothing is.
    pub detail: String,
}

/// Makes and removes boxes.
#[async_trait]
pub trait Boxes: Send + Sync {
    /// Makes the box, or finds it made, with exactly these limits. `slot` decides the uid.
    async fn ensure(
        &self,
        sandbox: &SandboxId,
        slot: Slot,
        limits: Limits,
    ) -> Result<(), HostError>;

    /// Removes the box. Its VMM is gone already; what else is left in it is an error, not killed silently.
    async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError>;

    /// Boxes that exist on the host, held or not: what the sweep compares.
    async fn list(&self) -> Result<Vec<SandboxId>, HostError>;

    /// What this host enforces.
    fn limits_in_force(&self) -> LimitsInForce;
}
