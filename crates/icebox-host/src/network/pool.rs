//! Spares, made ahead of time.
//!
//! Making a spare costs milliseconds (a namespace, a tap, a run of nft), giving it to a slot a fraction of one. A
//! thread of its own keeps a few in stock, so that what a user waits for is only the latter. Spares have no name and
//! belong to no slot: those of a daemon that dies go with it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::error::Failure;
use super::slots::{Slots, Spare};

/// The most spares that [`Pool::expect`] makes the pool hold: a burst is not a reason to fill the host.
const STOCK_LIMIT: usize = 64;

pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    slots: Arc<Slots>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    spares: VecDeque<Spare>,
    /// How many to keep in stock when nothing is expected.
    size: usize,
    /// How many more are expected to be taken soon.
    expected: usize,
    /// The last attempt failed: wait for the next sign of demand instead of trying in a loop.
    failed: bool,
    closed: bool,
}

impl State {
    fn wants_more(&self) -> bool {
        let target = self.size.max(self.expected).min(STOCK_LIMIT);
        !self.failed && self.spares.len() < target
    }
}

impl Pool {
    /// A pool that keeps `size` spares. With 0 it starts no thread, and every spare is made when it is needed.
    pub(super) fn new(slots: Arc<Slots>, size: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            slots,
            state: Mutex::new(State {
                spares: VecDeque::new(),
                size,
                expected: 0,
                failed: false,
                closed: false,
            }),
            changed: Condvar::new(),
        });
        if size > 0 {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("icebox-spares".into())
                .spawn(move || shared.keep_stocked())?;
        }
        Ok(Self { shared })
    }

    /// A spare from the stock, or one made now. Blocks for milliseconds in the second case. Does not replace it yet:
    /// making the next one would compete with the use of this one for the kernel's locks. Call [`Pool::replenish`].
    pub(super) fn take(&self) -> Result<Spare, Failure> {
        let spare = {
            let mut state = self.shared.lock();
            state.expected = state.expected.saturating_sub(1);
            state.spares.pop_front()
        };
        match spare {
            Some(spare) => Ok(spare),
            None => self.shared.slots.prepare(),
        }
    }

    /// Fills the stock in the background.
    pub(super) fn replenish(&self) {
        self.shared.lock().failed = false;
        self.shared.changed.notify_all();
    }

    /// Announces that `count` spares will be taken soon.
    pub(super) fn expect(&self, count: usize) {
        let mut state = self.shared.lock();
        state.expected = state.expected.saturating_add(count).min(STOCK_LIMIT);
        drop(state);
        self.replenish();
    }

    /// How many spares are in stock.
    #[cfg(test)]
    pub(super) fn stock(&self) -> usize {
        self.shared.lock().spares.len()
    }

    /// Blocks until the stock is full, or cannot be filled.
    #[cfg(test)]
    pub(super) fn wait_until_stocked(&self) {
        let state = self.shared.lock();
        drop(
            self.shared
                .changed
                .wait_while(state, |state| state.wants_more())
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No update of the state can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_stocked(&self) {
        loop {
            let state = self.lock();
            let state = self
                .changed
                .wait_while(state, |state| !state.closed && !state.wants_more())
                .unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return;
            }
            drop(state);
            let made = self.slots.prepare();
            let mut state = self.lock();
            match made {
                Ok(spare) => state.spares.push_back(spare),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot prepare network slots ahead"
                    );
                    state.failed = true;
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}
