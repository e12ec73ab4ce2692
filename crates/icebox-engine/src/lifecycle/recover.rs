//! Recover: what a start does with a sandbox that a previous daemon left, from its manifest alone.
//!
//! | the manifest says | what happens |
//! |---|---|
//! | rests nowhere | removed: it was being made or destroyed |
//! | a freeze or a setting aside is intended | finished, or taken back if it had not begun |
//! | `Stopped`, `Paused` | unwound to there: a start, resume or stop that had not ended, a pause that had committed |
//! | `Running`, and its VMM runs | adopted; if a dead capture left the vCPUs standing, they run again |
//! | `Running`, and its VMM does not | `Stopped`, with its newest disk and its last generation on offer |
//!
//! A second start finds nothing to do (INV-30).

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{ExitReason, VcpuState};
use crate::manifest::v1::{Hold, Rest};
use crate::sandbox::{Chained, Life, Sandbox};

/// What became of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recovered {
    /// It exists.
    Lives,
    /// It was finished removing.
    Gone,
}

impl Sandbox {
    pub(crate) async fn recover(&mut self) -> Recovered {
        if self.rests_nowhere() {
            return match self.remove().await {
                Ok(()) => {
                    self.shared.catalog.forget_sandbox(self.id());
                    Recovered::Gone
                }
                Err(error) => {
                    self.note("could not be removed", &error);
                    Recovered::Lives
                }
            };
        }
        if self.record().rests == Rest::Running
            && let Err(error) = self.adopt().await
        {
            self.break_down(format!("its VMM could not be adopted: {}", Chained(&error)))
                .await;
            return Recovered::Lives;
        }
        if let Err(error) = self.settle().await {
            self.note("has an unfinished freeze", &error);
        }
        if self.record().rests != Rest::Running
            && let Err(error) = self.unwind().await
        {
            self.note("could not be unwound", &error);
        }
        Recovered::Lives
    }

    /// Finds the running VMM again. One that is gone, or does not answer, is the end of the run, not of the sandbox.
    async fn adopt(&mut self) -> Result<(), Error> {
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
                detail,
            })
            .await;
            return Ok(());
        };
        let state = within(deadline::PROBE, "probing the VMM", machine.probe()).await?;
        if state == VcpuState::Paused {
            within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            )
            .await?;
        }
        self.life = Life::Running(machine);
        self.gate.open();
        if self.record().broken.is_some() {
            self.update(|record| record.broken = None).await?;
        }
        Ok(())
    }

    fn note(&self, what: &str, error: &Error) {
        tracing::error!(sandbox = %self.id(), error = %Chained(error), "{what}");
        let detail = format!("{what}: {}", Chained(error));
        self.emit(
            "sandbox.recovery-failed",
            detail,
            &crate::event::Steps::default(),
        );
    }
}
