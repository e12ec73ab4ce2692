//! Lifetimes: a running sandbox whose time is over is paused or destroyed, and a paused one may be resumed by whoever
//! asks for it.
//!
//! A sandbox can have two times. The *idle* time is over when nothing has happened in it for so long: no connection was
//! open to it, nothing was asked of it, and no command runs in it. The *run* time is over so long after it began to run,
//! whatever happens in it: E2B's `endAt`.
//!
//! Whether it is over is decided where everything about a sandbox is decided, in its own task, between two verbs: so a
//! time that is over never meets a verb half-way, and never another sandbox of the same name (INV-35). For the idle time
//! the gate is closed in the same moment as it is found that nobody is inside. A pause that fails leaves a sandbox that
//! runs on, and is tried again, ever more rarely; it never ends in something worse.
//!
//! The idle time goes by the monotonic clock, and what there was of it before this daemon began by the wall clock: what
//! happens in a sandbox is written down from time to time, and a start takes it to have gone on until it would have been
//! written down again. So after a restart a sandbox has a little longer than asked for, and never less.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::manifest::v1::{Lifetime, OnTimeout, Rest};
use crate::phase::Verb;
use crate::sandbox::{Chained, Fate, Life, Outcome, Sandbox};
use crate::steps::Steps;

/// The longest time that can be asked for: ten years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// What happens in a sandbox is written down at most so often, and else four times in its idle time.
const NOTE: Duration = Duration::from_secs(10);
/// The wall clock is looked at so often: it may be set.
const LOOK: Duration = Duration::from_secs(30);
/// Before an end that failed is tried again; then ever more rarely.
const RETRY: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// What a run that somebody's request began lasts at least: E2B's rule.
const WOKEN: Duration = Duration::from_secs(300);

/// A time that a sandbox may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// None.
    Never,
    /// So long.
    After(Duration),
}

impl Limit {
    fn seconds(self) -> Option<u64> {
        match self {
            Self::Never => None,
            Self::After(time) => Some(time.as_secs()),
        }
    }
}

/// What of a sandbox's lifetime is to be changed. What is not said stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LifetimeChange {
    /// When it ends for want of activity. Begins anew now.
    pub idle: Option<Limit>,
    /// How long it runs. Begins anew now.
    pub run: Option<Limit>,
    /// What becomes of it then.
    pub then: Option<OnTimeout>,
    /// Whether a request for it resumes it.
    pub auto_resume: Option<bool>,
}

impl LifetimeChange {
    /// Whether that can be.
    ///
    /// # Errors
    /// A time is too long, or an idle time no whole second.
    pub fn check(&self) -> Result<(), Error> {
        let too_long =
            |limit: Option<Limit>| matches!(limit, Some(Limit::After(time)) if time > LONGEST);
        if too_long(self.idle) || too_long(self.run) {
            return Err(Error::Invalid {
                message: "a sandbox's time cannot be longer than ten years".into(),
                hint: "`never` is for ever".into(),
            });
        }
        if matches!(self.idle, Some(Limit::After(time)) if time < Duration::from_secs(1)) {
            return Err(Error::Invalid {
                message: "a sandbox cannot be idle for less than a second".into(),
                hint: "ask for a second or more; `never` is for ever".into(),
            });
        }
        Ok(())
    }

    /// The lifetime that this makes of another.
    #[must_use]
    pub fn applied(&self, to: &Lifetime, now: Timestamp) -> Lifetime {
        let mut lifetime = to.clone();
        if let Some(idle) = self.idle {
            lifetime.idle_seconds = idle.seconds();
        }
        if let Some(run) = self.run {
            lifetime.run_seconds = run.seconds();
            lifetime.end_at = end_of(&lifetime, now);
        }
        lifetime.then = self.then.unwrap_or(lifetime.then);
        lifetime.auto_resume = self.auto_resume.unwrap_or(lifetime.auto_resume);
        lifetime.active_at = lifetime.idle_seconds.map(|_| now);
        lifetime
    }
}

/// When a run that begins now ends.
fn end_of(lifetime: &Lifetime, now: Timestamp) -> Option<Timestamp> {
    let after = Duration::from_secs(lifetime.run_seconds?);
    // Beyond the calendar is never.
    now.checked_add(after).ok()
}

