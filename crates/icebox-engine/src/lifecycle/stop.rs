//! Stop: to `Stopped`, the disk kept and the process gone.
//!
//! Running: the guest writes out its caches (best effort, bounded), then the commit of `Stopped` decides, then the
//! VMM ends. Paused: a new head over the generation's layer; the memory stays listed as a generation.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::manifest::v1::{Hold, Rest, Under};
use crate::phase::{Step, Verb};
use crate::sandbox::{Chained, Outcome, Sandbox};

impl Sandbox {
    pub(crate) async fn stop(&mut self) -> Result<Outcome, Error> {
        if self.admit(Verb::Stop).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        let steps = self.steps.clone();
        if let Rest::Paused { generation } = self.record().rests {
            let unpacked = self.unpack_disk(generation);
            if let Err(error) = steps.time("unpack-disk", unpacked).await {
                return Err(self.give_back(error).await);
            }
        } else {
            let gate = self.gate.clone();
            let closed = steps.time("drain", gate.close(deadline::DRAIN)).await;
            let guest = Arc::clone(&self.shared.host.guest);
            let token = self.record().token.clone();
            let synced = within(
                deadline::PREPARE,
                "syncing the guest",
                guest.sync(self.address(), &token),
            );
            // A guest without room to write answers nothing.
            if !self.stands_still()
                && let Err(error) = steps.time("sync-guest", synced).await
            {
                tracing::info!(sandbox = %self.id(), error = %Chained(&error), "the guest did not sync before the stop");
            }
            let commit = self.update(|record| record.rests = Rest::Stopped);
            steps.time("commit", commit).await?;
            closed.keep();
            self.leave_guest();
            steps.time("release", self.unwind()).await?;
        }
        self.emit("sandbox.stopped", "its disk is kept", &steps);
        Ok(Outcome::Changed)
    }

    /// Puts a head over a generation's disk, and rests there.
    async fn unpack_disk(&mut self, generation: crate::id::GenerationNo) -> Result<(), Error> {
        let layer = self.shared.catalog.generation_disk(self.id(), generation)?;
        let (number, over) = (self.record().next_head, Under::Layer(layer));
        self.update(|record| {
            record.holds.push(Hold::Head {
                number,
                over: over.clone(),
            });
            record.next_head += 1;
        })
        .await?;
        let (volumes, chain) = (self.volumes()?, self.chain(&over)?);
        let head = self.head_id(number);
        within(
            deadline::DISK,
            "making a head",
            volumes.ensure_head(&head, &chain),
        )
        .await?;
        self.update(|record| record.rests = Rest::Stopped).await
    }
}
