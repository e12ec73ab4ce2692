//! Times on the command line, and what `create` and `timeout` say about a sandbox's lifetime.

use icebox_api::types::{AutoResume, ChangeLifetime, Limit, OnTimeout};

use crate::duration;

/// What becomes of a sandbox whose time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Then {
    /// Pause it: it can be resumed as it was.
    Pause,
    /// Remove it with everything it has.
    Kill,
}

/// Parses `never`, a number of seconds, or a length of time.
pub(super) fn limit(text: &str) -> Result<Limit, String> {
    if text == "never" {
        return Ok(Limit::NEVER);
    }
    let seconds = match text.parse() {
        Ok(seconds) => seconds,
        Err(_) => duration::seconds(text)?,
    };
    match seconds {
        0.. => Ok(Limit::Seconds(seconds)),
        _ => Err("expected a length of time, which is not negative".to_owned()),
    }
}

/// A change as options have it. Whoever speaks of a time says also what becomes of the sandbox, since the daemon's default
/// is E2B's for E2B's time-out.
pub(super) fn change(
    idle_timeout: Option<Limit>,
    timeout: Option<Limit>,
    then: Option<Then>,
    auto_resume: Option<bool>,
) -> ChangeLifetime {
    ChangeLifetime {
        timeout,
        idle_timeout,
        on_timeout: then.map(|then| match then {
            Then::Pause => OnTimeout::Pause,
            Then::Kill => OnTimeout::Kill,
        }),
        auto_resume: auto_resume.map(|enabled| AutoResume { enabled }),
    }
}

/// So many seconds, for people.
pub(super) fn shown(seconds: u64) -> String {
    duration::length(i64::try_from(seconds).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400)] {
            assert_eq!(limit(text), Ok(Limit::Seconds(seconds)), "{text}");
        }
        assert_eq!(limit("never"), Ok(Limit::NEVER));
        for text in ["", "soon", "-5", "-5m", "10x"] {
            assert!(limit(text).is_err(), "{text}");
        }
    }
}
