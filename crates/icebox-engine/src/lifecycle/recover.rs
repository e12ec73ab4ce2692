//! Recover: what a start does with a sandbox that a previous daemon left, from its manifest alone. And what this daemon
//! does with one whose verb panicked.
//!
//! | the manifest says | what happens |
//! |---|---|
//! | rests nowhere | removed: it was being made or destroyed |
//! | it waits for somebody to ask for it | removed: who asked an earlier daemon has got another, or nothing |
//! | a freeze or a setting aside is intended | finished, or taken back if it had not begun |
//! | `Stopped`, `Paused` | unwound to there: a start, resume or stop that had not ended, a pause that had committed |
//! | `Paused`, and the guest runs on in the VMM that it was paused in | adopted: that pause's commit was in doubt |
//! | `Running`, and its VMM runs | adopted; if a dead capture left the vCPUs standing, they run again |
//! | `Running`, and its VMM does not | `Stopped`, with its newest disk and its last generation on offer |
//!
//! A second start finds nothing to do (INV-30).

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{ExitReason, Machine, VcpuState};
use crate::manifest::v1::{Hold, Rest};
use crate::sandbox::{Chained, Fate, Life, Sandbox};
use crate::steps::Steps;

impl Sandbox {
    pub(crate) async fn recover(&mut self) -> Fate {
        if let Err(error) = self.tend().await {
            self.note("has a manifest in doubt", &error);
        }
        if self.record().waits {
            self.happened(|record| record.rests = Rest::Nowhere).await;
        }
        if self.record().rests != Rest::Running {
            self.leave_guest();
        }
        if self.rests_nowhere() {
            return match self.remove().await {
                Ok(()) => {
                    self.shared.catalog.forget_sandbox(self.id());
                    Fate::Gone
                }
                Err(error) => {
                    self.note("could not be removed", &error);
                    Fate::Lives
                }
            };
        }
        if let Some(machine) = self.ran_on().await {
            self.life = Life::Running(machine);
            self.happened(|record| record.rests = Rest::Running).await;
        }
        if self.record().rests == Rest::Running
            && let Err(error) = self.adopt().await
        {
            self.break_down(format!("its VMM could not be adopted: {}", Chained(&error)))
                .await;
            return Fate::Lives;
        }
        if let Err(error) = self.settle().await {
            self.note("has an unfinished freeze", &error);
        }
        if self.record().rests != Rest::Running
            && let Err(error) = self.unwind().await
        {
            self.note("could not be unwound", &error);
        }
        Fate::Lives
    }

    /// The VMM of a guest that went on after its pause had been written down. It does when nobody could tell whether that
    /// write had happened: the pause failed, and what the guest wrote since is its newest disk (INV-51). A pause that
    /// was done leaves vCPUs that stand still, and a resume that was not done has recorded no process.
    async fn ran_on(&self) -> Option<Arc<dyn Machine>> {
        let Some(Hold::Vmm {
            process: Some(process),
        }) = self.record().holds.last()
        else {
            return None;
        };
        let (Rest::Paused { .. }, Ok(vmm)) = (&self.record().rests, self.vmm()) else {
            return None;
        };
        let running = async {
            let Some(machine) = vmm.adopt(self.id(), Some(process)).await? else {
                return Ok(None);
            };
            // One that ran out of room since did run on.
            Ok((machine.probe().await? != VcpuState::Paused).then_some(machine))
        };
        let running = within(
            deadline::LAUNCH,
            "looking for a guest that runs on",
            running,
        )
        .await;
        running.unwrap_or_default()
    }

    /// Finds the running VMM again. One that is gone, or does not answer, is the end of the run, not of the sandbox.
    async fn adopt(&mut self) -> Result<(), Error> {
        if let Life::Running(machine) = &self.life {
            // It is in hand already, and a VMM may talk to one process at a time.
            let machine = Arc::clone(machine);
            return self.take_over(machine).await;
        }
        let process = self.record().holds.iter().find_map(|hold| match hold {
            Hold::Vmm { process } => process.clone(),
            _ => None,
        });
        let vmm = self.vmm()?;
        let adopted = vmm.adopt(self.id(), process.as_ref());
        let Some(machine) = within(deadline::LAUNCH, "adopting the VMM", adopted).await? else {
            let detail = "its VMM ended while no daemon was running".to_owned();
            self.vmm_ended(&ExitReason {
                by_guest: false,
                reset: false,
                detail,
            })
            .await;
            return Ok(());
        };
        self.take_over(machine).await
    }

    async fn take_over(&mut self, machine: Arc<dyn Machine>) -> Result<(), Error> {
        let state = within(deadline::PROBE, "probing the VMM", machine.probe()).await?;
        if state == VcpuState::Paused {
            within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            )
            .await?;
            self.tell_time_soon();
        }
        self.enter_guest(machine);
        self.schedule_checkpoint_of_adopted();
        self.go_on_idling();
        if self.record().broken.is_some() {
            self.update(|record| record.broken = None).await?;
        }
        Ok(())
    }

    fn note(&self, what: &str, error: &Error) {
        tracing::error!(sandbox = %self.id(), error = %Chained(error), "{what}");
        let detail = format!("{what}: {}", Chained(error));
        self.emit("sandbox.recovery-failed", detail, &Steps::default());
    }
}
