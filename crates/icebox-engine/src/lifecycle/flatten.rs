//! Flatten: a disk-only template. The sandbox stays where it is, and stands still for the freeze alone.
//!
//! 1. Freeze the head into a layer (running or stopped), or take the generation's layer (paused).
//! 2. In the background, write that immutable layer out as one raw image, hash it, and publish it as a base and a
//!    template. That is [`crate::Engine`]'s: the sandbox is free for other verbs meanwhile.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{Machine, VcpuState};
use crate::id::LayerId;
use crate::manifest::v1::{Rest, Under};
use crate::phase::Verb;
use crate::sandbox::{Chained, Frozen, Life, Sandbox, no_room};

impl Sandbox {
    pub(crate) async fn freeze_disk(&mut self) -> Result<Frozen, Error> {
        self.admit(Verb::Flatten).await?;
        let layer = match (&self.life, &self.record().rests) {
            (_, Rest::Paused { generation }) => {
                let catalog = &self.shared.catalog;
                catalog.generation_disk(self.id(), *generation)?
            }
            (Life::Running(machine), _) => {
                let machine = Arc::clone(machine);
                self.freeze_running(&*machine).await?
            }
            (Life::AtRest, _) => {
                let steps = self.steps.clone();
                match steps.time("freeze", self.freeze_at_rest()).await {
                    Ok(freeze) => freeze.layer,
                    Err(error) => return Err(self.settle_after(error).await),
                }
            }
        };
        // The sandbox refers to the layer at this moment, so nothing can have collected it.
        Ok(Frozen {
            chain: self.chain(&Under::Layer(layer))?,
        })
    }

    async fn freeze_running(&mut self, machine: &dyn Machine) -> Result<LayerId, Error> {
        self.check_opened()?;
        let steps = self.steps.clone();
        let token = self.record().token.clone();
        let guest = Arc::clone(&self.shared.host.guest);
        let prepare = within(
            deadline::PREPARE,
            "preparing the guest",
            guest.prepare(self.address(), &token),
        );
        if let Err(error) = steps.time("prepare-guest", prepare).await {
            tracing::info!(sandbox = %self.id(), error = %Chained(&error), "the guest did not prepare for the freeze");
        }
        let probe = within(deadline::PROBE, "probing the VMM", machine.probe());
        let state = steps.time("probe", probe).await?;
        if state == VcpuState::Stalled {
            return Err(no_room());
        }
        let freeze = match steps.time("begin-freeze", self.begin_freeze(None)).await {
            Ok(freeze) => freeze,
            Err(error) => return Err(self.settle_after(error).await),
        };
        let frozen = async {
            let paused = within(deadline::VCPUS, "pausing the vCPUs", machine.pause_vcpus());
            steps.time("pause-vcpus", paused).await?;
            self.freeze_under_guest(machine, &freeze, &steps).await
        };
        let frozen = frozen.await;
        let resumed = steps.time("resume-vcpus", self.run_again(machine)).await;
        let finished = match frozen {
            Ok(()) => match steps.time("publish", self.finish_freeze(&freeze)).await {
                Ok(()) => self.update(|record| freeze.record(record)).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        resumed?;
        match finished {
            Ok(()) => {
                self.emit("sandbox.frozen", "its disk, for a flatten", &steps);
                Ok(freeze.layer)
            }
            Err(error) => Err(self.settle_after(error).await),
        }
    }

    /// Settles a freeze that failed, and passes on why.
    async fn settle_after(&mut self, error: Error) -> Error {
        if let Err(pending) = self.settle().await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&pending), "an unfinished freeze stays pending");
        }
        error
    }
}
