//! One running Cloud Hypervisor.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{ExitReason, HostError, ProcessIdentity, SavePlan};
use serde_json::Value;

use super::config::{self, SAVED_MEMORY, SAVED_STATE};
use crate::launcher::Ended;
use crate::vmm::api::{Api, ApiError, QUICK};
use crate::vmm::asked::{AskedMachine, FLIP_DEADLINE, Taken, Ways};
use crate::vmm::own_save::SaveArea;
use crate::vmm::watched::how_it_ended;

/// A Cloud Hypervisor and the way to it.
pub(crate) type ChMachine = AskedMachine<ChWays>;

/// How long memory may take to be loaded in the background before a save. The guest runs meanwhile.
const LOAD_DEADLINE: Duration = Duration::from_secs(25);
/// Between looks at whether it is loaded: the first, and the longest.
const LOAD_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// What it says when a save would write pages that it has not loaded yet.
const STILL_LOADING: &str = "on-demand memory restore is still in progress";

/// How it is asked.
#[derive(Debug)]
pub(crate) struct ChWays {
    /// Whether all memory is known to be there: what a lazy restore loads in the background cannot be saved before.
    is_loaded: AtomicBool,
}

impl ChWays {
    /// `is_loaded` is false if memory may still be loaded in the background.
    pub(crate) fn new(is_loaded: bool) -> Self {
        Self {
            is_loaded: AtomicBool::new(is_loaded),
        }
    }
}

#[async_trait]
impl Ways for ChWays {
    const STATE: &'static str = "vm.info";
    const SAVE: &'static str = "vm.snapshot";

    /// What a restore still loads is loaded first, while the guest runs: it stands still for its save alone.
    async fn pause(&self, api: &Api) -> Result<(), ApiError> {
        self.loaded(api).await?;
        api.put("vm.pause", None, FLIP_DEADLINE).await
    }

    async fn resume(&self, api: &Api) -> Result<(), ApiError> {
        api.put("vm.resume", None, FLIP_DEADLINE).await
    }

    /// Waits until all memory is there. The API does not tell; it refuses every save until then, so one is asked for that
    /// nothing can come of.
    async fn loaded(&self, api: &Api) -> Result<(), ApiError> {
        if self.is_loaded.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (mut pause, longest) = LOAD_PAUSES;
        let wait = async {
            loop {
                let asked = config::save_to_nowhere();
                match api.put("vm.snapshot", Some(&asked), QUICK).await {
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
                vmm: api.vmm(),
                request: "the loading of memory",
                after: LOAD_DEADLINE,
            })??;
        self.is_loaded.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// All memory.
    fn save_request(_: &SavePlan) -> Value {
        config::save_request()
    }

    fn take(
        &self,
        area: &SaveArea,
        _: &ProcessIdentity,
        plan: &SavePlan,
        message: &str,
    ) -> Result<Taken, HostError> {
        let state_bytes = area.take_state(SAVED_STATE, &plan.device_state, message)?;
        let (memory, length) = area.open_memory(SAVED_MEMORY, message)?;
        Ok(Taken::AllBut {
            memory,
            length,
            state_bytes,
        })
    }

    /// How it ended. By itself it ends well only when the guest powers off; a guest that resets makes it look for the kernel
    /// again, which is not there any more.
    fn exit_reason(&self, ended: Ended, last_words: &str) -> ExitReason {
        let reset = matches!(ended, Ended::Exited(1)) && last_words.contains("rebooting VM");
        ExitReason {
            by_guest: reset || ended == Ended::Exited(0),
            reset,
            detail: if reset {
                "the guest reset its machine".to_owned()
            } else {
                how_it_ended(super::DIALECT.name, ended, last_words.lines())
            },
        }
    }
}

/// Whether it was refused because memory is still being loaded in the background.
fn is_still_loading(error: &ApiError) -> bool {
    matches!(error, ApiError::Refused { reason, .. } if reason.contains(STILL_LOADING))
}
