//! The manifest of one sandbox, in memory and on disk, never apart.
//!
//! [`Ledger::update`] is the only way to change it: the change is durable before it is visible, and a change that
//! cannot be made durable did not happen.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::Store;
use crate::layout::Object;
use crate::manifest;
use crate::manifest::v1::Sandbox;

pub(crate) struct Ledger {
    store: Arc<dyn Store>,
    revision: u64,
    record: Sandbox,
}

impl Ledger {
    /// A sandbox that does not exist yet. The first [`update`](Self::update) makes its directory.
    pub(crate) fn new(store: Arc<dyn Store>, record: Sandbox) -> Self {
        Self {
            store,
            revision: 0,
            record,
        }
    }

    /// A sandbox as it was found at start.
    pub(crate) fn found(store: Arc<dyn Store>, revision: u64, record: Sandbox) -> Self {
        Self {
            store,
            revision,
            record,
        }
    }

    pub(crate) fn record(&self) -> &Sandbox {
        &self.record
    }

    /// Commits a change: one atomic, durable replacement of the manifest.
    ///
    /// If that fails, it is not known whether the disk has the old manifest or the new one. So the old one is
    /// committed again, as best as can be, and the change did not happen (INV-11).
    pub(crate) async fn update(&mut self, change: impl FnOnce(&mut Sandbox)) -> Result<(), Error> {
        let mut next = self.record.clone();
        change(&mut next);
        match self.commit(self.revision + 1, &next).await {
            Ok(()) => {
                self.revision += 1;
                self.record = next;
                Ok(())
            }
            Err(error) => {
                if self.revision > 0
                    && let Err(again) = self.commit(self.revision + 2, &self.record).await
                {
                    tracing::error!(sandbox = %self.record.id, error = %again, "the manifest could not be put back after a failed commit");
                }
                self.revision += 2;
                Err(error)
            }
        }
    }

    async fn commit(&self, revision: u64, record: &Sandbox) -> Result<(), Error> {
        let object = Object::Sandbox(record.id.clone());
        let bytes = manifest::encode(revision, record);
        within(
            deadline::STORE,
            "writing the sandbox's manifest",
            self.store.commit(&object, &bytes),
        )
        .await
    }
}
