//! The manifest of one sandbox, in memory and on disk.
//!
//! [`Ledger::update`] is how a decision is made: the change is durable before it is visible, and one that cannot be
//! made durable did not happen. [`Ledger::assume`] is for what has happened whether or not it can be written down.
//!
//! ```text
//!   certain: disk == memory ──commit fails──> put back ──ok──> certain, nothing changed
//!      ^                                         │fails
//!      └──────── any later commit succeeds ── in doubt: the disk has this record, or one that was to follow it
//! ```
//!
//! In doubt, nothing may go that either of the two manifests names: whoever removes things asks
//! [`in_doubt`](Ledger::in_doubt) first, and whoever begins something [confirms](Ledger::confirm) first.

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
    /// Whether the disk has a manifest of this sandbox that must not be believed instead of `record`.
    begun: bool,
    in_doubt: bool,
}

impl Ledger {
    /// A sandbox that does not exist yet. The first [`update`](Self::update) makes its directory.
    pub(crate) fn new(store: Arc<dyn Store>, record: Sandbox) -> Self {
        Self {
            store,
            revision: 0,
            record,
            begun: false,
            in_doubt: false,
        }
    }

    /// A sandbox as it was found at start.
    pub(crate) fn found(store: Arc<dyn Store>, revision: u64, record: Sandbox) -> Self {
        Self {
            begun: true,
            revision,
            ..Self::new(store, record)
        }
    }

    pub(crate) fn record(&self) -> &Sandbox {
        &self.record
    }

    /// Whether the disk may have another record than memory has.
    pub(crate) fn in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// Commits a change: one atomic, durable replacement of the manifest.
    ///
    /// If that fails, it is not known whether the disk has the old manifest or the new one. So the old one is
    /// committed again, and the change did not happen (INV-11). If that fails too, the ledger is in doubt.
    pub(crate) async fn update(&mut self, change: impl FnOnce(&mut Sandbox)) -> Result<(), Error> {
        let mut next = self.record.clone();
        change(&mut next);
        match self.commit(&next).await {
            Ok(()) => {
                self.record = next;
                Ok(())
            }
            Err(error) => {
                if let Err(again) = self.confirm().await {
                    tracing::error!(sandbox = %self.record.id, error = %again, "the manifest could not be put back after a failed commit");
                }
                Err(error)
            }
        }
    }

    /// Takes in what has happened already. In memory at once; on disk with the next commit, until which the ledger is
    /// in doubt.
    pub(crate) fn assume(&mut self, change: impl FnOnce(&mut Sandbox)) {
        change(&mut self.record);
        self.in_doubt = self.begun;
    }

    /// Ends the doubt, if there is one: commits the record as it is in memory.
    pub(crate) async fn confirm(&mut self) -> Result<(), Error> {
        if !self.in_doubt {
            return Ok(());
        }
        let record = self.record.clone();
        self.commit(&record).await
    }

    async fn commit(&mut self, record: &Sandbox) -> Result<(), Error> {
        self.revision += 1;
        // Until the store has answered, and for good if this future is dropped before, nobody knows what the disk has.
        // The directory of a sandbox that was never committed goes as a whole, whatever it has.
        self.in_doubt = self.begun;
        let object = Object::Sandbox(record.id.clone());
        let bytes = manifest::encode(self.revision, record);
        within(
            deadline::STORE,
            "writing the sandbox's manifest",
            self.store.commit(&object, &bytes),
        )
        .await?;
        (self.begun, self.in_doubt) = (true, false);
        Ok(())
    }
}
