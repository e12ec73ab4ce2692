//! `icebox kernel`

mod import;
mod list;

use super::{Context, Ended};

/// Import and list the kernels that sandboxes boot.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Import(import::Args),
    #[command(visible_alias = "list")]
    Ls(list::Args),
}

pub(crate) async fn run(context: &Context, command: Command) -> Ended {
    match command {
        Command::Import(args) => import::run(context, args).await,
        Command::Ls(args) => list::run(context, &args).await,
    }
}
