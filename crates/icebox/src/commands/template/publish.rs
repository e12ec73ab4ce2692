//! `icebox template publish` and `unpublish`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::reference;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The template.
    #[arg(value_name = "TEMPLATE", value_parser = reference)]
    template: String,
}

pub(crate) async fn run(context: &Context, args: &Args, public: bool) -> Ended {
    let changed = context.client.publish_template(&args.template, public);
    let changed = changed.await?;
    if context.output.is_json() {
        context.output.document(&changed)?;
    } else if public {
        let said = format!("every team can create sandboxes from {}", args.template);
        context.output.say(said);
    } else {
        let said = format!(
            "only team {} can create sandboxes from {}",
            changed.team, args.template
        );
        context.output.say(said);
    }
    Ok(ExitCode::SUCCESS)
}
