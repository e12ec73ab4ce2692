//! One running Cloud Hypervisor.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    DiskSwitch, ErrorKind, ExitReason, HostError, Machine, Meter, ProcessIdentity, SavePlan,
    SavedMemory, VcpuState,
};
use icebox_engine::id::SandboxId;

use super::config::{self, SAVED_MEMORY, SAVED_STATE};
use crate::blocking::blocking;
use crate::launcher::{Ended, Process};
use crate::vmm::api::{Api, ApiError, QUICK};
use crate::vmm::console::Outputs;
use crate::vmm::memory;
use crate::vmm::meter::ProcessMeter;
use crate::vmm::own_save::SaveArea;
use crate::vmm::watched::{Watched, how_it_ended};

/// What it is called, in words.
const NAME: &str = super::DIALECT.name;
/// To stop the vCPUs it first finishes the guest's requests in flight.
const FLIP_DEADLINE: Duration = Duration::from_secs(30);
/// All memory, through the page cache. Less than the engine gives a save, so that what failed is known.
const SAVE_DEADLINE: Duration = Duration::from_secs(280);
/// How long memory may take to be loaded in the background before a save. The guest runs meanwhile.
const LOAD_DEADLINE: Duration = Duration::from_secs(25);
/// Between looks at whether it is loaded: the first, and the longest.
const LOAD_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// What it says when a save would write pages that it has not loaded yet.
const STILL_LOADING: &str = "on-demand memory restore is still in progress";

/// A Cloud Hypervisor and the way to it.
#[derive(Debug)]
pub(crate) struct ChMachine {
    vmm: Watched,
    api: Api,
    /// Where it writes its saves.
    save_area: SaveArea,
    /// Whether all memory is known to be there: what a lazy restore loads in the background cannot be saved before.
    is_loaded: Arc<AtomicBool>,
}

impl ChMachine {
    /// Begins to watch a Cloud Hypervisor: its console, its stderr, its end. These go on until it ends, whether or not
    /// this value still exists. `is_loaded` is false if its memory may still be loaded in the background.
    pub(crate) fn watch(
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        console_log: PathBuf,
        api: Api,
        save_area: SaveArea,
        is_loaded: bool,
    ) -> Self {
        let reason = |ended, last_words: String| async move { exit_reason(ended, &last_words) };
        let vmm = Watched::begin(NAME, sandbox, process, outputs, console_log, reason);
        Self {
            vmm,
            api,
            save_area,
            is_loaded: Arc::new(AtomicBool::new(is_loaded)),
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
        let info = self.api.get("vm.info", QUICK).await?;
        let state = info["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| ApiError::Unclear {
            vmm: self.api.vmm(),
            request: "vm.info",
            what: "no state".to_owned(),
        })
    }

    /// Waits until all memory is there. The API does not tell; it refuses every save until then, so one is asked for that
    /// nothing can come of.
    async fn loaded(&self) -> Result<(), ApiError> {
        if self.is_loaded.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (mut pause, longest) = LOAD_PAUSES;
        let wait = async {
            loop {
                let asked = config::save_to_nowhere();
                match self.api.put("vm.snapshot", Some(&asked), QUICK).await {
                    Err(error) if is_still_loading(&error) => {}
                    Ok(()) | Err(ApiError::Refused { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 2);
            }
        };
        tokio::time::timeout(LOAD_DEADLINE, wait)
            .await
            .map_err(|_| ApiError::Timeout {
                vmm: self.api.vmm(),
                request: "the loading of memory",
                after: LOAD_DEADLINE,
            })??;
        self.is_loaded.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether it was refused because memory is still being loaded in the background.
fn is_still_loading(error: &ApiError) -> bool {
    matches!(error, ApiError::Refused { reason, .. } if reason.contains(STILL_LOADING))
}

#[async_trait]
impl Machine for ChMachine {
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

    /// What a restore still loads is loaded first, while the guest runs: it stands still for its save alone.
    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.vmm
            .or_its_end("pause vCPUs", async {
                if self.state().await? == "Paused" {
                    return Ok(());
                }
                self.loaded().await?;
                self.api.put("vm.pause", None, FLIP_DEADLINE).await
            })
            .await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        self.vmm
            .or_its_end("resume vCPUs", async {
                if self.state().await? == "Running" {
                    return Ok(());
                }
                self.api.put("vm.resume", None, FLIP_DEADLINE).await
            })
            .await
    }

    /// It writes all memory to a directory of its own, from where the state and what is not zero is copied: a file that it
    /// has had open cannot become immutable.
    async fn save(&self, plan: SavePlan) -> Result<SavedMemory, HostError> {
        if self.probe().await? != VcpuState::Paused {
            return Err(self.vmm.error(ErrorKind::Invalid, "save while vCPUs run"));
        }
        self.vmm.or_its_end("load memory", self.loaded()).await?;
        let area = self.save_area.clone();
        let message = format!("save the guest of sandbox {}", self.vmm.sandbox());
        area.empty()
            .map_err(|error| HostError::io(message.clone(), error))?;
        let request = config::save_request();
        let written = self.api.put("vm.snapshot", Some(&request), SAVE_DEADLINE);
        let written = self.vmm.or_its_end("save", written).await;
        blocking(move || {
            let taken = written.and_then(|()| take(&area, &plan, &message));
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

/// How it ended. By itself it ends well only when the guest powers off; a guest that resets makes it look for the kernel
/// again, which is not there any more.
fn exit_reason(ended: Ended, last_words: &str) -> ExitReason {
    let reset = matches!(ended, Ended::Exited(1)) && last_words.contains("rebooting VM");
    ExitReason {
        by_guest: reset || ended == Ended::Exited(0),
        detail: if reset {
            "the guest reset its machine".to_owned()
        } else {
            how_it_ended(NAME, ended, last_words.lines())
        },
    }
}

/// Copies a save to where it is kept.
fn take(area: &SaveArea, plan: &SavePlan, message: &str) -> Result<SavedMemory, HostError> {
    let bytes = area.take_state(SAVED_STATE, &plan.device_state, message)?;
    let (memory, length) = area.open_memory(SAVED_MEMORY, message)?;
    let saved = memory::save_file(&memory, length, &plan.memory)
        .map_err(|error| error.into_host(message.to_owned()))?;
    Ok(saved.with_state(bytes))
}
