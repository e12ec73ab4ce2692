//! The QEMU driver with real guests: Debian under TCG or KVM, in real boxes, on real networks and disks.
//!
//! Each test ends with a check that nothing is left on the host. They need root, and fail without.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod capture;
mod confinement;
mod devices;
mod endings;
mod lab;
mod switching;
