//! What verbs leave undone when they fail, and who finishes it: the next verb, or the sandbox's task by itself.
//!
//! | left undone | because | finished by |
//! |---|---|---|
//! | a manifest in doubt | two commits failed | committing the record |
//! | objects that no record names | they would not go | removing them, once the record is certain |
//! | an intent | a freeze could be neither finished nor taken back | asking the driver how far it came |
//! | a creation | its manifest was in doubt | removing it |

use std::time::Duration;

use crate::catalog::Pin;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::layout::Object;
use crate::manifest::v1::Intent;
use crate::sandbox::{Chained, Fate, Sandbox};

/// What a sandbox's verbs have left undone, besides what its record says.
#[derive(Default)]
pub(crate) struct Undone {
    unnamed: Vec<Unnamed>,
    /// How often in a row it could not be finished.
    vain: u32,
}

/// Objects that a verb is making and that no record names yet, or that a verb has failed to make.
struct Unnamed {
    /// Whatever refers to another comes before it: they go in this order, so nothing ever refers to what has gone.
    objects: Vec<Object>,
    /// Keeps them, and what they need, from the collector.
    pin: Pin,
}

impl Sandbox {
    /// Names objects that the verb is about to make. They are removed unless [`named`](Self::named) says that a record
    /// names them.
    pub(crate) fn making(&mut self, objects: Vec<Object>) {
        // The collector knows no generations. Who pins one keeps its sandbox from going.
        let collected = |object: &&Object| !matches!(object, Object::Generation(_, _));
        let pin = self
            .shared
            .catalog
            .pin(objects.iter().filter(collected).cloned());
        self.undone.unnamed.push(Unnamed { objects, pin });
    }

    /// What began with `first` is named by a record now. Its pin, for work that goes on with it.
    pub(crate) fn named(&mut self, first: &Object) -> Option<Pin> {
        let made = self
            .undone
            .unnamed
            .iter()
            .position(|unnamed| unnamed.objects.first() == Some(first));
        made.map(|made| self.undone.unnamed.remove(made).pin)
    }

    /// Removes what was staged and is not published. No manifest names that, not even one in doubt; and a manifest may need
    /// its room to be written.
    pub(crate) async fn discard_staged(&self) {
        let store = &self.shared.host.store;
        for object in self
            .undone
            .unnamed
            .iter()
            .flat_map(|unnamed| &unnamed.objects)
        {
            let discarded = within(
                deadline::STORE,
                "discarding what was staged",
                store.discard(object),
            );
            if let Err(error) = discarded.await {
                tracing::warn!(sandbox = %self.id(), %object, error = %Chained(&error), "not discarded yet");
            }
        }
    }

    /// Removes what no record names. What will not go stays listed for the next try, and keeps what it refers to.
    ///
    /// In doubt, the manifest on the disk may name a generation after all. It names nothing else that is unnamed here.
    pub(crate) async fn discard_unnamed(&mut self) {
        let mut at = 0;
        while let Some(unnamed) = self.undone.unnamed.get(at) {
            let Some(object) = unnamed.objects.first().cloned() else {
                self.undone.unnamed.remove(at);
                continue;
            };
            let may_be_named = self.ledger.in_doubt() && matches!(object, Object::Generation(_, _));
            if !may_be_named && self.discard(&object).await {
                self.undone.unnamed[at].objects.remove(0);
            } else {
                at += 1;
            }
        }
    }

    /// Removes an object that is not needed, staged or in place. Whether it has gone.
    async fn discard(&self, object: &Object) -> bool {
        let store = &self.shared.host.store;
        let discarded = within(deadline::STORE, "discarding what is not needed", async {
            store.discard(object).await?;
            store.trash(object).await
        });
        let discarded = discarded.await;
        if let Err(error) = &discarded {
            tracing::warn!(sandbox = %self.id(), %object, error = %Chained(error), "not removed yet");
        }
        discarded.is_ok()
    }

    /// Finishes what earlier work had to leave undone: the record is made certain, and what it does not name goes.
    ///
    /// # Errors
    /// The record is still in doubt.
    pub(crate) async fn tend(&mut self) -> Result<(), Error> {
        if self.ledger.in_doubt() {
            // On a full disk the record and what is staged would wait for each other.
            self.discard_staged().await;
        }
        self.ledger.confirm().await?;
        self.discard_unnamed().await;
        Ok(())
    }

    /// Whether there is anything to finish that nobody need ask for. What a broken sandbox has begun is not.
    fn is_undone(&self) -> bool {
        let record = self.record();
        let begun = record.intent.is_some() && record.broken.is_none();
        begun || self.ledger.in_doubt() || !self.undone.unnamed.is_empty()
    }

    /// Completes when it is time to [finish](Self::finish_undone) what is left undone: soon, then ever more rarely.
    /// Never, if nothing is.
    pub(crate) fn undone_is_due(&self) -> impl Future<Output = ()> + use<> {
        const FIRST: Duration = Duration::from_millis(100);
        const RAREST: Duration = Duration::from_secs(30);
        let is_undone = self.is_undone();
        let pause = (FIRST * 2_u32.saturating_pow(self.undone.vain.min(16))).min(RAREST);
        async move {
            if is_undone {
                tokio::time::sleep(pause).await;
            } else {
                std::future::pending::<()>().await;
            }
        }
    }

    pub(crate) async fn finish_undone(&mut self) -> Fate {
        self.undone.vain += 1;
        if let Err(error) = self.tend().await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "its manifest is still in doubt");
            return Fate::Lives;
        }
        // A creation that could not be undone for the doubt, which nobody else will come to undo.
        if self.rests_nowhere() && self.remove().await.is_ok() {
            self.shared.catalog.forget_sandbox(self.id());
            return Fate::Gone;
        }
        if let Err(error) = self.finish_intent().await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "what it has begun is still not finished");
        }
        if !self.is_undone() {
            self.undone.vain = 0;
        }
        Fate::Lives
    }

    /// Finishes what a verb had begun and could not finish: a full disk has room again, a VMM answers again.
    async fn finish_intent(&mut self) -> Result<(), Error> {
        if self.record().intent.is_none() || self.record().broken.is_some() {
            return Ok(());
        }
        self.settle().await?;
        self.unwind().await
    }

    /// Finishes an effect that had begun and cannot be undone.
    pub(crate) async fn settle(&mut self) -> Result<(), Error> {
        match self.record().intent.clone() {
            None => Ok(()),
            Some(Intent::Freeze { layer, to }) => self.settle_freeze(&layer, to).await,
            Some(Intent::SetAside {
                layer,
                branch,
                to,
                head,
            }) => self.settle_set_aside(&layer, branch, to, head).await,
        }
    }
}
