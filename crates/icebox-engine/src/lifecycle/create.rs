//! Create: from a template, or from an instant of another sandbox, to `Running`. All or nothing.
//!
//! 1. The name and a slot are taken in the catalog; the first commit makes the directory, and rests `Nowhere`: until
//!    the last commit, a crash means that the sandbox never was.
//! 2. Image: a head over the base, then as [start](super::start). Snapshot: a generation 0 with a copy of the device
//!    state, then as [resume](super::resume), with a new identity for the guest (INV-37). A snapshot whose memory is to be
//!    left out: a head over its layer, then as start; another VMM can do that, too.
//! 3. Commit `Running`. A failure before that gives back everything, the directory included.

use std::sync::Arc;

use crate::catalog::Pin;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::id::GenerationNo;
use crate::layout::{DEVICE_STATE, Object};
use crate::manifest;
use crate::manifest::v1::{Generation, Hold, MadeBy, Rest, Under};
use crate::sandbox::{Origin, Sandbox};
use crate::steps::Steps;

/// What a new sandbox begins with.
pub(crate) enum Beginning {
    /// A disk: cold boot.
    Disk {
        /// An image's base, or a snapshot's layer.
        over: Under,
        /// Keeps that until the sandbox refers to it.
        _pin: Pin,
    },
    /// An instant of a guest: restore.
    Instant(Arc<Origin>),
}

impl Sandbox {
    /// Creates the sandbox that the ledger describes and that does not exist yet.
    pub(crate) async fn create(&mut self, beginning: Beginning) -> Result<(), Error> {
        let steps = self.steps.clone();
        let created = match beginning {
            Beginning::Disk { over, _pin } => self.create_from_disk(over, &steps).await,
            Beginning::Instant(origin) => self.create_from_instant(origin, &steps).await,
        };
        match created {
            Ok(()) => {
                self.emit(
                    "sandbox.created",
                    format!("from {}", self.record().spec.template_name),
                    &steps,
                );
                Ok(())
            }
            Err(error) => match self.remove().await {
                Ok(()) => Err(error),
                Err(stuck) => {
                    let cause = crate::sandbox::Chained(&error).to_string();
                    tracing::error!(sandbox = %self.id(), cause, "a failed create could not be undone");
                    Err(stuck)
                }
            },
        }
    }

    async fn create_from_disk(&mut self, over: Under, steps: &Steps) -> Result<(), Error> {
        self.update(|record| {
            record.holds = vec![Hold::Directory, Hold::Slot, Hold::Head { number: 0, over }];
            record.next_head = 1;
        })
        .await?;
        self.boot(steps).await
    }

    async fn create_from_instant(
        &mut self,
        origin: Arc<Origin>,
        steps: &Steps,
    ) -> Result<(), Error> {
        const FIRST: GenerationNo = GenerationNo(0);
        let (from, capture) = (&origin.object, &origin.capture);
        self.check_restorable(&from.to_string(), capture)?;
        self.update(|record| {
            record.holds = vec![Hold::Directory, Hold::Slot];
            record.generations = vec![FIRST];
        })
        .await?;
        let generation = Generation {
            number: FIRST,
            made_by: MadeBy::Create,
            after: None,
            capture: capture.clone(),
        };
        let into = Object::Generation(self.id().clone(), FIRST);
        self.making(vec![into.clone()]);
        let store = Arc::clone(&self.shared.host.store);
        let copied = within(deadline::STORE, "copying the device state", async {
            store.stage(&into).await?;
            store.copy_into_staging(from, DEVICE_STATE, &into).await?;
            store
                .publish(&into, &manifest::encode(1, &generation))
                .await
        });
        let copied = steps.time("copy-device-state", copied).await;
        copied?;
        self.named(&into);
        self.shared.catalog.add_generation(self.id(), generation);
        // The copy is its own, and it refers to the rest by itself.
        drop(origin);
        self.restore(FIRST, steps).await
    }

    /// A sandbox that never was, or is to be no more, rests nowhere.
    pub(crate) fn rests_nowhere(&self) -> bool {
        self.record().rests == Rest::Nowhere
    }
}
