//! `icebox key`

mod create;
mod list;
mod remove;

use super::{Context, Ended};

/// Make, list and remove API keys.
///
/// A key is a team's: with --team that one's, else the default team's.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    Rm(remove::Args),
}

pub(crate) async fn run(context: &Context, command: Command) -> Ended {
    match command {
        Command::Create(args) => create::run(context, args).await,
        Command::Ls(args) => list::run(context, &args).await,
        Command::Rm(args) => remove::run(context, &args).await,
    }
}