impl Lifetime {
    /// The run begins now.
    pub(crate) fn begin_run(&mut self, now: Timestamp) {
        self.end_at = end_of(self, now);
        self.active_at = self.idle_seconds.map(|_| now);
    }

    fn idle(&self) -> Option<Duration> {
        self.idle_seconds.map(Duration::from_secs)
    }
}

/// How often it is written down that something happened in a sandbox.
fn note_every(idle: Duration) -> Duration {
    (idle / 4).max(NOTE)
}

/// What the clock asks of a running sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Something happened in it, and that is to be written down.
    Note,
    /// Nothing has happened in it for so long.
    Idle(Duration),
    /// Its run has lasted long enough.
    End,
}

/// What a sandbox's task knows of its time.
#[derive(Debug, Default)]
pub(crate) struct Timer {
    /// When something that happened was written down last.
    noted: Option<Instant>,
    /// When an end that failed may be tried again, and how long after that the next time.
    retry: Option<(Instant, Duration)>,
}

impl Timer {
    /// A run begins.
    pub(crate) fn begun() -> Self {
        Self {
            noted: Some(Instant::now()),
            retry: None,
        }
    }
}

impl Sandbox {
    /// Completes when the clock asks something of the sandbox. Never, if it does not run or has no time.
    pub(crate) fn due(&self) -> impl Future<Output = Due> + use<> {
        let record = self.record();
        let is_running = matches!(self.life, Life::Running(_)) && record.rests == Rest::Running;
        let may_end = record.broken.is_none() || record.lifetime.then == OnTimeout::Destroy;
        let idle = record.lifetime.idle().filter(|_| is_running && may_end);
        let end_at = record.lifetime.end_at.filter(|_| is_running && may_end);
        let (gate, clock) = (self.gate.clone(), Arc::clone(&self.shared.host.clock));
        let (retry, noted) = (self.timer.retry, self.timer.noted);
        async move {
            let not_yet = async {
                if let Some((at, _)) = retry {
                    tokio::time::sleep_until(at).await;
                }
            };
            let idles = async {
                let Some(limit) = idle else {
                    return std::future::pending().await;
                };
                not_yet.await;
                gate.idle_for(limit).await;
                Due::Idle(limit)
            };
            let ends = async {
                let Some(end_at) = end_at else {
                    return std::future::pending().await;
                };
                if let Some((at, _)) = retry {
                    tokio::time::sleep_until(at).await;
                }
                loop {
                    match Duration::try_from(end_at.duration_since(clock.now())) {
                        Ok(left) if !left.is_zero() => tokio::time::sleep(left.min(LOOK)).await,
                        _ => return Due::End,
                    }
                }
            };
            let notes = async {
                let Some(limit) = idle else {
                    return std::future::pending().await;
                };
                let every = note_every(limit);
                let mut next = noted.unwrap_or_else(Instant::now) + every;
                loop {
                    tokio::time::sleep_until(next).await;
                    if gate.idle() < every {
                        return Due::Note;
                    }
                    next = Instant::now() + every;
                }
            };
            tokio::select! {
                biased;
                due = ends => due,
                due = idles => due,
                due = notes => due,
            }
        }
    }

