//! `icebox vmm`

mod list;

use super::{Context, Ended};

/// Show the VMMs that run sandboxes here.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "list")]
    Ls(list::Args),
}

pub(crate) async fn run(context: &Context, command: Command) -> Ended {
    match command {
        Command::Ls(args) => list::run(context, &args).await,
    }
}
