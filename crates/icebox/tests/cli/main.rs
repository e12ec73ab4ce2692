//! The command line as its users meet it: the real binary against a daemon with a simulated host. What it prints on
//! stdout and stderr and the code it exits with are compared with what is written beside the tests.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

mod contract;
mod copy;
mod daemon;
mod dashboard;
mod document;
mod edge;
mod exec;
mod large;
mod lifecycle;
mod offline;
mod pipes;
mod refusals;
mod secrets;
mod support;
mod teams;
mod time;
mod tls;
