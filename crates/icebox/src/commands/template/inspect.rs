//! `icebox template inspect`

use std::process::ExitCode;

use icebox_api::types::Template;

use super::{Context, Ended};
use crate::commands::reference;
use crate::commands::size::space;
use crate::output::{NONE, Table, instant, mib};

/// Show everything about one template.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which template.
    #[arg(value_parser = reference)]
    template: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let template = context.client.template(&args.template).await?;
    if context.output.is_json() {
        context.output.document(&template)?;
    } else {
        page(&template).print(false)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page(template: &Template) -> Table {
    let mut table = Table::plain();
    let mut row = |key: &str, value: String| table.row([format!("{key}:"), value]);
    row("id", template.template_id.clone());
    let names = if template.names.is_empty() {
        NONE.to_owned()
    } else {
        template.names.join(", ")
    };
    row("names", names);
    row("kind", template.kind.to_string());
    row("created", instant(template.created_at));
    if let Some(origin) = &template.origin {
        row("from", origin.clone());
    }
    row("cpus", template.cpu_count.to_string());
    row("memory", mib(template.memory_mb.into()));
    row("disk", mib(template.disk_size_mb));
    if template.warm > 0 {
        let (warm, waiting) = (template.warm, template.waiting);
        row("warm", format!("{warm}, of which {waiting} wait"));
    }
    if let Some(unusable) = &template.unusable {
        row("unusable", unusable.clone());
    }
    let sizes = space(
        template.allocated_bytes,
        template.shared_bytes,
        &template.parts,
    );
    for (key, value) in sizes {
        row(key, value);
    }
    if let Some(base) = &template.base {
        row("base", base.clone());
    }
    if let Some(kernel) = &template.kernel {
        row("kernel", kernel.clone());
    }
    if let Some(vmm) = &template.vmm {
        row(
            "vmm",
            format!("{} {}, {}", vmm.name, vmm.version, vmm.accelerator),
        );
    }
    table
}
