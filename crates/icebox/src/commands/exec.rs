//! `icebox exec`

use std::time::Duration;

use icebox_agent_api::client::Command;

use super::process::{self, Following, Wiring};
use super::{Context, Ended, key_value, reference};
use crate::failure::OURS;

/// Run a command in a sandbox, with this terminal's input and output, and exit with its code.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes: the command's own; 128+n if signal n ended it; 127 if there is no such program, 126 if it is not \
executable; 124 if its time was over; 125 if icebox failed.")]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,

    /// Do not pass this command's input on.
    #[arg(short = 'n', long)]
    no_stdin: bool,

    /// Set a variable.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,

    /// Run in this directory instead of the user's home.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,

    /// Run as this user instead of the sandbox's default one.
    #[arg(short, long)]
    user: Option<String>,

    /// Kill the command, and all it started, after this many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Resume the sandbox first if it is paused.
    #[arg(long)]
    resume: bool,

    /// Print the command's process id and leave it to itself. `icebox attach` follows it.
    #[arg(short, long)]
    detach: bool,

    /// A name to find the command by.
    #[arg(long, value_name = "NAME")]
    tag: Option<String>,

    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "expected a number of seconds, more than 0".to_owned())
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let (client, sandbox) = process::agent(context, &args.sandbox, args.resume)
        .await
        .map_err(|failure| failure.exit(OURS))?;
    let client = match &args.user {
        Some(user) => client.with_user(user),
        None => client,
    };
    let mut words = args.command.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default()).args(words);
    command.env.extend(args.env);
    command.cwd = args.workdir;
    command.timeout = args.timeout;
    command.tag = args.tag;
    command.stdin = !args.no_stdin && !args.detach;
    if args.detach {
        if args.tty {
            process::name_terminal(&mut command);
        }
        return process::detach(context, &client, command, args.tty).await;
    }
    let wiring = match (context.output.is_json(), args.tty) {
        (true, _) => Wiring::Document,
        (false, true) => Wiring::Terminal,
        (false, false) => Wiring::Streams,
    };
    if wiring == Wiring::Terminal {
        process::name_terminal(&mut command);
    }
    let following = Following {
        context,
        client,
        sandbox,
    };
    process::run(following, command, wiring).await
}
