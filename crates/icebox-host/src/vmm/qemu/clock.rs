//! How fast the host's time stamp counter runs: TCG shows it to the guest, which cannot find out by itself.

use std::time::{Duration, Instant};

use super::sys;

/// Below this, the frequency would be off by more than a guest's clock should be.
const BASELINE_MIN: Duration = Duration::from_millis(50);

/// Two clocks, read at the same moment. The longer ago, the better the frequency known from it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Calibration {
    began: Instant,
    counter: Option<u64>,
}

impl Calibration {
    /// Begins to measure.
    pub(super) fn begin() -> Self {
        Self {
            began: Instant::now(),
            counter: sys::time_stamp(),
        }
    }

    /// The counter's frequency in kHz. Waits until enough time has passed since the beginning, which is only ever the case
    /// in the first moments of a daemon.
    pub(super) async fn khz(&self) -> Option<u64> {
        let counter = self.counter?;
        tokio::time::sleep(BASELINE_MIN.saturating_sub(self.began.elapsed())).await;
        let ticks = u128::from(sys::time_stamp()?.checked_sub(counter)?);
        let nanoseconds = self.began.elapsed().as_nanos();
        u64::try_from(ticks * 1_000_000 / nanoseconds).ok()
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_measurements_agree() {
        let first = Calibration::begin().khz().await.unwrap();
        let second = Calibration::begin().khz().await.unwrap();
        // 0.1 %: a loaded machine may delay one of two readings by tens of microseconds in 50 ms.
        assert!(first.abs_diff(second) < first / 1000, "{first} {second}");
        assert!(first > 100_000, "{first} kHz");
    }
}
