//! Why a verb did not do what was asked.

use std::sync::Arc;

use crate::host::{ErrorKind, HostError};
use crate::id::{GenerationNo, Name, Team};
use crate::manifest::ManifestError;
use crate::phase::Refusal;

/// Why a verb did not do what was asked. Whatever the variant, the sandbox rests in a phase again, or is broken and
/// says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such thing.
    #[error("no {kind} is called {wanted:?}")]
    Unknown {
        /// Sandbox, template, generation, driver…
        kind: &'static str,
        /// What was asked for.
        wanted: String,
        /// What there is, or what to do.
        hint: String,
    },
    /// A prefix that several things share.
    #[error("{wanted:?} could be {}", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        wanted: String,
        /// Ids and names that it could mean.
        candidates: Vec<String>,
    },
    /// The name is taken. Nothing is ever overwritten (INV-22).
    #[error("a {kind} called {name} exists already")]
    NameTaken {
        /// Sandbox or template.
        kind: &'static str,
        /// The name.
        name: Name,
    },
    /// The phase does not accept the verb.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What was asked makes no sense, whatever the phase.
    #[error("{message}")]
    Invalid {
        /// What is wrong with it.
        message: String,
        /// What would be right.
        hint: String,
    },
    /// Something else needs it.
    #[error("{what} is in use by {}", users.join(", "))]
    InUse {
        /// What was to be removed.
        what: String,
        /// What needs it.
        users: Vec<String>,
    },
    /// Too many verbs wait for their turn at the sandbox.
    #[error("sandbox {sandbox} is {doing}, and {waiting} requests wait for it already")]
    Busy {
        /// Its name, or its id.
        sandbox: String,
        /// What it is doing.
        doing: &'static str,
        /// How many requests wait.
        waiting: usize,
    },
    /// There is no room for one more.
    #[error("{message}")]
    Exhausted {
        /// What has run out.
        message: String,
        /// What would make room.
        hint: String,
    },
    /// The sandbox's team may not have more.
    #[error(
        "team {team} may have {bound} {what}: {taken} are taken by {}, and this needs {more} more",
        first(users)
    )]
    OverQuota {
        /// Whose limit it is.
        team: Team,
        /// What is bounded, in words.
        what: &'static str,
        /// How much the team may have.
        bound: u64,
        /// How much it has.
        taken: u64,
        /// How much more was asked for.
        more: u64,
        /// The sandboxes that have it.
        users: Vec<String>,
    },
    /// A saved state was made by something else than what would have to restore it (INV-44).
    #[error(
        "cannot restore {what}: it was captured with {field} {captured:?}, and this host has {here:?}"
    )]
    Incompatible {
        /// The generation or template.
        what: String,
        /// Which property differs.
        field: &'static str,
        /// Its value in the capture.
        captured: String,
        /// Its value here.
        here: String,
    },
    /// It is there, but something that it needs is missing or cannot be read. Nothing of it was removed.
    #[error("{what} cannot be used: {why}")]
    Unusable {
        /// The template, generation, layer…
        what: String,
        /// What it lacks.
        why: String,
    },
    /// What was written to the sandbox's disk since its last freeze cannot be read any more.
    #[error("the sandbox's disk is lost: {why}")]
    DiskLost {
        /// What happened to it.
        why: String,
        /// The last pause, which is whole.
        last: Option<GenerationNo>,
    },
    /// There is no such generation.
    #[error("the sandbox has no generation {wanted} (it has {})", list(have))]
    NoGeneration {
        /// What was asked for.
        wanted: GenerationNo,
        /// What there is.
        have: Vec<GenerationNo>,
    },
    /// A step of the verb failed. What it had taken has been given back.
    #[error("{step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: HostError,
    },
    /// A step did not end in its time.
    #[error("{step} did not finish within {seconds} s")]
    Deadline {
        /// What was being done.
        step: &'static str,
        /// Its deadline.
        seconds: u64,
    },
    /// The VMM ended while the verb ran.
    #[error("the VMM ended while {step}: {detail}")]
    VmmEnded {
        /// What was being done.
        step: &'static str,
        /// How it ended.
        detail: String,
    },
    /// A failure that could not be undone either: the sandbox is broken.
    #[error("{stuck} could not be released; the sandbox is broken")]
    Stuck {
        /// The hold that would not go.
        stuck: String,
        /// Why.
        source: HostError,
    },
    /// A bug: the work panicked. What it worked on was brought to where its record says it rests.
    #[error("internal error while {doing}: {detail}")]
    Internal {
        /// What was being done.
        doing: &'static str,
        /// What the panic said.
        detail: String,
    },
    /// A manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The sandbox went away before the verb's turn came.
    #[error("the sandbox was destroyed meanwhile")]
    Destroyed,
    /// Everything that runs is being paused, and nothing new may begin.
    #[error("the daemon is draining: it pauses what runs, and begins nothing new")]
    Draining,
    /// A sandbox was asked for that is paused, and it could not be resumed for that.
    #[error("the sandbox is paused, and could not be resumed for this request")]
    NotWoken {
        /// Why not.
        source: Arc<Error>,
    },
    /// The engine is shutting down.
    #[error("the daemon is stopping")]
    Stopping,
}

