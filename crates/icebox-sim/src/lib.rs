//! The engine's driver traits in memory, and faults by index around any implementation of them.
//!
//! Two things, usable apart:
//!
//! - [`World`] is a host that exists in memory: disks, memories, VMMs, networks, a store. Its guests are honest
//!   enough to catch a lifecycle that is not: each one writes the same number to its memory and to its disk at every
//!   call of the host, so a capture that is not one instant shows ([`World::check`]).
//! - [`fault::inject`] wraps any [`Host`](icebox_engine::host::Host) and, at the n-th call, fails, crashes or lets
//!   the client go, before or after the effect.
//!
//! The world outlives the engine: dropping the runtime that an engine runs in, and opening another one on the same
//! world, is `kill -9` of the daemon and a new start.

mod clock;
pub mod fault;
mod guest;
mod journal;
mod net;
mod store;
mod vmm;
mod volume;
mod world;

pub use volume::FreezeBy;
pub use world::{Vcpus, World};
