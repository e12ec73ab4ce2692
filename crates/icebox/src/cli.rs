//! The command line's grammar.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::commands::reference;
use crate::commands::{
    attach, audit, ca, checkpoint, completions, copy, create, destroy, doctor, drain, events, exec,
    flatten, fork, gc, history, inspect, kernel, key, list, logs, pause, pool, ps, resume,
    rollback, shell, snapshot, start, stats, stop, team, template, timeout, vmm,
};
use crate::serve;

/// Where the daemon listens unless told otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/run/icebox/icebox.sock";

/// Where help lists the options that every command has: below the command's own.
const LAST: usize = 900;

/// Run untrusted code in microVM sandboxes, and freeze them.
#[derive(Debug, Parser)]
#[command(
    name = "icebox",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = "\
Sandboxes and templates are named by name, id or any unique prefix of an id.

Exit codes: 0 done, 1 failed, 2 not understood; `exec` passes on the guest's own, and has 125 for a failure of ours, \
126 and 127 for a program that is not executable or not there, 128+n for one ended by signal n.")]
pub(crate) struct Cli {
    /// The daemon's socket [default: /run/icebox/icebox.sock].
    #[arg(
        long,
        global = true,
        env = "ICEBOX_SOCKET",
        value_name = "PATH",
        hide_env_values = true,
        display_order = LAST
    )]
    pub(crate) socket: Option<PathBuf>,

    /// Act for this team: see what it sees, and make what is its own.
    #[arg(
        long,
        global = true,
        env = "ICEBOX_TEAM",
        value_name = "TEAM",
        value_parser = reference,
        hide_env_values = true,
        display_order = LAST
    )]
    pub(crate) team: Option<String>,

    /// Print JSON: one document per line on stdout, and errors as JSON on stderr.
    #[arg(long, global = true, display_order = LAST)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(serve::Args),
    #[command(flatten)]
    Client(ClientCommand),
    #[command(subcommand)]
    Pool(pool::Command),
    Ca(ca::Args),
    Completions(completions::Args),
}

/// What talks to a daemon.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    Create(create::Args),
    Exec(exec::Args),
    Attach(attach::Args),
    Ps(ps::Args),
    Shell(shell::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    Inspect(inspect::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Stop(stop::Args),
    Start(start::Args),
    Checkpoint(checkpoint::Args),
    History(history::Args),
    Rollback(rollback::Args),
    Timeout(timeout::Args),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Flatten(flatten::Args),
    #[command(visible_alias = "destroy")]
    Rm(destroy::Args),
    Cp(copy::Args),
    Logs(logs::Args),
    Stats(stats::Args),
    Events(events::Args),
    #[command(subcommand)]
    Template(template::Command),
    #[command(subcommand)]
    Kernel(kernel::Command),
    #[command(subcommand)]
    Vmm(vmm::Command),
    #[command(subcommand)]
    Team(team::Command),
    #[command(subcommand)]
    Key(key::Command),
    Audit(audit::Args),
    Doctor(doctor::Args),
    Gc(gc::Args),
    Drain(drain::Args),
}
