//! `icebox kernel ls`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::output::{Table, bytes};

/// List kernels. The one with a star is what new templates use.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) async fn run(context: &Context, _: &Args) -> Ended {
    let kernels = context.client.kernels().await?;
    if context.output.is_json() {
        context.output.document(&kernels)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["", "DIGEST", "VERSION", "ALLOCATED", "FROM"]);
    for kernel in kernels {
        table.row([
            if kernel.default { "*" } else { "" }.to_owned(),
            kernel.digest.chars().take(12).collect(),
            kernel.version,
            bytes(kernel.allocated_bytes),
            kernel.origin,
        ]);
    }
    table.print(true)?;
    Ok(ExitCode::SUCCESS)
}
