//! `icebox history`

mod remove;

use std::process::ExitCode;

use icebox_api::types::History;
use jiff::Timestamp;

use super::{Context, Ended, reference};
use crate::output::{NONE, Table, age, bytes};

/// Show every point that a sandbox can go back to: generations, and branches. `*` is where it is.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(required = true, value_parser = reference)]
    sandbox: Option<String>,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Rm(remove::Args),
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    if let Some(Command::Rm(args)) = &args.command {
        return remove::run(context, args).await;
    }
    let sandbox = args.sandbox.as_deref().unwrap_or_default();
    let history = context.client.history(sandbox).await?;
    if context.output.is_json() {
        context.output.document(&history)?;
        return Ok(ExitCode::SUCCESS);
    }
    table(&history).print(true)?;
    for generation in &history.generations {
        if let Some(why) = &generation.unusable {
            let number = generation.number;
            let said = format!("generation {number} cannot be resumed: {why}");
            context.output.say(said);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(history: &History) -> Table {
    let mark = |current: bool| if current { "*" } else { "" }.to_owned();
    let none = || NONE.to_owned();
    let number = |after: Option<u32>| after.map_or_else(none, |number| number.to_string());
    let size = |n: Option<u64>| n.map_or_else(none, bytes);
    let mut rows: Vec<(Option<Timestamp>, [String; 8])> = Vec::new();
    for it in &history.generations {
        let vmm = it.vmm.as_ref();
        let row = [
            mark(it.current),
            it.number.to_string(),
            it.made_by.clone().unwrap_or_else(none),
            number(it.after),
            size(it.memory_bytes),
            size(it.disk_bytes),
            vmm.map_or_else(none, |vmm| format!("{} {}", vmm.name, vmm.version)),
            it.created_at.map_or_else(none, age),
        ];
        rows.push((it.created_at, row));
    }
    for it in &history.branches {
        let row = [
            mark(false),
            it.name.clone(),
            "set aside".to_owned(),
            number(it.after),
            none(),
            size(it.disk_bytes),
            none(),
            age(it.created_at),
        ];
        rows.push((Some(it.created_at), row));
    }
    rows.sort_by_key(|(at, _)| *at);
    let mut table = Table::new(&[
        "", "POINT", "MADE BY", "AFTER", "MEMORY", "DISK", "VMM", "AGE",
    ]);
    for (_, row) in rows {
        table.row(row);
    }
    if !history.generations.iter().any(|it| it.current) {
        table.row([
            mark(true),
            "now".to_owned(),
            history.now.state.to_string(),
            number(history.now.after),
            none(),
            size(history.now.disk_bytes),
            none(),
            none(),
        ]);
    }
    table
}
