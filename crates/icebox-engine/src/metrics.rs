//! What running sandboxes use, second by second, in one pass for all of them.
//!
//! ```text
//!   meters ── every second ──► seconds (10 min, memory)
//!                                 └─ mean of 10 ──► tens (2 h, memory)
//!                                       mean of 60 ──► minutes (2 days, journal)
//! ```
//! Measured from outside: a guest that is asked how it is would not be idle, and would have changed pages to save at its next
//! pause. While nothing runs nothing wakes up. A sandbox is measured exactly while its guest runs and not while it stands
//! still for a capture (INV-45): what a capture does is not the guest's work, and the time is not its time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::deadline::{self, within};
use crate::host::{Counters, Meter};
use crate::id::SandboxId;
use crate::sandbox::{Chained, Shared};

/// Between two passes.
const EVERY: Duration = Duration::from_secs(1);
/// How many sandboxes are read before others get a turn on the thread.
const IN_A_ROW: usize = 32;

/// How fine samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// A second each; the last ten minutes.
    Second,
    /// The means of ten seconds; the last two hours.
    TenSeconds,
    /// The means of minutes; the last two days, across restarts of the daemon.
    Minute,
}

impl Resolution {
    /// What one sample is of, in seconds.
    #[must_use]
    pub fn seconds(self) -> u32 {
        match self {
            Self::Second => 1,
            Self::TenSeconds => 10,
            Self::Minute => 60,
        }
    }

    /// How many are kept.
    const fn kept(self) -> usize {
        match self {
            Self::Second => 600,
            Self::TenSeconds => 720,
            Self::Minute => 2880,
        }
    }
}

/// What a sandbox used for a while: the guest, and the VMM that runs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// The end of that while, in seconds since 1970.
    pub at: u32,
    /// How long that was, in seconds. What of it the guest stood still is left out.
    pub seconds: u32,
    /// CPU time in thousandths of one CPU.
    pub cpu_permille: u32,
    /// Memory of the host, in KiB.
    pub memory_kib: u32,
    /// Bytes per second read from the disk, as for the three below.
    pub disk_read: u32,
    /// Written to the disk.
    pub disk_written: u32,
    /// Sent to the guest.
    pub network_in: u32,
    /// Sent by the guest.
    pub network_out: u32,
}

impl Sample {
    fn between(before: &Counters, after: &Counters, took: Duration, at: u32) -> Self {
        let rate = |before: u64, after: u64, unit: u128| {
            let rate = u128::from(after.saturating_sub(before)) * unit / took.as_nanos().max(1);
            u32::try_from(rate).unwrap_or(u32::MAX)
        };
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let per_second = |before, after| rate(before, after, 1_000_000_000);
        Self {
            at,
            seconds: Resolution::Second.seconds(),
            cpu_permille: rate(nanos(before.cpu), nanos(after.cpu), 1000),
            memory_kib: u32::try_from(after.memory.0 >> 10).unwrap_or(u32::MAX),
            disk_read: per_second(before.disk_read.0, after.disk_read.0),
            disk_written: per_second(before.disk_written.0, after.disk_written.0),
            network_in: per_second(before.network_in.0, after.network_in.0),
            network_out: per_second(before.network_out.0, after.network_out.0),
        }
    }

    fn values(&self) -> [u32; 6] {
        [
            self.cpu_permille,
            self.memory_kib,
            self.disk_read,
            self.disk_written,
            self.network_in,
            self.network_out,
        ]
    }
}

/// The mean of samples in the making.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    bucket: u32,
    count: u64,
    sums: [u64; 6],
}

impl Mean {
    /// Takes a sample in. If it is the first of a new while, the mean of the one before.
    fn add(&mut self, sample: &Sample, resolution: Resolution) -> Option<Sample> {
        // A sample is of the second that ends with it.
        let bucket = sample.at.saturating_sub(1) / resolution.seconds();
        let done = (bucket != self.bucket).then(|| self.take(resolution));
        self.bucket = bucket;
        self.count += 1;
        for (sum, value) in self.sums.iter_mut().zip(sample.values()) {
            *sum += u64::from(value);
        }
        done.flatten()
    }

