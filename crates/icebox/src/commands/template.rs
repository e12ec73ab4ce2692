//! `icebox template`

mod build;
mod inspect;
mod list;
mod publish;
mod remove;
mod warm;

use super::{Context, Ended};

/// Build, list and remove templates.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Build(Box<build::Args>),
    #[command(visible_alias = "list")]
    Ls(list::Args),
    Inspect(inspect::Args),
    /// Let every team create sandboxes from a template.
    Publish(publish::Args),
    /// Let only its own team create sandboxes from a template.
    Unpublish(publish::Args),
    Warm(warm::Args),
    Rm(remove::Args),
}

pub(crate) async fn run(context: &Context, command: Command) -> Ended {
    match command {
        Command::Build(args) => build::run(context, *args).await,
        Command::Ls(args) => list::run(context, &args).await,
        Command::Inspect(args) => inspect::run(context, &args).await,
        Command::Publish(args) => publish::run(context, &args, true).await,
        Command::Unpublish(args) => publish::run(context, &args, false).await,
        Command::Warm(args) => warm::run(context, &args).await,
        Command::Rm(args) => remove::run(context, &args).await,
    }
}
