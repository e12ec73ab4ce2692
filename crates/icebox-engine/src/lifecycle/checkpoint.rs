//! Checkpoint: a generation of a guest that runs on.
//!
//! 1. Capture the guest into the next generation; it stands still for the instant alone, and connections to it live
//!    through it.
//! 2. Commit: the generation is listed, and the disk has a new head. Before this write there is no generation.
//!
//! A fork of a running sandbox begins with one: the forks need an instant that a manifest names while they are made.

use crate::error::Error;
use crate::id::GenerationNo;
use crate::layout::Object;
use crate::lifecycle::capture::Then;
use crate::manifest;
use crate::manifest::v1::{Capture, Generation, MadeBy};
use crate::phase::{Step, Verb};
use crate::sandbox::{Outcome, Sandbox};

impl Sandbox {
    pub(crate) async fn checkpoint(&mut self) -> Result<Outcome, Error> {
        if self.admit(Verb::Checkpoint).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        self.capture_running(Verb::Checkpoint, MadeBy::Checkpoint)
            .await?;
        Ok(Outcome::Changed)
    }

    /// Captures the running guest into the next generation.
    pub(super) async fn capture_running(
        &mut self,
        verb: Verb,
        made_by: MadeBy,
    ) -> Result<Generation, Error> {
        let machine = self.machine(verb)?;
        self.check_opened()?;
        let steps = self.steps.clone();
        let maker = self.generation_maker(made_by);
        let number = self.record().next_generation;
        let object = Object::Generation(self.id().clone(), number);
        let mut attempt = self.begin_capture(object.clone());
        let document = |capture: &Capture| manifest::encode(1, &maker(capture));
        let captured = self
            .capture(&*machine, &mut attempt, Then::RunsOn, &steps, document)
            .await;
        let committed = match captured {
            Ok(capture) => {
                let commit = self.update(|record| {
                    attempt.record(record);
                    record.generations.push(number);
                    record.after = Some(number);
                });
                steps.time("commit", commit).await.map(|()| capture)
            }
            Err(error) => Err(error),
        };
        match committed {
            Ok(capture) => {
                let generation = maker(&capture);
                let catalog = &self.shared.catalog;
                catalog.add_generation(self.id(), generation.clone());
                let detail = format!("generation {number}, by a {made_by}");
                self.emit("sandbox.checkpointed", detail, &steps);
                self.named(&object);
                self.look_back_soon();
                self.schedule_checkpoint();
                Ok(generation)
            }
            Err(error) => {
                self.abandon_capture(&*machine, attempt).await?;
                Err(error)
            }
        }
    }

    /// Makes the next generation of a capture.
    pub(super) fn generation_maker(
        &self,
        made_by: MadeBy,
    ) -> impl Fn(&Capture) -> Generation + use<> {
        let (number, after): (GenerationNo, _) =
            (self.record().next_generation, self.record().after);
        move |capture| Generation {
            number,
            made_by,
            after,
            capture: capture.clone(),
        }
    }
}
