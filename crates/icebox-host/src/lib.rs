//! The engine's driver traits on Linux: VMMs, volumes, network slots, boxes, guests.
#![warn(missing_docs)]

mod blocking;
pub mod boxes;
pub mod cgroup;
pub mod database;
pub mod fs;
pub mod guest;
pub mod guest_image;
pub mod instance;
pub mod journal;
pub mod launcher;
pub mod network;
mod pace;
mod pager;
pub mod pool;
#[cfg(any(test, feature = "fixture"))]
pub mod skip;
pub mod store;
mod turns;
pub mod vmm;
pub mod volume;
