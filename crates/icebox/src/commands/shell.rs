//! `icebox shell`

use icebox_agent_api::client::Command;

use super::process::{self, Following, Wiring};
use super::{Context, Ended, reference};
use crate::failure::{Failure, OURS};

/// A better shell where there is one, else the one that every image has.
const START: &str = "if command -v bash >/dev/null 2>&1; then exec bash -il; else exec sh -i; fi";

/// Open a shell in a sandbox.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// Be this user instead of the sandbox's default one.
    #[arg(short, long)]
    user: Option<String>,

    /// Resume the sandbox first if it is paused.
    #[arg(long)]
    resume: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    if context.output.is_json() {
        return Err(Failure::new("a shell has no JSON form").hint("use `icebox exec --json`"));
    }
    let (client, sandbox) = process::agent(context, &args.sandbox, args.resume)
        .await
        .map_err(|failure| failure.exit(OURS))?;
    let client = match &args.user {
        Some(user) => client.with_user(user),
        None => client,
    };
    let mut command = Command::new("/bin/sh").args(["-c", START]);
    process::name_terminal(&mut command);
    let following = Following {
        context,
        client,
        sandbox,
    };
    process::run(following, command, Wiring::Terminal).await
}
