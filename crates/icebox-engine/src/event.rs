//! What happened, in order: numbered without holes, kept for a while, followable, across restarts of the daemon.
//!
//! ```text
//!   emit ─► recent (memory) ── writer, behind ──► journal (disk)
//!                 └──────── shown once written ────────► subscribers
//! ```
//! Nothing that emits an event waits for the disk. An event is shown when it is in the journal: so a number that somebody
//! has seen is never another event's, whoever kills the daemon. Where the journal cannot be written, events are shown all
//! the same, since a full disk is no reason to be silent about full disks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::deadline::{self, within};
use crate::host::{Clock, Journal, Kept};
use crate::id::{SandboxId, Team};
use crate::sandbox::{Chained, Shared};
use crate::steps::Steps;

/// How many events are at hand without the journal.
const RECENT: usize = 1_000;
/// How many are kept for a journal that cannot be written.
const UNWRITTEN: usize = 10_000;
/// How many are read from the journal, or written to it, at once.
const AT_ONCE: usize = 500;
/// Before a journal that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number: one more than the event before it.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// To which sandbox, if to one.
    pub sandbox: Option<SandboxId>,
    /// To whose sandbox or template. `None` of what concerns the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<Team>,
    /// What kind of thing: `sandbox.paused`, `sandbox.exited`, `template.removed`, …
    pub kind: String,
    /// For people.
    pub detail: String,
    /// How long each step took, in microseconds, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<(String, u64)>,
}

/// What a subscriber gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Events from the asked-for number on, in order. Perhaps not all there are: ask again from behind the last one.
    pub events: Vec<Event>,
    /// How many before them were asked for and are no longer kept: the subscriber is told what it missed (INV-49).
    pub missed: u64,
}

struct Log {
    /// The newest events, those that are not written yet among them.
    recent: VecDeque<Event>,
    /// The number of the next event.
    next: u64,
    /// The number of the next event to be written.
    unwritten: u64,
}

/// The log of events.
pub struct Events {
    clock: Arc<dyn Clock>,
    journal: Arc<dyn Journal>,
    log: Mutex<Log>,
    /// Changes with every event.
    emitted: watch::Sender<()>,
    /// Events before this number are shown.
    shown: watch::Sender<u64>,
}

