//! The server role as an ordinary process on the loopback interface, spoken to with the host's own client.
//!
//! The machine is not a sandbox, and the server is told so (`--outside`): it changes neither clock nor name. What
//! only a guest can show is tested in one, see `boot.rs`.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

mod auth;
mod damaged;
mod files;
mod filesystem;
mod process;
mod support;
