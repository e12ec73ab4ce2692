//! What a sandbox's task does between verbs, by itself and at its time: looking back at what is not kept any more, and
//! automatic checkpoints.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::Error;
use crate::phase::Verb;
use crate::sandbox::{Chained, Fate, Sandbox};
use crate::steps::Steps;

/// When something is due.
pub(crate) struct Chores {
    /// When to look at what is kept of the past.
    pub(crate) look_back: Option<Instant>,
    /// When the next automatic checkpoint is due. Only while a guest runs.
    checkpoint: Option<Instant>,
    /// Whether the last automatic checkpoint failed: the next failure is no news.
    checkpoints_fail: bool,
}

impl Chores {
    /// Of a task that begins: what is kept may have been said anew since the last.
    pub(crate) fn new() -> Self {
        Self {
            look_back: Some(Instant::now()),
            checkpoint: None,
            checkpoints_fail: false,
        }
    }

    /// Completes when something is due. Never, if nothing will be.
    pub(crate) fn due(&self) -> impl Future<Output = ()> + use<> {
        let next = self.look_back.into_iter().chain(self.checkpoint).min();
        async move {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        }
    }
}

impl Sandbox {
    /// Does what is due.
    pub(crate) async fn do_chores(&mut self) -> Fate {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        if is_due(self.chores.look_back) {
            self.look_back().await;
        }
        if is_due(self.chores.checkpoint) {
            return self.checkpoint_by_itself().await;
        }
        Fate::Lives
    }

    /// A guest runs from now on, or is captured: the next automatic checkpoint is due after a whole interval.
    pub(crate) fn schedule_checkpoint(&mut self) {
        let interval = self.checkpoint_interval();
        self.chores.checkpoint = interval.map(|it| Instant::now() + it);
    }

    /// A guest was found running: it is due when it would have been. A guest that was resumed since its last capture has
    /// its next earlier than that, which does no harm.
    pub(crate) fn schedule_checkpoint_of_adopted(&mut self) {
        self.schedule_checkpoint();
        let Some(interval) = self.checkpoint_interval() else {
            return;
        };
        let last = self.record().after.and_then(|number| {
            let generation = self.shared.catalog.generation(self.id(), number).ok()?;
            Some(generation.capture.captured_at)
        });
        if let Some(last) = last {
            let since = self.shared.now().duration_since(last);
            let since = Duration::try_from(since).unwrap_or_default();
            self.chores.checkpoint = Some(Instant::now() + interval.saturating_sub(since));
        }
    }

    /// No guest runs any more.
    pub(crate) fn cancel_checkpoint(&mut self) {
        self.chores.checkpoint = None;
    }

    fn checkpoint_interval(&self) -> Option<Duration> {
        let asked = self.record().spec.history.checkpoint_every_secs;
        asked.map(Duration::from_secs)
    }

    async fn checkpoint_by_itself(&mut self) -> Fate {
        self.schedule_checkpoint();
        let driver = self.record().spec.volume_driver.clone();
        let (reply, answer) = oneshot::channel();
        let fate = match self.shared.require_room(Some(&driver)).await {
            Ok(()) => {
                let checkpoint = async |it: &mut Self| it.checkpoint().await;
                self.answer(Verb::Checkpoint, reply, checkpoint).await
            }
            Err(error) => {
                self.checkpoint_went(Err(error));
                return Fate::Lives;
            }
        };
        self.checkpoint_went(answer.await.unwrap_or(Err(Error::Destroyed)).map(drop));
        fate
    }

    fn checkpoint_went(&mut self, result: Result<(), Error>) {
        let failed_before = self.chores.checkpoints_fail;
        self.chores.checkpoints_fail = result.is_err();
        if let Err(error) = result
            && !failed_before
        {
            let hint = error
                .hint()
                .map_or_else(String::new, |hint| format!(" ({hint})"));
            let detail = format!(
                "{}{hint}; it is tried again at each interval",
                Chained(&error)
            );
            self.emit("sandbox.checkpoint-failed", detail, &Steps::default());
        }
    }
}
