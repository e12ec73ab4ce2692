//! Freeze: the head becomes a layer, and a new head goes on top. The common root of pause, snapshot, fork, flatten.
//!
//! ```text
//!   intent committed -> [new head made] -> frozen / switched -> sealed -> layer published -> record: new head, no intent
//!                        by-VMM drivers    the point of no return
//! ```
//!
//! A freeze cannot be undone once guest writes go to the new head. So whoever finds an intent, a failed verb or a
//! start after a crash, asks how far it came, and rolls forward from the point of no return or back before it. If
//! even that fails, the intent stays: nothing of either head is removed, and the next verb tries again.

use std::path::PathBuf;
use std::sync::Arc;

use crate::catalog::{Pin, PinnedChain, display_name};
use crate::deadline::{self, within};
use crate::error::Error;
use crate::host::{ErrorKind, HostError, LiveFreeze, Machine};
use crate::id::{GenerationNo, HeadId, LayerId};
use crate::layout::Object;
use crate::manifest;
use crate::manifest::v1::{Hold, Intent, Layer, Sandbox as Record, Under};
use crate::sandbox::{Life, Sandbox};
use crate::steps::Steps;

/// A freeze that has begun.
pub(super) struct Freeze {
    pub(super) layer: LayerId,
    from: HeadId,
    under: Under,
    to: u32,
    /// Whether what has the disk open has the layer open too from then on.
    stays_open: bool,
    /// Keeps the layer from the collector until a manifest refers to it.
    _pin: Pin,
}

impl Freeze {
    /// Brings the record to what it says once the freeze is finished.
    pub(super) fn record(&self, record: &mut Record) {
        record_finished(record, &self.layer, self.to, self.stays_open);
    }
}

fn record_finished(record: &mut Record, layer: &LayerId, to: u32, stays_open: bool) {
    if stays_open && record.holds.contains(&Hold::Disk) {
        record.opened.push(layer.clone());
    }
    for hold in &mut record.holds {
        if let Hold::Head { number, over } = hold {
            (*number, *over) = (to, Under::Layer(layer.clone()));
        }
    }
    record.intent = None;
}

/// How many layers a disk may have open for a freeze that leaves it running. Every one costs its VMM two descriptors, of
/// which it has 1024, and every read some time; merging shortens what it will be started on, not what it has open.
const MAX_OPENED: usize = 64;

impl Sandbox {
    /// Refuses one more freeze of a disk that goes on being read through every layer since it was attached.
    pub(super) fn check_opened(&self) -> Result<(), Error> {
        let opened = self.record().opened.len();
        if opened < MAX_OPENED {
            return Ok(());
        }
        let name = display_name(self.record());
        Err(Error::Exhausted {
            message: format!(
                "sandbox {name} reads its disk through {opened} layers: as often was it frozen without a rest"
            ),
            hint: format!(
                "`icebox pause {name}`, then `icebox resume {name}`: what it reads through is short again then"
            ),
        })
    }

    /// Writes the intent, and prepares what can be prepared while the guest runs. A generation that the freeze is for
    /// has its number from here on, whatever becomes of it.
    pub(super) async fn begin_freeze(&mut self, into: Option<&Object>) -> Result<Freeze, Error> {
        let volumes = self.volumes()?;
        let (from, under) = self.head()?;
        let layer = LayerId::random();
        let to = self.record().next_head;
        let pin = self.shared.catalog.pin([Object::Layer(layer.clone())]);
        let intent = Intent::Freeze {
            layer: layer.clone(),
            to,
        };
        self.update(|record| {
            record.intent = Some(intent);
            record.next_head += 1;
            if let Some(Object::Generation(_, number)) = into {
                record.next_generation = GenerationNo(number.0 + 1);
            }
        })
        .await?;
        if matches!(volumes.live_freeze(), LiveFreeze::ByVmm) {
            let chain = self.chain_over(&layer, &under)?;
            within(
                deadline::DISK,
                "making a new head",
                volumes.ensure_head(&self.head_id(to), &chain),
            )
            .await?;
        }
        Ok(Freeze {
            layer,
            from,
            under,
            to,
            stays_open: !volumes.layers_are_whole(),
            _pin: pin,
        })
    }

    /// Under a guest that stands still: flushes the host's caches, then freezes. If the flush fails, the freeze never
    /// starts (INV-03).
    pub(super) async fn freeze_under_guest(
        &self,
        machine: &dyn Machine,
        freeze: &Freeze,
        steps: &Steps,
    ) -> Result<(), Error> {
        let volumes = self.volumes()?;
        let flushed = volumes.flush(&freeze.from);
        let flushed = within(deadline::DISK, "flushing the disk", flushed);
        steps.time("flush", flushed).await?;
        let frozen = self.put_new_head_under_guest(machine, freeze);
        steps.time("freeze", frozen).await
    }

    async fn put_new_head_under_guest(
        &self,
        machine: &dyn Machine,
        freeze: &Freeze,
    ) -> Result<(), Error> {
        let volumes = self.volumes()?;
        match volumes.live_freeze() {
            LiveFreeze::ByHost(host) => {
                let (to, staging) = (
                    self.head_id(freeze.to),
                    self.staged_layer(&freeze.layer).await?,
                );
                within(
                    deadline::DISK,
                    "freezing the disk",
                    host.freeze(&freeze.from, &to, &staging),
                )
                .await
            }
            LiveFreeze::ByVmm => {
                let chain = self.chain_over(&freeze.layer, &freeze.under)?;
                let to = self.head_id(freeze.to);
                let device = within(
                    deadline::DISK,
                    "attaching the new head",
                    volumes.attach(&to, &chain),
                )
                .await?;
                let switch = machine
                    .disk_switch()
                    .ok_or_else(no_disk_switch)?
                    .switch(&device);
                within(deadline::DISK, "switching the disk to a new head", switch).await
            }
        }
    }

