//! `icebox attach`

use icebox_agent_api::client::Selector;

use super::process::{self, Wiring};
use super::{Context, Ended, reference};
use crate::failure::{Failure, OURS};

/// Follow a command that runs in a sandbox: see what it writes, pass on this terminal's input, and exit with its code.
///
/// What it wrote before comes first, as far as the sandbox has kept it: the last 256 KiB.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// Which command: its process id or its tag, as `icebox ps` shows them.
    #[arg(value_name = "PID|TAG", value_parser = reference)]
    command: String,

    /// Do not pass this terminal's input on.
    #[arg(short = 'n', long)]
    no_stdin: bool,

    /// Leave out so many bytes of what it has written since it began.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    from: u64,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    if context.output.is_json() {
        return Err(
            Failure::new("following a command has no JSON form").hint("use `icebox exec --json`")
        );
    }
    let (client, sandbox) = process::agent(context, &args.sandbox, false)
        .await
        .map_err(|failure| failure.exit(OURS))?;
    let which = match args.command.parse() {
        Ok(pid) => Selector::Pid(pid),
        Err(_) => Selector::Tag(args.command.clone()),
    };
    let attached = client.attach_from(which, args.from).await;
    let attached = attached.map_err(|error| {
        let failure = Failure::of(&error).exit(OURS);
        failure.hint(format!("see `icebox ps {}`", args.sandbox))
    })?;
    let wiring = match attached.has_terminal() {
        true => Wiring::Terminal,
        false => Wiring::Streams,
    };
    let following = process::Following {
        context,
        client,
        sandbox,
    };
    process::follow(following, attached, wiring, !args.no_stdin).await
}
