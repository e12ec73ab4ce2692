//! One running Firecracker.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    DiskSwitch, ErrorKind, ExitReason, HostError, Machine, MemorySource, Meter, ProcessIdentity,
    SavePlan, SavedMemory, VcpuState,
};

use super::config::{self, Extent, SAVED_MEMORY, SAVED_STATE};
use crate::blocking::blocking;
use crate::launcher::Ended;
use crate::vmm::api::{Api, ApiError, QUICK};
use crate::vmm::memory::{self, ProcessMemory, SaveError};
use crate::vmm::meter::ProcessMeter;
use crate::vmm::own_save::SaveArea;
use crate::vmm::watched::{Watched, how_it_ended};

/// What it is called, in words.
const NAME: &str = super::DIALECT.name;
/// Its one thread may be busy with a request of the guest's first.
const FLIP_DEADLINE: Duration = Duration::from_secs(30);
/// All memory, to the disk: it flushes what it has written. Less than the engine gives a save, so that what failed is known.
const SAVE_DEADLINE: Duration = Duration::from_secs(280);
/// Memory below the devices' addresses is one piece, what is above them another: 3 GiB, as in `arch/x86_64/layout.rs` of
/// Firecracker's sources. A save checks that it is so.
const BELOW_DEVICES: u64 = 3 << 30;

/// A Firecracker and the way to it.
#[derive(Debug)]
pub(crate) struct FirecrackerMachine {
    vmm: Watched,
    api: Api,
    /// Where it writes its saves.
    save_area: SaveArea,
}

impl FirecrackerMachine {
    /// A Firecracker that is watched.
    pub(crate) fn new(vmm: Watched, api: Api, save_area: SaveArea) -> Self {
        Self {
            vmm,
            api,
            save_area,
        }
    }

    /// Its process, and its end.
    pub(super) fn vmm(&self) -> &Watched {
        &self.vmm
    }

    /// Its API.
    pub(super) fn api(&self) -> &Api {
        &self.api
    }

    /// What it says that the guest does.
    async fn state(&self) -> Result<String, ApiError> {
        let info = self.api.get("/", QUICK).await?;
        let state = info["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| ApiError::Unclear {
            vmm: self.api.vmm(),
            request: "/",
            what: "no state".to_owned(),
        })
    }

    /// Brings the vCPUs to a state, if they are not in it.
    async fn flip(&self, to: &str, request: &str) -> Result<(), ApiError> {
        if self.state().await? == to {
            return Ok(());
        }
        let body = serde_json::json!({ "state": request });
        self.api.patch("/vm", &body, FLIP_DEADLINE).await
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn process(&self) -> ProcessIdentity {
        self.vmm.process().identity().clone()
    }

    async fn probe(&self) -> Result<VcpuState, HostError> {
        match &*self.vmm.or_its_end("probe", self.state()).await? {
            "Running" => Ok(VcpuState::Running),
            "Paused" => Ok(VcpuState::Paused),
            other => Err(self
                .vmm
                .error(ErrorKind::Other, format!("its guest is {other:?}"))),
        }
    }

    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        Ok(Box::new(ProcessMeter::open(self.vmm.process().identity())?))
    }

    async fn pause_vcpus(&self) -> Result<(), HostError> {
        let flip = self.flip("Paused", "Paused");
        self.vmm.or_its_end("pause vCPUs", flip).await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        let flip = self.flip("Running", "Resumed");
        self.vmm.or_its_end("resume vCPUs", flip).await
    }

    /// It writes device state, and memory: all of it if the guest was booted, what has changed since the last save if it was
    /// restored. What has changed since the restore is not taken from that alone, but from the guest's own pages: saves that
    /// failed, or that an earlier daemon made, are of no account.
    async fn save(&self, plan: SavePlan) -> Result<SavedMemory, HostError> {
        if self.probe().await? != VcpuState::Paused {
            return Err(self.vmm.error(ErrorKind::Invalid, "save while vCPUs run"));
        }
        let area = self.save_area.clone();
        let message = format!("save the guest of sandbox {}", self.vmm.sandbox());
        area.empty()
            .map_err(|error| HostError::io(message.clone(), error))?;
        let extent = match plan.restored_from {
            Some(_) => Extent::Diff,
            None => Extent::Full,
        };
        let request = config::save_request(extent);
        let written = self
            .api
            .put("/snapshot/create", Some(&request), SAVE_DEADLINE);
        let written = self.vmm.or_its_end("save", written).await;
        let process = self.process();
        blocking(move || {
            let taken = written.and_then(|()| take(&area, &process, &plan, &message));
            // Also what a save that failed has left.
            let emptied = area.empty().map_err(|error| HostError::io(message, error));
            let saved = taken?;
            emptied?;
            Ok(saved)
        })
        .await
    }

    /// Never: a write that finds no room is an error that the guest sees.
    async fn stalled(&self) {
        std::future::pending::<()>().await;
    }

    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        None
    }

    async fn exited(&self) -> ExitReason {
        self.vmm.exited().await
    }
}

/// How it ended. It ends well only when the guest resets its machine, which is also how one is turned off.
pub(crate) fn exit_reason(ended: Ended, last_words: &str) -> ExitReason {
    let by_guest = ended == Ended::Exited(0);
    ExitReason {
        by_guest,
        detail: if by_guest {
            "the guest reset its machine".to_owned()
        } else {
            how_it_ended(NAME, ended, last_words.lines())
        },
    }
}

/// Copies a save to where it is kept.
fn take(
    area: &SaveArea,
    process: &ProcessIdentity,
    plan: &SavePlan,
    message: &str,
) -> Result<SavedMemory, HostError> {
    let bytes = area.take_state(SAVED_STATE, &plan.device_state, message)?;
    let (written, length) = area.open_memory(SAVED_MEMORY, message)?;
    let saved = match &plan.restored_from {
        None => memory::save_file(&written, length, &plan.memory),
        Some(MemorySource { base, .. }) => save_changes(process, base, &written, length, plan),
    };
    let saved = saved.map_err(|error| error.into_host(message.to_owned()))?;
    Ok(saved.with_state(bytes))
}

fn save_changes(
    process: &ProcessIdentity,
    base: &Path,
    written: &File,
    length: u64,
    plan: &SavePlan,
) -> Result<memory::SaveOutcome, SaveError> {
    let failed = |operation, source| SaveError::File {
        operation,
        path: base.to_owned(),
        source,
    };
    let old = File::open(base).map_err(|source| failed("open", source))?;
    let bytes = old.metadata().map_err(|source| failed("look at", source))?;
    if bytes.len() != length {
        let what = format!("{length} bytes were saved");
        return Err(failed("compare", std::io::Error::other(what)));
    }
    let process = ProcessMemory::open(process)?;
    let parts = process.find_parts(base, &parts(length))?;
    memory::save_flat(&process, &parts, (&old, base), written, &plan.memory)
}

/// The pieces that a guest's memory is mapped in.
fn parts(bytes: u64) -> Vec<Range<u64>> {
    let below = bytes.min(BELOW_DEVICES);
    let parts = [0..below, below..bytes];
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_devices_is_a_piece_of_its_own() {
        const GIB: u64 = 1 << 30;
        let ends = |gib: u64| {
            let parts = parts(gib * GIB);
            let ends = parts.iter().map(|part| (part.start / GIB, part.end / GIB));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(ends(1), [(0, 1)]);
        assert_eq!(ends(3), [(0, 3)]);
        assert_eq!(ends(5), [(0, 3), (3, 5)]);
    }
}
