//! `icebox snapshot`

use std::process::ExitCode;

use icebox_api::types::NewSnapshot;

use super::{Context, Ended, reference};

/// Make a template of a sandbox as it is this instant: disk, memory, processes. It goes on running. Prints the
/// template's id.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// What to call the template.
    #[arg(long)]
    name: String,
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let new = NewSnapshot {
        name: Some(args.name),
        memory: None,
    };
    let taken = context.client.snapshot(&args.sandbox, &new).await?;
    if context.output.is_json() {
        context.output.document(&taken)?;
    } else {
        context.output.line(&taken.snapshot_id)?;
    }
    Ok(ExitCode::SUCCESS)
}
