//! `icebox checkpoint`

use super::{Context, Ended, reference, verb};

/// Make a generation of a running sandbox, which runs on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    verb::each(context, &args.sandboxes, "checkpointed", async |sandbox| {
        context.client.checkpoint(&sandbox).await
    })
    .await
}
