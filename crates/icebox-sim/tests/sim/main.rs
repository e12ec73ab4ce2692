//! The engine on a host in memory: its promises as stories, every verb with a fault at every step, and random verbs under
//! random faults. No disk, no guest, no clock but one that jumps.
//!
//! One program, since each would have the whole engine compiled into it once more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod chains;
mod crowd;
mod disks;
mod families;
mod history;
mod lifecycle;
mod lifetimes;
mod matrix;
mod model;
mod scene;
mod shares;
mod space;
mod stories;
mod support;
mod table;
mod teams;
mod undone;
mod vmms;
mod warm;
