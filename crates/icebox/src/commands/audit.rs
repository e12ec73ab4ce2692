//! `icebox audit`

use std::process::ExitCode;

use icebox_api::types::AuditRange;

use super::{Context, Ended};
use crate::output::NONE;

/// Print what was changed and who asked for it, oldest first.
///
/// Who asked is `key:` and a key's id, or `local:` and the number of the user who had the daemon's socket. What a sandbox
/// did by itself is in `icebox events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Begin after the entry with this number.
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 0,
        hide_default_value = true
    )]
    since: u64,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut range = AuditRange {
        since: args.since,
        limit: None,
    };
    loop {
        let entries = context.client.audit(range).await?;
        let Some(last) = entries.last() else {
            return Ok(ExitCode::SUCCESS);
        };
        range.since = last.sequence;
        for entry in entries {
            if context.output.is_json() {
                context.output.document(&entry)?;
                continue;
            }
            let target = match entry.target.as_str() {
                "" => NONE,
                target => target,
            };
            context.output.line(format!(
                "{:>6}  {}  {:<17}  {:<18}  {target:<21}  {}",
                entry.sequence,
                entry.time.strftime("%FT%T%.3fZ"),
                entry.actor,
                entry.verb,
                entry.outcome.as_deref().unwrap_or("no end"),
            ))?;
        }
    }
}
