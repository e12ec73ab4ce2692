//! The journal: what happened, and what was used, kept for whoever asks later.
//!
//! It decides nothing: a sandbox is what its manifest says. So it is written behind, and one that is lost costs history.

use async_trait::async_trait;

use super::HostError;
use crate::event::Event;
use crate::id::SandboxId;
use crate::metrics::Sample;

/// What a journal has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Events, in order.
    pub events: Vec<Event>,
    /// The number of the oldest event that is kept; 0 if none is.
    pub oldest: u64,
}

/// Keeps events and samples, within bounds of its own.
#[async_trait]
pub trait Journal: Send + Sync {
    /// The number of the newest event that was written, or 0. Of those before it, the older ones may be gone.
    async fn newest(&self) -> Result<u64, HostError>;

    /// Writes events, all or none: in order, and going on from the newest. A daemon that is killed afterwards has written
    /// them; a host that loses its power may lose the last ones.
    async fn append(&self, events: &[Event]) -> Result<(), HostError>;

    /// Up to `limit` events from number `from` on.
    async fn read(&self, from: u64, limit: usize) -> Result<Kept, HostError>;

    /// Writes samples, one of each sandbox at most.
    async fn append_samples(&self, samples: &[(SandboxId, Sample)]) -> Result<(), HostError>;

    /// A sandbox's samples from `since` on (seconds since 1970), oldest first.
    async fn samples(&self, sandbox: &SandboxId, since: u32) -> Result<Vec<Sample>, HostError>;

    /// Removes the samples of a sandbox that is no more.
    async fn forget_samples(&self, sandbox: &SandboxId) -> Result<(), HostError>;
}
