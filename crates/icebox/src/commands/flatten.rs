//! `icebox flatten`

use std::process::ExitCode;

use icebox_api::types::NewSnapshot;

use super::{Context, Ended, reference};

/// Make an image template of a sandbox's disk, with no layers under it. Prints the template's id.
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
    let flat = context.client.flatten(&args.sandbox, &new).await?;
    if context.output.is_json() {
        context.output.document(&flat)?;
    } else {
        context.output.line(&flat.template_id)?;
    }
    Ok(ExitCode::SUCCESS)
}
