//! Chains stay short: layers that lie on each other are merged into one, in the background.
//!
//! Every pause, snapshot and fork puts a layer on the chain of a disk, and every read of what nobody wrote since goes
//! through all of it. So when a chain is deeper than [`MAX_LAYERS`], neighbours in it become one layer:
//!
//! ```text
//!  tip ── above ── P ── … ── Q ── rest          the run P…Q, newest to oldest
//!             └──── M ─────────── rest          M shows over the rest what P…Q show over it
//!
//!  [stage] ─> [merge] ─> [verify] ─> publish M ─> commit: the parent of `above` is M ─> P…Q go, if nobody needs them
//!                                                 └ the only write that counts, and it may be repeated
//! ```
//!
//! - Nothing is dropped before M has been read back and compared with the run (INV-09). Layers stay immutable: what
//!   `above` shows is the same before and after (INV-10, INV-25).
//! - A crash before the commit leaves an M that nothing reaches, one after it a run that nothing reaches: both are what
//!   a collection removes (INV-30, INV-52). Whether a commit that failed has happened is not known, so both are kept
//!   until it succeeds.
//! - A guest that runs keeps the layers that it was started on open. Its record names them until its disk is
//!   detached, so they stay until then ([`Sandbox::opened`](crate::manifest::v1::Sandbox::opened)), and what it reads
//!   through is short from its next start or resume on. Work in flight has [pinned](crate::catalog::PinnedChain) its
//!   chain.
//! - One merge at a time, in a task of its own: no verb waits for it. One that fails changes nothing, is reported
//!   (`layers.merge-failed`), and is tried again later.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::catalog::{DeepChain, StoredLayer};
use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{ErrorKind, HostError};
use crate::id::LayerId;
use crate::layout::Object;
use crate::manifest;
use crate::manifest::v1::Layer;
use crate::panics::caught;
use crate::sandbox::{Chained, Shared, find_volume_driver};
use crate::steps::Steps;

/// How many layers may lie under a disk. `docs/decisions/volumes.md` has what a layer costs a read, and what merging
/// costs; twice as many as generations that are kept by default, so that there is always a run that only its neighbours
/// need.
pub(crate) const MAX_LAYERS: usize = 16;
/// With fewer, a run could be too short to be worth it.
const MAX_LAYERS_MIN: usize = 4;
/// A merge is worth it if so many layers go.
const WORTH: usize = 2;
/// A layer joins a run above it that is at least half its size. So what is merged again has grown by half since, and
/// every byte is written a number of times that grows with the logarithm of the number of pauses.
const GROWTH: u64 = 2;
/// From a new layer to the look at its chain: its verb is done with the disk by then, and a burst is one look.
const SETTLE: Duration = Duration::from_secs(1);
/// After a failure, until the same run is tried again.
const RETRY: Duration = Duration::from_mins(10);

/// What is to be done to one chain.
struct Plan {
    /// The layer on top of the run. It will sit on `into`.
    above: StoredLayer,
    /// Newest first, each on the next.
    run: Vec<LayerId>,
    /// What the run becomes.
    into: Layer,
}

/// The task: shortens chains that are too deep now, and whenever there is a new layer. Ends with the engine.
pub(crate) async fn keep_chains_short(engine: Weak<Shared>) {
    let Some(mut layers) = engine.upgrade().map(|it| it.catalog.layers_added()) else {
        return;
    };
    let mut failed = BTreeMap::new();
    loop {
        layers.mark_unchanged();
        let Some(shared) = engine.upgrade() else {
            return;
        };
        shorten(&shared, &mut failed).await;
        drop(shared);
        let retry = tokio::time::sleep(RETRY);
        tokio::select! {
            added = layers.changed() => match added {
                Ok(()) => {}
                Err(_no_engine) => return,
            },
            () = retry, if !failed.is_empty() => {}
        }
        tokio::time::sleep(SETTLE).await;
    }
}

