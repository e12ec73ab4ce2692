//! `icebox audit`

use std::process::ExitCode;

use icebox_api::types::AuditRange;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use super::{Context, Ended};
use crate::duration;
use crate::output::NONE;

/// Print what was changed and who asked for it, oldest first.
///
/// Who asked is `key:` and a key's id, or `local:` and the number of the user who had the daemon's socket. What a sandbox
/// did by itself is in `icebox events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Begin after the entry with this number; or with the first of this time, as in `2026-01-31` or `2026-01-31T12:00`, in
    /// UTC; or with what is so long ago: `90m`, `7d`.
    #[arg(long, value_name = "NUMBER|TIME", value_parser = since)]
    since: Option<Since>,
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Number(u64),
    Time(Timestamp),
}

/// What a user means by where to begin.
fn since(text: &str) -> Result<Since, String> {
    if let Ok(number) = text.parse() {
        return Ok(Since::Number(number));
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(Since::Time(time));
    }
    if let Ok(local) = text.parse::<DateTime>() {
        let zoned = local.to_zoned(TimeZone::UTC);
        let zoned = zoned.map_err(|error| error.to_string())?;
        return Ok(Since::Time(zoned.timestamp()));
    }
    duration::seconds(text)
        .ok()
        .and_then(|ago| {
            Timestamp::now()
                .checked_sub(SignedDuration::from_secs(ago))
                .ok()
        })
        .map(Since::Time)
        .ok_or_else(|| "expected an entry's number, a time, or how long ago".to_owned())
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut range = AuditRange::default();
    match args.since {
        Some(Since::Number(number)) => range.since = number,
        Some(Since::Time(time)) => range.from = Some(time),
        None => {}
    }
    loop {
        let entries = context.client.audit(range).await?;
        let Some(last) = entries.last() else {
            return Ok(ExitCode::SUCCESS);
        };
        range.since = last.sequence;
        range.from = None;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_is_a_number_a_time_or_a_length_of_time() {
        assert_eq!(since("7"), Ok(Since::Number(7)));
        let time = |text: &str| match since(text) {
            Ok(Since::Time(time)) => time,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(
            time("2026-01-31T12:00:00Z").to_string(),
            "2026-01-31T12:00:00Z"
        );
        assert!(time("2026-01-31") < time("2026-01-31T12:00:01"));
        let then = time("90m");
        let ago = Timestamp::now().duration_since(then);
        assert!((5400..5460).contains(&ago.as_secs()), "{ago:?}");
        for wrong in ["", "soon", "-1", "2026-13-01", "7 x"] {
            assert!(since(wrong).is_err(), "{wrong:?}");
        }
    }
}
