//! Who asks, and what they get to see of the daemon.
//!
//! Nothing reaches a [`Daemon`] but through [`Premises::seen_by`], which needs a [`Caller`]: so no route can forget whose
//! sandboxes and templates it is about. What another team has is not there, in every answer; never forbidden, since that
//! would tell that it is there.

use std::sync::Arc;

use crate::{ApiError, Daemon};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Whoever may open the Unix socket: sees everything, and may act for a team.
    Administrator {
        /// The user, as the kernel says.
        uid: Option<u32>,
        /// The team that they act for, and then see as it sees itself.
        team: Option<String>,
    },
    /// Whoever presents one of a team's keys.
    Key {
        /// The key's id: never the key.
        id: String,
        /// The team.
        team: String,
    },
    /// Anybody. What they see is for the way to sandboxes' ports alone, where a sandbox's full id is what one has to know.
    Anybody,
}

impl Caller {
    /// Whether the host is theirs.
    #[must_use]
    pub fn is_administrator(&self) -> bool {
        matches!(self, Self::Administrator { .. })
    }

    /// Whose sandboxes and templates they see. `None`: everybody's.
    #[must_use]
    pub fn team(&self) -> Option<&str> {
        match self {
            Self::Administrator { team, .. } => team.as_deref(),
            Self::Key { team, .. } => Some(team),
            Self::Anybody => None,
        }
    }

    /// What an audit log calls them.
    #[must_use]
    pub fn actor(&self) -> String {
        match self {
            Self::Administrator { uid: Some(uid), .. } => format!("local:{uid}"),
            Self::Administrator { uid: None, .. } => "local".to_owned(),
            Self::Key { id, .. } => format!("key:{id}"),
            Self::Anybody => "anybody".to_owned(),
        }
    }
}

/// What a [server](crate::server::Server) serves: a daemon, as each caller may see it.
pub trait Premises: Send + Sync + 'static {
    /// Who presents this as an API key. `None`: nobody who may come in. Does not block.
    fn caller_of_key(&self, presented: &[u8]) -> Option<Caller>;

    /// Refuses a team that does not exist. Does not block.
    ///
    /// # Errors
    /// There is none of that name.
    fn require_team(&self, team: &str) -> Result<(), ApiError>;

    /// The daemon as `caller` sees it. What they change through it is written down as theirs.
    fn seen_by(&self, caller: &Caller) -> Arc<dyn Daemon>;
}
