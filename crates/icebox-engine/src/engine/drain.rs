//! Drain: every running sandbox is paused, so that the host may go down.
//!
//! From its beginning on nothing new begins, whoever asks. Verbs that are under way end first, each sandbox's own: a pause
//! waits for its turn like any other verb. One that cannot be paused is named and runs on, and does not stop the others
//! (INV-34).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use futures_util::StreamExt as _;
use tokio::sync::oneshot;

use super::{AT_ONCE, Engine};
use crate::catalog::{Entry, display_name};
use crate::error::Error;
use crate::id::SandboxId;
use crate::manifest::v1::Rest;
use crate::phase::Refusal;
use crate::sandbox::{Chained, Outcome, Request};
use crate::steps::Steps;

/// What a drain did.
#[derive(Debug, Default)]
pub struct Drained {
    /// The sandboxes that it paused, by name or else id.
    pub paused: Vec<String>,
    /// Those that run on, and why.
    pub failed: Vec<(String, Error)>,
}

impl Engine {
    /// Pauses everything that runs, 8 at once, and lets nothing new begin from now on. Ends by itself whether or not
    /// anybody waits for it; safe to repeat.
    ///
    /// # Errors
    /// The engine is going. That a sandbox could not be paused is part of the result.
    pub async fn drain(&self) -> Result<Drained, Error> {
        self.shared.draining.store(true, Ordering::SeqCst);
        self.detached(
            "draining",
            |engine| async move { Ok(engine.pause_all().await) },
        )
        .await
    }

    async fn pause_all(&self) -> Drained {
        let events = &self.shared.events;
        let none = Steps::default();
        let mut drained = Drained::default();
        let mut asked = BTreeSet::<SandboxId>::new();
        let mut announced = false;
        loop {
            let mut running = self.shared.catalog.sandboxes();
            // What is being made or brought to run will run, or not: it is asked as well, and comes to it after that.
            running.retain(|entry| {
                let may_run = entry.record.rests == Rest::Running || entry.busy.is_some();
                may_run && !asked.contains(&entry.record.id)
            });
            if !announced {
                announced = true;
                let detail = format!("nothing new begins; sandboxes to pause: {}", running.len());
                events.emit(None, None, "daemon.draining", detail, &none);
            }
            if running.is_empty() {
                break;
            }
            asked.extend(running.iter().map(|entry| entry.record.id.clone()));
            let pauses = running.into_iter().map(|entry| async move {
                let paused = match entry.record.waits {
                    true => self.discard_or_pause(&entry).await,
                    false => pause(&entry).await,
                };
                (entry, paused)
            });
            let mut pauses = futures_util::stream::iter(pauses).buffer_unordered(AT_ONCE);
            while let Some((entry, paused)) = pauses.next().await {
                let name = display_name(&entry.record);
                match paused {
                    Ok(Outcome::Changed) => drained.paused.push(name),
                    Ok(Outcome::AlreadyThere) => {}
                    // It does not run: there is nothing to pause.
                    Err(Error::Destroyed | Error::Refused(Refusal::WrongPhase { .. })) => {}
                    Err(error) => {
                        let detail = format!("it runs on: {}", Chained(&error));
                        let (of, kind) = (&entry.record, "sandbox.drain-failed");
                        events.emit(Some(&of.spec.team), Some(&of.id), kind, detail, &none);
                        drained.failed.push((name, error));
                    }
                }
            }
        }
        drained.paused.sort();
        drained.failed.sort_by(|(a, _), (b, _)| a.cmp(b));
        let detail = format!(
            "paused {}, {} run on",
            drained.paused.len(),
            drained.failed.len()
        );
        events.emit(None, None, "daemon.drained", detail, &none);
        drained
    }

    /// What waits is nobody's, and is made anew after a start. It may have been taken meanwhile.
    async fn discard_or_pause(&self, entry: &Entry) -> Result<Outcome, Error> {
        match self.discard_waiting(entry).await? {
            true => Ok(Outcome::AlreadyThere),
            false => pause(entry).await,
        }
    }
}

/// Pauses a sandbox when its turn comes, however many wait before.
async fn pause(entry: &Entry) -> Result<Outcome, Error> {
    let (reply, answer) = oneshot::channel();
    let asked = entry.mailbox.send(Request::Pause(reply)).await;
    asked.map_err(|_| Error::Destroyed)?;
    answer.await.map_err(|_| Error::Destroyed)?
}
