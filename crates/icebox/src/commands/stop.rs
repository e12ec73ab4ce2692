//! `icebox stop`

use super::{Context, Ended, reference, verb};

/// Shut the sandbox down; its disk stays.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    verb::each(context, &args.sandboxes, "stopped", async |sandbox| {
        context.client.stop(&sandbox).await
    })
    .await
}
