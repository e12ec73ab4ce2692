//! Boxes on Linux: a runtime directory, a uid and a cgroup for each VMM.
//!
//! The mount namespace that completes a box is made by the launcher (`launcher`) and goes with the VMM's process.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use async_trait::async_trait;
use icebox_engine::host::{Boxes, HostError, Limits, LimitsInForce, Removed};
use icebox_engine::id::{SandboxId, Slot};
use icebox_engine::layout::Layout;

/// First uid of the range that boxes use, one per slot. Far above what systems assign to users, and below the range
/// of systemd's containers (524,288) and of subordinate ids of most distributions' newer defaults.
pub const DEFAULT_FIRST_UID: u32 = 400_000;

/// The boxes of one installation.
#[derive(Debug)]
pub struct HostBoxes {
    layout: Layout,
    first_uid: u32,
}

impl HostBoxes {
    /// Boxes with runtime directories in `layout` and uids from `first_uid` on.
    #[must_use]
    pub fn new(layout: Layout, first_uid: u32) -> Self {
        Self { layout, first_uid }
    }

    /// The uid and gid of a slot's box.
    #[must_use]
    pub fn uid(&self, slot: Slot) -> u32 {
        self.first_uid + u32::from(slot.0)
    }

    /// Files into which a process writes its pid to enter the box's cgroups.
    #[must_use]
    pub fn cgroup_procs(&self, _sandbox: &SandboxId) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Processes in the box, as far as its cgroup tells.
    ///
    /// # Errors
    /// The cgroup cannot be read.
    pub fn pids(&self, _sandbox: &SandboxId) -> io::Result<Vec<u32>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Boxes for HostBoxes {
    async fn ensure(
        &self,
        sandbox: &SandboxId,
        _slot: Slot,
        _limits: Limits,
    ) -> Result<(), HostError> {
        let path = self.layout.vm(sandbox);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|error| HostError::io(format!("create {}", path.display()), error))
    }

    async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError> {
        let path = self.layout.vm(sandbox);
        match fs::remove_dir_all(&path) {
            Ok(()) => Ok(Removed::Removed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::AlreadyAbsent),
            Err(error) => Err(HostError::io(format!("remove {}", path.display()), error)),
        }
    }

    async fn list(&self) -> Result<Vec<SandboxId>, HostError> {
        let directory = self.layout.run().join("vm");
        let failed = |error| HostError::io(format!("list {}", directory.display()), error);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            // Names that are not ids are not ours.
            let name = entry.map_err(failed)?.file_name();
            found.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        Ok(found)
    }

    fn limits_in_force(&self) -> LimitsInForce {
        LimitsInForce {
            mechanism: "none".into(),
            detail: "cgroups are not used".into(),
        }
    }
}
