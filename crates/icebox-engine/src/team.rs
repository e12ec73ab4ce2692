//! Teams: whose a sandbox or a template is.
//!
//! The engine knows a team as a label. It keeps teams apart in names and look-ups: through a handle that is
//! [of a team](crate::Engine::of_team), what another team has does not exist, except for its public templates. Who may
//! have which handle is for whoever serves the engine to decide.

use crate::id::Team;

/// Whose sandboxes and templates a look-up finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Everybody's. What is made is the default team's, and so is a name that several teams have.
    #[default]
    Everything,
    /// One team's, and public templates. A name that is the team's own and somebody's public template is its own.
    Team(Team),
}

impl Scope {
    /// Whose the things are that are made or that come first.
    #[must_use]
    pub fn team(&self) -> Team {
        match self {
            Self::Everything => Team::default(),
            Self::Team(team) => team.clone(),
        }
    }

    /// Whether what this team has is seen, and may be changed.
    #[must_use]
    pub fn owns(&self, team: &Team) -> bool {
        match self {
            Self::Everything => true,
            Self::Team(own) => own == team,
        }
    }
}
