//! `icebox gc`

use std::process::ExitCode;

use icebox_api::types::GcRequest;

use super::{Context, Ended};
use crate::output::bytes;

/// Remove layers, memories, images and kernels that nothing reaches any more.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only tell what would be removed.
    #[arg(long)]
    dry_run: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let request = GcRequest {
        dry_run: args.dry_run,
    };
    let report = context.client.gc(request).await?;
    if context.output.is_json() {
        context.output.document(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut sum = 0;
    for garbage in &report.garbage {
        sum += garbage.allocated_bytes.unwrap_or(0);
        context.output.line(&garbage.object)?;
    }
    let did = if report.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let count = report.garbage.len();
    let things = if count == 1 { "object" } else { "objects" };
    context
        .output
        .say(format!("{did} {count} {things}, {}", bytes(sum)));
    Ok(ExitCode::SUCCESS)
}
