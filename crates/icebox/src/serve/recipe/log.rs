//! What a build says while it goes on, and how it ended: in memory to be asked for, and in a file that outlives the daemon.
//!
//! The file has a line of JSON for the build itself and one for each thing that happened, appended when it did and not
//! flushed: what a host that loses its power loses of it is worth no wait.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Mutex;

use icebox_api::types::{BuildLogEntry, BuildReason, BuildState};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::lock;

/// How much of what a build says is kept: the first lines, and a word that there were more. All of it is in memory, and
/// builds run what their users like.
const LINES: usize = 20_000;
const BYTES: usize = 1 << 20;

/// What a line belongs to that no step said.
const INTERRUPTED: &str = "base";

/// A build's log.
pub(super) struct Log(Mutex<Inner>);

struct Inner {
    state: BuildState,
    lines: Vec<BuildLogEntry>,
    /// What is left of [`BYTES`]; `None` once there were more.
    room: Option<usize>,
    reason: Option<BuildReason>,
    file: Option<File>,
}

/// What happened, as the file has it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Entry {
    Said(BuildLogEntry),
    Begun,
    Ended(Option<BuildReason>),
}

impl Default for Log {
    fn default() -> Self {
        Self(Mutex::new(Inner {
            state: BuildState::Waiting,
            lines: Vec::new(),
            room: Some(BYTES),
            reason: None,
            file: None,
        }))
    }
}

impl Log {
    /// A log that is kept in a new file, after a line for `build`.
    pub(super) fn create(path: &Path, build: &impl Serialize) -> io::Result<Self> {
        // What a build says may have secrets in it.
        let mut options = File::options();
        let mut file = options
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        write_line(&mut file, build)?;
        let log = Self::default();
        lock(&log.0).file = Some(file);
        Ok(log)
    }

    /// The build of a file, and its log. One that had begun and had not ended when the daemon did has failed.
    pub(super) fn open<B: for<'a> Deserialize<'a>>(path: &Path) -> io::Result<(B, Self)> {
        let mut lines = BufReader::new(File::open(path)?).lines();
        let build = lines.next().transpose()?.unwrap_or_default();
        let build = serde_json::from_str(&build)?;
        let log = Self::default();
        for line in lines {
            // One may be there in part.
            match serde_json::from_str(&line?) {
                Ok(Entry::Said(line)) => lock(&log.0).lines.push(line),
                Ok(Entry::Begun) => drop(log.begin()),
                Ok(Entry::Ended(reason)) => log.end(reason),
                Err(_) => {}
            }
        }
        if log.state() != BuildState::Waiting && log.state() != BuildState::Building {
            return Ok((build, log));
        }
        let mut file = File::options().append(true).open(path)?;
        file.write_all(b"\n")?;
        lock(&log.0).file = Some(file);
        if log.state() == BuildState::Building {
            let message = "the daemon was restarted while it was building";
            log.say(INTERRUPTED, "error", message);
            log.end(Some(BuildReason {
                message: message.to_owned(),
                step: None,
            }));
        }
        Ok((build, log))
    }

    pub(super) fn state(&self) -> BuildState {
        lock(&self.0).state
    }

    /// From waiting to building; whether it did wait.
    pub(super) fn begin(&self) -> bool {
        let mut inner = lock(&self.0);
        let waits = inner.state == BuildState::Waiting;
        if waits {
            inner.state = BuildState::Building;
            inner.keep(&Entry::Begun);
        }
        waits
    }

    pub(super) fn end(&self, failed: Option<BuildReason>) {
        let mut inner = lock(&self.0);
        inner.state = match &failed {
            None => BuildState::Ready,
            Some(_) => BuildState::Error,
        };
        inner.keep(&Entry::Ended(failed.clone()));
        inner.file = None;
        inner.reason = failed;
    }

