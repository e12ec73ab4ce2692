//! Boxes on Linux: a runtime directory, a uid and a cgroup for each VMM.
//!
//! The mount namespace that completes a box is made by the launcher (`launcher`) and goes with the VMM's process.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;

use async_trait::async_trait;
use icebox_engine::host::{Boxes, HostError, Limits, LimitsInForce, Removed};
use icebox_engine::id::{SandboxId, Slot};
use icebox_engine::layout::Layout;

use crate::cgroup::{Cgroups, OVERHEAD_TCG};

/// First uid of the range that boxes use, one per slot. Far above what systems assign to users, and below the range
/// of systemd's containers (524,288) and of subordinate ids of most distributions' newer defaults.
pub const DEFAULT_FIRST_UID: u32 = 400_000;

/// The boxes of one installation.
///
/// Calls do a few small file operations, and block for as long as those take.
#[derive(Debug)]
pub struct HostBoxes {
    layout: Layout,
    cgroups: Cgroups,
    first_uid: u32,
}

impl HostBoxes {
    /// Boxes with runtime directories in `layout`, limits by `cgroups` and uids from `first_uid` on.
    #[must_use]
    pub fn new(layout: Layout, cgroups: Cgroups, first_uid: u32) -> Self {
        Self {
            layout,
            cgroups,
            first_uid,
        }
    }

    /// The uid and gid of a slot's box.
    #[must_use]
    pub fn uid(&self, slot: Slot) -> u32 {
        self.first_uid + u32::from(slot.0)
    }

    /// Limits and usage of boxes.
    #[must_use]
    pub fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }
}

#[async_trait]
impl Boxes for HostBoxes {
    async fn ensure(
        &self,
        sandbox: &SandboxId,
        _slot: Slot,
        limits: Limits,
    ) -> Result<(), HostError> {
        let path = self.layout.vm(sandbox);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|error| HostError::io(format!("create {}", path.display()), error))?;
        // The translator's overhead for KVM too: which of them a box will hold is not known when it is made, and what is
        // not used costs nothing.
        self.cgroups.ensure(sandbox, limits, OVERHEAD_TCG).map(drop)
    }

    async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError> {
        // First, since it fails while something is left in the box.
        let cgroup = self.cgroups.release(sandbox).await?;
        let path = self.layout.vm(sandbox);
        match fs::remove_dir_all(&path) {
            Ok(()) => Ok(Removed::Removed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(cgroup),
            Err(error) => Err(HostError::io(format!("remove {}", path.display()), error)),
        }
    }

    async fn list(&self) -> Result<Vec<SandboxId>, HostError> {
        let directory = self.layout.run().join("vm");
        let failed = |error| HostError::io(format!("list {}", directory.display()), error);
        let mut found: BTreeSet<_> = self.cgroups.list()?.into_iter().collect();
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(found.into_iter().collect());
            }
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            // Names that are not ids are not ours.
            let name = entry.map_err(failed)?.file_name();
            found.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        Ok(found.into_iter().collect())
    }

    fn limits_in_force(&self) -> LimitsInForce {
        self.cgroups.limits_in_force()
    }
}
