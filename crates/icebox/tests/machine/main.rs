//! The real daemon on this machine, as far as it takes no guest: what it refuses, and what it leaves when somebody goes
//! in the middle. Needs root, QEMU and what `scripts/setup` installs.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

#[path = "../../../icebox-host/tests/support/mounts.rs"]
mod mounts;
mod pool;
mod refusals;
mod support;