    /// Adds a line.
    pub(super) fn say(&self, step: &str, level: &str, message: impl Into<String>) {
        let mut inner = lock(&self.0);
        let Some(room) = inner.room else {
            return;
        };
        let message = message.into();
        inner.room = match inner.lines.len() {
            LINES.. => None,
            _ => room.checked_sub(message.len()),
        };
        let message = match inner.room {
            Some(_) => message,
            None => "no more is kept of what this build says".to_owned(),
        };
        let line = BuildLogEntry {
            timestamp: Timestamp::now(),
            message,
            level: level.to_owned(),
            step: Some(step.to_owned()),
        };
        inner.keep(&Entry::Said(line.clone()));
        inner.lines.push(line);
    }

    /// How far the build is, and its lines from `offset` on.
    pub(super) fn read(
        &self,
        offset: usize,
        limit: usize,
    ) -> (BuildState, Vec<BuildLogEntry>, Option<BuildReason>) {
        let inner = lock(&self.0);
        let lines = inner.lines.iter().skip(offset).take(limit);
        (inner.state, lines.cloned().collect(), inner.reason.clone())
    }
}

impl Inner {
    /// Writes it down. A build goes on if it cannot be: who asks now is told all the same.
    fn keep(&mut self, entry: &Entry) {
        if let Some(file) = &mut self.file
            && let Err(error) = write_line(file, entry)
        {
            tracing::warn!(%error, "a build's log is not kept any further");
            self.file = None;
        }
    }
}

/// Appends a line in one write, so that it is there or not.
fn write_line(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(line)?;
    line.push(b'\n');
    file.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(log: &Log) -> (BuildState, Vec<String>, Option<BuildReason>) {
        let (state, lines, reason) = log.read(0, LINES);
        let lines = lines.into_iter().map(|line| line.message).collect();
        (state, lines, reason)
    }

    #[test]
    fn a_log_is_what_it_was_when_the_daemon_is_restarted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("build");
        let log = Log::create(&path, &"b1").expect("created");
        let open = || Log::open::<String>(&path).expect("it is there");
        assert_eq!(open().1.state(), BuildState::Waiting);
        // It waits on, and begins under the next daemon.
        let (build, log) = {
            drop(log);
            open()
        };
        assert_eq!(build, "b1");
        assert!(log.begin() && !log.begin());
        log.say("0", "info", "one");
        log.say("1", "info", "two\nlines");
        log.end(None);
        let before = said(&log);
        assert_eq!(before.0, BuildState::Ready);
        assert_eq!(said(&open().1), before);
        assert_eq!(said(&open().1), before);
    }

    #[test]
    fn what_is_kept_of_a_build_that_says_much_is_bounded() {
        let (long, many) = (Log::default(), Log::default());
        for _ in 0..200 {
            long.say("0", "info", "x".repeat(16 << 10));
        }
        for _ in 0..2 * LINES {
            many.say("0", "info", "");
        }
        for (log, most) in [(long, 100), (many, LINES + 1)] {
            let (_, lines, _) = log.read(0, 2 * LINES);
            assert!(lines.len() <= most, "{}", lines.len());
            assert!(lines.last().expect("lines").message.contains("no more"));
        }
    }

    #[test]
    fn a_build_that_was_interrupted_has_failed_and_keeps_what_it_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("build");
        let log = Log::create(&path, &"b1").expect("created");
        log.begin();
        log.say("0", "info", "one");
        // The daemon is killed in the middle of a line.
        let mut file = File::options()
            .append(true)
            .open(&path)
            .expect("it is there");
        file.write_all(b"{\"said\":{\"mess").expect("written");
        for _ in 0..2 {
            let (_, log) = Log::open::<String>(&path).expect("it is there");
            let (state, lines, reason) = said(&log);
            assert_eq!(state, BuildState::Error);
            assert_eq!(lines.len(), 2, "{lines:?}");
            assert_eq!(lines[0], "one");
            assert!(reason.expect("a reason").message.contains("restarted"));
        }
    }
}