/// Merges until no chain is too deep, other than those where it has failed, and removes what is not needed any more.
async fn shorten(shared: &Arc<Shared>, failed: &mut BTreeMap<LayerId, Instant>) {
    let drivers: BTreeSet<String> = shared
        .host
        .volumes
        .iter()
        .filter(|driver| driver.merges_layers().is_some())
        .map(|driver| driver.name().to_owned())
        .collect();
    let bound = shared.config.max_layers.max(MAX_LAYERS_MIN);
    failed.retain(|_, since| since.elapsed() < RETRY);
    loop {
        // While nothing can go, a merge would only cost room.
        if shared.catalog.holds_back().is_some() {
            break;
        }
        let without = failed.keys().cloned().collect();
        let Some(deep) = shared.catalog.deep_chain(bound, &drivers, &without) else {
            break;
        };
        let planned = caught("measuring layers", plan(shared, &deep, bound)).await;
        let (at, merged) = match &planned {
            Ok(plan) => (plan.run[0].clone(), merge(shared, plan).await),
            Err(_) => (deep.links[0].stored.layer.id.clone(), Ok(())),
        };
        if let Err(error) = planned.map(drop).and(merged) {
            let why = Chained(&error).to_string();
            tracing::warn!(layer = %at, why, "a chain of layers stays as deep as it is");
            let detail = format!("the chain of layer {at} stays as deep as it is: {why}");
            let none = Steps::default();
            shared
                .events
                .emit(None, None, "layers.merge-failed", detail, &none);
            failed.insert(at, Instant::now());
        }
    }
    if !shared.catalog.unreachable().is_empty() {
        collect::what_goes(shared).await;
    }
}

async fn plan(shared: &Shared, deep: &DeepChain, bound: usize) -> Result<Plan, Error> {
    let mut weights = Vec::new();
    for link in &deep.links {
        let layer = &link.stored.layer;
        let driver = find_volume_driver(&shared.host, &layer.driver)?;
        let bytes = driver.layer_usage(&layer.id);
        let bytes = within(deadline::DISK, "measuring a layer", bytes).await?;
        weights.push(Weight {
            bytes: bytes.0,
            shared: link.shared,
        });
    }
    let run = choose(&weights, bound);
    let (above, run) = (&deep.links[run.start - 1], &deep.links[run]);
    let (newest, oldest) = (&run[0].stored.layer, &run[run.len() - 1].stored.layer);
    Ok(Plan {
        above: above.stored.clone(),
        run: run.iter().map(|it| it.stored.layer.id.clone()).collect(),
        into: Layer {
            id: LayerId::random(),
            driver: newest.driver.clone(),
            parent: oldest.parent.clone(),
            base: oldest.base.clone(),
            size: newest.size,
            created_at: shared.now(),
        },
    })
}

/// What a layer of a chain weighs in the choice of a run.
struct Weight {
    bytes: u64,
    shared: bool,
}

/// Which layers of a chain that is deeper than `bound`, newest first, become one. Never the first, which something
/// refers to by its name.
///
/// The newest stretch of layers that only their neighbours need and that is worth it: they go. Where there is none,
/// layers that others need are copied, and nothing goes: the chain is short all the same.
fn choose(links: &[Weight], bound: usize) -> Range<usize> {
    let depth = links.len();
    let stretch = (1..depth).find_map(|start| {
        let end = (start..depth).find(|at| links[*at].shared);
        let end = end.unwrap_or(depth);
        (end > start + WORTH).then_some(start..end)
    });
    let stretch = stretch.unwrap_or(1..depth);
    let wanted = depth.saturating_sub(bound) + WORTH;
    let mut run = stretch.start..stretch.start + 1;
    let mut bytes = links[run.start].bytes;
    while run.end < stretch.end
        && (run.len() < wanted || links[run.end].bytes <= bytes.saturating_mul(GROWTH))
    {
        bytes = bytes.saturating_add(links[run.end].bytes);
        run.end += 1;
    }
    run
}

/// Merges one run. The chain is kept meanwhile.
async fn merge(shared: &Shared, plan: &Plan) -> Result<(), Error> {
    let object = Object::Layer(plan.into.id.clone());
    let _pin = shared.catalog.pin([object.clone()]);
    let steps = Steps::default();
    let made = make(shared, plan, &object, &steps);
    if let Err(error) = caught("merging layers", made).await {
        let store = &shared.host.store;
        let discarded = within(deadline::STORE, "discarding a merged layer", async {
            store.discard(&object).await?;
            store.trash(&object).await
        });
        if let Err(error) = caught("discarding a merged layer", discarded).await {
            tracing::warn!(%object, error = %Chained(&error), "left for the next start to remove");
        }
        return Err(error);
    }
    shared.catalog.add_layer(1, plan.into.clone());
    steps.time("commit", commit(shared, plan)).await;
    let (layers, above) = (plan.run.len(), &plan.above.layer.id);
    let detail = format!("{layers} layers under {above} are one: {}", plan.into.id);
    shared
        .events
        .emit(None, None, "layers.merged", detail, &steps);
    Ok(())
}

