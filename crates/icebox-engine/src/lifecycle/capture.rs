//! Capture: one instant of a running guest, disk and memory together (INV-04).
//!
//! ```text
//!   probe VMM -> prepare guest, begin freeze -> stage
//!   -> pause vCPUs -> device state and changed pages -> flush host -> freeze disk -> [resume vCPUs]
//!   -> [copy what the VMM has saved by itself] -> seal and publish layer, publish memory -> publish what refers to them
//! ```
//!
//! Only what must happen in one instant happens between pausing and resuming the vCPUs. Whatever fails, the guest
//! runs again, the freeze is settled, and staging is gone ([`Sandbox::abandon_capture`], INV-01). vCPUs that cannot
//! be resumed break the sandbox, since nobody may call it running (INV-02).

use futures_util::FutureExt as _;
use futures_util::future::{OptionFuture, join};

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{Machine, Save, SavePlan, SavedPages, VcpuState};
use crate::id::MemoryId;
use crate::layout::{DEVICE_STATE, Object};
use crate::lifecycle::freeze::Freeze;
use crate::manifest;
use crate::manifest::v1::{Capture, Memory, Sandbox as Record};
use crate::metrics::Still;
use crate::sandbox::{Chained, Sandbox, no_room};
use crate::steps::Steps;

/// What the guest does after the instant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// It runs on: snapshot, fork.
    RunsOn,
    /// It stands still until the caller ends it: pause.
    StandsStill,
}

/// How far a capture has come: what there is to clean up if it fails.
pub(super) struct Attempt {
    /// The object that will hold the device state: a generation or a template.
    into: Object,
    memory: MemoryId,
    freeze: Option<Freeze>,
    vcpus_may_stand: bool,
    /// Held while the guest stands still.
    still: Option<Still>,
}

impl Attempt {
    /// Brings the record to what it says once the captured disk is under a new head.
    pub(super) fn record(&self, record: &mut Record) {
        if let Some(freeze) = &self.freeze {
            freeze.record(record);
        }
    }
}

impl Sandbox {
    pub(super) fn begin_capture(&mut self, into: Object) -> Attempt {
        let memory = MemoryId::random();
        self.making(vec![into.clone(), Object::Memory(memory.clone())]);
        Attempt {
            into,
            memory,
            freeze: None,
            vcpus_may_stand: false,
            still: None,
        }
    }