    fn take(&mut self, resolution: Resolution) -> Option<Sample> {
        let Self {
            bucket,
            count,
            sums,
        } = std::mem::take(self);
        if count == 0 {
            return None;
        }
        // The mean of numbers of 32 bits has no more.
        let mean = sums.map(|sum| u32::try_from(sum / count).unwrap_or(u32::MAX));
        let [
            cpu_permille,
            memory_kib,
            disk_read,
            disk_written,
            network_in,
            network_out,
        ] = mean;
        Some(Sample {
            at: (bucket + 1).saturating_mul(resolution.seconds()),
            seconds: resolution.seconds(),
            cpu_permille,
            memory_kib,
            disk_read,
            disk_written,
            network_in,
            network_out,
        })
    }
}

/// What is known of one sandbox.
#[derive(Default)]
struct Series {
    meter: Option<Box<dyn Meter>>,
    /// How many captures have its guest stand still.
    still: usize,
    last: Option<(Instant, Counters)>,
    seconds: VecDeque<Sample>,
    tens: VecDeque<Sample>,
    ten: Mean,
    minute: Mean,
}

impl Series {
    /// Reads the meter. A minute that has ended, if one has.
    fn sample(&mut self, at: u32) -> Option<Sample> {
        if self.still > 0 {
            return None;
        }
        // One whose VMM has just ended will be told so.
        let now = self.meter.as_mut()?.read().ok()?;
        let read_at = Instant::now();
        let (before_at, before) = self.last.replace((read_at, now))?;
        match self.seconds.back().map(|sample| sample.at) {
            Some(newest) if newest == at => return None,
            // The clock was set back: what is not in order is of no use.
            Some(newest) if newest > at => {
                self.seconds.clear();
                self.tens.clear();
                (self.ten, self.minute) = (Mean::default(), Mean::default());
            }
            _ => {}
        }
        let sample = Sample::between(&before, &now, read_at - before_at, at);
        keep(&mut self.seconds, sample, Resolution::Second);
        if let Some(ten) = self.ten.add(&sample, Resolution::TenSeconds) {
            keep(&mut self.tens, ten, Resolution::TenSeconds);
        }
        self.minute.add(&sample, Resolution::Minute)
    }
}

/// Adds a sample, and lets go of those that are too old, or too many.
fn keep(samples: &mut VecDeque<Sample>, sample: Sample, resolution: Resolution) {
    let kept = resolution.kept();
    let oldest = u32::try_from(kept)
        .unwrap_or(u32::MAX)
        .saturating_mul(resolution.seconds());
    let oldest = sample.at.saturating_sub(oldest);
    while samples.len() >= kept || samples.front().is_some_and(|it| it.at <= oldest) {
        samples.pop_front();
    }
    samples.push_back(sample);
}

/// What sandboxes use and used. Cheap to clone; all clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Metrics(Arc<Inner>);

#[derive(Default)]
struct Inner {
    series: Mutex<BTreeMap<SandboxId, Series>>,
    /// How many sandboxes are measured.
    measured: watch::Sender<usize>,
}

/// Keeps a sandbox from being measured.
pub(crate) struct Still {
    metrics: Metrics,
    sandbox: SandboxId,
}

