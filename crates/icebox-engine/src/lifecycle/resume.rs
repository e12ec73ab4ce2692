//! Resume: `Paused` to `Running` with memory, devices and disk as they were.
//!
//! 1. Check that this host can restore what was captured (INV-44).
//! 2. Write down what will be held: a new head over the generation's layer, disk device, network, box, VMM, and the
//!    memory that will be mapped.
//! 3. Take it, restore, let the vCPUs run, and wait until the guest answers. One whose agent was wedged when it was
//!    paused does not: after 30 s it runs [without](crate::silence).
//! 4. Commit `Running`. A failure before that gives back everything and leaves `Paused`, whole and retryable
//!    (INV-16): the generation was only read, and the head that was thrown away was new.
//!
//! Resuming a named generation is a [rollback](super::rollback) to it before that: it first sets the newest disk of a
//! stopped sandbox aside as a branch (INV-51).

use crate::error::Error;
use crate::host::{GuestOrigin, MemorySource, Start};
use crate::id::{GenerationNo, MemoryId};
use crate::layout::{DEVICE_STATE, MEMORY_BASE, MEMORY_DIFF, Object};
use crate::lifecycle::power::power_holds;
use crate::manifest::v1::{Capture, Hold, Machine, Point, Rest, Under};
use crate::phase::{Refusal, Step, Verb};
use crate::sandbox::{Outcome, Sandbox};
use crate::steps::Steps;
use crate::unit::Geometry;

impl Sandbox {
    pub(crate) async fn resume(&mut self) -> Result<Outcome, Error> {
        if self.admit(Verb::Resume).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        let Rest::Paused { generation } = self.record().rests else {
            return Err(Refusal::WrongPhase {
                verb: Verb::Resume,
                phase: self.phase(),
            }
            .into());
        };
        let steps = self.steps.clone();
        match self.restore(generation, &steps).await {
            Ok(()) => {
                self.emit(
                    "sandbox.resumed",
                    format!("continues from generation {generation}"),
                    &steps,
                );
                self.say_whether_it_answers();
                Ok(Outcome::Changed)
            }
            Err(error) => Err(self.give_back(error).await),
        }
    }

    pub(crate) async fn resume_generation(
        &mut self,
        number: GenerationNo,
    ) -> Result<Outcome, Error> {
        self.admit(Verb::ResumeGeneration).await?;
        let to = Point::Generation(number);
        self.check_point(&to, true)?;
        // Before anything is set aside for it.
        let _counts = self.shared.catalog.take_power(self.id())?;
        self.go_to(&to).await?;
        self.resume().await
    }

    /// Restores a generation of this sandbox. The caller gives back on failure.
    pub(super) async fn restore(
        &mut self,
        number: GenerationNo,
        steps: &Steps,
    ) -> Result<(), Error> {
        let _counts = self.shared.catalog.take_power(self.id())?;
        let capture = self.shared.catalog.generation(self.id(), number)?.capture;
        self.check_restorable(&format!("generation {number}"), &capture)?;
        let machine = self.restored_machine(&capture)?;
        let memory = self.memory_source(&capture.memory)?;
        let head = self.record().next_head;
        let over = Under::Layer(capture.layer.clone());
        let chain = self.chain(&over)?;
        let opened = self.opened(&chain)?;
        let written = self.update(|record| {
            record.holds.push(Hold::Head { number: head, over });
            record.holds.extend(power_holds());
            record.opened = opened;
            record.next_head += 1;
            record.after = Some(number);
            record.machine = Some(machine);
            record.restored_from = Some(capture.memory.clone());
        });
        steps.time("write-down", written).await?;

        let object = Object::Generation(self.id().clone(), number);
        let device_state = self.shared.host.store.path(&object, DEVICE_STATE);
        let origin = if capture.sandbox == *self.id() {
            GuestOrigin::Resume
        } else {
            GuestOrigin::Fork
        };
        let welcome = self.welcome(capture.token, origin);
        let powered = self
            .power_on(
                &chain,
                Start::Restore {
                    device_state,
                    memory,
                },
                welcome,
                steps,
            )
            .await?;
        steps.time("commit", self.running(powered)).await
    }

    /// The files of a memory.
    pub(super) fn memory_source(&self, memory: &MemoryId) -> Result<MemorySource, Error> {
        let path = |id, file| self.shared.host.store.path(&Object::Memory(id), file);
        let memory = self.shared.catalog.memory(memory)?;
        Ok(match memory.against {
            None => MemorySource {
                base: path(memory.id, MEMORY_BASE),
                diff: None,
            },
            Some(full) => MemorySource {
                base: path(full, MEMORY_BASE),
                diff: Some(path(memory.id, MEMORY_DIFF)),
            },
        })
    }

    /// Compares what a capture ran on with what is here, field by field. Not its agent: that is in its memory, and a host
    /// with a newer one can talk to it, or finds that it does not answer.
    pub(super) fn check_restorable(&self, what: &str, capture: &Capture) -> Result<(), Error> {
        let here = self.vmm()?.identity().clone();
        let then = &capture.machine;
        let spec = &self.record().spec;
        let geometry = |g: Geometry| format!("{} vCPUs, {} MiB", g.vcpus, g.mem_mib);
        let fields = [
            ("VMM", &then.vmm.name, &here.name),
            ("VMM version", &then.vmm.version, &here.version),
            ("machine type", &then.vmm.machine, &here.machine),
            ("CPU model", &then.vmm.cpu, &here.cpu),
            ("accelerator", &then.vmm.accelerator, &here.accelerator),
            ("kernel", &then.kernel.to_string(), &spec.kernel.to_string()),
            (
                "geometry",
                &geometry(then.geometry),
                &geometry(spec.geometry),
            ),
        ];
        let differs = |field, captured: &str, here: &str| Error::Incompatible {
            what: what.to_owned(),
            field,
            captured: captured.to_owned(),
            here: here.to_owned(),
        };
        let found = fields
            .into_iter()
            .find(|(_, captured, here)| captured != here);
        if let Some((field, captured, here)) = found {
            return Err(differs(field, captured, here));
        }
        let missing = then.vmm.cpu_features.without(&here.cpu_features);
        if !missing.is_empty() {
            return Err(differs(
                "CPU features",
                &missing.to_string(),
                "none of these",
            ));
        }
        Ok(())
    }

    /// What the guest runs on once a capture is restored here.
    fn restored_machine(&self, capture: &Capture) -> Result<Machine, Error> {
        let vmm = self.vmm()?;
        let mut machine = capture.machine.clone();
        if !vmm.capabilities().keeps_cpu_features {
            machine.vmm.cpu_features = vmm.identity().cpu_features.clone();
        }
        Ok(machine)
    }
}
