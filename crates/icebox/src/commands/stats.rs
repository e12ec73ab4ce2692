//! `icebox stats`

use std::process::ExitCode;
use std::time::Duration;

use icebox_agent_api::control::Metrics;
use icebox_api::types::{Limit, MetricsRange, SandboxDetail, State};
use jiff::Timestamp;

use super::{Context, Ended, lifetime, process, reference, verb};
use crate::failure::Failure;
use crate::output::{NONE, Table, bytes, instant};

/// How long a guest may take to answer: a busy one is still worth waiting for.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Show what sandboxes use: as their guests count it, and of the host's disk.
///
/// Without names: all sandboxes, and what the whole installation occupies. ALLOCATED is what removing a sandbox gives
/// back; SHARED is what others need, too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandboxes [default: all].
    #[arg(value_name = "SANDBOX", value_parser = reference)]
    sandboxes: Vec<String>,

    /// Show what they used in the past instead, as their host measured it: seconds, then tens of seconds, then minutes,
    /// back to two days ago.
    #[arg(long)]
    history: bool,

    /// With --history: no further back than so long: 90s, 10m, 1h30m.
    #[arg(long, value_name = "TIME", requires = "history", value_parser = lifetime::limit, default_value = "10m")]
    since: Limit,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    if args.history {
        return history(context, args).await;
    }
    let all = args.sandboxes.is_empty();
    let mut ended = ExitCode::SUCCESS;
    let mut wanted = Vec::new();
    if all {
        wanted = context.client.list(true).await?;
    }
    for sandbox in &args.sandboxes {
        match context.client.inspect(sandbox, true).await {
            Ok(found) => wanted.push(found),
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    let mut table = Table::new(&[
        "NAME",
        "CPU",
        "CPUS",
        "MEMORY",
        "CACHE",
        "DISK",
        "ALLOCATED",
        "SHARED",
    ]);
    for sandbox in wanted {
        // One that stands still would not answer in time.
        let runs = sandbox.listed.state == State::Running && sandbox.listed.stalled.is_none();
        let metrics = match runs {
            true => measure(context, &sandbox.listed.sandbox_id).await.map(Some),
            false => Ok(None),
        };
        let metrics = metrics.unwrap_or_else(|failure| {
            context.output.failure(&failure);
            ended = failure.exit_code();
            None
        });
        if context.output.is_json() {
            context.output.document(&serde_json::json!({
                "sandbox": verb::label(&sandbox),
                "metrics": metrics,
                "allocatedBytes": sandbox.allocated_bytes,
                "sharedBytes": sandbox.shared_bytes,
            }))?;
        } else {
            table.row(cells(&sandbox, metrics.as_ref()));
        }
    }
    if !context.output.is_json() && (table.has_rows() || ended == ExitCode::SUCCESS) {
        table.print(true)?;
    }
    if all {
        installation(context).await?;
    }
    Ok(ended)
}

/// What sandboxes used, one after the other.
async fn history(context: &Context, args: &Args) -> Ended {
    let mut wanted = args.sandboxes.clone();
    if wanted.is_empty() {
        let all = context.client.list(false).await?;
        wanted.extend(all.into_iter().map(|it| it.listed.sandbox_id));
    }
    let start = match args.since {
        Limit::Seconds(seconds) => Some(Timestamp::now().as_second().saturating_sub(seconds)),
        Limit::Word(_) => None,
    };
    let range = MetricsRange {
        start,
        ..MetricsRange::default()
    };
    let mut table = Table::new(&[
        "NAME",
        "TIME",
        "OF",
        "CPU",
        "MEMORY",
        "READ/s",
        "WRITTEN/s",
        "IN/s",
        "OUT/s",
    ]);
    for sandbox in wanted {
        let found = context.client.inspect(&sandbox, false).await?;
        let id = &found.listed.sandbox_id;
        let metrics = context.client.metrics(id, &range).await?;
        if context.output.is_json() {
            let document =
                serde_json::json!({ "sandbox": verb::label(&found), "metrics": metrics });
            context.output.document(&document)?;
            continue;
        }
        for it in metrics {
            table.row([
                verb::label(&found).to_owned(),
                instant(it.timestamp),
                format!("{}s", it.seconds),
                format!("{:.1} %", it.cpu_used_pct),
                bytes(it.mem_used),
                bytes(it.disk_read_rate.into()),
                bytes(it.disk_write_rate.into()),
                bytes(it.network_in_rate.into()),
                bytes(it.network_out_rate.into()),
            ]);
        }
    }
    if !context.output.is_json() {
        table.print(true)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn cells(sandbox: &SandboxDetail, metrics: Option<&Metrics>) -> [String; 8] {
    let none = || NONE.to_owned();
    let [cpu, cpus, memory, cache, disk] = match metrics {
        Some(it) => [
            format!("{:.1} %", it.cpu_used_pct),
            it.cpu_count.to_string(),
            of(it.mem_used, it.mem_total),
            bytes(it.mem_cache),
            of(it.disk_used, it.disk_total),
        ],
        None => [none(), none(), none(), none(), none()],
    };
    let size = |size: Option<u64>| size.map_or_else(none, bytes);
    [
        verb::label(sandbox).to_owned(),
        cpu,
        cpus,
        memory,
        cache,
        disk,
        size(sandbox.allocated_bytes),
        size(sandbox.shared_bytes),
    ]
}

/// What the whole installation occupies.
async fn installation(context: &Context) -> Result<(), Failure> {
    let stats = context.client.stats().await?;
    if context.output.is_json() {
        context.output.document(&stats)?;
        return Ok(());
    }
    context.output.line("")?;
    let mut table = Table::new(&["ON DISK", "COUNT", "ALLOCATED"]);
    for kind in &stats.kinds {
        table.row([
            kind.kind.clone(),
            kind.count.to_string(),
            bytes(kind.allocated_bytes),
        ]);
    }
    let unneeded = (stats.unneeded_bytes > 0).then_some(stats.unneeded_bytes);
    table.row([
        "of which nothing needs".to_owned(),
        NONE.to_owned(),
        unneeded.map_or_else(|| NONE.to_owned(), bytes),
    ]);
    table.print(true)?;
    context.output.line("")?;
    let mut table = Table::new(&["PLACE", "FREE", "OF", "NOTHING NEW BELOW"]);
    for place in &stats.places {
        table.row([
            place.place.clone(),
            bytes(place.free_bytes),
            bytes(place.total_bytes),
            bytes(place.keep_free_bytes),
        ]);
    }
    table.print(true)?;
    Ok(())
}

async fn measure(context: &Context, sandbox: &str) -> Result<Metrics, Failure> {
    let (client, _) = process::agent(context, sandbox, false).await?;
    client
        .metrics(TIMEOUT)
        .await
        .map_err(|error| Failure::of(&error))
}

fn of(used: u64, total: u64) -> String {
    format!("{} / {}", bytes(used), bytes(total))
}