    /// Does what the clock asks for.
    pub(crate) async fn act_on(&mut self, due: Due) -> Fate {
        let why = match due {
            Due::Note => {
                self.note_activity().await;
                return Fate::Lives;
            }
            Due::Idle(limit) => {
                if self.works().await {
                    self.gate.touch();
                    return Fate::Lives;
                }
                format!("nothing has happened in it for {} s", limit.as_secs())
            }
            Due::End => {
                let ran = self.record().lifetime.run_seconds.unwrap_or_default();
                format!("it has run for the {ran} s that it was given")
            }
        };
        let then = self.record().lifetime.then;
        let closed = match due {
            Due::Idle(limit) => match self.gate.close_if_idle(limit) {
                Some(closed) => Some(closed),
                // Somebody came.
                None => return Fate::Lives,
            },
            _ => None,
        };
        let (verb, doing, past) = match then {
            OnTimeout::Pause => (Verb::Pause, "pausing", "it is paused"),
            OnTimeout::Destroy => (Verb::Destroy, "destroying", "it is destroyed"),
            OnTimeout::Stop => (Verb::Stop, "stopping", "it is stopped"),
        };
        if self.timer.retry.is_none() {
            let detail = format!("{why}: {past}");
            self.emit("sandbox.timed-out", detail, &Steps::default());
        }
        let id = self.id().clone();
        self.shared.catalog.set_busy(&id, Some(doing));
        let timed = self.begin_timing(verb.name());
        let ended = match then {
            OnTimeout::Pause => self.pause_through(closed).await.map(|_| Fate::Lives),
            OnTimeout::Destroy => self.destroy().await.map(|()| Fate::Gone),
            OnTimeout::Stop => self.stop_through(closed).await.map(|_| Fate::Lives),
        };
        self.end_timing(timed, &ended);
        self.shared.catalog.set_busy(&id, None);
        match ended {
            Ok(fate) => {
                self.timer.retry = None;
                if fate == Fate::Gone {
                    collect::soon(&self.shared);
                }
                fate
            }
            Err(error) => {
                self.end_failed(&error);
                Fate::Lives
            }
        }
    }

    fn end_failed(&mut self, error: &Error) {
        let pause = match self.timer.retry {
            None => {
                let detail = format!("it runs on, and is tried again: {}", Chained(error));
                self.emit("sandbox.timeout-failed", detail, &Steps::default());
                RETRY
            }
            Some((_, pause)) => (pause * 2).min(RETRY_MAX),
        };
        tracing::warn!(sandbox = %self.id(), error = %Chained(error), again_in = ?pause, "its time is over, and it runs on");
        self.timer.retry = Some((Instant::now() + pause, pause));
    }

    /// Whether commands run in the guest. One that does not answer has nothing to keep it.
    async fn works(&self) -> bool {
        let guest = Arc::clone(&self.shared.host.guest);
        let token = self.record().token.clone();
        let asked = guest.is_working(self.address(), &token);
        let asked = within(deadline::PROBE, "asking the guest what runs in it", asked);
        asked.await.unwrap_or_else(|error| {
            tracing::info!(sandbox = %self.id(), error = %Chained(&error), "the guest did not say what runs in it");
            false
        })
    }

    async fn note_activity(&mut self) {
        let now = self.shared.now();
        let noted = self.update(|record| record.lifetime.active_at = Some(now));
        if let Err(error) = noted.await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "it is not written down that something happened");
        }
        self.timer.noted = Some(Instant::now());
    }

    /// Takes into account what is written down of the time before this daemon began.
    pub(crate) fn go_on_idling(&self) {
        let lifetime = &self.record().lifetime;
        let (Some(idle), Some(active_at)) = (lifetime.idle(), lifetime.active_at) else {
            return;
        };
        let since = self.shared.now().duration_since(active_at);
        // What a clock that was set back says is nothing.
        let since = Duration::try_from(since.max(SignedDuration::ZERO)).unwrap_or_default();
        self.gate.was_idle(since.saturating_sub(note_every(idle)));
    }

    /// Changes the sandbox's lifetime. Its times begin anew.
    pub(crate) async fn change_lifetime(&mut self, change: LifetimeChange) -> Result<(), Error> {
        self.tend().await?;
        let lifetime = change.applied(&self.record().lifetime, self.shared.now());
        self.update(|record| record.lifetime = lifetime).await?;
        self.gate.touch();
        self.timer = Timer::begun();
        Ok(())
    }

    /// Resumes the sandbox for a request. Its run lasts a while, however short it was to be.
    pub(crate) async fn wake(&mut self) -> Result<(), Error> {
        let outcome = self.resume().await?;
        let run = self.record().lifetime.run_seconds;
        if outcome == Outcome::Changed && run.is_some_and(|run| run < WOKEN.as_secs()) {
            let end_at = self.shared.now().checked_add(WOKEN).ok();
            let lasts = self.update(|record| record.lifetime.end_at = end_at);
            if let Err(error) = lasts.await {
                tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "its run may be a short one");
            }
        }
        Ok(())
    }
}
