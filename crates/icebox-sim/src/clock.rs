//! A wall clock that goes as the runtime's clock does, also where that jumps over waits.

use std::sync::{Mutex, PoisonError};

use icebox_engine::host::Clock;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::world::World;

/// The clock of one life of the engine. What it shows goes on from what the world's last one has shown.
pub(crate) struct SimClock {
    world: World,
    /// When somebody looked last.
    looked: Mutex<Option<Instant>>,
}

impl SimClock {
    pub(crate) fn new(world: World) -> Self {
        Self {
            world,
            looked: Mutex::default(),
        }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let now = Instant::now();
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let gone_by = looked.map_or(SignedDuration::ZERO, |looked| {
            SignedDuration::try_from(now - looked).unwrap_or(SignedDuration::MAX)
        });
        // No two moments are the same, so that what happened first is known to have.
        let gone_by = gone_by.max(SignedDuration::from_micros(1));
        *looked = Some(now);
        let mut state = self.world.lock();
        state.wall += gone_by;
        state.wall
    }
}
