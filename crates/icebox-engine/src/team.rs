//! Teams: whose a sandbox or a template is.
//!
//! The engine knows a team as a label. It keeps teams apart in names and look-ups: through a handle that is
//! [of a team](crate::Engine::of_team), what another team has does not exist, except for its public templates. Who may
//! have which handle is for whoever serves the engine to decide.

use crate::id::Team;
use crate::manifest::v1::Spec;

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

/// What a team may have at once, whoever asks for it on the team's behalf. What is not said is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Sandboxes, in whatever phase.
    pub sandboxes: Option<u64>,
    /// Sandboxes that run.
    pub running: Option<u64>,
    /// Virtual CPUs of sandboxes that run.
    pub vcpus: Option<u64>,
    /// Memory of guests of sandboxes that run, in MiB.
    pub mem_mib: Option<u64>,
    /// The sizes of all sandboxes' disks as their guests see them, in MiB: what they could come to occupy.
    pub disk_mib: Option<u64>,
}

/// What a team has, counted as its [`Quota`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Sandboxes.
    pub sandboxes: u64,
    /// Sandboxes that run, or are being brought to.
    pub running: u64,
    /// Their virtual CPUs.
    pub vcpus: u64,
    /// Their memory in MiB.
    pub mem_mib: u64,
    /// The sizes of all disks, in MiB.
    pub disk_mib: u64,
}

impl Holdings {
    /// What one sandbox adds to what its team has.
    pub(crate) fn of(spec: &Spec, runs: bool) -> Self {
        let if_running = |number: u64| if runs { number } else { 0 };
        Self {
            sandboxes: 1,
            disk_mib: spec.disk_size.0.div_ceil(1 << 20),
            running: if_running(1),
            vcpus: if_running(spec.geometry.vcpus.into()),
            mem_mib: if_running(spec.geometry.mem_mib.into()),
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes + other.sandboxes,
            running: self.running + other.running,
            vcpus: self.vcpus + other.vcpus,
            mem_mib: self.mem_mib + other.mem_mib,
            disk_mib: self.disk_mib + other.disk_mib,
        }
    }
}

/// A limit that something would go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Over {
    /// What is bounded, in words.
    pub(crate) what: &'static str,
    pub(crate) bound: u64,
    pub(crate) taken: u64,
    pub(crate) more: u64,
    /// Whether only sandboxes that run count.
    pub(crate) of_running: bool,
}

impl Quota {
    /// The first limit that `taken` and `more` together are over. What is not needed more of is not looked at: a limit
    /// that was lowered below what there is keeps nobody from what it does not concern.
    pub(crate) fn over(&self, taken: &Holdings, more: &Holdings) -> Option<Over> {
        let limit = |what, bound: Option<u64>, taken: u64, more: u64, of_running| {
            let bound = bound?;
            (more > 0 && taken + more > bound).then_some(Over {
                what,
                bound,
                taken,
                more,
                of_running,
            })
        };
        limit(
            "sandboxes",
            self.sandboxes,
            taken.sandboxes,
            more.sandboxes,
            false,
        )
        .or_else(|| {
            let what = "MiB of disk";
            limit(what, self.disk_mib, taken.disk_mib, more.disk_mib, false)
        })
        .or_else(|| {
            let what = "running sandboxes";
            limit(what, self.running, taken.running, more.running, true)
        })
        .or_else(|| {
            let what = "vCPUs in running sandboxes";
            limit(what, self.vcpus, taken.vcpus, more.vcpus, true)
        })
        .or_else(|| {
            let what = "MiB of memory in running sandboxes";
            limit(what, self.mem_mib, taken.mem_mib, more.mem_mib, true)
        })
    }
}
