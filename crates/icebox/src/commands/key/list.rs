//! `icebox key ls`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::output::{NONE, Table, age};

/// List API keys.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let keys = context.client.keys().await?;
    if context.output.is_json() {
        context.output.document(&keys)?;
    } else if args.quiet {
        for key in keys {
            context.output.line(key.id)?;
        }
    } else {
        let mut table = Table::new(&["ID", "NAME", "TEAM", "KEY", "AGE", "USED"]);
        for key in keys {
            table.row([
                key.id,
                key.name,
                key.team,
                key.mask,
                age(key.created_at),
                key.last_used.map_or_else(|| NONE.to_owned(), age),
            ]);
        }
        table.print(true)?;
    }
    Ok(ExitCode::SUCCESS)
}
