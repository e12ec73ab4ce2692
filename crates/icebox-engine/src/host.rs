//! What the engine asks of the host: nine small traits and the error they share.
//!
//! `icebox-host` implements them on Linux, `icebox-sim` in memory; the engine knows no third way
//! to touch anything. Three rules hold for every method here:
//!
//! - **Names derive from ids.** Whatever a method makes can be found again, and removed, by a process
//!   that knows only the sandbox's manifest. No method returns a handle that is needed to undo it.
//! - **`ensure_*` and `release` are idempotent.** They describe the state on return, not the change.
//!   `release` means *ensure absent*, and retries what is transient (busy) itself, within a bound.
//! - **Every wait is bounded by the implementation.** The engine adds its own deadline around calls that
//!   talk to a VMM or a guest, since those may be wedged or hostile.

mod boxes;
mod clock;
mod error;
mod guest;
mod journal;
mod kernels;
mod network;
mod store;
mod vmm;
mod volume;

use std::sync::Arc;

pub use boxes::{Boxes, Limits, LimitsInForce};
pub use clock::{Clock, SystemClock};
pub use error::{ErrorKind, HostError};
pub use guest::{Guest, GuestAddress, GuestOrigin, Secret, Welcome};
pub use journal::{Journal, Kept};
pub use kernels::{BootFiles, Kernels};
pub use network::{Egress, Network, SlotNetwork};
pub use store::{Space, Store, StoredDocument};
pub use vmm::{
    Capabilities, Counters, CpuFeatures, DiskSwitch, ExitReason, LaunchPlan, Machine, MemorySource,
    Meter, ProcessIdentity, Save, SavePlan, SavedMemory, SavedPages, Start, VcpuState, Vmm,
    VmmIdentity,
};
pub use volume::{
    BlockDevice, Chain, FreezeByHost, LiveFreeze, MergeLayers, Trouble, VolumeDriver, Watch,
    WatchHeads,
};

/// Whether `ensure_*` had to do anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ensured {
    /// It did not exist.
    Created,
    /// It was there already, and is what was asked for.
    AlreadyPresent,
}

/// Whether `release` or `remove` had to do anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It existed.
    Removed,
    /// It was absent already.
    AlreadyAbsent,
}

/// Everything outside the engine, as one value.
#[derive(Clone)]
pub struct Host {
    /// Durable documents and object directories.
    pub store: Arc<dyn Store>,
    /// Volume drivers, in order of preference: the first that works is the default.
    pub volumes: Vec<Arc<dyn VolumeDriver>>,
    /// VMMs, in order of preference.
    pub vmms: Vec<Arc<dyn Vmm>>,
    /// What happened, and what was used.
    pub journal: Arc<dyn Journal>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// Network slots.
    pub network: Arc<dyn Network>,
    /// Boxes: limits and runtime directories of VMMs.
    pub boxes: Arc<dyn Boxes>,
    /// Kernels to boot.
    pub kernels: Arc<dyn Kernels>,
    /// The agents inside guests.
    pub guest: Arc<dyn Guest>,
}
