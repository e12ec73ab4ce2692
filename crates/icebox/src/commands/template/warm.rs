//! `icebox template warm`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::reference;

/// Have sandboxes made from a template wait for who creates one.
///
/// They run, and count for their team's limits. `create` takes one of them if it asks for no other CPUs, memory, disk, VMM or
/// network than the template's, and another is made in its place. Nobody sees them before; `template inspect` says how many
/// there are.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The template.
    #[arg(value_name = "TEMPLATE", value_parser = reference)]
    template: String,
    /// How many; 0 for none.
    #[arg(value_name = "COUNT")]
    count: u16,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let changed = context.client.warm_template(&args.template, args.count);
    let changed = changed.await?;
    if context.output.is_json() {
        context.output.document(&changed)?;
    } else {
        let said = match args.count {
            0 => format!("no sandboxes of {} wait", args.template),
            1 => format!("a sandbox of {} is kept waiting", args.template),
            many => format!("{many} sandboxes of {} are kept waiting", args.template),
        };
        context.output.say(said);
    }
    Ok(ExitCode::SUCCESS)
}
