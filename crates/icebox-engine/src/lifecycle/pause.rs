//! Pause: `Running` to `Paused`. Memory, devices and disk go to the host's disk, and the process goes.
//!
//! 1. Close the gate: requests end by themselves within 5 s, or are cut, and then streams are (INV-07).
//! 2. Capture the guest into the next generation; it stands still from the instant on.
//! 3. Commit `Paused(n)`. Before this write the guest runs again, whatever happened; after it, it never does.
//! 4. End the VMM and give back everything above the slot, the head over the generation's layer included.

use crate::deadline;
use crate::error::Error;
use crate::gate::Closed;
use crate::layout::Object;
use crate::lifecycle::capture::Then;
use crate::manifest;
use crate::manifest::v1::{Capture, MadeBy, Rest};
use crate::phase::{Step, Verb};
use crate::sandbox::{Outcome, Sandbox};

impl Sandbox {
    pub(crate) async fn pause(&mut self) -> Result<Outcome, Error> {
        self.pause_through(None).await
    }

    /// Pauses the sandbox. Its gate may be closed already.
    pub(crate) async fn pause_through(&mut self, closed: Option<Closed>) -> Result<Outcome, Error> {
        if self.admit(Verb::Pause).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        let machine = self.machine(Verb::Pause)?;
        let number = self.record().next_generation;
        let steps = self.steps.clone();

        let gate = self.gate.clone();
        let closed = match closed {
            Some(closed) => closed,
            None => steps.time("drain", gate.close(deadline::DRAIN)).await,
        };

        let maker = self.generation_maker(MadeBy::Pause);
        let object = Object::Generation(self.id().clone(), number);
        let mut attempt = self.begin_capture(object.clone());
        let document = |capture: &Capture| manifest::encode(1, &maker(capture));
        let captured = self
            .capture(&*machine, &mut attempt, Then::StandsStill, &steps, document)
            .await;
        let paused = match captured {
            Ok(capture) => {
                let commit = self.update(|record| {
                    attempt.record(record);
                    record.rests = Rest::Paused { generation: number };
                    record.generations.push(number);
                    record.after = Some(number);
                });
                steps.time("commit", commit).await.map(|()| capture)
            }
            Err(error) => Err(error),
        };
        let capture = match paused {
            Ok(capture) => capture,
            Err(error) => {
                self.abandon_capture(&*machine, attempt).await?;
                return Err(error);
            }
        };
        // Until the catalog has the generation.
        let pin = self.named(&object);
        closed.keep();
        self.leave_guest();
        let saved = capture.saved;
        let generation = maker(&capture);
        self.shared.catalog.add_generation(self.id(), generation);
        drop(pin);
        self.look_back_soon();
        steps.time("release", self.unwind()).await?;
        let detail = format!(
            "generation {number}: {} changed pages, {} on disk",
            saved.changed_pages, saved.allocated
        );
        self.emit("sandbox.paused", detail, &steps);
        Ok(Outcome::Changed)
    }
}
