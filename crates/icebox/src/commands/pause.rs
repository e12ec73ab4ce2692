//! `icebox pause`

use super::{Context, Ended, reference, verb};

/// Save memory and disk, and end the process. Resume continues as if nothing happened.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    verb::each(context, &args.sandboxes, "paused", async |sandbox| {
        context.client.pause(&sandbox).await
    })
    .await
}
