//! The sandbox: phases, verbs, holds, manifests and the driver traits.
//!
//! A sandbox is a stack of *holds* on the host, and its manifest is that stack. A hold is written down before it is
//! taken and erased after it is given back, so a failed create, a stop, a destroy and crash recovery are one loop:
//! unwind to a watermark, newest first. This crate is that idea and what follows from it. It knows no HTTP and no
//! VMM by name, and touches the host only through the traits in [`host`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod host;
pub mod id;
pub mod layout;
pub mod unit;
