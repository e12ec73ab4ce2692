//! How long the steps of a verb take: noted as they end, shown in the log, in the event that the verb ends with, and in
//! `inspect`.
//!
//! A step is what somebody would ask about who finds a verb slow: not every call of the host, but every one that waits for
//! something. A verb that fails leaves the steps that it came through, the one that failed last.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use crate::error::Error;
use crate::id::SandboxId;
use crate::sandbox::Chained;

/// The steps of one verb so far. Clones are the same steps: who runs them and who shows them each have one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps(Arc<Mutex<Vec<(&'static str, Duration)>>>);

impl Steps {
    /// Runs one step and notes its time, however it ends.
    pub(crate) async fn time<T>(&self, name: &'static str, work: impl Future<Output = T>) -> T {
        let begun = tokio::time::Instant::now();
        let result = work.await;
        self.lock().push((name, begun.elapsed()));
        result
    }

    /// Adds what was timed beside.
    pub(crate) fn append(&self, beside: &Self) {
        let beside = beside.lock().clone();
        self.lock().extend(beside);
    }

    /// Each step with its time in microseconds, in the order in which they ended.
    pub(crate) fn named(&self) -> Vec<(String, u64)> {
        let named = |(name, time): &(&str, Duration)| ((*name).to_owned(), micros(*time));
        self.lock().iter().map(named).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(&'static str, Duration)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For people: `probe 0.2 ms, save 31.0 ms`.
impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, time)) in self.lock().iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {:.1} ms", time.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The last verb that had something to do with a sandbox, as this daemon remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastVerb {
    /// Which.
    pub verb: String,
    /// When its turn came.
    pub began_at: Timestamp,
    /// How long it took from then on, in microseconds.
    pub micros: u64,
    /// How long each of its steps took, in microseconds, in the order in which they ended.
    pub steps: Vec<(String, u64)>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// A verb under way: what there will be to say of it.
pub(crate) struct Timed {
    verb: String,
    steps: Steps,
    began_at: Timestamp,
    begun: tokio::time::Instant,
}

impl Timed {
    pub(crate) fn begin(verb: &str, steps: Steps, now: Timestamp) -> Self {
        Self {
            verb: verb.to_string(),
            steps,
            began_at: now,
            begun: tokio::time::Instant::now(),
        }
    }

    /// Writes the log's line about a verb that ended. `None` if it found nothing to do, or was refused before it began.
    pub(crate) fn end<T>(self, of: &SandboxId, result: &Result<T, Error>) -> Option<LastVerb> {
        let micros = micros(self.begun.elapsed());
        let (verb, steps) = (&self.verb, &self.steps);
        let refused = result.as_ref().is_err_and(Error::is_refusal) && steps.is_empty();
        let error = result.as_ref().err().map(|it| Chained(it).to_string());
        match &error {
            // It did nothing to the sandbox, whose last verb is another.
            Some(error) if refused => {
                tracing::info!(sandbox = %of, verb, error, "verb refused");
                return None;
            }
            Some(error) => {
                tracing::warn!(sandbox = %of, verb, micros, %steps, error, "verb failed");
            }
            None if steps.is_empty() => return None,
            None => tracing::info!(sandbox = %of, verb, micros, %steps, "verb done"),
        }
        Some(LastVerb {
            steps: steps.named(),
            verb: self.verb,
            began_at: self.began_at,
            micros,
            error,
        })
    }
}
