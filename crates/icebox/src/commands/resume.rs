//! `icebox resume`

use icebox_api::types::ResumeRequest;

use super::{Context, Ended, reference, verb};

/// Continue a paused sandbox where it was.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes.
    #[arg(required = true, value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,

    /// Go back to this generation. The newest disk is kept as a branch.
    #[arg(long, value_name = "N")]
    generation: Option<u32>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let how = ResumeRequest {
        generation: args.generation,
        ..ResumeRequest::default()
    };
    verb::each(context, &args.sandboxes, "resumed", async |sandbox| {
        context.client.resume(&sandbox, &how).await
    })
    .await
}
