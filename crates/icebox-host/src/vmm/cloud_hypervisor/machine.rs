//! One running Cloud Hypervisor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    DiskSwitch, ErrorKind, ExitReason, HostError, Machine, Meter, ProcessIdentity, SavePlan,
    SavedMemory, VcpuState,
};
use icebox_engine::id::SandboxId;
use icebox_engine::unit::{Bytes, PAGE_SIZE};
use rustix::fs::OFlags;

use super::api::{Api, ApiError, QUICK};
use super::config::{self, SAVED_MEMORY, SAVED_STATE};
use crate::blocking::blocking;
use crate::launcher::{Ended, Process};
use crate::vmm::console::Outputs;
use crate::vmm::memory::{self, SaveOutcome};
use crate::vmm::meter::ProcessMeter;
use crate::vmm::watched::{TalkError, Watched};

/// To stop the vCPUs it first finishes the guest's requests in flight.
const FLIP_DEADLINE: Duration = Duration::from_secs(30);
/// All memory, through the page cache. Less than the engine gives a save, so that what failed is known.
const SAVE_DEADLINE: Duration = Duration::from_secs(280);
/// How long memory may take to be loaded in the background before a save. The guest runs meanwhile.
const LOAD_DEADLINE: Duration = Duration::from_secs(25);
/// Between looks at whether it is loaded: the first, and the longest.
const LOAD_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// Largest device state that is accepted. Real ones have some hundred kilobytes.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// Largest guest memory that is believed.
const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// A Cloud Hypervisor and the way to it.
#[derive(Debug)]
pub(super) struct ChMachine {
    vmm: Watched,
    api: Api,
    /// Where it writes its saves.
    save_area: PathBuf,
    /// Whether all memory is known to be there: what a lazy restore loads in the background cannot be saved before.
    is_loaded: Arc<AtomicBool>,
}

impl ChMachine {
    /// Begins to watch a Cloud Hypervisor: its console, its stderr, its end. These go on until it ends, whether or not
    /// this value still exists. `is_loaded` is false if its memory may still be loaded in the background.
    pub(super) fn watch(
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        console_log: PathBuf,
        api: Api,
        save_area: PathBuf,
        is_loaded: bool,
    ) -> Self {
        let reason = |ended, last_words: String| async move { exit_reason(ended, &last_words) };
        let vmm = Watched::begin(
            "Cloud Hypervisor",
            sandbox,
            process,
            outputs,
            console_log,
            reason,
        );
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
                    Err(error) if error.is_still_loading() => {}
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
                request: "the loading of memory",
                after: LOAD_DEADLINE,
            })??;
        self.is_loaded.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl TalkError for ApiError {
    fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
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
        empty(&area).map_err(|error| HostError::io(message.clone(), error))?;
        let request = config::save_request();
        let written = self.api.put("vm.snapshot", Some(&request), SAVE_DEADLINE);
        let written = self.vmm.or_its_end("save", written).await;
        blocking(move || {
            let taken = written.and_then(|()| take(&area, &plan, &message));
            // Also what a save that failed has left.
            let emptied = empty(&area).map_err(|error| HostError::io(message, error));
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
    let how = match ended {
        Ended::Exited(0) => "Cloud Hypervisor exited".to_owned(),
        Ended::Exited(status) => format!("Cloud Hypervisor exited with status {status}"),
        Ended::Signalled(signal) => format!("Cloud Hypervisor was killed by signal {signal}"),
        Ended::Unknown => "Cloud Hypervisor ended".to_owned(),
    };
    let reset = matches!(ended, Ended::Exited(1)) && last_words.contains("rebooting VM");
    let words: Vec<&str> = last_words.lines().collect();
    ExitReason {
        by_guest: reset || ended == Ended::Exited(0),
        detail: match words[..] {
            _ if reset => "the guest reset its machine".to_owned(),
            [] => how,
            _ => format!("{how}: {}", words.join("; ")),
        },
    }
}

/// Removes everything in a directory that the VMM can write to.
fn empty(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Copies a save to where it is kept.
fn take(area: &Path, plan: &SavePlan, message: &str) -> Result<SavedMemory, HostError> {
    let failed = |error| HostError::io(message.to_owned(), error);
    let not_credible = |what: &str, bytes: u64| {
        HostError::new(
            ErrorKind::Invalid,
            format!("{message}: {what} of {bytes} bytes is not credible"),
        )
    };
    let (state, bytes) = open_saved(&area.join(SAVED_STATE)).map_err(failed)?;
    if bytes == 0 || bytes > STATE_BYTES_MAX {
        return Err(not_credible("device state", bytes));
    }
    copy_state(&state, bytes, &plan.device_state).map_err(failed)?;
    let (memory, length) = open_saved(&area.join(SAVED_MEMORY)).map_err(failed)?;
    if length == 0 || length > MEMORY_BYTES_MAX || length % PAGE_SIZE as u64 != 0 {
        return Err(not_credible("guest memory", length));
    }
    let SaveOutcome {
        pages,
        changed,
        zero,
        allocated,
    } = memory::save_file(&memory, length, &plan.memory)
        .map_err(|error| error.into_host(message.to_owned()))?;
    Ok(SavedMemory {
        pages,
        changed_pages: changed,
        zero_pages: zero,
        allocated: Bytes(allocated + bytes.next_multiple_of(4096)),
    })
}

/// A file that the VMM says it has written: nothing that it may have put there instead is followed or waited for.
fn open_saved(path: &Path) -> io::Result<(File, u64)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() {
        Ok((file, meta.len()))
    } else {
        Err(io::Error::other(format!("{} is no file", path.display())))
    }
}

fn copy_state(state: &File, length: u64, path: &Path) -> io::Result<()> {
    let mut bytes = Vec::new();
    state.take(length).read_to_end(&mut bytes)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)?
        .write_all(&bytes)
}
