//! `icebox events`

use std::process::ExitCode;

use futures_util::TryStreamExt as _;

use super::{Context, Ended};
use crate::output::NONE;

/// Print what happens to sandboxes, in order.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Begin after the event with this number; 0 is the oldest that is kept.
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,

    /// Wait for more after the newest event: the default.
    #[arg(short, long, conflicts_with = "no_follow")]
    follow: bool,

    /// Stop with the newest event instead of waiting for more.
    #[arg(long)]
    no_follow: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let follow = args.follow || !args.no_follow;
    let since = args.since.or((!follow).then_some(0));
    let mut events = std::pin::pin!(context.client.events(since, follow).await?);
    while let Some(event) = events.try_next().await? {
        if context.output.is_json() {
            context.output.document(&event)?;
        } else {
            let detail = if event.detail.is_empty() {
                String::new()
            } else {
                format!("  {}", event.detail)
            };
            context.output.line(format!(
                "{:>6}  {}  {:<21}  {}{detail}",
                event.sequence,
                event.time.strftime("%FT%T%.3fZ"),
                event.sandbox_id.as_deref().unwrap_or(NONE),
                event.event,
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
