//! Destroy: nothing left.
//!
//! 1. Commit `Nowhere`: from here on, every start finishes the job.
//! 2. Shut the gate, end the VMM, and give back every hold down to the directory.
//! 3. Wait, but not for long, until forks that are being made have what they need of its generations.
//! 4. Move the directory to the trash: that is when the sandbox does not exist any more.

use crate::deadline::{self, within};
use crate::error::Error;
use crate::layout::Object;
use crate::manifest::v1::{Intent, Rest};
use crate::sandbox::Sandbox;

impl Sandbox {
    pub(crate) async fn destroy(&mut self) -> Result<(), Error> {
        let steps = self.steps.clone();
        let commit = self.update(|record| record.rests = Rest::Nowhere);
        steps.time("commit", commit).await?;
        self.leave_guest();
        steps.time("release", self.remove()).await?;
        self.emit(
            "sandbox.destroyed",
            crate::catalog::display_name(self.record()),
            &steps,
        );
        self.shared.catalog.forget_sandbox(self.id());
        self.shared.forget_history(self.id());
        Ok(())
    }

    /// Gives back everything, the directory last. The record rests nowhere.
    pub(crate) async fn remove(&mut self) -> Result<(), Error> {
        let object = Object::Sandbox(self.id().clone());
        let intent = self.record().intent.clone();
        self.unwind().await?;
        if let Some(Intent::Freeze { layer, to: head } | Intent::SetAside { layer, head, .. }) =
            &intent
        {
            let head = self.head_id(*head);
            within(
                deadline::DISK,
                "removing an unused head",
                self.volumes()?.remove_head(&head),
            )
            .await?;
            self.making(vec![Object::Layer(layer.clone())]);
        }
        self.discard_unnamed().await;
        let copied = self.shared.catalog.generations_unpinned(self.id());
        if tokio::time::timeout(deadline::COPIES, copied)
            .await
            .is_err()
        {
            tracing::warn!(sandbox = %self.id(), "forks that have not begun will find nothing to begin with");
        }
        let trashed = self.shared.host.store.trash(&object);
        within(deadline::STORE, "moving the sandbox to the trash", trashed)
            .await
            .map(drop)
    }
}
