//! Process 1: from the kernel's first program to a guest that serves.
//!
//! [`boot`] runs as `/init` of the initramfs and ends by becoming [`supervise`] in the real root. A boot that fails
//! says why in one line on the console and powers the machine off: whoever started it learns of it at once.

mod boot;
mod initctl;
mod network;
mod parameters;
mod power;
mod supervise;

use std::{error::Error, process::ExitCode};

pub(crate) use parameters::KernelParameters;

use crate::chain;

/// Name of the role that process 1 takes on in the real root.
pub(crate) const SUPERVISE_ROLE: &str = "supervise";

/// Runs as the first program of the kernel. Does not return unless even powering off fails.
pub(crate) fn boot() -> ExitCode {
    match boot::run() {
        Err(error) => abandon("boot", error.as_ref()),
    }
}

/// Runs as process 1 in the real root. Does not return unless even powering off fails.
pub(crate) fn supervise() -> ExitCode {
    match supervise::run() {
        Err(error) => abandon("supervise", error.as_ref()),
    }
}

fn abandon(stage: &str, error: &(dyn Error + 'static)) -> ExitCode {
    eprintln!("icebox: {stage} failed: {}", chain(error));
    power::off_now();
    ExitCode::FAILURE
}
