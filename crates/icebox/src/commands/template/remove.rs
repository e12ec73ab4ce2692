//! `icebox template rm`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::reference;

/// Remove templates that no sandbox depends on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which templates.
    #[arg(required = true, value_name = "TEMPLATE", value_parser = reference)]
    templates: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut ended = ExitCode::SUCCESS;
    for template in &args.templates {
        match context.client.remove_template(template).await {
            Ok(()) if context.output.is_json() => {
                let document = serde_json::json!({ "removed": template });
                context.output.document(&document)?;
            }
            Ok(()) => context.output.say(format!("removed {template}")),
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}
