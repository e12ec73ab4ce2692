//! A VMM that is asked over an API and saves by itself, whichever it is: what is asked, in which order, and what is left when
//! it goes wrong.
//!
//! How such VMMs differ is their [`Ways`].

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    DiskSwitch, ErrorKind, ExitReason, HostError, Machine, Meter, ProcessIdentity, Save, SavePlan,
    SavedMemory, VcpuState,
};
use icebox_engine::id::SandboxId;
use serde_json::Value;

use crate::blocking::blocking;
use crate::launcher::{Ended, Process};
use crate::vmm::api::{Api, ApiError, QUICK};
use crate::vmm::console::Outputs;
use crate::vmm::memory;
use crate::vmm::meter::ProcessMeter;
use crate::vmm::own_save::SaveArea;
use crate::vmm::watched::Watched;

/// A VMM may finish what it does for its guest before it stops or lets go of the vCPUs.
pub(super) const FLIP_DEADLINE: Duration = Duration::from_secs(30);
/// All memory, to the page cache or the disk. Less than the engine gives a save, so that what failed is known.
const SAVE_DEADLINE: Duration = Duration::from_secs(280);

/// What is different with each of these VMMs.
#[async_trait]
pub(super) trait Ways: fmt::Debug + Send + Sync + 'static {
    /// Asks what the guest does.
    const STATE: &'static str;
    /// Asks for a save.
    const SAVE: &'static str;

    /// Pauses vCPUs that run.
    async fn pause(&self, api: &Api) -> Result<(), ApiError>;

    /// Lets vCPUs run that are paused.
    async fn resume(&self, api: &Api) -> Result<(), ApiError>;

    /// Waits until a save has all there is to save.
    async fn loaded(&self, api: &Api) -> Result<(), ApiError>;

    /// What goes with the request for a save.
    fn save_request(plan: &SavePlan) -> Value;

    /// Copies what it saved to where it is kept, but for a memory that can wait: a file that the VMM has had open cannot
    /// become immutable. `message` says what is done. Blocking.
    fn take(
        &self,
        area: &SaveArea,
        process: &ProcessIdentity,
        plan: &SavePlan,
        message: &str,
    ) -> Result<Taken, HostError>;

    /// What its end means, by its status and the last that it said.
    fn exit_reason(&self, ended: Ended, last_words: &str) -> ExitReason;
}

/// What was taken of a save.
#[derive(Debug)]
pub(super) enum Taken {
    /// All of it.
    Whole(SavedMemory),
    /// All but the memory, whose file has all there is to know of it: the guest may run while it is copied.
    AllBut {
        memory: File,
        length: u64,
        state_bytes: u64,
    },
}

/// Somebody waits for a copy; dropped, nobody does.
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A VMM and the way to it.
#[derive(Debug)]
pub(super) struct AskedMachine<W> {
    vmm: Watched,
    api: Api,
    /// Where it writes its saves.
    save_area: SaveArea,
    ways: Arc<W>,
}

impl<W: Ways> AskedMachine<W> {
    /// Begins to watch a VMM: its console, its stderr, its end. These go on until it ends, whether or not this value still
    /// exists.
    pub(super) fn watch(
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        console_log: PathBuf,
        api: Api,
        save_area: SaveArea,
        ways: W,
    ) -> Self {
        let ways = Arc::new(ways);
        let asked = Arc::clone(&ways);
        let reason = |ended, words: String| async move { asked.exit_reason(ended, &words) };
        let vmm = Watched::begin(api.vmm(), sandbox, process, outputs, console_log, reason);
        Self {
            vmm,
            api,
            save_area,
            ways,
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
        let info = self.api.get(W::STATE, QUICK).await?;
        let state = info["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| ApiError::Unclear {
            vmm: self.api.vmm(),
            request: W::STATE,
            what: "no state".to_owned(),
        })
    }
}

#[async_trait]
impl<W: Ways> Machine for AskedMachine<W> {
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
        let pause = async {
            match &*self.state().await? {
                "Paused" => Ok(()),
                _ => self.ways.pause(&self.api).await,
            }
        };
        self.vmm.or_its_end("pause vCPUs", pause).await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        let resume = async {
            match &*self.state().await? {
                "Running" => Ok(()),
                _ => self.ways.resume(&self.api).await,
            }
        };
        self.vmm.or_its_end("resume vCPUs", resume).await
    }

    async fn save(&self, plan: SavePlan) -> Result<Save, HostError> {
        if self.probe().await? != VcpuState::Paused {
            return Err(self.vmm.error(ErrorKind::Invalid, "save while vCPUs run"));
        }
        let loaded = self.ways.loaded(&self.api);
        self.vmm.or_its_end("load memory", loaded).await?;
        let area = self.save_area.clone();
        let message = format!("save the guest of sandbox {}", self.vmm.sandbox());
        area.empty()
            .map_err(|error| HostError::io(message.clone(), error))?;
        let request = W::save_request(&plan);
        let written = self.api.put(W::SAVE, Some(&request), SAVE_DEADLINE);
        let written = self.vmm.or_its_end("save", written).await;
        let (process, ways) = (self.process(), Arc::clone(&self.ways));
        let copied_to = plan.memory.clone();
        let failed = message.clone();
        let taken = blocking(move || {
            let taken = written.and_then(|()| ways.take(&area, &process, &plan, &message));
            // Also what a save that failed has left. A memory that is still to be copied is open, and goes with that.
            let emptied = area.empty().map_err(|error| HostError::io(message, error));
            let taken = taken?;
            emptied?;
            Ok(taken)
        })
        .await?;
        Ok(match taken {
            Taken::Whole(saved) => Save::Done(saved),
            Taken::AllBut {
                memory,
                length,
                state_bytes,
            } => {
                let wanted = Wanted(Arc::new(AtomicBool::new(true)));
                let is_wanted = Arc::clone(&wanted.0);
                Save::Rest(Box::pin(async move {
                    let _wanted = wanted;
                    let copied = blocking(move || {
                        let saved = memory::save_file(&memory, length, &copied_to, &is_wanted);
                        let saved = saved.map_err(|error| error.into_host(failed))?;
                        Ok(saved.with_state(state_bytes))
                    });
                    copied.await
                }))
            }
        })
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
