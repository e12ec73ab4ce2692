//! `icebox ls`

use std::process::ExitCode;

use super::{Context, Ended, of_team};
use crate::output::{NONE, Table, age, bytes, mib};

/// List sandboxes, newest first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let sandboxes = context.client.list(!args.quiet).await?;
    if context.output.is_json() {
        context.output.document(&sandboxes)?;
    } else if args.quiet {
        for sandbox in sandboxes {
            context.output.line(sandbox.listed.sandbox_id)?;
        }
    } else {
        let mut table = Table::new(&[
            "NAME",
            "ID",
            "STATE",
            "TEMPLATE",
            "CPUS",
            "MEMORY",
            "DISK",
            "ALLOCATED",
            "ADDRESS",
            "AGE",
        ]);
        for sandbox in sandboxes {
            let unusable = sandbox.unusable.iter().any(|it| it.current);
            let listed = sandbox.listed;
            let lost = sandbox.disk_lost.map(|_| "disk lost".to_owned());
            let stalled = listed.stalled.map(|_| "stalled: no space".to_owned());
            let silent = listed.unanswering.map(|_| "does not answer".to_owned());
            let unusable = unusable.then(|| "unusable".to_owned());
            let remark = listed.verb.or(lost).or(stalled).or(silent).or(unusable);
            let state = match remark {
                Some(remark) => format!("{} ({remark})", listed.state),
                None => listed.state.to_string(),
            };
            table.row([
                match listed.name {
                    Some(name) => of_team(context, &listed.team, name),
                    None => NONE.to_owned(),
                },
                listed.sandbox_id,
                state,
                listed.alias.unwrap_or(listed.template_id),
                listed.cpu_count.to_string(),
                mib(listed.memory_mb.into()),
                mib(listed.disk_size_mb),
                sandbox
                    .allocated_bytes
                    .map_or_else(|| NONE.to_owned(), bytes),
                listed
                    .address
                    .map_or_else(|| NONE.to_owned(), |address| address.to_string()),
                age(listed.started_at),
            ]);
        }
        table.print(true)?;
    }
    Ok(ExitCode::SUCCESS)
}