impl Metrics {
    fn series(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Series>> {
        self.0.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, all: &BTreeMap<SandboxId, Series>) {
        let measured = all.values().filter(|it| it.meter.is_some()).count();
        self.0.measured.send_replace(measured);
    }

    /// The sandbox runs from now on.
    pub(crate) fn begin(&self, sandbox: &SandboxId, mut meter: Box<dyn Meter>) {
        let read = meter.read().ok();
        let mut all = self.series();
        let series = all.entry(sandbox.clone()).or_default();
        series.last = read.map(|read| (Instant::now(), read));
        series.meter = Some(meter);
        self.count(&all);
    }

    /// It does not run any more. What it used stays known.
    pub(crate) fn end(&self, sandbox: &SandboxId) {
        let mut all = self.series();
        if let Some(series) = all.get_mut(sandbox) {
            (series.meter, series.last) = (None, None);
        }
        self.count(&all);
    }

    /// It is no more.
    pub(crate) fn forget(&self, sandbox: &SandboxId) {
        let mut all = self.series();
        all.remove(sandbox);
        self.count(&all);
    }

    /// Its guest stands still as long as what this returns exists.
    pub(crate) fn hold_still(&self, sandbox: &SandboxId) -> Still {
        if let Some(series) = self.series().get_mut(sandbox) {
            series.still += 1;
        }
        Still {
            metrics: self.clone(),
            sandbox: sandbox.clone(),
        }
    }

    /// Reads all meters of up to [`IN_A_ROW`] sandboxes after this one. The minutes that have ended, and the last sandbox.
    fn pass(
        &self,
        after: Option<&SandboxId>,
        at: u32,
        minutes: &mut Vec<(SandboxId, Sample)>,
    ) -> Option<SandboxId> {
        use std::ops::Bound;
        let mut all = self.series();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = all.range_mut::<SandboxId, _>((from, Bound::Unbounded));
        let mut last = None;
        for (sandbox, series) in range.take(IN_A_ROW) {
            if let Some(minute) = series.sample(at) {
                minutes.push((sandbox.clone(), minute));
            }
            last = Some(sandbox.clone());
        }
        last
    }

    /// What is in memory, by its resolution.
    fn at_hand(&self, sandbox: &SandboxId) -> (Vec<Sample>, Vec<Sample>) {
        let all = self.series();
        let series = all.get(sandbox);
        let copy = |samples: &VecDeque<Sample>| samples.iter().copied().collect();
        series.map_or_else(Default::default, |series| {
            (copy(&series.tens), copy(&series.seconds))
        })
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        if let Some(series) = self.metrics.series().get_mut(&self.sandbox) {
            series.still = series.still.saturating_sub(1);
            // What was used meanwhile is nobody's.
            let read = series.meter.as_mut().and_then(|meter| meter.read().ok());
            series.last = read.map(|read| (Instant::now(), read));
        }
    }
}

impl Shared {
    /// What a sandbox used from `since` on (seconds since 1970), oldest first: as fine as it is known, or of one
    /// resolution.
    pub(crate) async fn history(
        &self,
        sandbox: &SandboxId,
        since: u32,
        resolution: Option<Resolution>,
    ) -> Vec<Sample> {
        let (tens, seconds) = self.metrics.at_hand(sandbox);
        let oldest = |samples: &[Sample]| samples.first().map_or(u32::MAX, |it| it.at - it.seconds);
        let (oldest_second, oldest_ten) = (oldest(&seconds), oldest(&tens));
        let is_wanted = |wanted| resolution.is_none_or(|resolution| resolution == wanted);
        let mut samples = Vec::new();
        if is_wanted(Resolution::Minute) {
            let journal = self.host.journal.samples(sandbox, since);
            match within(deadline::STORE, "reading the journal", journal).await {
                Ok(minutes) => samples = minutes,
                Err(error) => {
                    tracing::error!(%sandbox, error = %Chained(&error), "older samples cannot be shown");
                }
            }
        }
        let append = |samples: &mut Vec<Sample>, finer: Vec<Sample>, from: u32| {
            samples.retain(|sample| sample.at <= from);
            samples.extend(finer);
        };
        if is_wanted(Resolution::TenSeconds) && !tens.is_empty() {
            append(&mut samples, tens, oldest_ten);
        }
        if is_wanted(Resolution::Second) && !seconds.is_empty() {
            append(&mut samples, seconds, oldest_second);
        }
        samples.retain(|sample| sample.at >= since);
        samples
    }

