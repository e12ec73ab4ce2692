//! What nothing reaches, and what nobody holds: finding it and removing it.
//!
//! Two things share this file because they share one rule: never touch what is live or not ours. The *sweep* runs
//! once, at start, after every sandbox has been recovered, and compares what exists on the host with what manifests
//! hold. The *collection* runs whenever something was removed, and compares objects with what reaches them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{ErrorKind, HostError};
use crate::id::{HeadId, SandboxId, Slot};
use crate::layout::Object;
use crate::manifest::v1::{Hold, Intent, Sandbox as Record};
use crate::panics::caught;
use crate::sandbox::{Chained, Shared};
use crate::steps::Steps;
use crate::unit::Bytes;

/// What a collection removes, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Objects that nothing reaches, with their allocated bytes.
    pub objects: Vec<(Object, Bytes)>,
}

/// Collects in the background. What does not go is left for the next collection.
pub(crate) fn soon(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move { what_goes(&shared).await });
}

/// Collects. What does not go is left for the next collection.
pub(crate) async fn what_goes(shared: &Arc<Shared>) {
    if let Err(error) = caught("collecting", collect(shared, false)).await {
        tracing::warn!(error = %Chained(&error), "left for the next collection");
    }
}

/// Removes what nothing reaches, or says what that would be: the same plan (INV-52).
pub(crate) async fn collect(shared: &Arc<Shared>, dry_run: bool) -> Result<Plan, Error> {
    let _collecting = shared.collecting.lock().await;
    let store = &shared.host.store;
    let objects = if dry_run {
        shared.catalog.unreachable()
    } else {
        shared.catalog.forget_unreachable()
    };
    if let Some(why) = shared.catalog.holds_back() {
        tracing::warn!(
            why,
            "nothing is collected while something refers to what cannot be read"
        );
    }
    let mut plan = Plan::default();
    let mut failed = None;
    for object in objects {
        let size = within(
            deadline::DISK,
            "measuring an object",
            store.allocated(&object),
        )
        .await;
        if !dry_run && let Err(error) = remove(shared, &object).await {
            tracing::warn!(%object, %error, "left for the next collection to remove");
            failed = Some(error);
            continue;
        }
        plan.objects.push((object, size.unwrap_or_default()));
    }
    if !dry_run {
        within(deadline::STORE, "emptying the trash", store.empty_trash()).await?;
    }
    failed.map_or(Ok(plan), Err)
}

/// Removes an object that the catalog has forgotten. The caller holds [`Shared::collecting`].
pub(crate) async fn remove(shared: &Shared, object: &Object) -> Result<(), Error> {
    for driver in &shared.host.volumes {
        match object {
            Object::Base(digest) => {
                let removal = driver.remove_base(digest);
                within(deadline::DISK, "removing a base", removal).await?;
            }
            // Whose it is may be in a manifest that cannot be read.
            Object::Layer(layer) => {
                let removal = driver.remove_layer(layer);
                within(deadline::DISK, "removing a layer", removal).await?;
            }
            _ => {}
        }
    }
    within(
        deadline::STORE,
        "removing an object",
        shared.host.store.trash(object),
    )
    .await?;
    shared.catalog.removed(object);
    Ok(())
}

/// What manifests hold, by kind.
struct Held {
    sandboxes: BTreeSet<SandboxId>,
    boxes: BTreeSet<SandboxId>,
    slots: BTreeSet<Slot>,
    heads: BTreeSet<HeadId>,
    layers_in_making: BTreeSet<Object>,
}

impl Held {
    fn by(records: &[Arc<Record>]) -> Self {
        let holding = |wanted: fn(&Hold) -> bool| {
            records
                .iter()
                .filter(move |record| record.holds.iter().any(wanted))
        };
        let heads = records.iter().flat_map(|record| {
            let held = record.holds.iter().filter_map(|hold| match hold {
                Hold::Head { number, .. } => Some(*number),
                _ => None,
            });
            let intended = record.intent.iter().map(|intent| match intent {
                Intent::Freeze { to: head, .. } | Intent::SetAside { head, .. } => *head,
            });
            held.chain(intended).map(|number| HeadId {
                sandbox: record.id.clone(),
                number,
            })
        });
        let layers = records
            .iter()
            .filter_map(|record| record.intent.as_ref())
            .map(|intent| match intent {
                Intent::Freeze { layer, .. } | Intent::SetAside { layer, .. } => {
                    Object::Layer(layer.clone())
                }
            });
        Self {
            sandboxes: records.iter().map(|record| record.id.clone()).collect(),
            boxes: holding(|hold| matches!(hold, Hold::Box | Hold::Vmm { .. }))
                .map(|r| r.id.clone())
                .collect(),
            slots: holding(|hold| matches!(hold, Hold::Network))
                .map(|record| record.slot)
                .collect(),
            heads: heads.collect(),
            layers_in_making: layers.collect(),
        }
    }
}