    /// Captures the guest. `document` makes the manifest of [`Attempt::into`]. The caller commits
    /// [`Attempt::record`] and says that the capture is [named](Self::named), or calls
    /// [`abandon_capture`](Self::abandon_capture).
    pub(super) async fn capture(
        &mut self,
        machine: &dyn Machine,
        attempt: &mut Attempt,
        then: Then,
        steps: &Steps,
        document: impl FnOnce(&Capture) -> Vec<u8>,
    ) -> Result<Capture, Error> {
        let host = self.shared.host.clone();

        let token = self.record().token.clone();
        // First, since a freeze that has begun asks the VMM again if it must be taken back.
        let probe = within(deadline::PROBE, "probing the VMM", machine.probe());
        if steps.time("probe", probe).await? == VcpuState::Stalled {
            return Err(no_room());
        }
        let prepare = within(
            deadline::PREPARE,
            "preparing the guest",
            host.guest.prepare(self.address(), &token),
        );
        let beside = Steps::default();
        let prepare = beside.time("prepare-guest", prepare);
        let begin = steps.time("begin-freeze", self.begin_freeze(Some(&attempt.into)));
        let (prepared, freeze) = join(prepare, begin).await;
        steps.append(&beside);
        let answers = prepared.is_ok();
        if let Err(error) = prepared {
            tracing::info!(sandbox = %self.id(), error = %Chained(&error), "the guest did not prepare for the capture");
        }
        let freeze = freeze?;
        let freeze: &Freeze = attempt.freeze.insert(freeze);
        let memory = Object::Memory(attempt.memory.clone());
        let staged = async {
            let into = host.store.stage(&attempt.into);
            let into = within(deadline::STORE, "staging the capture", into).await?;
            let memory = host.store.stage(&memory);
            let memory = within(deadline::STORE, "staging the memory", memory).await?;
            Ok::<_, Error>((into, memory))
        };
        let (into, memory) = steps.time("stage", staged).await?;
        let restored_from = self
            .record()
            .restored_from
            .as_ref()
            .map(|memory| self.memory_source(memory))
            .transpose()?;
        let plan = SavePlan {
            device_state: into.join(DEVICE_STATE),
            memory,
            restored_from,
        };

        attempt.vcpus_may_stand = true;
        attempt.still = Some(self.shared.metrics.hold_still(self.id()));
        steps
            .time(
                "pause-vcpus",
                within(deadline::VCPUS, "pausing the vCPUs", machine.pause_vcpus()),
            )
            .await?;
        let captured_at = self.shared.now();
        let save = steps
            .time(
                "save",
                within(deadline::SAVE, "saving the memory", machine.save(plan)),
            )
            .await?;
        self.freeze_under_guest(machine, freeze, steps).await?;
        if then == Then::RunsOn {
            let resumed = within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            );
            steps.time("resume-vcpus", resumed).await?;
            attempt.vcpus_may_stand = false;
            attempt.still = None;
        }
        // At once, whatever becomes of the capture. Who did not answer before does not hold the verb up again.
        let time = OptionFuture::from((then == Then::RunsOn && answers).then(|| self.tell_time()));
        let kept = async {
            let saved = match save {
                Save::Done(saved) => saved,
                Save::Rest(rest) => {
                    let rest = within(deadline::SAVE, "copying the saved memory", rest);
                    steps.time("copy", rest).await?
                }
            };
            let record = self.record();
            let capture = Capture {
                layer: freeze.layer.clone(),
                memory: attempt.memory.clone(),
                machine: record.machine.clone().ok_or(Error::Destroyed)?,
                sandbox: record.id.clone(),
                token,
                saved,
                captured_at,
            };
            let document = document(&capture);
            let published = self.publish_capture(&attempt.into, freeze, &capture, document);
            steps.time("publish", published).await?;
            Ok(capture)
        };
        let (kept, _) = join(kept, time).await;
        kept
    }

    /// Cleans up after a capture that failed at any point. The guest runs on.
    ///
    /// # Errors
    /// The guest could not be made to run: the sandbox is broken.
    pub(super) async fn abandon_capture(
        &mut self,
        machine: &dyn Machine,
        attempt: Attempt,
    ) -> Result<(), Error> {
        let runs = if attempt.vcpus_may_stand {
            self.run_again(machine).await
        } else {
            Ok(())
        };
        self.discard_staged().await;
        if let Err(error) = self.settle().await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "an unfinished freeze stays pending");
        }
        self.discard_unnamed().await;
        runs
    }

    /// Lets the vCPUs run at the end of a window, however it went.
    ///
    /// # Errors
    /// They do not, though the VMM lives: the sandbox is broken.
    pub(super) async fn run_again(&mut self, machine: &dyn Machine) -> Result<(), Error> {
        let resume = || {
            within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            )
        };
        let resumed = match resume().await {
            Ok(()) => Ok(()),
            Err(_) => resume().await,
        };
        self.tell_time_soon();
        // A VMM that has ended is no guest that stands still: the task notices its end by itself.
        if let Err(error) = resumed
            && machine.exited().now_or_never().is_none()
        {
            self.break_down(format!(
                "its vCPUs could not be resumed: {}",
                Chained(&error)
            ))
            .await;
            return Err(error);
        }
        Ok(())
    }

    /// Makes everything durable, all at once as far as that can be: one commit of the file system's journal then serves
    /// several of them. Nothing that counts refers to what does not exist: a generation does not count before its
    /// sandbox's manifest names it, a template does as soon as it is there, and so comes last.
    async fn publish_capture(
        &self,
        into: &Object,
        freeze: &Freeze,
        capture: &Capture,
        document: Vec<u8>,
    ) -> Result<(), Error> {
        let disk_and_memory = async {
            let (layer, memory) =
                join(self.finish_freeze(freeze), self.publish_memory(capture)).await;
            layer.and(memory)
        };
        let published = self.shared.host.store.publish(into, &document);
        let referring = within(deadline::STORE, "publishing the capture", published);
        match into {
            Object::Generation(..) => {
                // To their end, each of them: what fails is cleaned up when nothing is under way any more.
                let (captured, referring) = join(disk_and_memory, referring).await;
                captured.and(referring)
            }
            _ => {
                disk_and_memory.await?;
                referring.await
            }
        }
    }

    async fn publish_memory(&self, capture: &Capture) -> Result<(), Error> {
        let memory = Memory {
            id: capture.memory.clone(),
            pages: capture.saved.pages,
            against: match capture.saved.pages {
                SavedPages::Full => None,
                SavedPages::Diff => self.full_memory_under_guest()?,
            },
            size: capture.machine.geometry.memory(),
            created_at: capture.captured_at,
        };
        let (object, bytes) = (
            Object::Memory(memory.id.clone()),
            manifest::encode(1, &memory),
        );
        let published = self.shared.host.store.publish(&object, &bytes);
        within(deadline::STORE, "publishing the memory", published).await?;
        self.shared.catalog.add_memory(memory);
        Ok(())
    }

    /// The full memory that the running guest maps.
    fn full_memory_under_guest(&self) -> Result<Option<MemoryId>, Error> {
        let restored_from = self.record().restored_from.as_ref();
        restored_from
            .map(|id| {
                self.shared
                    .catalog
                    .memory(id)
                    .map(|memory| memory.against.unwrap_or(memory.id))
            })
            .transpose()
    }
}
