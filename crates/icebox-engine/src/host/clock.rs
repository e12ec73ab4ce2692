//! What time it is.
//!
//! Time-outs, retention and the times that records name are of the wall clock, since they outlive the daemon. It is a part
//! of the host like any other, so that tests say how much of it goes by, also while no daemon runs. How long a wait may
//! take is no question for it: waits go by the runtime's own, monotonic clock.

use jiff::Timestamp;

/// Tells the time.
pub trait Clock: Send + Sync {
    /// Now, by the wall clock. It may be set back or forward at any moment.
    fn now(&self) -> Timestamp;
}

/// The clock of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}
