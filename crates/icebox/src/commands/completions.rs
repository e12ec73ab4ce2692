//! `icebox completions`

use std::io;
use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Ended;
use crate::cli::Cli;

/// Print a shell's completion script.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which shell.
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> Ended {
    clap_complete::generate(
        args.shell,
        &mut Cli::command(),
        "icebox",
        &mut io::stdout().lock(),
    );
    Ok(ExitCode::SUCCESS)
}
