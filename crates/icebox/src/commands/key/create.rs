//! `icebox key create`

use std::process::ExitCode;

use icebox_api::types::NewKey;

use super::{Context, Ended};

/// Make an API key, and print it: this once.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to call it, to know it again.
    #[arg(long, value_name = "NAME", default_value = "key")]
    name: String,
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let made = context
        .client
        .create_key(&NewKey { name: args.name })
        .await?;
    if context.output.is_json() {
        context.output.document(&made)?;
    } else {
        let kept = &made.kept;
        let said = format!("key {} of team {}, shown this once:", kept.id, kept.team);
        context.output.say(said);
        context.output.line(&made.key)?;
    }
    Ok(ExitCode::SUCCESS)
}
