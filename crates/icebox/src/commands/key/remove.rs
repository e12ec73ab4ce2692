//! `icebox key rm`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::reference;

/// Remove API keys: whoever has one does not come in any more, from this instant.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which keys, by id.
    #[arg(required = true, value_name = "KEY", value_parser = reference)]
    keys: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut ended = ExitCode::SUCCESS;
    for key in &args.keys {
        match context.client.remove_key(key).await {
            Ok(()) if context.output.is_json() => {
                let document = serde_json::json!({ "removed": key });
                context.output.document(&document)?;
            }
            Ok(()) => context.output.say(format!("removed {key}")),
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}
