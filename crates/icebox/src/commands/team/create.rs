//! `icebox team create`

use std::process::ExitCode;

use icebox_api::types::NewTeam;

use super::limits::Limits;
use super::{Context, Ended, list};

/// Make a team.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name, which it keeps.
    #[arg(value_name = "NAME")]
    name: String,

    #[command(flatten)]
    limits: Limits,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let new = NewTeam {
        name: args.name.clone(),
        limits: args.limits.of_new(),
    };
    let team = context.client.create_team(&new).await?;
    if context.output.is_json() {
        context.output.document(&team)?;
    } else {
        list::print(&[team])?;
    }
    Ok(ExitCode::SUCCESS)
}
