//! `icebox timeout`

use std::process::ExitCode;

use icebox_api::types::Limit;

use super::lifetime::{self, Then};
use super::{Context, Ended, reference, verb};
use crate::failure::Failure;

/// Change when a sandbox ends by itself, and when it begins to.
///
/// A sandbox is idle while no connection to it is open, nothing is asked of it, and no command runs in it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// End it when it has been idle for so long: 90s, 10m, 1h30m, or `never`. Counts from now.
    #[arg(value_name = "TIME", value_parser = lifetime::limit)]
    idle: Option<Limit>,

    /// End it so long from now, and after each later start or resume, whatever happens in it; or `never`.
    #[arg(long, value_name = "TIME", value_parser = lifetime::limit)]
    ends_after: Option<Limit>,

    /// What to do with it then.
    #[arg(long, value_name = "WHAT")]
    on_timeout: Option<Then>,

    /// Resume it by itself when somebody wants something of it while it is paused.
    #[arg(long, value_name = "BOOL")]
    auto_resume: Option<bool>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let change = lifetime::change(
        args.idle,
        args.ends_after,
        args.on_timeout,
        args.auto_resume,
    );
    if change == Default::default() {
        return Err(Failure::new("there is nothing to change")
            .hint("say a time: `icebox timeout SANDBOX 10m`, or one of the options"));
    }
    let sandbox = context.client.set_lifetime(&args.sandbox, &change).await?;
    if context.output.is_json() {
        context.output.document(&sandbox)?;
    }
    context
        .output
        .say(format!("{}: {}", verb::label(&sandbox), sentence(&sandbox)));
    Ok(ExitCode::SUCCESS)
}

/// When a sandbox ends and begins by itself.
pub(super) fn sentence(sandbox: &icebox_api::types::SandboxDetail) -> String {
    let Some(lifecycle) = &sandbox.lifecycle else {
        return "runs until it is told otherwise".to_owned();
    };
    let mut says = Vec::new();
    let then = lifecycle.on_timeout;
    if let Some(idle) = lifecycle.idle_timeout {
        says.push(format!("{then} after {} idle", lifetime::shown(idle)));
    }
    if let Some(timeout) = lifecycle.timeout {
        let end = sandbox.listed.end_at.map(crate::output::instant);
        let end = end.map_or_else(String::new, |end| format!(", at {end}"));
        says.push(format!(
            "{then} after {} of running{end}",
            lifetime::shown(timeout)
        ));
    }
    if lifecycle.auto_resume {
        says.push("resumed by whoever asks for it".to_owned());
    }
    says.join("; ")
}
