//! `icebox team`

mod create;
mod limits;
mod list;
mod remove;
mod set;

use super::{Context, Ended};

/// Make, list, bound and remove teams.
///
/// A sandbox, a template and a key are a team's, and what is another team's does not exist for it, except public templates.
/// Who names no team is the default one, which is always there.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    Set(set::Args),
    Rm(remove::Args),
}

pub(crate) async fn run(context: &Context, command: Command) -> Ended {
    match command {
        Command::Create(args) => create::run(context, &args).await,
        Command::Ls(args) => list::run(context, &args).await,
        Command::Set(args) => set::run(context, &args).await,
        Command::Rm(args) => remove::run(context, &args).await,
    }
}
