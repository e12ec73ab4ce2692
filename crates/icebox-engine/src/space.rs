//! Room for new work, and for guests that have run out of it.
//!
//! ```text
//!   free   ├──────────────────────────┼───────────────────┼───┤ 0
//!          what is new is admitted    │ running guests     │ a guest whose write found no room stands still
//!                                     └ low-water mark     └ a sixteenth of it: it goes on from here
//! ```
//! Below the mark, whatever would begin to fill the disk is refused, while there is still room for what is there already
//! (INV-28). Pausing is not refused: it is how a machine is given back, a small one fits where nothing else does, and one
//! that does not fit leaves the guest running and gives back what it had written.

use std::time::Duration;

use tokio::time::Instant;

use crate::deadline::{self, within};
use crate::engine::Config;
use crate::error::Error;
use crate::host::Space;
use crate::sandbox::{Shared, find_volume_driver};
use crate::unit::Bytes;

/// What is kept free where nothing else is asked for, on all but small file systems.
const KEEP_FREE: Bytes = Bytes::mib(1024);
/// On small ones: this part of them.
const KEEP_FREE_PART: u64 = 20;
/// Which part of the mark must be free for a guest that ran out of room to go on. Less would only stall it again.
const GO_ON_PART: u64 = 16;

/// Between two looks at whether there is room again.
const LOOK: Duration = Duration::from_secs(1);
/// At most between two such looks, for a guest that stalls again and again.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// A guest that has run for so long since it stalled has had room.
const SETTLED: Duration = Duration::from_secs(10);

impl Config {
    /// How much must be free in a place for new work to be admitted there.
    #[must_use]
    pub fn low_water_mark(&self, space: &Space) -> Bytes {
        let default = || KEEP_FREE.min(Bytes(space.total.0 / KEEP_FREE_PART));
        self.keep_free.unwrap_or_else(default)
    }
}

impl Shared {
    fn mark(&self, space: &Space) -> Bytes {
        self.config.low_water_mark(space)
    }

    /// The places that a sandbox with this volume driver writes to, or those that everything does.
    async fn places(&self, driver: Option<&str>) -> Result<Vec<Space>, Error> {
        let checking = "checking free space";
        let mut places = vec![within(deadline::DISK, checking, self.host.store.space()).await?];
        if let Some(driver) = driver {
            let driver = find_volume_driver(&self.host, driver)?;
            places.extend(within(deadline::DISK, checking, driver.space()).await?);
        }
        Ok(places)
    }

    /// Every place, with its low-water mark.
    pub(crate) async fn room(&self) -> Result<Vec<(Space, Bytes)>, Error> {
        let mut places = self.places(None).await?;
        for driver in &self.host.volumes {
            places.extend(within(deadline::DISK, "checking free space", driver.space()).await?);
        }
        let marked = places.into_iter().map(|space| {
            let mark = self.mark(&space);
            (space, mark)
        });
        Ok(marked.collect())
    }

    /// Refuses what would begin to fill a place in which less than the low-water mark is free.
    pub(crate) async fn require_room(&self, driver: Option<&str>) -> Result<(), Error> {
        let places = self.places(driver).await?;
        let full = |space: &&Space| space.available < self.mark(space);
        let Some(space) = places.iter().find(full) else {
            return Ok(());
        };
        Err(Error::Exhausted {
            message: format!(
                "only {} of {} are free on {}, less than the {} that are kept for sandboxes that run",
                space.available,
                space.total,
                space.place,
                self.mark(space),
            ),
            hint: "free some space: `icebox stats` shows what takes how much, then `icebox rm` and `icebox template rm`; \
                   or lower `space.keep_free_mib` in the settings"
                .into(),
        })
    }

    /// Whether a guest that ran out of room would get somewhere now.
    pub(crate) async fn has_room_to_go_on(&self, driver: &str) -> Result<bool, Error> {
        let places = self.places(Some(driver)).await?;
        let fits = |space: &Space| space.available.0 >= self.mark(space).0 / GO_ON_PART;
        Ok(places.iter().all(fits))
    }
}

/// A guest that stands still for want of room, or did a moment ago.
#[derive(Debug)]
pub(crate) struct Stall {
    stands: bool,
    /// When it stalled, or went on.
    since: Instant,
    pause: Duration,
    look_at: Instant,
}

impl Stall {
    /// A guest stalls. `before` is what was known of it.
    pub(crate) fn again(before: Option<&Self>) -> Self {
        let pause = match before {
            // It went on, and did not get far.
            Some(it) if it.since.elapsed() < SETTLED => (it.pause * 2).min(LOOK_MAX),
            _ => LOOK,
        };
        let now = Instant::now();
        Self {
            stands: true,
            since: now,
            pause,
            look_at: now + pause,
        }
    }

    /// The guest goes on.
    pub(crate) fn over(&mut self) {
        self.stands = false;
        self.since = Instant::now();
    }

    /// There is no room yet.
    pub(crate) fn lasts(&mut self) {
        self.look_at = Instant::now() + self.pause;
    }

    /// When to look whether there is room again.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        self.stands.then_some(self.look_at)
    }
}
