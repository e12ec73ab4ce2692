//! `icebox rm`

use std::process::ExitCode;

use super::{Context, Ended, reference};

/// Destroy sandboxes and everything they hold.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut ended = ExitCode::SUCCESS;
    for sandbox in &args.sandboxes {
        match context.client.destroy(sandbox).await {
            Ok(()) if context.output.is_json() => {
                let document = serde_json::json!({ "destroyed": sandbox });
                context.output.document(&document)?;
            }
            Ok(()) => context.output.say(format!("destroyed {sandbox}")),
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}
