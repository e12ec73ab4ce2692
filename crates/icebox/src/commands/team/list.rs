//! `icebox team ls`

use std::process::ExitCode;

use icebox_api::types::Team;

use super::{Context, Ended, limits};
use crate::output::Table;

/// List teams, with what each has of what it may have.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print names only.
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let teams = context.client.teams().await?;
    if context.output.is_json() {
        context.output.document(&teams)?;
    } else if args.quiet {
        for team in teams {
            context.output.line(team.name)?;
        }
    } else {
        print(&teams)?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn print(teams: &[Team]) -> std::io::Result<()> {
    let mut table = Table::new(&[
        "NAME",
        "SANDBOXES",
        "RUNNING",
        "CPUS",
        "MEMORY",
        "DISK",
        "KEYS",
    ]);
    for team in teams {
        let cells = limits::cells(team).into_iter();
        let name = std::iter::once(team.name.clone());
        table.row(name.chain(cells).chain([team.keys.to_string()]));
    }
    table.print(true)
}
