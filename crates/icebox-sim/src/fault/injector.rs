//! The injector: counts steps, and springs the fault that lies ahead.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError};
use tokio::sync::Notify;

#[cfg(feature = "conductor")]
use super::conductor::Conductor;

/// On which side of a step's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The effect has not happened.
    Before,
    /// It has.
    After,
}

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The step returns an error.
    Fail,
    /// The step returns the error of a file system that is full.
    Full,
    /// From this step on there is no room: whatever writes returns that error.
    StaysFull,
    /// The step never returns: the engine is about to be killed.
    Crash,
    /// The step panics: a bug.
    Panic,
    /// The step goes on, and [`Injector::reached`] completes: the client is about to go away.
    Cancel,
    /// The step goes on when it is [told to](Injector::go_on), and [`Injector::reached`] completes: something else is
    /// about to happen first.
    Hold,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The step's number, from when the injector was armed, counted from 0.
    pub at: usize,
    /// On which side of its effect.
    pub when: When,
    /// What happens.
    pub kind: Kind,
}

/// Steps that need room on the file system.
const WRITES: [&str; 13] = [
    "machine.finish_save",
    "machine.save",
    "machine.switch",
    "store.commit",
    "store.copy_into_staging",
    "store.move_into_staging",
    "store.publish",
    "store.stage",
    "volume.ensure_head",
    "volume.flatten",
    "volume.freeze",
    "volume.merge",
    "volume.seal",
];

/// How long a step takes at most when steps take time.
const SLOWEST: Duration = Duration::from_millis(20);

/// What becomes of the calls of one step, in order: done, or failed on one side of the effect. Calls after the last
/// are done.
type Script = Box<dyn Iterator<Item = Option<When>> + Send>;

/// Counts steps and springs the fault. Cheap to clone; all clones are the same injector.
#[derive(Clone, Default)]
pub struct Injector(Arc<Inner>);

#[derive(Default)]
struct Inner {
    armed: Mutex<Option<Fault>>,
    /// What the next step's time follows from, if steps take any.
    pace: Mutex<Option<u64>>,
    scripts: Mutex<BTreeMap<&'static str, Script>>,
    steps: AtomicUsize,
    trace: Mutex<Vec<&'static str>>,
    reached: Notify,
    go_on: Notify,
    #[cfg(feature = "conductor")]
    conductor: Option<Conductor>,
}

/// What a step fails with.
pub(super) fn broken(step: &str) -> HostError {
    HostError::new(ErrorKind::Other, format!("injected at {step}"))
}

/// What it fails with on a full file system.
pub(super) fn full(step: &str) -> HostError {
    let cause = std::io::Error::from(std::io::ErrorKind::StorageFull);
    HostError::io(format!("injected at {step}"), cause)
}

impl Injector {
    /// An injector that only counts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One that asks `conductor` at each step, and does nothing else.
    #[cfg(feature = "conductor")]
    pub(super) fn conducted_by(conductor: Conductor) -> Self {
        Self(Arc::new(Inner {
            conductor: Some(conductor),
            ..Inner::default()
        }))
    }

    /// Counts from 0 again, with this fault ahead (or none).
    pub fn arm(&self, fault: Option<Fault>) {
        *self.0.armed.lock().unwrap_or_else(PoisonError::into_inner) = fault;
        self.0
            .trace
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.0.steps.store(0, Ordering::SeqCst);
    }

    /// Makes steps take time, on both sides of their effects: each another, which follows from `seed`. Without this they take
    /// none in memory, and nothing ever happens between two of them.
    pub fn take_time(&self, seed: u64) {
        *self.0.pace.lock().unwrap_or_else(PoisonError::into_inner) = Some(seed);
    }

    /// Waits for as long as a step takes.
    async fn wait(&self) {
        let time = {
            let mut pace = self.0.pace.lock().unwrap_or_else(PoisonError::into_inner);
            pace.as_mut().map(|pace| {
                // A linear congruential generator, by Knuth: its upper half is random enough for this.
                *pace = pace
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                SLOWEST.mul_f64((*pace >> 32) as f64 / f64::from(u32::MAX))
            })
        };
        if let Some(time) = time {
            tokio::time::sleep(time).await;
        }
    }

    /// Makes every step of this name fail before its effect, until it is called with `None`.
    pub fn break_step(&self, step: Option<&'static str>) {
        match step {
            Some(step) => self.script(step, std::iter::repeat(Some(When::Before))),
            None => self.scripts().clear(),
        }
    }

    /// Decides the next calls of the steps of this name, one by one: `None` lets a call be.
    pub fn script(
        &self,
        step: &'static str,
        calls: impl IntoIterator<Item = Option<When>, IntoIter: Send + 'static>,
    ) {
        self.scripts().insert(step, Box::new(calls.into_iter()));
    }

    fn scripts(&self) -> MutexGuard<'_, BTreeMap<&'static str, Script>> {
        self.0
            .scripts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of the steps since it was armed, in order.
    #[must_use]
    pub fn trace(&self) -> Vec<&'static str> {
        self.0
            .trace
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Completes when a crash, cancel or hold has been sprung.
    pub async fn reached(&self) {
        self.0.reached.notified().await;
    }

    /// Lets the step that is held go on.
    pub fn go_on(&self) {
        self.0.go_on.notify_one();
    }

    pub(super) async fn around<T>(
        &self,
        step: &'static str,
        effect: impl Future<Output = Result<T, HostError>> + Send,
    ) -> Result<T, HostError> {
        #[cfg(feature = "conductor")]
        if let Some(conductor) = &self.0.conductor {
            return conductor.around(step, effect).await;
        }
        let number = self.0.steps.fetch_add(1, Ordering::SeqCst);
        self.0
            .trace
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(step);
        let armed = *self.0.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let here = armed.filter(|fault| match fault.kind {
            Kind::StaysFull => fault.at <= number && WRITES.contains(&step),
            _ => fault.at == number,
        });
        let scripted = self.scripts().get_mut(step).and_then(Iterator::next);
        if scripted == Some(Some(When::Before)) {
            return Err(broken(step));
        }
        self.wait().await;
        self.spring(here, When::Before, step).await?;
        let result = effect.await;
        self.wait().await;
        if result.is_ok() {
            self.spring(here, When::After, step).await?;
        }
        if scripted == Some(Some(When::After)) {
            return Err(broken(step));
        }
        result
    }

    async fn spring(
        &self,
        here: Option<Fault>,
        when: When,
        step: &'static str,
    ) -> Result<(), HostError> {
        match here
            .filter(|fault| fault.when == when)
            .map(|fault| fault.kind)
        {
            None => Ok(()),
            Some(Kind::Fail) => Err(broken(step)),
            Some(Kind::Full | Kind::StaysFull) => Err(full(step)),
            Some(Kind::Panic) => panic!("injected at {step}"),
            Some(Kind::Crash) => {
                self.0.reached.notify_one();
                std::future::pending().await
            }
            Some(Kind::Cancel) => {
                self.0.reached.notify_one();
                Ok(())
            }
            Some(Kind::Hold) => {
                self.0.reached.notify_one();
                self.0.go_on.notified().await;
                Ok(())
            }
        }
    }
}