    /// After the point of no return: the layer becomes an object. The caller commits [`Freeze::record`].
    pub(super) async fn finish_freeze(&self, freeze: &Freeze) -> Result<(), Error> {
        self.seal_and_publish(&freeze.layer, &freeze.from, &freeze.under)
            .await
    }

    /// Rolls an intent forward or back, by how far it came.
    pub(crate) async fn settle_freeze(&mut self, layer: &LayerId, to: u32) -> Result<(), Error> {
        let volumes = self.volumes()?;
        let (from, under) = self.head()?;
        let new_head = self.head_id(to);
        let chain = self.chain_over(layer, &under)?;
        let past = match volumes.live_freeze() {
            LiveFreeze::ByHost(host) => {
                let frozen = host.is_frozen(&from, &new_head);
                within(deadline::DISK, "asking whether the disk is frozen", frozen).await?
            }
            LiveFreeze::ByVmm => {
                // Nobody may have made it yet; an empty one that nobody uses is harmless.
                within(
                    deadline::DISK,
                    "making a new head",
                    volumes.ensure_head(&new_head, &chain),
                )
                .await?;
                match &self.life {
                    // Nobody writes to either: an empty new head on top of the old one is the same disk.
                    Life::AtRest => true,
                    Life::Running(machine) => {
                        let device = volumes.attach(&new_head, &chain);
                        let device =
                            within(deadline::DISK, "attaching the new head", device).await?;
                        let is_on = machine
                            .disk_switch()
                            .ok_or_else(no_disk_switch)?
                            .is_on(&device);
                        within(
                            deadline::PROBE,
                            "asking which head the VMM writes to",
                            is_on,
                        )
                        .await?
                    }
                }
            }
        };
        if past {
            self.seal_and_publish(layer, &from, &under).await?;
            let stays_open = !volumes.layers_are_whole();
            return self
                .update(|record| record_finished(record, layer, to, stays_open))
                .await;
        }
        within(
            deadline::DISK,
            "removing an unused head",
            volumes.remove_head(&new_head),
        )
        .await?;
        let store = Arc::clone(&self.shared.host.store);
        let unused = Object::Layer(layer.clone());
        within(
            deadline::STORE,
            "discarding an unused layer",
            store.discard(&unused),
        )
        .await?;
        self.update(|record| record.intent = None).await
    }

    /// Freezes the disk of a sandbox that has no VMM.
    pub(super) async fn freeze_at_rest(&mut self) -> Result<Freeze, Error> {
        let freeze = self.begin_freeze(None).await?;
        let volumes = self.volumes()?;
        if let LiveFreeze::ByHost(host) = volumes.live_freeze() {
            let (to, staging) = (
                self.head_id(freeze.to),
                self.staged_layer(&freeze.layer).await?,
            );
            within(
                deadline::DISK,
                "freezing the disk",
                host.freeze(&freeze.from, &to, &staging),
            )
            .await?;
        }
        self.finish_freeze(&freeze).await?;
        self.update(|record| freeze.record(record)).await?;
        Ok(freeze)
    }

    async fn seal_and_publish(
        &self,
        layer: &LayerId,
        from: &HeadId,
        under: &Under,
    ) -> Result<(), Error> {
        let volumes = self.volumes()?;
        if matches!(volumes.live_freeze(), LiveFreeze::ByVmm) {
            let staging = self.staged_layer(layer).await?;
            within(
                deadline::DISK,
                "sealing the disk",
                volumes.seal(from, &staging),
            )
            .await?;
        }
        self.publish_layer(layer, under).await
    }

    /// Makes a sealed head an object that others can refer to.
    pub(super) async fn publish_layer(&self, id: &LayerId, under: &Under) -> Result<(), Error> {
        let (parent, base) = match under {
            _ if self.volumes()?.layers_are_whole() => (None, None),
            Under::Layer(parent) => (Some(parent.clone()), None),
            Under::Base(base) => (None, Some(base.clone())),
        };
        let spec = &self.record().spec;
        let layer = Layer {
            id: id.clone(),
            driver: spec.volume_driver.clone(),
            parent,
            base,
            size: spec.disk_size,
            created_at: self.shared.now(),
        };
        let (object, bytes) = (Object::Layer(id.clone()), manifest::encode(1, &layer));
        let published = self.shared.host.store.publish(&object, &bytes);
        within(deadline::STORE, "publishing the layer", published).await?;
        self.shared.catalog.add_layer(1, layer);
        Ok(())
    }

    pub(super) async fn staged_layer(&self, layer: &LayerId) -> Result<PathBuf, Error> {
        let object = Object::Layer(layer.clone());
        within(
            deadline::STORE,
            "staging a layer",
            self.shared.host.store.staged(&object),
        )
        .await
    }

    /// The chain under a new head on `layer`, which need not exist yet, itself on `under`.
    fn chain_over(&self, layer: &LayerId, under: &Under) -> Result<PinnedChain, Error> {
        let mut pinned = self.chain(under)?;
        if self.volumes()?.layers_are_whole() {
            pinned.chain.layers.clear();
            pinned.chain.base = None;
        }
        pinned.chain.layers.insert(0, layer.clone());
        Ok(pinned)
    }
}

fn no_disk_switch() -> Error {
    Error::Step {
        step: "freezing the disk",
        source: HostError::new(
            ErrorKind::Unsupported,
            "this VMM cannot switch disks, which the sandbox's volume driver needs",
        ),
    }
}
