//! What a build says while it goes on, and how it ended.

use std::sync::Mutex;

use icebox_api::types::{BuildLogEntry, BuildReason, BuildState};
use jiff::Timestamp;

use super::lock;

/// How many lines of a build are kept: the first ones, and a word that there were more.
const LINES: usize = 20_000;

/// A build's log.
pub(super) struct Log(Mutex<Inner>);

struct Inner {
    state: BuildState,
    lines: Vec<BuildLogEntry>,
    reason: Option<BuildReason>,
}

impl Default for Log {
    fn default() -> Self {
        Self(Mutex::new(Inner {
            state: BuildState::Waiting,
            lines: Vec::new(),
            reason: None,
        }))
    }
}

impl Log {
    pub(super) fn state(&self) -> BuildState {
        lock(&self.0).state
    }

    /// From waiting to building; whether it did wait.
    pub(super) fn begin(&self) -> bool {
        let mut inner = lock(&self.0);
        let waits = inner.state == BuildState::Waiting;
        if waits {
            inner.state = BuildState::Building;
        }
        waits
    }

    pub(super) fn end(&self, failed: Option<BuildReason>) {
        let mut inner = lock(&self.0);
        inner.state = match &failed {
            None => BuildState::Ready,
            Some(_) => BuildState::Error,
        };
        inner.reason = failed;
    }

    /// Adds a line.
    pub(super) fn say(&self, step: &str, level: &str, message: impl Into<String>) {
        let mut inner = lock(&self.0);
        let message = match inner.lines.len() {
            LINES.. => return,
            n if n + 1 == LINES => "no more lines are kept of this build".to_owned(),
            _ => message.into(),
        };
        inner.lines.push(BuildLogEntry {
            timestamp: Timestamp::now(),
            message,
            level: level.to_owned(),
            step: Some(step.to_owned()),
        });
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
