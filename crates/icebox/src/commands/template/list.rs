//! `icebox template ls`

use std::process::ExitCode;

use super::{Context, Ended};
use crate::commands::of_team;
use crate::output::{NONE, Table, age, bytes, mib};

/// List templates.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print ids only.
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let templates = context.client.templates().await?;
    if context.output.is_json() {
        context.output.document(&templates)?;
    } else if args.quiet {
        for template in templates {
            context.output.line(template.template_id)?;
        }
    } else {
        let mut table = Table::new(&[
            "NAME",
            "ID",
            "KIND",
            "CPUS",
            "MEMORY",
            "DISK",
            "ALLOCATED",
            "SHARED",
            "AGE",
        ]);
        for template in templates {
            let names = if template.names.is_empty() {
                NONE.to_owned()
            } else {
                let names = template.names.into_iter();
                let names = names.map(|name| of_team(context, &template.team, name));
                names.collect::<Vec<_>>().join(",")
            };
            table.row([
                names,
                template.template_id,
                match template.unusable {
                    Some(_) => format!("{} (unusable)", template.kind),
                    None if template.public => format!("{} (public)", template.kind),
                    None => template.kind.to_string(),
                },
                template.cpu_count.to_string(),
                mib(template.memory_mb.into()),
                mib(template.disk_size_mb),
                template
                    .allocated_bytes
                    .map_or_else(|| NONE.to_owned(), bytes),
                template.shared_bytes.map_or_else(|| NONE.to_owned(), bytes),
                age(template.created_at),
            ]);
        }
        table.print(true)?;
    }
    Ok(ExitCode::SUCCESS)
}
