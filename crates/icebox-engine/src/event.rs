//! What happened, in order: numbered without holes, kept for a while, followable.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::host::Clock;
use crate::id::SandboxId;
use crate::steps::Steps;

/// How many events are kept for late subscribers.
const KEPT: usize = 10_000;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number: one more than the event before it, since the daemon started.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// To which sandbox, if to one.
    pub sandbox: Option<SandboxId>,
    /// What kind of thing: `sandbox.paused`, `sandbox.exited`, `template.removed`, …
    pub kind: String,
    /// For people.
    pub detail: String,
    /// How long each step took, in microseconds, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<(String, u64)>,
}

/// What a subscriber gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Events from the asked-for number on, in order.
    pub events: Vec<Event>,
    /// How many before them were asked for and are no longer kept: the subscriber is told what it missed (INV-49).
    pub missed: u64,
}

/// The log of events.
pub struct Events {
    clock: Arc<dyn Clock>,
    log: Mutex<VecDeque<Event>>,
    next: watch::Sender<u64>,
}

impl Events {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            log: Mutex::new(VecDeque::new()),
            next: watch::Sender::new(1),
        }
    }

    pub(crate) fn emit(
        &self,
        sandbox: Option<&SandboxId>,
        kind: &str,
        detail: impl Into<String>,
        steps: &Steps,
    ) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = *self.next.borrow();
        let event = Event {
            seq,
            at: self.clock.now(),
            sandbox: sandbox.cloned(),
            kind: kind.to_owned(),
            detail: detail.into(),
            steps: steps.named(),
        };
        tracing::info!(seq, kind, sandbox = sandbox.map(tracing::field::display), detail = %event.detail, "event");
        if log.len() == KEPT {
            log.pop_front();
        }
        log.push_back(event);
        self.next.send_replace(seq + 1);
    }

    /// The number that the next event will have.
    pub fn next_seq(&self) -> u64 {
        *self.next.borrow()
    }

    /// Events from number `from` on; waits until there is one.
    pub async fn since(&self, from: u64) -> Batch {
        let mut next = self.next.subscribe();
        // Cannot fail: the sender lives in `self`.
        next.wait_for(|next| *next > from)
            .await
            .map(drop)
            .unwrap_or_default();
        self.kept(from)
    }

    /// Events from number `from` on that are kept now; does not wait.
    pub fn kept(&self, from: u64) -> Batch {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let first = log
            .front()
            .map_or_else(|| self.next_seq(), |event| event.seq);
        Batch {
            events: log
                .iter()
                .filter(|event| event.seq >= from)
                .cloned()
                .collect(),
            missed: first.saturating_sub(from.max(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::SystemClock;

    #[tokio::test]
    async fn inv_49_numbers_have_no_holes_and_a_late_subscriber_is_told_what_it_missed() {
        let events = Events::new(Arc::new(SystemClock));
        let total = u64::try_from(KEPT).unwrap() + 10;
        for n in 0..total {
            events.emit(None, "test", n.to_string(), &Steps::default());
        }
        let batch = events.since(1).await;
        assert_eq!(batch.missed, 10);
        assert_eq!(batch.events.len(), KEPT);
        assert!(
            batch
                .events
                .windows(2)
                .all(|pair| pair[1].seq == pair[0].seq + 1)
        );
        assert_eq!(events.since(total).await.events.len(), 1);
        assert_eq!(events.kept(total + 1).events, []);
    }
}
