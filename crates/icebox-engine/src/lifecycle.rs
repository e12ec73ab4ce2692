//! The verbs. One file each, listing its steps in order; what several share has a file of its own.
//!
//! A verb either ends where it leads, or gives back what it took and ends where it began. Its commit point is one
//! durable write of the manifest: before it, recovery goes back; after it, recovery goes on.

mod capture;
mod checkpoint;
mod create;
mod destroy;
mod flatten;
mod forget;
mod fork;
mod freeze;
mod pause;
mod power;
mod recover;
mod resume;
mod retention;
mod rollback;
mod snapshot;
mod start;
mod stop;
mod take;

pub(crate) use create::Beginning;
pub(crate) use take::Taking;
