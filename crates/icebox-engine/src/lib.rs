//! The sandbox: phases, verbs, holds, manifests and the driver traits.
//!
//! A sandbox is a stack of *holds* on the host, and its manifest is that stack. A hold is written down before it is
//! taken and erased after it is given back, so a failed create, a stop, a destroy and crash recovery are one loop:
//! unwind to a watermark, newest first. This crate is that idea and what follows from it. It knows no HTTP and no
//! VMM by name, and touches the host only through the traits in [`host`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod catalog;
mod chores;
mod collect;
mod deadline;
mod engine;
mod error;
mod event;
mod gate;
pub mod host;
pub mod id;
pub mod layout;
mod ledger;
mod lifecycle;
mod lifetime;
pub mod manifest;
mod merge;
mod metrics;
mod panics;
mod phase;
mod sandbox;
mod silence;
mod space;
mod standstill;
mod steps;
mod team;
mod undone;
pub mod unit;
mod wake;
mod watch;

pub use collect::Plan;
pub use engine::{
    Config, CreateRequest, Defaults, Drained, Engine, History, ImageRequest, Part, PastBranch,
    PastGeneration, Route, SandboxView, Usage, Usages,
};
pub use error::Error;
pub use event::{Batch, Event, Events};
pub use gate::{Gate, Pass};
pub use lifetime::{LifetimeChange, Limit};
pub use metrics::{Resolution, Sample};
pub use phase::{Phase, Refusal, Step, Verb};
pub use sandbox::Outcome;
pub use steps::LastVerb;
pub use team::{Holdings, Quota, Scope};
