//! How sandboxes are shown to clients that know E2B's words alone: they refuse a state that they do not know, and a sandbox
//! without an end.

use jiff::Timestamp;
use jiff::civil::date;
use jiff::tz::TimeZone;

use crate::types::{ListedSandbox, OnTimeout, PauseMode, SandboxDetail, State};

/// The end of a sandbox that has none. Not the last day of the calendar: clients move it to their own time zone.
pub(super) fn never() -> Timestamp {
    let end = date(9999, 1, 1).at(0, 0, 0, 0);
    end.to_zoned(TimeZone::UTC)
        .map_or(Timestamp::MAX, |end| end.timestamp())
}

/// Puts it in E2B's words: a sandbox that is stopped is one that was paused without its memory.
pub(in crate::server) fn put(sandbox: &mut SandboxDetail) {
    sandbox.pause_mode = match sandbox.listed.state {
        State::Paused => Some(PauseMode::Full),
        State::Stopped => Some(PauseMode::Filesystem),
        State::Running | State::Broken => None,
    };
    if let Some(lifecycle) = &mut sandbox.lifecycle
        && lifecycle.on_timeout == OnTimeout::Stop
    {
        lifecycle.on_timeout = OnTimeout::Pause;
    }
    put_listed(&mut sandbox.listed);
}

/// The same of a sandbox in a list.
pub(super) fn put_listed(sandbox: &mut ListedSandbox) {
    sandbox.end_at.get_or_insert_with(never);
    sandbox.state = state(sandbox.state);
}

/// E2B's word for a state.
pub(super) fn state(state: State) -> State {
    match state {
        State::Stopped => State::Paused,
        state => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_ends_when_every_client_can_say() {
        assert_eq!(never().to_string(), "9999-01-01T00:00:00Z");
    }
}
