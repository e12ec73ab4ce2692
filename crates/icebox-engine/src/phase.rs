//! Where a sandbox rests, which verbs it accepts there, and where each verb leads.
//!
//! ```text
//!              start            pause
//!   Stopped ----------> Running -------> Paused
//!    ^  ^ |              |   ^            | |
//!    |  | |              |   +-- resume --+ |
//!    |  +-+---- stop ----+                  |
//!    |    +-- resume --generation n --> (Paused n) --> Running
//!    +-------------- stop ------------------+
//! ```
//!
//! `Paused` is memory on disk and no process. After a crash a sandbox is `Stopped` with its newest disk; resuming
//! its last generation from there needs that generation named, because it sets the newest disk aside (INV-51).
//! Rollback goes to any point of a sandbox's history from anywhere: to `Paused` at a generation, to `Stopped` on a branch.
//! Checkpoint, snapshot, fork and flatten leave the phase as it is; destroy leaves nothing.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::GenerationNo;

/// Where a sandbox rests when nothing is happening to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, strum::EnumIter)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// A VMM runs it.
    Running,
    /// Its memory is on disk; no process.
    Paused,
    /// Only its disk.
    Stopped,
}

/// A change that a caller may ask of a sandbox that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, strum::EnumIter)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// Cold-boot from the disk.
    Start,
    /// Memory and devices to disk, process gone.
    Pause,
    /// Back to where the last pause was.
    Resume,
    /// Back to where an earlier pause was, setting the newest disk aside.
    ResumeGeneration,
    /// Back to an earlier point, setting the newest disk aside.
    Rollback,
    /// Process gone, disk kept.
    Stop,
    /// A generation of the guest, which runs on.
    Checkpoint,
    /// A template of disk, memory and devices.
    Snapshot,
    /// More sandboxes like this one.
    Fork,
    /// A template of the disk alone.
    Flatten,
    /// A generation or a branch less.
    Forget,
    /// Nothing left.
    Destroy,
}

/// What an accepted verb means for the phase. `AlreadyThere` makes every verb idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The sandbox will rest here.
    To(Phase),
    /// It does so already: success, and nothing changes (INV-19).
    AlreadyThere,
    /// The verb works on it where it is.
    Stays,
    /// The sandbox will be no more.
    Gone,
}

/// Why a verb was refused, and what to do instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The verb makes no sense in this phase.
    #[error("cannot {verb} a sandbox that is {phase}")]
    WrongPhase {
        /// What was asked.
        verb: Verb,
        /// Where the sandbox rests.
        phase: Phase,
    },
    /// It is not paused, and has been before: there are two ways to have it run.
    #[error(
        "cannot resume a sandbox that is stopped{}",
        .crashed.as_ref().map_or_else(String::new, |why| format!(" since its VMM ended: {why}"))
    )]
    NotPaused {
        /// How its VMM ended, if it did by itself.
        crashed: Option<String>,
        /// The pause to go back to.
        last: GenerationNo,
    },
    /// A failure could not be undone.
    #[error("cannot {verb}: the sandbox is broken ({why})")]
    Broken {
        /// What was asked.
        verb: Verb,
        /// The hold that is stuck, and why.
        why: String,
    },
}

impl Refusal {
    /// What the user can do instead.
    #[must_use]
    pub fn hint(&self) -> Cow<'static, str> {
        let hint = match self {
            Self::NotPaused { last, .. } => {
                return format!(
                    "`start` boots its newest disk; `resume --generation {last}` goes back to its last pause, and keeps that disk as a branch"
                )
                .into();
            }
            Self::Broken { .. } => "only `inspect` and `rm` work on a broken sandbox",
            Self::WrongPhase { verb, phase } => match (verb, phase) {
                (Verb::Start, _) => {
                    "`resume` continues where it was paused; `stop` drops the memory so that `start` boots the disk"
                }
                (Verb::Resume, _) => "`start` boots its disk: it has never been paused",
                (Verb::ResumeGeneration, Phase::Running) => {
                    "`rollback --to N --resume` ends it first, and keeps its newest disk as a branch"
                }
                (Verb::Snapshot | Verb::Fork, _) => {
                    "`start` it first, or `flatten` makes a template of its disk alone"
                }
                _ => "`start` it first",
            },
        };
        hint.into()
    }
}

impl Verb {
    /// Its name, as the command line has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume | Self::ResumeGeneration => "resume",
            Self::Rollback => "rollback",
            Self::Stop => "stop",
            Self::Checkpoint => "checkpoint",
            Self::Snapshot => "snapshot",
            Self::Fork => "fork",
            Self::Flatten => "flatten",
            Self::Forget => "history rm",
            Self::Destroy => "destroy",
        }
    }

    /// The whole transition table, as one pure function.
    ///
    /// # Errors
    /// The phase does not accept the verb.
    pub fn from(self, phase: Phase) -> Result<Step, Refusal> {
        use Phase::{Paused, Running, Stopped};
        match (self, phase) {
            (Self::Start, Stopped)
            | (Self::Resume, Paused)
            | (Self::ResumeGeneration, Stopped | Paused) => Ok(Step::To(Running)),
            (Self::Pause, Running) => Ok(Step::To(Paused)),
            (Self::Stop, Running | Paused) => Ok(Step::To(Stopped)),
            (Self::Start | Self::Resume, Running)
            | (Self::Pause, Paused)
            | (Self::Stop, Stopped) => Ok(Step::AlreadyThere),
            // It is a generation of itself.
            (Self::Checkpoint, Paused) => Ok(Step::AlreadyThere),
            // Or stopped, if the point is a branch.
            (Self::Rollback, _) => Ok(Step::To(Paused)),
            (Self::Checkpoint, Running)
            | (Self::Snapshot | Self::Fork, Running | Paused)
            | (Self::Flatten | Self::Forget, _) => Ok(Step::Stays),
            (Self::Destroy, _) => Ok(Step::Gone),
            (Self::Start, Paused)
            | (
                Self::Pause | Self::Resume | Self::Checkpoint | Self::Snapshot | Self::Fork,
                Stopped,
            )
            | (Self::ResumeGeneration, Running) => Err(Refusal::WrongPhase { verb: self, phase }),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Paused => "paused",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResumeGeneration => "resume a generation of",
            Self::Rollback => "roll back",
            Self::Forget => "forget a part of",
            other => other.name(),
        })
    }
}

#[cfg(test)]
mod tests {
    use strum::IntoEnumIterator as _;

    use super::*;

    #[test]
    fn inv_19_every_verb_that_moves_is_idempotent() {
        for phase in Phase::iter() {
            // What these mean where they lead depends on the point that is asked for.
            let points = [Verb::ResumeGeneration, Verb::Rollback];
            for verb in Verb::iter().filter(|verb| !points.contains(verb)) {
                if let Ok(Step::To(next)) = verb.from(phase) {
                    assert_eq!(
                        verb.from(next),
                        Ok(Step::AlreadyThere),
                        "{verb} twice from {phase}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_phase_can_be_stopped_and_destroyed() {
        for phase in Phase::iter() {
            assert!(Verb::Stop.from(phase).is_ok());
            assert_eq!(Verb::Destroy.from(phase), Ok(Step::Gone));
        }
    }

    #[test]
    fn every_refusal_has_a_hint_that_names_a_verb() {
        for phase in Phase::iter() {
            for verb in Verb::iter() {
                if let Err(refusal) = verb.from(phase) {
                    assert!(refusal.hint().contains('`'), "{refusal}");
                }
            }
        }
    }
}
