//! `icebox ps`

use std::process::ExitCode;
use std::time::Duration;

use super::{Context, Ended, process, reference};
use crate::failure::Failure;
use crate::output::{NONE, Table};

/// How long a guest may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How much of a command is shown.
const COMMAND: usize = 100;

/// List the commands that run in a sandbox: those that were started with `exec`, `shell` or an SDK.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let (client, _) = process::agent(context, &args.sandbox, false).await?;
    let running = client.list(TIMEOUT).await;
    let running = running.map_err(|error| Failure::of(&error))?;
    if context.output.is_json() {
        let running = running.iter().map(|process| {
            serde_json::json!({
                "pid": process.pid,
                "tag": process.tag,
                "cmd": process.program,
                "args": process.args,
                "cwd": process.cwd,
            })
        });
        context.output.document(&running.collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["PID", "TAG", "COMMAND"]);
    for process in running {
        let words = std::iter::once(process.program).chain(process.args);
        let command = words.collect::<Vec<_>>().join(" ");
        table.row([
            process.pid.to_string(),
            process.tag.unwrap_or_else(|| NONE.to_owned()),
            command.replace('\n', " ").chars().take(COMMAND).collect(),
        ]);
    }
    table.print(true)?;
    Ok(ExitCode::SUCCESS)
}
