//! `icebox team rm`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::reference;

/// Remove a team that has no sandboxes and no templates, with its keys.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which team.
    #[arg(value_name = "NAME", value_parser = reference)]
    name: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    context.client.remove_team(&args.name).await?;
    if context.output.is_json() {
        let document = serde_json::json!({ "removed": args.name });
        context.output.document(&document)?;
    } else {
        context.output.say(format!("removed {}", args.name));
    }
    Ok(ExitCode::SUCCESS)
}