/// Removes what exists on the host and no manifest holds (INV-33). One that will not go is reported and does not stop
/// the rest.
pub(crate) async fn sweep(shared: &Arc<Shared>, strays: Vec<Object>) {
    let records: Vec<Arc<Record>> = shared
        .catalog
        .sandboxes()
        .into_iter()
        .map(|entry| entry.record)
        .collect();
    let held = Held::by(&records);
    let host = &shared.host;

    for object in strays {
        report(shared, &object.to_string(), async {
            host.store.trash(&object).await?;
            Ok(())
        })
        .await;
    }
    match host.boxes.list().await {
        Ok(boxes) => {
            for id in boxes.into_iter().filter(|id| !held.boxes.contains(id)) {
                report(shared, &format!("box of {id}"), async {
                    // Only a sandbox that no manifest knows can have a VMM that no manifest holds.
                    for vmm in &host.vmms {
                        vmm.kill(&id, None).await?;
                    }
                    host.boxes.release(&id).await?;
                    Ok(())
                })
                .await;
            }
        }
        Err(error) => unseen(shared, "boxes", &error),
    }
    match host.network.list().await {
        Ok(slots) => {
            for slot in slots.into_iter().filter(|slot| !held.slots.contains(slot)) {
                report(shared, &format!("network of slot {slot}"), async {
                    host.network.release(slot).await?;
                    Ok(())
                })
                .await;
            }
        }
        Err(error) => unseen(shared, "networks", &error),
    }
    for driver in &host.volumes {
        match driver.list_heads().await {
            Ok(heads) => {
                for head in heads.into_iter().filter(|head| !held.heads.contains(head)) {
                    // A sandbox that no manifest knows has a directory that may be the only copy of something.
                    if held.sandboxes.contains(&head.sandbox) {
                        report(shared, &format!("disk head {head}"), async {
                            driver.detach(&head).await?;
                            driver.remove_head(&head).await?;
                            Ok(())
                        })
                        .await;
                    }
                }
            }
            Err(error) => unseen(shared, "disk heads", &error),
        }
        match driver.list_layers().await {
            Ok(layers) => {
                let layers = layers.into_iter().map(Object::Layer);
                let strays = layers.filter(|layer| !held.layers_in_making.contains(layer));
                for layer in shared.catalog.strays(strays) {
                    report(shared, &format!("data of {layer}"), async {
                        if let Object::Layer(id) = &layer {
                            driver.remove_layer(id).await?;
                        }
                        Ok(())
                    })
                    .await;
                }
            }
            Err(error) => unseen(shared, "layers", &error),
        }
    }
    match host.store.list_staging().await {
        Ok(staged) => {
            for object in staged
                .into_iter()
                .filter(|object| !held.layers_in_making.contains(object))
            {
                report(shared, &format!("unfinished {object}"), async {
                    host.store.discard(&object).await?;
                    Ok(())
                })
                .await;
            }
        }
        Err(error) => unseen(shared, "unfinished objects", &error),
    }
}

async fn report(
    shared: &Arc<Shared>,
    what: &str,
    removal: impl Future<Output = Result<(), HostError>>,
) {
    match within(deadline::RELEASE, "removing a stray", removal).await {
        Ok(()) => shared
            .events
            .emit(None, None, "stray.removed", what, &Steps::default()),
        Err(error) => {
            let why = Chained(&error).to_string();
            tracing::error!(stray = what, why, "a stray would not go");
            shared.events.emit(
                None,
                None,
                "stray.stuck",
                format!("{what}: {why}"),
                &Steps::default(),
            );
        }
    }
}

fn unseen(shared: &Arc<Shared>, what: &str, error: &HostError) {
    if error.kind() != ErrorKind::Unsupported {
        tracing::error!(%error, "could not look for stray {what}");
        shared.events.emit(
            None,
            None,
            "stray.unseen",
            format!("{what}: {error}"),
            &Steps::default(),
        );
    }
}
