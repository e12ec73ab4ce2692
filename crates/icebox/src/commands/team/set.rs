//! `icebox team set`

use std::process::ExitCode;

use super::limits::Limits;
use super::{Context, Ended, list};
use crate::commands::reference;

/// Change what a team may have. What it has is not affected.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which team.
    #[arg(value_name = "NAME", value_parser = reference)]
    name: String,

    #[command(flatten)]
    limits: Limits,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let change = args.limits.change();
    let team = context.client.change_team(&args.name, &change).await?;
    if context.output.is_json() {
        context.output.document(&team)?;
    } else {
        list::print(&[team])?;
    }
    Ok(ExitCode::SUCCESS)
}
