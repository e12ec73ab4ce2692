//! `icebox inspect`

use std::process::ExitCode;

use icebox_api::types::SandboxDetail;

use super::size::space;
use super::{Context, Ended, reference, timeout};
use crate::duration::length;
use crate::output::{NONE, Table, bytes, instant, mib, millis};

/// Show everything about one sandbox.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let sandbox = context.client.inspect(&args.sandbox, true).await?;
    if context.output.is_json() {
        context.output.document(&sandbox)?;
    } else {
        page(&sandbox).print(false)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page(sandbox: &SandboxDetail) -> Table {
    let listed = &sandbox.listed;
    let none = || NONE.to_owned();
    let mut table = Table::plain();
    let mut row = |key: &str, value: String| table.row([format!("{key}:"), value]);
    row("id", listed.sandbox_id.clone());
    row("name", listed.name.clone().unwrap_or_else(none));
    row("state", listed.state.to_string());
    if let Some(verb) = &listed.verb {
        row("under way", verb.clone());
    }
    if let Some(stalled) = &listed.stalled {
        row("stalled", stalled.clone());
    }
    if let Some(unanswering) = &listed.unanswering {
        row("unanswering", unanswering.clone());
    }
    if let Some(broken) = &sandbox.broken {
        row("broken", broken.clone());
    }
    if let Some(lost) = &sandbox.disk_lost {
        row("disk lost", lost.clone());
    }
    if let Some(exit) = &sandbox.last_exit {
        row("last exit", exit.clone());
    }
    if let Some(last) = &sandbox.last_verb {
        let (began, took) = (instant(last.began_at), millis(last.micros));
        row("last verb", format!("{} at {began}, {took}", last.verb));
        for step in &last.steps {
            row("step", format!("{}  {}", step.step, millis(step.micros)));
        }
        if let Some(error) = &last.error {
            row("failed", error.clone());
        }
    }
    let template = match &listed.alias {
        Some(alias) => format!("{alias} ({})", listed.template_id),
        None => listed.template_id.clone(),
    };
    row("template", template);
    row("created", instant(listed.started_at));
    row("cpus", listed.cpu_count.to_string());
    row("memory", mib(listed.memory_mb.into()));
    row(
        "disk",
        format!("{} ({})", mib(listed.disk_size_mb), sandbox.volume_driver),
    );
    let sizes = space(
        sandbox.allocated_bytes,
        sandbox.shared_bytes,
        &sandbox.parts,
    );
    for (key, value) in sizes {
        row(key, value);
    }
    if let Some(vmm) = &sandbox.vmm {
        row("vmm", format!("{} {}", vmm.name, vmm.version));
        row(
            "accelerator",
            format!("{}: {}", vmm.accelerator, vmm.accelerator_reason),
        );
    }
    if let Some(pid) = sandbox.pid {
        row("pid", pid.to_string());
    }
    if let Some(kernel) = &sandbox.kernel {
        row("kernel", kernel.clone());
    }
    if let Some(limits) = &sandbox.limits {
        row("limits", limits.clone());
    }
    row(
        "address",
        listed
            .address
            .map_or_else(none, |address| address.to_string()),
    );
    let egress = if sandbox.allow_internet_access {
        "public addresses"
    } else {
        "nothing"
    };
    row("reaches", egress.to_owned());
    if sandbox.lifecycle.is_some() {
        row("lifetime", timeout::sentence(sandbox));
    }
    for (key, value) in &listed.metadata {
        row("metadata", format!("{key}={value}"));
    }
    if let Some(history) = &sandbox.history {
        let newest = history.keep.map(|n| format!("the newest {n}"));
        let young = history.keep_seconds.map(|it| format!("for {}", length(it)));
        let kept: Vec<_> = newest.into_iter().chain(young).collect();
        if !kept.is_empty() {
            row("keeps", kept.join(", "));
        }
        if let Some(every) = history.checkpoint_every_seconds {
            row("checkpoints", format!("every {}", length(every)));
        }
    }
    for generation in &sandbox.generations {
        row(
            "generation",
            format!(
                "{}  {}  {} changed pages, {}",
                generation.number,
                instant(generation.created_at),
                generation.changed_pages,
                bytes(generation.allocated_bytes)
            ),
        );
    }
    for unusable in &sandbox.unusable {
        row(
            "generation",
            format!("{}  cannot be used: {}", unusable.number, unusable.why),
        );
    }
    for branch in &sandbox.branches {
        row(
            "branch",
            format!("{}  {}", branch.name, instant(branch.created_at)),
        );
    }
    for hold in &sandbox.holds {
        row("holds", hold.clone());
    }
    table
}
