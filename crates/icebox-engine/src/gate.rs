//! The gate in front of a guest: who may talk to it, and the way to make them stop for a capture.
//!
//! ```text
//!   Shut --open()--> Open --close()--> Draining --shut() or Closed::keep()--> Shut
//!                     ^                   |
//!                     +-- Closed dropped -+
//! ```
//!
//! Since everything that a user does in a sandbox passes here, this is also where it is known how long nobody did.
//!
//! A capture must not freeze half a conversation, and a connection must not slip in between the drain and the
//! freeze. So admission and closing are decided under one lock: after [`Gate::close`] has begun, no
//! [`enter`](Gate::enter) succeeds, even one that raced it (INV-07). The guard opens the gate again when it is
//! dropped, on every way out of a failed capture, unless the gate has been shut meanwhile.
//!
//! What is inside is a request, which ends by itself when it is answered, or a stream, which ends when somebody wants it
//! to: a command that is followed, a shell, a web socket. A drain waits for requests. Streams it cuts as soon as there
//! are none: what a stream shows goes on in the guest, and who follows it can do so again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Open,
    Draining,
    Shut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    admission: Admission,
    /// Passes that exist.
    inside: usize,
    /// Those of them that are streams.
    streams: usize,
    /// Passes of an older epoch must end.
    epoch: u64,
    /// When somebody was inside, or something else happened in the sandbox.
    active_at: Instant,
    /// How long nothing had happened before that, in a time that this process has not seen.
    before: Duration,
}

impl State {
    /// For how long nothing has happened.
    fn idle(&self) -> Duration {
        if self.inside > 0 {
            return Duration::ZERO;
        }
        self.active_at.elapsed().saturating_add(self.before)
    }

    fn touch(&mut self) {
        (self.active_at, self.before) = (Instant::now(), Duration::ZERO);
    }
}

/// Admits connections to one guest.
#[derive(Clone)]
pub struct Gate(Arc<watch::Sender<State>>);

impl Default for Gate {
    fn default() -> Self {
        let state = State {
            admission: Admission::Shut,
            inside: 0,
            streams: 0,
            epoch: 0,
            active_at: Instant::now(),
            before: Duration::ZERO,
        };
        Self(Arc::new(watch::Sender::new(state)))
    }
}

/// The right of one connection to talk to the guest. Dropping it gives it back.
pub struct Pass {
    gate: Gate,
    epoch: u64,
    is_stream: AtomicBool,
}

/// How long those inside a gate that closes have to end by themselves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drain {
    pub(crate) requests: Duration,
    pub(crate) streams: Duration,
}

/// Keeps the gate closed. Dropping it opens the gate.
pub(crate) struct Closed(Gate);

impl Gate {
    /// Asks for admission. `None` while the guest is not there, or stands still.
    #[must_use]
    pub fn enter(&self) -> Option<Pass> {
        let mut epoch = None;
        self.0.send_if_modified(|state| {
            if state.admission == Admission::Open {
                state.inside += 1;
                epoch = Some(state.epoch);
            }
            // Nobody waits for the number inside to grow.
            false
        });
        epoch.map(|epoch| Pass {
            gate: self.clone(),
            epoch,
            is_stream: AtomicBool::new(false),
        })
    }

    /// Admits connections from now on.
    pub(crate) fn open(&self) {
        self.0.send_modify(|state| {
            state.admission = Admission::Open;
            state.touch();
        });
    }

    /// Notes that something happens in the sandbox at this moment.
    pub(crate) fn touch(&self) {
        self.0.send_modify(State::touch);
    }

    /// Notes that nothing has happened in the sandbox for so long.
    pub(crate) fn was_idle(&self, so_long: Duration) {
        self.0.send_modify(|state| {
            state.touch();
            state.before = so_long;
        });
    }

    /// For how long nothing has happened.
    pub(crate) fn idle(&self) -> Duration {
        self.0.borrow().idle()
    }

    /// Completes when nothing has happened for `limit`.
    pub(crate) fn idle_for(&self, limit: Duration) -> impl Future<Output = ()> + use<> {
        let mut state = self.0.subscribe();
        async move {
            loop {
                let empty = state.wait_for(|state| state.inside == 0);
                let Ok(idle) = empty.await.map(|state| state.idle()) else {
                    // There is no gate any more, and so no sandbox.
                    return std::future::pending().await;
                };
                if idle >= limit {
                    return;
                }
                tokio::time::sleep(limit - idle).await;
            }
        }
    }

    /// Closes the gate as [`close`](Self::close) does, if nothing has happened for `limit`: whoever is about to enter
    /// comes before that, or finds the gate closed.
    pub(crate) fn close_if_idle(&self, limit: Duration) -> Option<Closed> {
        let closed = self.0.send_if_modified(|state| {
            let is_idle = state.admission != Admission::Draining && state.idle() >= limit;
            if is_idle && state.admission == Admission::Open {
                state.admission = Admission::Draining;
            }
            is_idle
        });
        closed.then(|| Closed(self.clone()))
    }

    /// Admits nobody from now on, and tells whoever is inside to end at once.
    pub(crate) fn shut(&self) {
        self.0.send_modify(|state| {
            state.admission = Admission::Shut;
            state.epoch += 1;
        });
    }

