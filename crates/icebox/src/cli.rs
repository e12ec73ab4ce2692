//! The command line's grammar.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::commands::{
    completions, create, destroy, doctor, events, flatten, fork, gc, inspect, kernel, list, logs,
    pause, resume, snapshot, start, stop, template,
};

/// Where the daemon listens unless told otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/run/icebox/icebox.sock";

/// Run untrusted code in microVM sandboxes, and freeze them.
#[derive(Debug, Parser)]
#[command(
    name = "icebox",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = "\
Sandboxes and templates are named by name, id or any unique prefix of either.

Exit codes: 0 done, 1 failed, 2 not understood; `exec` passes on the guest's own, and has 125 for a failure of ours, \
126 and 127 for a program that is not executable or not there, 128+n for one ended by signal n.")]
pub(crate) struct Cli {
    /// The daemon's socket.
    #[arg(
        long,
        global = true,
        env = "ICEBOX_SOCKET",
        value_name = "PATH",
        default_value = DEFAULT_SOCKET,
        hide_env_values = true
    )]
    pub(crate) socket: PathBuf,

    /// Print JSON: one document per line on stdout, and errors as JSON on stderr.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    Inspect(inspect::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Stop(stop::Args),
    Start(start::Args),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Flatten(flatten::Args),
    #[command(visible_alias = "destroy")]
    Rm(destroy::Args),
    Logs(logs::Args),
    Events(events::Args),
    #[command(subcommand)]
    Template(template::Command),
    #[command(subcommand)]
    Kernel(kernel::Command),
    Doctor(doctor::Args),
    Gc(gc::Args),
    Completions(completions::Args),
}
