//! What create, start and resume share: from a disk on the host to a guest that runs, and answers.

use std::sync::Arc;

use crate::catalog::PinnedChain;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{GuestOrigin, LaunchPlan, Limits, Machine, Secret, Start, Vmm, Welcome};
use crate::id::{Digest, LayerId};
use crate::layout::{BASE_IMAGE, Object};
use crate::manifest::v1::{Hold, Rest, Sandbox as Record};
use crate::sandbox::Sandbox;
use crate::steps::Steps;

/// Processes and threads in a box: vCPU threads, the VMM's I/O threads and some room.
const PIDS_MAX: u32 = 256;
/// How often a guest is booted that asks for a reset before it answers.
const BOOTS: u32 = 3;

/// The holds between a head and a running guest, in the order they are taken.
pub(super) fn power_holds() -> [Hold; 4] {
    [
        Hold::Disk,
        Hold::Network,
        Hold::Box,
        Hold::Vmm { process: None },
    ]
}

/// A guest that runs.
pub(super) struct Powered {
    machine: Arc<dyn Machine>,
    /// Whether it has said so.
    answers: bool,
}

impl Sandbox {
    /// The layers of a chain that stay open while a disk on it is attached.
    pub(super) fn opened(&self, chain: &PinnedChain) -> Result<Vec<LayerId>, Error> {
        if self.volumes()?.layers_are_whole() {
            return Ok(Vec::new());
        }
        Ok(chain.layers.clone())
    }

    /// Acquires the head and what [`power_holds`] names, all of which is written down already, and brings the guest
    /// to where it answers. On failure the caller gives back.
    ///
    /// A guest that asks for a reset while it boots gets one, as on any machine: VMMs end at a reset, so it is a new one. One
    /// that was restored does not: it may have written to its disk, which its memory then knows nothing of.
    ///
    /// A guest that goes on from its own pause need not answer: what else runs in it is worth as much as it was, and this
    /// is the only way back to it.
    ///
    /// `chain` is the one that the record names as opened.
    pub(super) async fn power_on(
        &mut self,
        chain: &PinnedChain,
        start: Start,
        welcome: Welcome,
        steps: &Steps,
    ) -> Result<Powered, Error> {
        let host = self.shared.host.clone();
        let (volumes, vmm) = (self.volumes()?, self.vmm()?);
        let (slot, spec) = (self.record().slot, self.record().spec.clone());
        let (head, _) = self.head()?;
        let boots_at_most = match start {
            Start::Boot { .. } => BOOTS,
            Start::Restore { .. } => 1,
        };
        let limits = Limits {
            geometry: spec.geometry,
            pids_max: PIDS_MAX,
        };
        if let Some(base) = &chain.base {
            self.require_base(base).await?;
        }

        // Independent of each other, so together. All of them end before a failure is reported, since giving back
        // must not race with taking.
        let disk = async {
            if let Some(base) = &chain.base {
                let import = volumes.ensure_base(base);
                within(deadline::IMPORT, "importing the base", import).await?;
            }
            within(deadline::DISK, "attaching the disk", async {
                volumes.ensure_head(&head, chain).await?;
                volumes.attach(&head, chain).await
            })
            .await
        };
        let network = within(
            deadline::SETUP,
            "setting up the network",
            host.network.ensure(slot, spec.egress),
        );
        let fence = within(
            deadline::SETUP,
            "making the box",
            host.boxes.ensure(self.id(), slot, limits),
        );
        let prepared = futures_util::future::join3(disk, network, fence);
        let (disk, network, fence) = steps.time("prepare", prepared).await;
        let (disk, network) = (disk?, network?);
        fence?;

        let plan = LaunchPlan {
            sandbox: self.id().clone(),
            slot,
            geometry: spec.geometry,
            disk,
            network,
            start,
        };
        let mut boots = 0;
        loop {
            boots += 1;
            let (machine, answers) = self.bring_up(&*vmm, plan.clone(), &welcome, steps).await?;
            let error = match answers {
                Ok(answers) => return Ok(Powered { machine, answers }),
                Err(error) => error,
            };
            let has_ended = matches!(error, Error::VmmEnded { .. });
            if boots == boots_at_most || !has_ended || !machine.exited().await.reset {
                return Err(error);
            }
            tracing::warn!(sandbox = %self.id(), boots, "the guest asked for a reset before it answered, and is booted again");
            let process = machine.process();
            let cleared = vmm.kill(self.id(), Some(&process));
            within(deadline::RELEASE, "clearing away the VMM", cleared).await?;
        }
    }

