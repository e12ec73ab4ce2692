//! Watches the disks of running guests, for drivers whose heads can be lost as a whole (INV-28).
//!
//! Before that: a guest whose next write could cost it its disk stands still, like one whose write found no room, until there
//! is some. Its own task stops it and lets it go on, so that no verb is disturbed.
//!
//! After it:
//! What a guest sees of it is one failed write after the other; what the user sees is an event, and a state in `inspect` and
//! `ls`. The VMM is left alone: whatever its guest still has in memory is the user's to rescue. Captures are refused, since
//! they would make a generation of a disk that cannot be read; `stop`, `resume --generation` and `rm` work.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use crate::deadline::{self, within};
use crate::host::{Trouble, WatchHeads};
use crate::id::{HeadId, SandboxId};
use crate::sandbox::{Chained, Request, Shared};
use crate::steps::Steps;

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

/// Sandboxes that have been asked to hold their guests and have not come to it yet.
type Asked = BTreeMap<SandboxId, oneshot::Receiver<()>>;

async fn watch(shared: Weak<Shared>) {
    let mut asked = Asked::new();
    while let Some(shared) = shared.upgrade() {
        let mut pause = LOOK;
        for driver in &shared.host.volumes {
            let heads = shared.catalog.heads_in_use(driver.name());
            if let Some(watch) = driver.watch()
                && !heads.is_empty()
            {
                pause = pause.min(look(&shared, watch, &heads, &mut asked).await);
            }
        }
        drop(shared);
        asked.retain(|_, done| done.try_recv() == Err(TryRecvError::Empty));
        tokio::time::sleep(pause.max(LOOK_MIN)).await;
    }
}

/// Looks at heads, and says what is news. When to look again.
async fn look(
    shared: &Shared,
    watch: &dyn WatchHeads,
    heads: &[HeadId],
    asked: &mut Asked,
) -> Duration {
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
                    let entry = shared.catalog.sandbox_of_id(&head.sandbox).ok();
                    let team = entry.as_ref().map(|entry| &entry.record.spec.team);
                    let (sandbox, kind) = (Some(&head.sandbox), "sandbox.disk-lost");
                    let none = Steps::default();
                    shared.events.emit(team, sandbox, kind, why, &none);
                }
            }
            Trouble::Starved { why } => hold(shared, head, why, asked),
        }
    }
    seen.again_in
}

/// Asks a sandbox to hold its guest, unless it does, or has been asked. One that cannot be asked now is asked after the next
/// look.
fn hold(shared: &Shared, head: HeadId, why: String, asked: &mut Asked) {
    let Ok(entry) = shared.catalog.sandbox_of_id(&head.sandbox) else {
        return;
    };
    if entry.stalled || asked.contains_key(&head.sandbox) {
        return;
    }
    let (done, waiting) = oneshot::channel();
    let sandbox = head.sandbox.clone();
    if entry
        .mailbox
        .try_send(Request::Hold(head, why, done))
        .is_ok()
    {
        asked.insert(sandbox, waiting);
    }
}