    /// Nothing is known any more of what a sandbox used that is no more.
    pub(crate) fn forget_history(&self, sandbox: &SandboxId) {
        self.metrics.forget(sandbox);
        let (journal, sandbox) = (Arc::clone(&self.host.journal), sandbox.clone());
        tokio::spawn(async move {
            let forgotten = journal.forget_samples(&sandbox);
            let forgotten = within(deadline::STORE, "writing the journal", forgotten);
            if let Err(error) = forgotten.await {
                tracing::warn!(%sandbox, error = %Chained(&error), "its samples stay until they are too old");
            }
        });
    }
}

/// Measures whatever runs. Ends with the engine.
pub(crate) async fn measure(shared: Weak<Shared>) {
    let Some(mut measured) = shared.upgrade().map(|it| it.metrics.0.measured.subscribe()) else {
        return;
    };
    let mut pass = tokio::time::interval(EVERY);
    pass.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        if measured.wait_for(|measured| *measured > 0).await.is_err() {
            return;
        }
        pass.tick().await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let at = u32::try_from(shared.now().as_second()).unwrap_or_default();
        let mut minutes = Vec::new();
        let mut last = shared.metrics.pass(None, at, &mut minutes);
        while let Some(sandbox) = last {
            tokio::task::yield_now().await;
            last = shared.metrics.pass(Some(&sandbox), at, &mut minutes);
        }
        if minutes.is_empty() {
            continue;
        }
        // Beside the next pass: a disk that is slow leaves no gap.
        tokio::spawn(async move {
            let written = shared.host.journal.append_samples(&minutes);
            let written = within(deadline::STORE, "writing the journal", written);
            if let Err(error) = written.await {
                tracing::warn!(error = %Chained(&error), "what sandboxes used in the last minute is not kept");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostError;
    use crate::unit::Bytes;

    /// Uses half a CPU, 1 MiB, and reads 100 bytes a second.
    struct Steady(Instant);

    impl Meter for Steady {
        fn read(&mut self) -> Result<Counters, HostError> {
            let elapsed = self.0.elapsed();
            Ok(Counters {
                cpu: elapsed / 2,
                memory: Bytes::mib(1),
                disk_read: Bytes(elapsed.as_secs() * 100),
                ..Counters::default()
            })
        }
    }

    fn sandbox() -> SandboxId {
        "iaaaaaaaaaaaaaaaaaaaa".parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn samples_are_rates_and_coarser_ones_their_means() {
        let metrics = Metrics::default();
        metrics.begin(&sandbox(), Box::new(Steady(Instant::now())));
        let mut minutes = Vec::new();
        for at in 1..=7300 {
            tokio::time::sleep(EVERY).await;
            metrics.pass(None, at, &mut minutes);
        }
        let (tens, seconds) = metrics.at_hand(&sandbox());
        assert_eq!((seconds.len(), seconds[0].at), (600, 6701));
        assert_eq!((tens.len(), tens[0].at), (720, 100));
        assert_eq!((minutes.len(), minutes[0].1.at), (121, 60));
        let of = |seconds, at| Sample {
            at,
            seconds,
            cpu_permille: 500,
            memory_kib: 1024,
            disk_read: 100,
            ..Sample::default()
        };
        assert_eq!(seconds[0], of(1, 6701));
        assert_eq!(tens[0], of(10, 100));
        assert_eq!(minutes[0].1, of(60, 60));
    }

    #[tokio::test(start_paused = true)]
    async fn inv_45_what_a_capture_takes_is_not_measured() {
        let metrics = Metrics::default();
        metrics.begin(&sandbox(), Box::new(Steady(Instant::now())));
        let count = |metrics: &Metrics| metrics.at_hand(&sandbox()).1.len();
        let mut minutes = Vec::new();
        let still = metrics.hold_still(&sandbox());
        tokio::time::sleep(EVERY).await;
        metrics.pass(None, 1, &mut minutes);
        assert_eq!(count(&metrics), 0);
        drop(still);
        tokio::time::sleep(EVERY).await;
        metrics.pass(None, 2, &mut minutes);
        assert_eq!(count(&metrics), 1);
        metrics.end(&sandbox());
        assert_eq!(*metrics.0.measured.borrow(), 0, "nothing wakes up");
        tokio::time::sleep(EVERY).await;
        metrics.pass(None, 3, &mut minutes);
        assert_eq!(count(&metrics), 1, "what it used stays known");
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_set_back_begins_anew() {
        let metrics = Metrics::default();
        metrics.begin(&sandbox(), Box::new(Steady(Instant::now())));
        let mut minutes = Vec::new();
        for at in [100, 101, 50, 51] {
            tokio::time::sleep(EVERY).await;
            metrics.pass(None, at, &mut minutes);
        }
        let (_, seconds) = metrics.at_hand(&sandbox());
        assert_eq!(seconds.iter().map(|it| it.at).collect::<Vec<_>>(), [50, 51]);
    }
}
