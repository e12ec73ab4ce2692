//! `icebox pool rm`

use std::process::ExitCode;

use icebox_engine::host::Removed;

use super::{Ended, Place, failed};
use crate::failure::Failure;
use crate::output::Output;

/// Unmount the pool of the data directory and delete it, with its line in /etc/fstab.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,

    /// Also with sandboxes and templates in it, which are lost.
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args, output: Output) -> Ended {
    let pool = args.place.pool()?;
    match pool.remove(args.force).map_err(|error| failed(&error))? {
        Removed::Removed => output.say(format!("removed {}", pool.image.display())),
        Removed::AlreadyAbsent => {
            let message = format!("{} has no pool", pool.data.display());
            return Err(Failure::new(message).hint("`icebox pool ls` shows one"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
