//! Finding and ending the VMMs of sandboxes, whichever they are: by what the manifest recorded, by their pid files and by
//! their cgroups.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError, ProcessIdentity, Removed};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::Layout;

use crate::boxes::HostBoxes;
use crate::launcher::{Process, is_of_the_kernel};
use crate::pager::{PAGER_PID_FILE, PAGER_STATE};
use crate::vmm::{PID_FILE, read_pager_pid_file, read_pid_file};

/// A killed process may still write out what it has in flight.
const KILL_DEADLINE: Duration = Duration::from_secs(15);

/// Where VMMs of an installation are found.
#[derive(Clone, Debug)]
pub(crate) struct Processes {
    layout: Layout,
    boxes: Arc<HostBoxes>,
}

impl Processes {
    pub(crate) fn new(layout: Layout, boxes: Arc<HostBoxes>) -> Self {
        Self { layout, boxes }
    }

    /// Everything that may be the VMM of this sandbox, or its pager: recorded, or found by its pid file or its cgroup.
    fn candidates(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Vec<Process>, HostError> {
        let failed = |error| HostError::io(format!("find the VMM of sandbox {sandbox}"), error);
        let mut identities: Vec<ProcessIdentity> = recorded.into_iter().cloned().collect();
        let runtime = self.layout.vm(sandbox);
        identities.extend(read_pid_file(&runtime).map_err(failed)?);
        identities.extend(read_pager_pid_file(&runtime).map_err(failed)?);
        let mut found = self.members(sandbox)?;
        for identity in identities {
            if found.iter().all(|process| *process.identity() != identity) {
                found.extend(Process::find(&identity).map_err(failed)?);
            }
        }
        Ok(found)
    }

    /// The processes in the sandbox's group.
    ///
    /// A pid that was read may be anybody's by the time it is used. So each is held first, and the group is asked again:
    /// who holds a pid, is in the group and has not ended since is a member.
    fn members(&self, sandbox: &SandboxId) -> Result<Vec<Process>, HostError> {
        let failed = |error| HostError::io(format!("find the VMM of sandbox {sandbox}"), error);
        let mut held = Vec::new();
        for pid in self.boxes.cgroups().pids(sandbox)? {
            match is_of_the_kernel(pid) {
                Ok(false) => held.extend(Process::open(pid).map_err(failed)?),
                Ok(true) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        if !held.is_empty() {
            let still = self.boxes.cgroups().pids(sandbox)?;
            held.retain(|process| still.contains(&process.identity().pid) && !process.has_ended());
        }
        Ok(held)
    }

    /// The VMM of this sandbox, if it runs.
    ///
    /// # Errors
    /// The host does not say, or there is more than one.
    pub(crate) fn running(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Process>, HostError> {
        let mut found = self.candidates(sandbox, recorded)?;
        let pager = self.pager_identity(sandbox)?;
        found.retain(|process| !process.has_ended() && Some(process.identity()) != pager.as_ref());
        let process = found.pop();
        if found.is_empty() {
            return Ok(process);
        }
        Err(HostError::new(
            ErrorKind::Other,
            format!("sandbox {sandbox} has {} VMMs", found.len() + 1),
        ))
    }

    fn pager_identity(&self, sandbox: &SandboxId) -> Result<Option<ProcessIdentity>, HostError> {
        read_pager_pid_file(&self.layout.vm(sandbox))
            .map_err(|error| HostError::io(format!("find the pager of sandbox {sandbox}"), error))
    }

    /// The pager of this sandbox's VMM, if it runs.
    pub(crate) fn pager(&self, sandbox: &SandboxId) -> Result<Option<Process>, HostError> {
        let Some(identity) = self.pager_identity(sandbox)? else {
            return Ok(None);
        };
        let found = Process::find(&identity).map_err(|error| {
            HostError::io(format!("find the pager of sandbox {sandbox}"), error)
        })?;
        Ok(found.filter(|process| !process.has_ended()))
    }

    /// Ensures that no VMM of this sandbox runs, nor its pager, and that its runtime directory has none of `files` and no pid file.
    ///
    /// # Errors
    /// One would not end, or a file not go.
    pub(crate) async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
        files: &[&str],
    ) -> Result<Removed, HostError> {
        let failed = |error| HostError::io(format!("kill the VMM of sandbox {sandbox}"), error);
        let found = self.candidates(sandbox, recorded)?;
        for process in &found {
            end(process).await?;
        }
        let runtime = self.layout.vm(sandbox);
        for file in files
            .iter()
            .chain([&PID_FILE, &PAGER_PID_FILE, &PAGER_STATE])
        {
            match std::fs::remove_file(runtime.join(file)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(if found.is_empty() {
            Removed::AlreadyAbsent
        } else {
            Removed::Removed
        })
    }
}

/// Kills and waits.
///
/// # Errors
/// It has not ended in time.
pub(crate) async fn end(process: &Process) -> Result<(), HostError> {
    let pid = process.identity().pid;
    process
        .kill()
        .map_err(|error| HostError::io(format!("kill process {pid}"), error))?;
    tokio::time::timeout(KILL_DEADLINE, process.ended())
        .await
        .map_err(|_| {
            HostError::new(
                ErrorKind::Timeout,
                format!("process {pid} has not ended {KILL_DEADLINE:?} after SIGKILL"),
            )
            .hint("it may be waiting for a disk or network file system that does not answer")
        })?;
    Ok(())
}
