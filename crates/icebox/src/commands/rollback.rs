//! `icebox rollback`

use icebox_api::types::RollbackRequest;

use super::{Context, Ended, reference, verb};

/// Bring a sandbox back to a point of its history.
///
/// A generation is where it was paused then, and a branch is a disk. The newest disk is kept as a branch; what a running
/// guest has in memory is not, unless it is paused first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// A generation's number or a branch's name, as `icebox history` has them.
    #[arg(long, value_name = "POINT", value_parser = reference)]
    to: String,

    /// Go on from there at once: resume the generation, or boot the branch's disk.
    #[arg(long)]
    resume: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let how = RollbackRequest {
        to: args.to.clone(),
        resume: args.resume,
    };
    let sandboxes = [args.sandbox.clone()];
    verb::each(context, &sandboxes, "rolled back", async |sandbox| {
        context.client.rollback(&sandbox, &how).await
    })
    .await
}