impl Events {
    /// A log that goes on after event `newest`.
    pub(crate) fn new(clock: Arc<dyn Clock>, journal: Arc<dyn Journal>, newest: u64) -> Self {
        let next = newest + 1;
        Self {
            clock,
            journal,
            log: Mutex::new(Log {
                recent: VecDeque::new(),
                next,
                unwritten: next,
            }),
            emitted: watch::Sender::new(()),
            shown: watch::Sender::new(next),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn emit(
        &self,
        team: Option<&Team>,
        sandbox: Option<&SandboxId>,
        kind: &str,
        detail: impl Into<String>,
        steps: &Steps,
    ) {
        let mut log = self.log();
        let seq = log.next;
        let event = Event {
            seq,
            at: self.clock.now(),
            sandbox: sandbox.cloned(),
            team: team.cloned(),
            kind: kind.to_owned(),
            detail: detail.into(),
            steps: steps.named(),
        };
        tracing::info!(seq, kind, sandbox = sandbox.map(tracing::field::display), detail = %event.detail, "event");
        log.recent.push_back(event);
        log.next = seq + 1;
        while let Some(oldest) = log.recent.front() {
            let may_go = oldest.seq < log.unwritten && log.recent.len() > RECENT;
            if !may_go && log.recent.len() <= UNWRITTEN {
                break;
            }
            log.recent.pop_front();
        }
        self.emitted.send_replace(());
    }

    /// The number that the next event will have.
    pub fn next_seq(&self) -> u64 {
        self.log().next
    }

    /// Events from number `from` on; waits until there is one. A number that nobody has seen yet is taken for the next.
    pub async fn since(&self, from: u64) -> Batch {
        let from = from.min(self.next_seq());
        self.until_shown(from + 1).await;
        self.read(from).await
    }

    /// Events from number `from` on of those that there are now, the newest included that has just been emitted.
    pub async fn past(&self, from: u64) -> Batch {
        self.until_shown(self.next_seq()).await;
        self.read(from).await
    }

    /// Events from number `from` on of those that are at hand: recent ones of this process, written or not.
    pub fn kept(&self, from: u64) -> Batch {
        let log = self.log();
        let oldest = log.recent.front().map_or(log.next, |event| event.seq);
        let wanted = log.recent.iter().filter(|event| event.seq >= from);
        Batch {
            events: wanted.cloned().collect(),
            missed: oldest.saturating_sub(from.max(1)),
        }
    }

    async fn until_shown(&self, before: u64) {
        let mut shown = self.shown.subscribe();
        // Cannot fail: the sender lives in `self`.
        let shown = shown.wait_for(|shown| *shown >= before).await;
        shown.map(drop).unwrap_or_default();
    }

    async fn read(&self, from: u64) -> Batch {
        let from = from.max(1);
        let shown = *self.shown.borrow();
        let (oldest, recent) = {
            let log = self.log();
            let oldest = log.recent.front().map_or(log.next, |event| event.seq);
            let wanted = |event: &&Event| (from..shown).contains(&event.seq);
            let recent: Vec<_> = log.recent.iter().filter(wanted).cloned().collect();
            (oldest, recent)
        };
        if from >= oldest || from >= shown {
            let events = recent;
            return Batch { events, missed: 0 };
        }
        let read = self.journal.read(from, AT_ONCE);
        match within(deadline::STORE, "reading the journal", read).await {
            Ok(Kept {
                events,
                oldest: first,
            }) if !events.is_empty() => Batch {
                missed: first.saturating_sub(from),
                events,
            },
            Ok(_) => Batch {
                missed: oldest.saturating_sub(from),
                events: recent,
            },
            Err(error) => {
                tracing::error!(error = %Chained(&error), "older events cannot be shown");
                Batch {
                    missed: oldest.saturating_sub(from),
                    events: recent,
                }
            }
        }
    }

    /// Writes what is not written yet, and shows it. Whether nothing is left.
    async fn write(&self) -> bool {
        loop {
            let batch: Vec<Event> = {
                let log = self.log();
                let unwritten = |event: &&Event| event.seq >= log.unwritten;
                let unwritten = log.recent.iter().filter(unwritten);
                unwritten.take(AT_ONCE).cloned().collect()
            };
            let Some(last) = batch.last().map(|event| event.seq) else {
                return true;
            };
            let written = self.journal.append(&batch);
            if let Err(error) = within(deadline::STORE, "writing the journal", written).await {
                tracing::error!(error = %Chained(&error), "events are not kept at the moment");
                self.shown.send_replace(self.next_seq());
                return false;
            }
            self.log().unwritten = last + 1;
            self.shown
                .send_modify(|shown| *shown = (*shown).max(last + 1));
        }
    }
}

/// Writes events behind those that emit them. Ends with the engine.
pub(crate) async fn keep_written(shared: Weak<Shared>) {
    let Some(mut emitted) = shared.upgrade().map(|it| it.events.emitted.subscribe()) else {
        return;
    };
    while let Some(strong) = shared.upgrade() {
        let is_all_written = strong.events.write().await;
        drop(strong);
        let retry = async {
            match is_all_written {
                true => std::future::pending().await,
                false => tokio::time::sleep(RETRY).await,
            }
        };
        tokio::select! {
            emitted = emitted.changed() => if emitted.is_err() { return },
            () = retry => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::host::{ErrorKind, HostError, SystemClock};
    use crate::metrics::Sample;

    /// Keeps the newest ten, and can be broken.
    #[derive(Default)]
    struct Paper {
        written: Mutex<Vec<Event>>,
        is_full: Mutex<bool>,
    }

    #[async_trait]
    impl Journal for Paper {
        async fn newest(&self) -> Result<u64, HostError> {
            Ok(self.written.lock().unwrap().last().map_or(0, |it| it.seq))
        }
        async fn append(&self, events: &[Event]) -> Result<(), HostError> {
            if *self.is_full.lock().unwrap() {
                return Err(HostError::new(ErrorKind::Exhausted, "full"));
            }
            let mut written = self.written.lock().unwrap();
            written.extend(events.iter().cloned());
            let excess = written.len().saturating_sub(10);
            written.drain(..excess);
            Ok(())
        }
        async fn read(&self, from: u64, limit: usize) -> Result<Kept, HostError> {
            let written = self.written.lock().unwrap();
            let events = written.iter().filter(|event| event.seq >= from);
            Ok(Kept {
                oldest: written.first().map_or(0, |event| event.seq),
                events: events.take(limit).cloned().collect(),
            })
        }
        async fn append_samples(&self, _: &[(SandboxId, Sample)]) -> Result<(), HostError> {
            Ok(())
        }
        async fn samples(&self, _: &SandboxId, _: u32) -> Result<Vec<Sample>, HostError> {
            Ok(Vec::new())
        }
        async fn forget_samples(&self, _: &SandboxId) -> Result<(), HostError> {
            Ok(())
        }
    }

    async fn log(paper: &Arc<Paper>) -> Events {
        let newest = paper.newest().await.unwrap();
        Events::new(Arc::new(SystemClock), paper.clone(), newest)
    }

    async fn emit(events: &Events, count: usize) {
        for n in 0..count {
            events.emit(None, None, "test", n.to_string(), &Steps::default());
        }
        events.write().await;
    }

    fn numbers(batch: &Batch) -> Vec<u64> {
        batch.events.iter().map(|event| event.seq).collect()
    }

    #[tokio::test]
    async fn inv_49_numbers_go_on_and_a_late_subscriber_is_told_what_it_missed() {
        let paper = Arc::new(Paper::default());
        emit(&log(&paper).await, 8).await;
        let events = log(&paper).await;
        emit(&events, 7).await;
        let batch = events.since(1).await;
        assert_eq!((numbers(&batch), batch.missed), ((6..=15).collect(), 5));
        let batch = events.past(14).await;
        assert_eq!((numbers(&batch), batch.missed), (vec![14, 15], 0));
        assert_eq!(events.past(16).await, Batch::default());
        // Of a future that was lost with the power.
        let (early, ()) = tokio::join!(events.since(99), emit(&events, 1));
        assert_eq!(numbers(&early), [16]);
    }

    #[tokio::test]
    async fn inv_49_what_is_shown_is_written_unless_nothing_can_be() {
        let paper = Arc::new(Paper::default());
        let events = log(&paper).await;
        events.emit(None, None, "test", "unwritten", &Steps::default());
        assert_eq!(events.read(1).await, Batch::default());
        *paper.is_full.lock().unwrap() = true;
        assert!(!events.write().await);
        assert_eq!(numbers(&events.past(1).await), [1]);
        *paper.is_full.lock().unwrap() = false;
        emit(&events, 1).await;
        assert_eq!(numbers(&log(&paper).await.past(1).await), [1, 2]);
    }

    #[tokio::test]
    async fn a_journal_that_cannot_be_written_for_long_costs_bounded_memory() {
        let paper = Arc::new(Paper::default());
        *paper.is_full.lock().unwrap() = true;
        let events = log(&paper).await;
        emit(&events, UNWRITTEN + 5).await;
        assert_eq!(events.log().recent.len(), UNWRITTEN);
        let batch = events.past(1).await;
        assert_eq!((batch.events.len(), batch.missed), (UNWRITTEN, 5));
    }
}
