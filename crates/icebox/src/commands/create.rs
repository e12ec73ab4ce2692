//! `icebox create`

use std::process::ExitCode;

use icebox_api::types::{HistoryPolicy, Limit, NewSandbox};

use super::lifetime::{self, Then};
use super::size::mib;
use super::{Context, Ended, key_value, reference, verb};
use crate::duration::seconds;

/// Create a sandbox and wait until commands can run in it. Prints its id.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The template to create it from.
    #[arg(value_parser = reference)]
    template: String,

    /// What to call it.
    #[arg(long)]
    name: Option<String>,

    /// Virtual CPUs. Not for snapshots: theirs are fixed.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<i64>,

    /// Guest memory in MiB, or with a suffix: 512M, 2G. Not for snapshots: theirs is fixed.
    #[arg(long, value_name = "SIZE", value_parser = mib, allow_negative_numbers = true)]
    memory: Option<i64>,

    /// Disk size in MiB, or with a suffix. At least the template's.
    #[arg(long, value_name = "SIZE", value_parser = mib, allow_negative_numbers = true)]
    disk: Option<i64>,

    /// Use this volume driver and no other.
    #[arg(long, value_name = "DRIVER")]
    driver: Option<String>,

    /// Use this VMM and no other.
    #[arg(long)]
    vmm: Option<String>,

    /// Boot the disk of a snapshot, without what its guest had in memory. Any VMM can, with any CPUs and memory.
    #[arg(long)]
    cold: bool,

    /// Set a variable for every command in the sandbox.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,

    /// Attach a label.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    metadata: Vec<(String, String)>,

    /// Keep this many of its newest generations, and of its newest branches.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    keep: Option<i64>,

    /// Keep generations and branches for this long: 12h, 30d.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    keep_for: Option<i64>,

    /// Make a checkpoint of it every so often while it runs: 10m, 1h.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    checkpoint_every: Option<i64>,

    /// End it when it has been idle for so long: no connection to it is open, nothing is asked of it, and no command runs
    /// in it. As 90s, 10m, 1h30m or `never`, which is the default.
    #[arg(long, value_name = "TIME", value_parser = lifetime::limit)]
    timeout: Option<Limit>,

    /// End it so long after it began to run, whatever happens in it.
    #[arg(long, value_name = "TIME", value_parser = lifetime::limit)]
    ends_after: Option<Limit>,

    /// What to do with it then.
    #[arg(long, value_name = "WHAT", default_value = "pause")]
    on_timeout: Then,

    /// Resume it by itself when somebody wants something of it while it is paused.
    #[arg(long)]
    auto_resume: bool,

    /// Let the sandbox reach public addresses; otherwise it reaches nothing.
    #[arg(long)]
    internet: bool,
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let history = HistoryPolicy {
        keep: args.keep,
        keep_seconds: args.keep_for,
        checkpoint_every_seconds: args.checkpoint_every,
    };
    let ends = args.timeout.is_some() || args.ends_after.is_some();
    let lifetime = lifetime::change(
        args.timeout,
        args.ends_after,
        ends.then_some(args.on_timeout),
        args.auto_resume.then_some(true),
    );
    let new = NewSandbox {
        template_id: args.template,
        name: args.name,
        cpu_count: args.cpus,
        memory_mb: args.memory,
        disk_size_mb: args.disk,
        volume_driver: args.driver,
        vmm: args.vmm,
        cold: args.cold,
        env_vars: args.env.into_iter().collect(),
        metadata: args.metadata.into_iter().collect(),
        history: (history != HistoryPolicy::default()).then_some(history),
        allow_internet_access: Some(args.internet),
        lifetime,
        ..NewSandbox::default()
    };
    let made = context.client.create(&new).await?;
    if context.output.is_json() {
        context.output.document(&made)?;
    } else {
        context.output.line(&made.listed.sandbox_id)?;
        if made.listed.name.is_some() {
            context
                .output
                .say(format!("created {}", verb::label(&made)));
        }
    }
    Ok(ExitCode::SUCCESS)
}
