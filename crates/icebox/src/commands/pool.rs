//! `icebox pool`: an XFS in a file as the data directory. Works on this machine itself, without a daemon.

mod create;
mod list;
mod remove;

use std::path::{Path, PathBuf};

use icebox_engine::host::HostError;
use icebox_host::pool::{FSTAB, Pool};

use super::Ended;
use crate::failure::Failure;
use crate::output::Output;
use crate::serve::{Settings, data_directory};

/// Make, show and remove a pool: an XFS in a file, mounted as the data directory, where the reflink driver works whatever
/// the host's own file system is.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    #[command(visible_alias = "destroy")]
    Rm(remove::Args),
}

/// Which pool.
#[derive(Debug, clap::Args)]
struct Place {
    #[command(flatten)]
    settings: Settings,

    /// The file that holds the pool [default: the data directory's name with .xfs, beside it].
    #[arg(long, value_name = "FILE")]
    path: Option<PathBuf>,

    /// The table of mounts at boot, for preparing another machine's file system.
    #[arg(long, hide = true, value_name = "FILE", default_value = FSTAB)]
    fstab: PathBuf,
}

impl Place {
    fn pool(&self) -> Result<Pool, Failure> {
        let data = data_directory(&self.settings)?;
        let mut pool = Pool::of(&data, &self.fstab).map_err(|error| failed(&error))?;
        if let Some(path) = &self.path {
            pool.image = absolute(path)?;
        }
        Ok(pool)
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::because(format!("cannot use path {}", path.display()), &error))
}

fn failed(error: &HostError) -> Failure {
    let failure = Failure::of(error);
    match error.hint_text() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

pub(crate) fn run(command: &Command, output: Output) -> Ended {
    match command {
        Command::Create(args) => create::run(args, output),
        Command::Ls(args) => list::run(args, output),
        Command::Rm(args) => remove::run(args, output),
    }
}