/// Names, as many as a message can hold.
fn first(users: &[String]) -> String {
    const SHOWN: usize = 8;
    match users {
        [] => "none".to_owned(),
        few if few.len() <= SHOWN => few.join(", "),
        many => format!(
            "{} and {} more",
            many[..SHOWN].join(", "),
            many.len() - SHOWN
        ),
    }
}

fn list(have: &[GenerationNo]) -> String {
    if have.is_empty() {
        return "none".to_owned();
    }
    have.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

impl Error {
    /// What the user can do, where there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { hint, .. } | Self::Invalid { hint, .. } | Self::Exhausted { hint, .. } => Some(hint.clone()),
            Self::Ambiguous { .. } => Some("give more characters of the id, or the full name".into()),
            Self::NameTaken { kind, .. } => Some(format!("choose another name, or remove the {kind} first")),
            Self::Refused(refusal) => Some(refusal.hint().into_owned()),
            Self::InUse { .. } => Some("remove what uses it first".into()),
            Self::Unusable { .. } => Some(
                "nothing of it was removed: put back what is missing and restart the daemon, or remove what needs it".into(),
            ),
            Self::DiskLost { last, .. } => Some(match last {
                Some(number) => format!("`stop` it, then `resume --generation {number}` goes back to its last pause"),
                None => "it was never paused: take what its guest still has in memory, then `rm` it".into(),
            }),
            Self::Busy { .. } => Some("ask again when they have ended; `icebox inspect` shows what it is doing".into()),
            Self::Incompatible { .. } => {
                Some("restore it with what it was captured with, or boot its disk: a sandbox's by `stop`, then `start`, a template's by `create --cold`".into())
            }
            Self::OverQuota { team, .. } => Some(format!(
                "pause or remove what is not needed, or have the host's administrator raise the limit: `icebox team set {team}`"
            )),
            Self::Step { source, .. } => source.hint_text().map(ToOwned::to_owned),
            Self::Stuck { source, .. } => Some(
                source
                    .hint_text()
                    .unwrap_or("free what holds it, then `icebox rm` the sandbox; a restart of the daemon tries again")
                    .to_owned(),
            ),
            Self::Internal { .. } => {
                Some("this is a bug: please report it with what the daemon's log says; `icebox inspect` shows where the sandbox rests".into())
            }
            Self::Draining => Some("ask again when the daemon has been started again".into()),
            Self::NotWoken { source } => source.hint(),
            Self::Manifest(ManifestError::TooNew { .. } | ManifestError::Unknown { .. }) => {
                Some("install the newer version again".into())
            }
            _ => None,
        }
    }

    /// Whether it says why a verb does not begin, rather than how it failed.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Step { .. }
            | Self::Deadline { .. }
            | Self::VmmEnded { .. }
            | Self::Stuck { .. }
            | Self::Internal { .. }
            | Self::Manifest(_) => false,
            Self::Unknown { .. }
            | Self::Ambiguous { .. }
            | Self::NameTaken { .. }
            | Self::Refused(_)
            | Self::Invalid { .. }
            | Self::InUse { .. }
            | Self::OverQuota { .. }
            | Self::Busy { .. }
            | Self::Exhausted { .. }
            | Self::Incompatible { .. }
            | Self::Unusable { .. }
            | Self::DiskLost { .. }
            | Self::NoGeneration { .. }
            | Self::Destroyed
            | Self::Draining
            | Self::NotWoken { .. }
            | Self::Stopping => true,
        }
    }

    /// A step of the host that failed.
    pub(crate) fn step(step: &'static str) -> impl FnOnce(HostError) -> Self {
        move |source| {
            if source.kind() == ErrorKind::Exhausted && source.hint_text().is_none() {
                let source =
                    source.hint("free some space: `icebox gc`, or remove sandboxes and templates");
                return Self::Step { step, source };
            }
            Self::Step { step, source }
        }
    }
}