    /// Starts a VMM, lets its vCPUs run, and waits for the guest: whether it answers, or why not.
    async fn bring_up(
        &self,
        vmm: &dyn Vmm,
        plan: LaunchPlan,
        welcome: &Welcome,
        steps: &Steps,
    ) -> Result<(Arc<dyn Machine>, Result<bool, Error>), Error> {
        let restored = matches!(plan.start, Start::Restore { .. });
        let launched = within(deadline::LAUNCH, "starting the VMM", vmm.launch(plan));
        let machine = steps.time("launch", launched).await?;
        if restored {
            within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            )
            .await?;
        }
        let goes_on = welcome.origin == GuestOrigin::Resume;
        let limit = if goes_on {
            deadline::ANSWER
        } else {
            deadline::WELCOME
        };
        let answer = self.shared.host.guest.welcome(self.address(), welcome);
        let answer = Self::while_alive(&machine, limit, "waiting for the guest", answer);
        let answers = match steps.time("welcome", answer).await {
            Ok(()) => Ok(true),
            Err(Error::Deadline { .. }) if goes_on => Ok(false),
            Err(error) => Err(error),
        };
        Ok((machine, answers))
    }

    /// Refuses a base that is not as long as it was when it was imported. It was cut short from outside, and what a guest
    /// would read where nothing is left would be zeros, and no error.
    async fn require_base(&self, base: &Digest) -> Result<(), Error> {
        let expected = self.shared.catalog.base_size(base)?;
        let store = &self.shared.host.store;
        let image = store.path(&Object::Base(base.clone()), BASE_IMAGE);
        let found = store.file_size(&image);
        let found = within(deadline::STORE, "looking at the base", found).await?;
        if found == expected {
            return Ok(());
        }
        Err(Error::Unusable {
            what: format!("base {}", base.short()),
            why: format!("its image has {} bytes instead of {}", found.0, expected.0),
        })
    }

    /// The commit point of create, start and resume: the guest runs, and the manifest says so.
    pub(super) async fn running(&mut self, powered: Powered) -> Result<(), Error> {
        let Powered { machine, answers } = powered;
        let process = machine.process();
        let now = self.shared.now();
        self.update(|record| {
            record.rests = Rest::Running;
            record.lifetime.begin_run(now);
            record.last_exit = None;
            record.unwelcomed = !answers;
            if let Some(Hold::Vmm { process: recorded }) = record.holds.last_mut() {
                *recorded = Some(process);
            }
        })
        .await?;
        self.enter_guest(machine);
        self.schedule_checkpoint();
        Ok(())
    }

    /// What the guest is told first.
    pub(crate) fn welcome(&self, current_token: Secret, origin: GuestOrigin) -> Welcome {
        Self::welcome_of(self.record(), current_token, origin)
    }

    /// What a guest is told that is to be the sandbox of this record.
    pub(super) fn welcome_of(
        record: &Record,
        current_token: Secret,
        origin: GuestOrigin,
    ) -> Welcome {
        Welcome {
            current_token,
            token: record.token.clone(),
            sandbox: record.id.clone(),
            template: record.spec.template.to_string(),
            hostname: record
                .name
                .as_ref()
                .map_or_else(|| record.id.to_string(), ToString::to_string),
            env: record.spec.env.clone(),
            login: record.spec.login.clone(),
            origin,
        }
    }
}