    /// Admits nobody from now on, waits for those inside to end, and then tells them to: for requests as long as `requests`
    /// says, for streams as long as `streams` does, or as there are requests.
    pub(crate) async fn close(&self, Drain { requests, streams }: Drain) -> Closed {
        self.0
            .send_modify(|state| state.admission = Admission::Draining);
        let guard = Closed(self.clone());
        let mut state = self.0.subscribe();
        let begun = Instant::now();
        let empty = state.wait_for(|state| state.inside == 0);
        if tokio::time::timeout_at(begun + streams, empty)
            .await
            .is_err()
        {
            let only_streams = state.wait_for(|state| state.inside == state.streams);
            // Whichever it was, whoever is still inside leaves now.
            tokio::time::timeout_at(begun + requests, only_streams)
                .await
                .map(drop)
                .unwrap_or_default();
            self.0.send_modify(|state| state.epoch += 1);
        }
        guard
    }
}

impl Pass {
    /// Says that this is a stream from now on, which a drain does not wait for.
    pub fn becomes_stream(&self) {
        if !self.is_stream.swap(true, Ordering::SeqCst) {
            self.gate.0.send_modify(|state| state.streams += 1);
        }
    }

    /// Completes when the connection must end now.
    pub async fn revoked(&self) {
        let mut state = self.gate.0.subscribe();
        // Cannot fail: the sender lives as long as `self.gate`.
        state
            .wait_for(|state| state.epoch != self.epoch)
            .await
            .map(drop)
            .unwrap_or_default();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.0.send_modify(|state| {
            state.inside -= 1;
            state.streams -= usize::from(*self.is_stream.get_mut());
            state.touch();
        });
    }
}

impl Closed {
    /// Leaves the gate shut: the guest is going away.
    pub(crate) fn keep(self) {
        self.0.shut();
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| {
            if state.admission == Admission::Draining {
                state.admission = Admission::Open;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const DRAIN: Drain = Drain {
        requests: Duration::from_secs(5),
        streams: Duration::from_millis(50),
    };

    #[tokio::test(start_paused = true)]
    async fn inv_07_a_drain_waits_for_requests_and_not_for_streams() {
        let gate = Gate::default();
        gate.open();
        let stream = gate.enter().unwrap();
        stream.becomes_stream();
        stream.becomes_stream();
        let begun = Instant::now();
        drop(gate.close(DRAIN).await);
        assert_eq!(begun.elapsed(), DRAIN.streams);
        stream.revoked().await;
        drop(stream);

        let (stream, request) = (gate.enter().unwrap(), gate.enter().unwrap());
        stream.becomes_stream();
        let begun = Instant::now();
        let answered = async {
            tokio::time::sleep(DRAIN.requests / 2).await;
            let is_cut = tokio::time::timeout(Duration::ZERO, stream.revoked()).await;
            assert!(is_cut.is_err(), "nobody is cut while a request is answered");
            drop(request);
        };
        let (closed, ()) = tokio::join!(gate.close(DRAIN), answered);
        assert_eq!(begun.elapsed(), DRAIN.requests / 2);
        stream.revoked().await;
        drop((closed, stream));

        let stream = gate.enter().unwrap();
        stream.becomes_stream();
        let begun = Instant::now();
        let (closed, ()) = tokio::join!(gate.close(DRAIN), async { drop(stream) });
        assert_eq!(begun.elapsed(), Duration::ZERO, "it has ended by itself");
        drop(closed);
        assert!(gate.idle_for(Duration::ZERO).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn inv_07_drain_is_bounded_and_admits_nobody() {
        let gate = Gate::default();
        assert!(gate.enter().is_none(), "closed until the guest is there");
        gate.open();
        let slow = gate.enter().unwrap();
        let begun = Instant::now();
        let closing = {
            let gate = gate.clone();
            tokio::spawn(async move { gate.close(DRAIN).await })
        };
        tokio::task::yield_now().await;
        assert!(
            gate.enter().is_none(),
            "nobody is admitted once the drain has begun"
        );
        let guard = closing.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
        slow.revoked().await;
        drop(guard);
        assert!(
            gate.enter().is_some(),
            "a failed capture opens the gate again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn inv_35_who_is_inside_keeps_a_sandbox_from_being_idle() {
        let gate = Gate::default();
        gate.open();
        let limit = Duration::from_secs(60);
        let pass = gate.enter().unwrap();
        let idle = tokio::spawn(gate.idle_for(limit));
        tokio::time::sleep(limit * 3).await;
        assert!(!idle.is_finished() && gate.close_if_idle(limit).is_none());
        drop(pass);
        let begun = Instant::now();
        idle.await.unwrap();
        assert_eq!(begun.elapsed(), limit);
        // Between the end of the wait and the decision somebody comes.
        let pass = gate.enter().unwrap();
        assert!(gate.close_if_idle(limit).is_none());
        drop(pass);
        assert!(gate.close_if_idle(limit).is_none(), "and has just left");
        tokio::time::sleep(limit).await;
        let closed = gate.close_if_idle(limit).unwrap();
        assert!(gate.enter().is_none(), "nobody comes any more");
        drop(closed);
        assert!(gate.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_sandbox_was_idle_before_counts_until_something_happens() {
        let gate = Gate::default();
        gate.open();
        gate.was_idle(Duration::from_secs(50));
        let begun = Instant::now();
        gate.idle_for(Duration::from_secs(60)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(10));
        gate.touch();
        assert_eq!(gate.idle(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_as_soon_as_the_last_connection_does() {
        let gate = Gate::default();
        gate.open();
        let pass = gate.enter().unwrap();
        let begun = Instant::now();
        let closing = {
            let gate = gate.clone();
            tokio::spawn(async move { gate.close(DRAIN).await })
        };
        tokio::task::yield_now().await;
        drop(pass);
        closing.await.unwrap().keep();
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert!(gate.enter().is_none(), "kept closed");
    }
}
