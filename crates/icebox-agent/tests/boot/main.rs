//! Real guests: the agent as process 1 under QEMU, with Debian's kernel and no acceleration.
//!
//! Needs QEMU, and on the first run the distribution's package archive for a kernel and an image (see the fixture of
//! `icebox-host`). A guest takes a few seconds to boot; so one test looks at several things.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

mod failures;
mod guest;
mod power;
mod running;
