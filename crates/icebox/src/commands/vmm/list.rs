//! `icebox vmm ls`

use std::process::ExitCode;

use icebox_api::types::VmmAbilities;

use super::{Context, Ended};
use crate::output::Table;

/// List the VMMs that run sandboxes here, and what each can do.
///
/// The one with a star runs sandboxes that ask for none (`create --vmm`). `icebox doctor` says why another does not work.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) async fn run(context: &Context, _: &Args) -> Ended {
    let vmms = context.client.vmms().await?;
    if context.output.is_json() {
        context.output.document(&vmms)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["", "NAME", "VERSION", "ACCELERATOR", "VCPUS", "CAN"]);
    for vmm in vmms {
        table.row([
            if vmm.default { "*" } else { "" }.to_owned(),
            vmm.name,
            vmm.version,
            vmm.accelerator,
            format!("up to {}", vmm.abilities.max_vcpus),
            abilities(&vmm.abilities),
        ]);
    }
    table.print(true)?;
    Ok(ExitCode::SUCCESS)
}

fn abilities(can: &VmmAbilities) -> String {
    let named = [
        (can.live_save, "live save"),
        (can.differential_save, "differential save"),
        (can.lazy_restore, "lazy restore"),
        (can.disk_switch, "disk switch"),
        (can.resize, "resize"),
    ];
    let can: Vec<_> = named
        .into_iter()
        .filter_map(|(can, name)| can.then_some(name))
        .collect();
    can.join(", ")
}
