//! What a team may have, as options.

use icebox_api::types::{ChangeTeam, Team, TeamLimits};

use crate::commands::size;
use crate::output::{NONE, mib};

/// A bound, or that there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound(Option<u64>);

fn count(text: &str) -> Result<Bound, String> {
    match text {
        "none" => Ok(Bound(None)),
        number => number
            .parse()
            .map(|number| Bound(Some(number)))
            .map_err(|_| "expected a whole number, or none".to_owned()),
    }
}

fn mebibytes(text: &str) -> Result<Bound, String> {
    match text {
        "none" => Ok(Bound(None)),
        size => {
            let mib = size::mib(size)?;
            let mib = u64::try_from(mib).map_err(|_| "expected a size, or none".to_owned())?;
            Ok(Bound(Some(mib)))
        }
    }
}

/// What a team may have at once; `none` lifts a bound.
#[derive(Debug, clap::Args)]
pub(super) struct Limits {
    /// Sandboxes, whether or not they run.
    #[arg(long, value_name = "COUNT", value_parser = count)]
    sandboxes: Option<Bound>,

    /// Sandboxes that run.
    #[arg(long, value_name = "COUNT", value_parser = count)]
    running: Option<Bound>,

    /// CPUs of sandboxes that run, together.
    #[arg(long, value_name = "COUNT", value_parser = count)]
    cpus: Option<Bound>,

    /// Memory of sandboxes that run, together: 16G, or a number of MiB.
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    memory: Option<Bound>,

    /// The sizes of all sandboxes' disks, together: 500G, or a number of MiB.
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    disk: Option<Bound>,
}

impl Limits {
    pub(super) fn change(&self) -> ChangeTeam {
        let said = |bound: Option<Bound>| bound.map(|Bound(number)| number);
        ChangeTeam {
            sandboxes: said(self.sandboxes),
            running: said(self.running),
            cpu_count: said(self.cpus),
            memory_mb: said(self.memory),
            disk_size_mb: said(self.disk),
        }
    }

    pub(super) fn of_new(&self) -> TeamLimits {
        self.change().applied(TeamLimits::default())
    }
}

/// What a team has of what it may have: `2/5`, or `2` where nothing bounds it.
pub(super) fn cells(team: &Team) -> [String; 5] {
    let (used, limits) = (&team.used, &team.limits);
    let number = |used: u64, limit: Option<u64>| match limit {
        Some(limit) => format!("{used}/{limit}"),
        None => used.to_string(),
    };
    let size = |used: u64, limit: Option<u64>| {
        let used = match used {
            0 => NONE.to_owned(),
            used => mib(used),
        };
        match limit {
            Some(limit) => format!("{used}/{}", mib(limit)),
            None => used,
        }
    };
    [
        number(used.sandboxes, limits.sandboxes),
        number(used.running, limits.running),
        number(used.cpu_count, limits.cpu_count),
        size(used.memory_mb, limits.memory_mb),
        size(used.disk_size_mb, limits.disk_size_mb),
    ]
}
