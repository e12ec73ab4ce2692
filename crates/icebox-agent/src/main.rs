//! The guest agent: process 1 of every sandbox, and the server that runs commands and serves files.
//!
//! One static binary with four roles, so that a guest carries it once and any root filesystem will do:
//!
//! ```text
//! kernel ─► boot            /init of the initramfs: modules, root filesystem, switch root
//!             └─► supervise process 1 in the new root: reaps orphans, restarts the server, powers off
//!                   └─► serve    HTTP on port 49983: processes, files, the host's control calls
//!                         └─► launch    one per command: becomes the user, then the program
//! ```
//!
//! Process 1 waits for any child, the server only for its own: so an orphan is always reaped, and no exit status is
//! ever taken from under the server. `launch` is a process of its own, not code between fork and exec: it may do
//! what it likes to become the user, and reports over a pipe what went wrong.
//!
//! Nothing here asks the C library for users, groups or host names: those calls load shared objects of the root
//! filesystem, which need not have any that fit.

mod cgroup;
mod init;
mod launch;
mod netlink;
mod server;
mod sys;
mod users;

use std::{error::Error, ffi::OsString, fmt::Write as _, process::ExitCode};

/// This program, wherever it was started from and whether or not its file still has a name.
const THIS_PROGRAM: &str = "/proc/self/exe";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let role = args.next().unwrap_or_default();
    let rest: Vec<OsString> = args.collect();
    match role.to_str() {
        Some(init::SUPERVISE_ROLE) => init::supervise(),
        Some(launch::ROLE) => launch::run(&rest),
        Some(server::ROLE) => {
            server::run(&rest).map_or_else(|error| failure(error.as_ref()), |()| ExitCode::SUCCESS)
        }
        _ if rustix::process::getpid().is_init() => init::boot(),
        _ => {
            eprintln!(
                "icebox-agent runs inside a sandbox; outside of one only `icebox-agent serve` makes sense"
            );
            eprintln!("usage: {}", server::USAGE);
            ExitCode::from(2)
        }
    }
}

fn failure(error: &(dyn Error + 'static)) -> ExitCode {
    eprintln!("icebox-agent: {}", chain(error));
    ExitCode::FAILURE
}

/// An error and its causes, in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        if write!(text, ": {error}").is_err() {
            break;
        }
        cause = error.source();
    }
    text
}