/// Makes the merged layer, up to its publication.
async fn make(shared: &Shared, plan: &Plan, object: &Object, steps: &Steps) -> Result<(), Error> {
    let (store, into) = (&shared.host.store, &plan.into);
    let driver = find_volume_driver(&shared.host, &into.driver)?;
    let merging = driver.merges_layers().ok_or_else(|| Error::Step {
        step: "merging layers",
        source: HostError::new(
            ErrorKind::Unsupported,
            format!("{} keeps no chains of layers", into.driver),
        ),
    })?;
    shared.require_room(Some(&into.driver)).await?;
    let staging = within(deadline::STORE, "staging a layer", store.stage(object)).await?;
    let merged = merging.merge(&plan.run, into.size, &staging);
    let merged = within(deadline::FLATTEN, "merging layers", merged);
    steps.time("merge", merged).await?;
    let same = merging.verify(&plan.run, into.size, &staging);
    let same = within(deadline::FLATTEN, "comparing a merged layer", same);
    steps.time("verify", same).await?;
    let document = manifest::encode(1, into);
    let published = store.publish(object, &document);
    let published = within(deadline::STORE, "publishing a merged layer", published);
    steps.time("publish", published).await
}

/// Puts what is above the run on the merged layer. If that fails, the disk may have either chain, and both show the
/// same: it is tried until it has this one.
async fn commit(shared: &Shared, plan: &Plan) {
    const FIRST: Duration = Duration::from_millis(100);
    const RAREST: Duration = Duration::from_secs(30);
    let revision = plan.above.revision + 1;
    let above = Layer {
        parent: Some(plan.into.id.clone()),
        base: None,
        ..plan.above.layer.clone()
    };
    let object = Object::Layer(above.id.clone());
    let bytes = manifest::encode(revision, &above);
    let mut pause = FIRST;
    loop {
        let committed = shared.host.store.commit(&object, &bytes);
        let committed = within(
            deadline::STORE,
            "putting a layer on a merged one",
            committed,
        );
        match caught("putting a layer on a merged one", committed).await {
            Ok(()) => break,
            Err(error) => {
                tracing::warn!(%object, error = %Chained(&error), "it is not known yet what it sits on");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RAREST);
    }
    shared.catalog.add_layer(revision, above);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(chain: &[(u64, bool)]) -> Vec<Weight> {
        let weight = |&(bytes, shared)| Weight { bytes, shared };
        chain.iter().map(weight).collect()
    }

    fn repeated(bytes: u64, shared: bool, times: usize) -> Vec<(u64, bool)> {
        vec![(bytes, shared); times]
    }

    #[test]
    fn a_run_is_what_only_its_neighbours_need() {
        // A sandbox that is paused again and again: the newest eight are its generations'.
        let chain = [repeated(10, true, 8), repeated(10, false, 9)].concat();
        assert_eq!(choose(&weights(&chain), 16), 8..17);
        // A big one at the bottom, which the others are not worth writing again for.
        let chain = [
            repeated(10, true, 8),
            repeated(10, false, 8),
            repeated(1000, false, 1),
        ];
        assert_eq!(choose(&weights(&chain.concat()), 16), 8..16);
        // A fork over a template's deep chain: what is under the template's layer becomes one for all forks.
        let chain = [repeated(10, true, 2), repeated(10, false, 15)].concat();
        assert_eq!(choose(&weights(&chain), 16), 2..17);
        // Small ones join with as much as the bound needs, whatever it weighs.
        let chain = [
            repeated(10, true, 14),
            repeated(10, false, 1),
            repeated(1000, false, 5),
        ];
        assert_eq!(choose(&weights(&chain.concat()), 16), 14..20);
    }

    #[test]
    fn where_others_need_every_layer_some_are_copied() {
        let chain = repeated(10, true, 17);
        assert_eq!(choose(&weights(&chain), 16), 1..17);
        let chain = [repeated(10, true, 6), repeated(1000, true, 11)].concat();
        assert_eq!(choose(&weights(&chain), 16), 1..6);
    }

    #[test]
    fn a_chain_stays_short_and_its_bytes_are_written_few_times() {
        const PAUSES: u64 = 2000;
        const KEPT: usize = 8;
        const SIZE: u64 = 1 << 20;
        let (mut chain, mut written): (Vec<u64>, u64) = (Vec::new(), 0);
        for _ in 0..PAUSES {
            chain.insert(0, SIZE);
            while chain.len() > MAX_LAYERS {
                let weight = |(at, bytes): (usize, &u64)| (*bytes, at < KEPT);
                let links: Vec<_> = chain.iter().enumerate().map(weight).collect();
                let run = choose(&weights(&links), MAX_LAYERS);
                assert!(run.start > 0 && run.len() > 1, "{run:?}");
                let merged: u64 = chain[run.clone()].iter().sum();
                written += merged;
                chain.splice(run, [merged]);
            }
        }
        // Nothing is ever written over here, which is the worst case.
        let times = written / (PAUSES * SIZE);
        assert!(times <= 6, "{times}");
    }
}
