//! Stop: to `Stopped`, the disk kept and the process gone.
//!
//! Running: the guest writes out its caches (best effort, bounded), then the commit of `Stopped` decides, then the
//! VMM ends. Paused: a new head over the generation's layer; the memory stays listed as a generation.

use crate::error::Error;
use crate::gate::Closed;
use crate::manifest::v1::Rest;
use crate::phase::{Step, Verb};
use crate::sandbox::{Outcome, Sandbox};

impl Sandbox {
    pub(crate) async fn stop(&mut self) -> Result<Outcome, Error> {
        self.stop_through(None).await
    }

    /// Stops the sandbox, through a gate that may be closed already.
    pub(crate) async fn stop_through(&mut self, closed: Option<Closed>) -> Result<Outcome, Error> {
        if self.admit(Verb::Stop).await? == Step::AlreadyThere {
            return Ok(Outcome::AlreadyThere);
        }
        let steps = self.steps.clone();
        if let Rest::Paused { generation } = self.record().rests {
            let catalog = &self.shared.catalog;
            let layer = catalog.generation_disk(self.id(), generation)?;
            let unpacked = self.unpack(layer, Some(generation));
            if let Err(error) = steps.time("unpack-disk", unpacked).await {
                return Err(self.give_back(error).await);
            }
        } else {
            let closed = self.quiet_guest(closed, &steps).await;
            let commit = self.update(|record| record.rests = Rest::Stopped);
            steps.time("commit", commit).await?;
            closed.keep();
            self.leave_guest();
            steps.time("release", self.unwind()).await?;
        }
        self.emit("sandbox.stopped", "its disk is kept", &steps);
        Ok(Outcome::Changed)
    }
}
