//! Start: `Stopped` to `Running` by a cold boot of the newest disk.
//!
//! 1. Write down what will be held: disk device, network, box, VMM.
//! 2. Take it, boot, and wait until the guest answers.
//! 3. Commit `Running`. A failure before that gives back everything and leaves `Stopped`.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{GuestOrigin, Secret, Start};
use crate::lifecycle::power::power_holds;
use crate::manifest::v1::Machine;
use crate::phase::{Step, Verb};
use crate::sandbox::{Outcome, Sandbox};
use crate::steps::Steps;

impl Sandbox {
    pub(crate) async fn start(&mut self) -> Result<Outcome, Error> {
        if self.admit(Verb::Start).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        let steps = self.steps.clone();
        match self.boot(&steps).await {
            Ok(()) => {
                self.emit("sandbox.started", "booted its newest disk", &steps);
                Ok(Outcome::Changed)
            }
            Err(error) => Err(self.give_back(error).await),
        }
    }

    /// Boots the head that the sandbox holds. The caller gives back on failure.
    pub(super) async fn boot(&mut self, steps: &Steps) -> Result<(), Error> {
        let _counts = self.shared.catalog.take_power(self.id())?;
        let spec = self.record().spec.clone();
        let kernels = Arc::clone(&self.shared.host.kernels);
        let files = within(
            deadline::DISK,
            "finding the kernel",
            kernels.boot_files(&spec.kernel),
        )
        .await?;
        let vmm = self.vmm()?.identity().clone();
        let machine = Machine {
            vmm,
            geometry: spec.geometry,
            kernel: spec.kernel,
            agent: files.agent,
        };
        let (_, under) = self.head()?;
        let chain = self.chain(&under)?;
        let opened = self.opened(&chain)?;
        let written = self.update(|record| {
            record.holds.extend(power_holds());
            record.opened = opened;
            record.machine = Some(machine);
        });
        steps.time("write-down", written).await?;

        let token = Secret::random();
        let welcome = self.welcome(token.clone(), GuestOrigin::Boot);
        let start = Start::Boot {
            kernel: files.kernel,
            initramfs: files.initramfs,
            token,
        };
        let powered = self.power_on(&chain, start, welcome, steps).await?;
        steps.time("commit", self.running(powered)).await
    }
}
