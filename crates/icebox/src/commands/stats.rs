//! `icebox stats`

use std::process::ExitCode;
use std::time::Duration;

use icebox_agent_api::control::Metrics;
use icebox_api::types::State;

use super::{Context, Ended, process, reference, verb};
use crate::failure::Failure;
use crate::output::{Table, bytes};

/// How long a guest may take to answer: a busy one is still worth waiting for.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Show what running sandboxes use, as their guests count it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes [default: all that run].
    #[arg(value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let wanted = if args.sandboxes.is_empty() {
        let all = context.client.list().await?;
        let running = all
            .into_iter()
            .filter(|sandbox| sandbox.listed.state == State::Running);
        running.map(|sandbox| sandbox.listed.sandbox_id).collect()
    } else {
        args.sandboxes.clone()
    };
    let mut ended = ExitCode::SUCCESS;
    let mut table = Table::new(&["NAME", "CPU", "CPUS", "MEMORY", "CACHE", "DISK"]);
    for sandbox in &wanted {
        match measure(context, sandbox).await {
            Ok((label, metrics)) if context.output.is_json() => {
                let document = serde_json::json!({ "sandbox": label, "metrics": metrics });
                context.output.document(&document)?;
            }
            Ok((label, metrics)) => table.row([
                label,
                format!("{:.1} %", metrics.cpu_used_pct),
                metrics.cpu_count.to_string(),
                of(metrics.mem_used, metrics.mem_total),
                bytes(metrics.mem_cache),
                of(metrics.disk_used, metrics.disk_total),
            ]),
            Err(failure) => {
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    if !context.output.is_json() && (table.has_rows() || ended == ExitCode::SUCCESS) {
        table.print(true)?;
    }
    Ok(ended)
}

async fn measure(context: &Context, sandbox: &str) -> Result<(String, Metrics), Failure> {
    let (client, sandbox) = process::agent(context, sandbox).await?;
    let metrics = client
        .metrics(TIMEOUT)
        .await
        .map_err(|error| Failure::of(&error))?;
    Ok((verb::label(&sandbox).to_owned(), metrics))
}

fn of(used: u64, total: u64) -> String {
    format!("{} / {}", bytes(used), bytes(total))
}
