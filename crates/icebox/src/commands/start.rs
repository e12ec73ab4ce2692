//! `icebox start`

use super::{Context, Ended, reference, verb};

/// Boot a stopped sandbox from its disk.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    verb::each(context, &args.sandboxes, "started", async |sandbox| {
        context.client.start(&sandbox).await
    })
    .await
}
