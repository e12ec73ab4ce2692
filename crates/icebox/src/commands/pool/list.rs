//! `icebox pool ls`

use std::process::ExitCode;

use icebox_host::pool::Pool;

use super::{Ended, Place, failed};
use crate::failure::Failure;
use crate::output::{NONE, Output, Table, bytes};

/// Show the pool of the data directory, if there is one.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
}

pub(super) fn run(args: &Args, output: Output) -> Ended {
    show(&args.place.pool()?, output)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn show(pool: &Pool, output: Output) -> Result<(), Failure> {
    let status = pool.status().map_err(|error| failed(&error))?;
    if output.is_json() {
        let document = status.map(|it| {
            serde_json::json!({
                "path": pool.image,
                "sizeBytes": it.size.0,
                "allocatedBytes": it.allocated.0,
                "mountedOn": it.mounted.is_some().then_some(&pool.data),
                "freeBytes": it.mounted.as_ref().map(|space| space.available.0),
                "atBoot": it.at_boot,
            })
        });
        output.document(&document.into_iter().collect::<Vec<_>>())?;
        return Ok(());
    }
    let header = ["PATH", "SIZE", "ALLOCATED", "MOUNTED ON", "FREE", "AT BOOT"];
    let mut table = Table::new(&header);
    if let Some(it) = status {
        let mounted = it.mounted.as_ref();
        table.row([
            pool.image.display().to_string(),
            bytes(it.size.0),
            bytes(it.allocated.0),
            mounted.map_or_else(|| NONE.to_owned(), |_| pool.data.display().to_string()),
            mounted.map_or_else(|| NONE.to_owned(), |space| bytes(space.available.0)),
            if it.at_boot { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table.print(true)?;
    Ok(())
}
