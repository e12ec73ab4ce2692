//! The gate in front of a guest: who may talk to it, and the way to make them stop for a capture.
//!
//! ```text
//!   Shut --open()--> Open --close()--> Draining --shut() or Closed::keep()--> Shut
//!                     ^                   |
//!                     +-- Closed dropped -+
//! ```
//!
//! A capture must not freeze half a conversation, and a connection must not slip in between the drain and the
//! freeze. So admission and closing are decided under one lock: after [`Gate::close`] has begun, no
//! [`enter`](Gate::enter) succeeds, even one that raced it (INV-07). The guard opens the gate again when it is
//! dropped, on every way out of a failed capture, unless the gate has been shut meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

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
    /// Passes of an older epoch must end.
    epoch: u64,
}

/// Admits connections to one guest.
#[derive(Clone)]
pub struct Gate(Arc<watch::Sender<State>>);

impl Default for Gate {
    fn default() -> Self {
        let state = State {
            admission: Admission::Shut,
            inside: 0,
            epoch: 0,
        };
        Self(Arc::new(watch::Sender::new(state)))
    }
}

/// The right of one connection to talk to the guest. Dropping it gives it back.
pub struct Pass {
    gate: Gate,
    epoch: u64,
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
        })
    }

    /// Admits connections from now on.
    pub(crate) fn open(&self) {
        self.0
            .send_modify(|state| state.admission = Admission::Open);
    }

    /// Admits nobody from now on, and tells whoever is inside to end at once.
    pub(crate) fn shut(&self) {
        self.0.send_modify(|state| {
            state.admission = Admission::Shut;
            state.epoch += 1;
        });
    }

    /// Admits nobody from now on, waits up to `limit` for those inside to end, and then tells them to.
    pub(crate) async fn close(&self, limit: Duration) -> Closed {
        self.0
            .send_modify(|state| state.admission = Admission::Draining);
        let guard = Closed(self.clone());
        let mut state = self.0.subscribe();
        let drained = state.wait_for(|state| state.inside == 0);
        if tokio::time::timeout(limit, drained).await.is_err() {
            self.0.send_modify(|state| state.epoch += 1);
        }
        guard
    }
}

impl Pass {
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
        self.gate.0.send_modify(|state| state.inside -= 1);
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
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn inv_07_drain_is_bounded_and_admits_nobody() {
        let gate = Gate::default();
        assert!(gate.enter().is_none(), "closed until the guest is there");
        gate.open();
        let slow = gate.enter().unwrap();
        let begun = tokio::time::Instant::now();
        let closing = {
            let gate = gate.clone();
            tokio::spawn(async move { gate.close(Duration::from_secs(5)).await })
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
    async fn a_drain_ends_as_soon_as_the_last_connection_does() {
        let gate = Gate::default();
        gate.open();
        let pass = gate.enter().unwrap();
        let begun = tokio::time::Instant::now();
        let closing = {
            let gate = gate.clone();
            tokio::spawn(async move { gate.close(Duration::from_secs(5)).await })
        };
        tokio::task::yield_now().await;
        drop(pass);
        closing.await.unwrap().keep();
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert!(gate.enter().is_none(), "kept closed");
    }
}
