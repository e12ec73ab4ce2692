//! Watches the disks of running guests, for drivers whose heads can be lost as a whole (INV-28).
//!
//! What a guest sees of it is one failed write after the other; what the user sees is an event, and a state in `inspect` and
//! `ls`. The VMM is left alone: whatever its guest still has in memory is the user's to rescue. Captures are refused, since
//! they would make a generation of a disk that cannot be read; `stop`, `resume --generation` and `rm` work.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::deadline::{self, within};
use crate::event::Steps;
use crate::host::{Trouble, WatchHeads};
use crate::id::HeadId;
use crate::sandbox::{Chained, Shared};

/// At most between two looks: what is seen is seen within a second.
const LOOK: Duration = Duration::from_millis(500);
/// At least between two looks: a look itself takes some time.
const LOOK_MIN: Duration = Duration::from_millis(10);

/// Begins to watch. Ends with the engine.
pub(crate) fn begin(shared: &Arc<Shared>) {
    let is_watched = shared.host.volumes.iter().any(|it| it.watch().is_some());
    if is_watched {
        tokio::spawn(watch(Arc::downgrade(shared)));
    }
}

async fn watch(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let mut pause = LOOK;
        for driver in &shared.host.volumes {
            let heads = shared.catalog.heads_in_use(driver.name());
            if let Some(watch) = driver.watch()
                && !heads.is_empty()
            {
                pause = pause.min(look(&shared, watch, &heads).await);
            }
        }
        drop(shared);
        tokio::time::sleep(pause.max(LOOK_MIN)).await;
    }
}

/// Looks at heads, and says what is news. When to look again.
async fn look(shared: &Shared, watch: &dyn WatchHeads, heads: &[HeadId]) -> Duration {
    let seen = match within(deadline::PROBE, "looking at disks", watch.look(heads)).await {
        Ok(seen) => seen,
        Err(error) => {
            tracing::warn!(error = %Chained(&error), "disks are not watched at the moment");
            return LOOK;
        }
    };
    for (head, trouble) in seen.troubled {
        match trouble {
            Trouble::Lost { why } => {
                if shared.catalog.set_lost(&head, &why) {
                    let (sandbox, kind) = (Some(&head.sandbox), "sandbox.disk-lost");
                    shared.events.emit(sandbox, kind, why, &Steps::default());
                }
            }
        }
    }
    seen.again_in
}
