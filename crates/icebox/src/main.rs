//! The icebox command: the daemon and its command line.
//!
//! Every command but `serve` is a client of a daemon's Unix socket. What a command prints on stdout is data, what it
//! prints on stderr is for people; [`failure`] has the exit codes.

mod cli;
mod commands;
mod duration;
mod failure;
mod output;
mod serve;
mod terminal;
mod worker;

use std::process::ExitCode;

use clap::Parser as _;

use cli::Cli;
use icebox_host::launcher::{LAUNCHER_ARGUMENT, launcher_main};

fn main() -> ExitCode {
    // What the daemon starts itself as is no part of the command line that users meet: a worker, or a launcher, which
    // becomes a VMM and does nothing else before that.
    let role = std::env::args_os().nth(1);
    if role.as_ref().is_some_and(|role| role == worker::ARGUMENT) {
        return worker::run();
    }
    if role.is_some_and(|role| role == LAUNCHER_ARGUMENT) {
        launcher_main();
    }
    let cli = Cli::parse();
    let output = output::Output::new(cli.json);
    match commands::run(cli, output) {
        Ok(code) => code,
        Err(failure) => {
            if !failure.is_quiet() {
                output.failure(&failure);
            }
            failure.exit_code()
        }
    }
}
