//! How a process ended, and how that is written on the wire.
//!
//! `EndEvent` has a status text in the manner of Go's `os.ProcessState` and an exit code that is -1 for a signal.
//! The signal's number, which a shell reports as 128+n, is in the text only; this module goes both ways.

use crate::proto::process::process_event::EndEvent;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited by itself with this status, 0 to 255.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

/// Signals by the names Go gives them on Linux; the index is the number.
const SIGNAL_NAMES: [&str; 16] = [
    "",
    "hangup",
    "interrupt",
    "quit",
    "illegal instruction",
    "trace/breakpoint trap",
    "aborted",
    "bus error",
    "floating point exception",
    "killed",
    "user defined signal 1",
    "segmentation fault",
    "user defined signal 2",
    "broken pipe",
    "alarm clock",
    "terminated",
];

impl Exit {
    /// The status a shell reports: the code itself, or 128 plus the number of the signal.
    #[must_use]
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    /// The event that tells a client about this end.
    #[must_use]
    pub fn to_event(self) -> EndEvent {
        let (exit_code, exited, status) = match self {
            Self::Code(code) => (code, true, format!("exit status {code}")),
            Self::Signal(signal) => (-1, false, format!("signal: {}", signal_name(signal))),
        };
        let error = (exit_code != 0).then(|| status.clone());
        EndEvent {
            exit_code,
            exited,
            status,
            error,
            ..EndEvent::default()
        }
    }

    /// Reads an event written by [`Exit::to_event`] or by envd.
    ///
    /// A signal whose text is not understood counts as `SIGKILL`: it was a signal, and the number only matters to
    /// whoever prints 128+n.
    #[must_use]
    pub fn from_event(event: &EndEvent) -> Self {
        if event.exited {
            return Self::Code(event.exit_code);
        }
        let name = event.status.strip_prefix("signal: ").unwrap_or_default();
        let name = name.strip_suffix(" (core dumped)").unwrap_or(name);
        let known = SIGNAL_NAMES
            .iter()
            .position(|known| !known.is_empty() && *known == name);
        let signal = known
            .and_then(|n| i32::try_from(n).ok())
            .or_else(|| name.strip_prefix("signal ")?.parse().ok())
            .unwrap_or(9);
        Self::Signal(signal)
    }
}

fn signal_name(signal: i32) -> String {
    match usize::try_from(signal)
        .ok()
        .and_then(|n| SIGNAL_NAMES.get(n))
    {
        Some(name) if !name.is_empty() => (*name).to_owned(),
        _ => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::Exit;

    #[test]
    fn every_end_survives_the_wire() {
        for exit in (0..=255).map(Exit::Code).chain((1..=64).map(Exit::Signal)) {
            assert_eq!(Exit::from_event(&exit.to_event()), exit);
        }
    }

    #[test]
    fn texts_are_those_that_sdks_print() {
        assert_eq!(Exit::Code(3).to_event().status, "exit status 3");
        let killed = Exit::Signal(9).to_event();
        assert_eq!(
            (killed.status.as_str(), killed.exit_code, killed.exited),
            ("signal: killed", -1, false)
        );
        assert_eq!(Exit::Signal(15).shell_code(), 143);
    }
}
