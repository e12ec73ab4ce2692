//! `icebox history rm`

use std::process::ExitCode;

use crate::commands::{Context, Ended, reference};

/// Remove generations and branches from a sandbox's history. What only they needed goes with them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// Numbers of generations, and names of branches.
    #[arg(required = true, value_name = "POINT", value_parser = reference)]
    points: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut ended = ExitCode::SUCCESS;
    for point in &args.points {
        match context.client.forget(&args.sandbox, point).await {
            Ok(()) if context.output.is_json() => {
                let document = serde_json::json!({ "removed": point });
                context.output.document(&document)?;
            }
            Ok(()) => context
                .output
                .say(format!("removed {point} of {}", args.sandbox)),
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}
