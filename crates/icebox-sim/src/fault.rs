//! Faults by index, around any host.
//!
//! Every call of a driver trait that touches the host is a numbered step. One of them can be made to fail, to crash
//! the engine (the call never returns, and the [`Injector`] says so: whoever drives the engine then drops it), or to
//! announce itself, so that a client can be made to go away at exactly that moment. Each before the step's effect, or
//! after it: a failure *after* the effect is a lost reply, the nastiest of all.
//!
//! In a daemon the steps are the same, and who counts them is outside: [`conducted`].

#[cfg(feature = "conductor")]
mod conductor;
mod injector;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, BootFiles, Boxes, Capabilities, Chain, DiskSwitch, Egress, Ensured, ExitReason,
    FreezeByHost, Guest, GuestAddress, Host, HostError, Kernels, LaunchPlan, Limits, LimitsInForce,
    LiveFreeze, Machine, MergeLayers, Meter, Network, ProcessIdentity, Removed, Save, SavePlan,
    Secret, SlotNetwork, Space, Store, StoredDocument, VcpuState, Vmm, VmmIdentity, VolumeDriver,
    WatchHeads, Welcome,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId, Slot};
use icebox_engine::layout::Object;
use icebox_engine::unit::Bytes;

pub use injector::{Fault, Injector, Kind, When};

/// Where a [conducted] daemon finds its conductor: the path of a Unix socket.
pub const CONDUCTOR: &str = "ICEBOX_TEST_CONDUCTOR";

/// The same host, each step of which is done when the conductor that the environment names says so. In a build without
/// the feature `conductor`, which is every build that is not for tests, it is the host as it is.
#[must_use]
pub fn conducted(host: Host) -> Host {
    #[cfg(feature = "conductor")]
    if let Some(socket) = std::env::var_os(CONDUCTOR) {
        let conductor = conductor::Conductor::at(socket.into());
        return inject(host, &Injector::conducted_by(conductor));
    }
    host
}

/// The same host, with every step counted by `injector`.
#[must_use]
pub fn inject(host: Host, injector: &Injector) -> Host {
    let volume = |inner| -> Arc<dyn VolumeDriver> {
        Arc::new(Faulty {
            inner,
            injector: injector.clone(),
        })
    };
    let vmm = |inner| -> Arc<dyn Vmm> {
        Arc::new(Faulty {
            inner,
            injector: injector.clone(),
        })
    };
    Host {
        // Asking for the time is no step, and neither is what is written behind, when it comes to it.
        clock: host.clock,
        journal: host.journal,
        store: Arc::new(Faulty {
            inner: host.store,
            injector: injector.clone(),
        }),
        volumes: host.volumes.into_iter().map(volume).collect(),
        vmms: host.vmms.into_iter().map(vmm).collect(),
        network: Arc::new(Faulty {
            inner: host.network,
            injector: injector.clone(),
        }),
        boxes: Arc::new(Faulty {
            inner: host.boxes,
            injector: injector.clone(),
        }),
        kernels: Arc::new(Faulty {
            inner: host.kernels,
            injector: injector.clone(),
        }),
        guest: Arc::new(Faulty {
            inner: host.guest,
            injector: injector.clone(),
        }),
    }
}

struct Faulty<T: ?Sized> {
    injector: Injector,
    inner: Arc<T>,
}

#[async_trait]
impl Store for Faulty<dyn Store> {
    async fn load(&self) -> Result<Vec<StoredDocument>, HostError> {
        self.injector.around("store.load", self.inner.load()).await
    }
    async fn commit(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        self.injector
            .around("store.commit", self.inner.commit(object, manifest))
            .await
    }
    async fn stage(&self, object: &Object) -> Result<PathBuf, HostError> {
        self.injector
            .around("store.stage", self.inner.stage(object))
            .await
    }
    async fn staged(&self, object: &Object) -> Result<PathBuf, HostError> {
        self.injector
            .around("store.staged", self.inner.staged(object))
            .await
    }
    async fn publish(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        self.injector
            .around("store.publish", self.inner.publish(object, manifest))
            .await
    }
    async fn discard(&self, object: &Object) -> Result<Removed, HostError> {
        self.injector
            .around("store.discard", self.inner.discard(object))
            .await
    }
    async fn trash(&self, object: &Object) -> Result<Removed, HostError> {
        self.injector
            .around("store.trash", self.inner.trash(object))
            .await
    }
    async fn empty_trash(&self) -> Result<(), HostError> {
        self.injector
            .around("store.empty_trash", self.inner.empty_trash())
            .await
    }
    async fn list_staging(&self) -> Result<Vec<Object>, HostError> {
        self.injector
            .around("store.list_staging", self.inner.list_staging())
            .await
    }
    async fn digest(&self, file: &Path) -> Result<Digest, HostError> {
        self.injector
            .around("store.digest", self.inner.digest(file))
            .await
    }
    async fn file_size(&self, file: &Path) -> Result<Bytes, HostError> {
        self.injector
            .around("store.file_size", self.inner.file_size(file))
            .await
    }
    async fn move_into_staging(
        &self,
        file: &Path,
        object: &Object,
        as_file: &str,
    ) -> Result<(), HostError> {
        let moved = self.inner.move_into_staging(file, object, as_file);
        self.injector.around("store.move_into_staging", moved).await
    }
    async fn allocated(&self, object: &Object) -> Result<Bytes, HostError> {
        self.injector
            .around("store.allocated", self.inner.allocated(object))
            .await
    }
    async fn space(&self) -> Result<Space, HostError> {
        self.injector
            .around("store.space", self.inner.space())
            .await
    }
    fn path(&self, object: &Object, file: &str) -> PathBuf {
        self.inner.path(object, file)
    }
    async fn copy_into_staging(
        &self,
        from: &Object,
        file: &str,
        to: &Object,
    ) -> Result<(), HostError> {
        let copied = self.inner.copy_into_staging(from, file, to);
        self.injector
            .around("store.copy_into_staging", copied)
            .await
    }
}

#[async_trait]
impl VolumeDriver for Faulty<dyn VolumeDriver> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    async fn probe(&self) -> Result<(), HostError> {
        self.injector
            .around("volume.probe", self.inner.probe())
            .await
    }
    fn live_freeze(&self) -> LiveFreeze<'_> {
        match self.inner.live_freeze() {
            LiveFreeze::ByHost(_) => LiveFreeze::ByHost(self),
            LiveFreeze::ByVmm => LiveFreeze::ByVmm,
        }
    }
    /// Not a step: looks come when they come, and change nothing.
    fn watch(&self) -> Option<&dyn WatchHeads> {
        self.inner.watch()
    }
    fn layers_are_whole(&self) -> bool {
        self.inner.layers_are_whole()
    }
    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        let merges = self.inner.merges_layers().is_some();
        merges.then_some(self as &dyn MergeLayers)
    }
    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        self.injector
            .around("volume.ensure_base", self.inner.ensure_base(base))
            .await
    }
    async fn remove_base(&self, base: &Digest) -> Result<Removed, HostError> {
        self.injector
            .around("volume.remove_base", self.inner.remove_base(base))
            .await
    }
    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        self.injector
            .around("volume.ensure_head", self.inner.ensure_head(head, chain))
            .await
    }
    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        self.injector
            .around("volume.remove_head", self.inner.remove_head(head))
            .await
    }
    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        self.injector
            .around("volume.attach", self.inner.attach(head, chain))
            .await
    }
    async fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        self.injector
            .around("volume.detach", self.inner.detach(head))
            .await
    }
    async fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        self.injector
            .around("volume.flush", self.inner.flush(head))
            .await
    }
    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        self.injector
            .around("volume.seal", self.inner.seal(head, staging))
            .await
    }
    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        self.injector
            .around("volume.flatten", self.inner.flatten(chain, out))
            .await
    }
    async fn remove_layer(&self, layer: &LayerId) -> Result<Removed, HostError> {
        self.injector
            .around("volume.remove_layer", self.inner.remove_layer(layer))
            .await
    }
    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        self.injector
            .around("volume.head_usage", self.inner.head_usage(head))
            .await
    }
    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        self.injector
            .around("volume.layer_usage", self.inner.layer_usage(layer))
            .await
    }
    async fn space(&self) -> Result<Option<Space>, HostError> {
        self.injector
            .around("volume.space", self.inner.space())
            .await
    }
    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        self.injector
            .around("volume.list_heads", self.inner.list_heads())
            .await
    }
    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        self.injector
            .around("volume.list_layers", self.inner.list_layers())
            .await
    }
}

impl Faulty<dyn VolumeDriver> {
    fn by_host(&self) -> &dyn FreezeByHost {
        match self.inner.live_freeze() {
            LiveFreeze::ByHost(host) => host,
            LiveFreeze::ByVmm => unreachable!("only a driver that freezes by itself is asked to"),
        }
    }
}

#[async_trait]
impl FreezeByHost for Faulty<dyn VolumeDriver> {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        self.injector
            .around("volume.freeze", self.by_host().freeze(from, to, staging))
            .await
    }
    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        self.injector
            .around("volume.is_frozen", self.by_host().is_frozen(from, to))
            .await
    }
}

impl Faulty<dyn VolumeDriver> {
    fn merging(&self) -> &dyn MergeLayers {
        self.inner
            .merges_layers()
            .unwrap_or_else(|| unreachable!("only a driver that merges is asked to"))
    }
}

#[async_trait]
impl MergeLayers for Faulty<dyn VolumeDriver> {
    async fn merge(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let merged = self.merging().merge(run, size, staging);
        self.injector.around("volume.merge", merged).await
    }

    async fn verify(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let verified = self.merging().verify(run, size, staging);
        self.injector.around("volume.verify", verified).await
    }
}

#[async_trait]
impl Vmm for Faulty<dyn Vmm> {
    fn identity(&self) -> &VmmIdentity {
        self.inner.identity()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        let inner = self
            .injector
            .around("vmm.launch", self.inner.launch(plan))
            .await?;
        Ok(Arc::new(Faulty {
            inner,
            injector: self.injector.clone(),
        }))
    }
    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        let inner = self
            .injector
            .around("vmm.adopt", self.inner.adopt(sandbox, recorded))
            .await?;
        Ok(inner.map(|inner| {
            Arc::new(Faulty {
                inner,
                injector: self.injector.clone(),
            }) as Arc<dyn Machine>
        }))
    }
    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        self.injector
            .around("vmm.kill", self.inner.kill(sandbox, recorded))
            .await
    }
}

#[async_trait]
impl Machine for Faulty<dyn Machine> {
    fn process(&self) -> ProcessIdentity {
        self.inner.process()
    }
    async fn probe(&self) -> Result<VcpuState, HostError> {
        self.injector
            .around("machine.probe", self.inner.probe())
            .await
    }
    /// Not a step: it is read when it is, and changes nothing.
    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        self.inner.meter()
    }
    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.injector
            .around("machine.pause_vcpus", self.inner.pause_vcpus())
            .await
    }
    async fn resume_vcpus(&self) -> Result<(), HostError> {
        self.injector
            .around("machine.resume_vcpus", self.inner.resume_vcpus())
            .await
    }
    async fn save(&self, plan: SavePlan) -> Result<Save, HostError> {
        let save = self.inner.save(plan);
        Ok(match self.injector.around("machine.save", save).await? {
            Save::Done(saved) => Save::Done(saved),
            Save::Rest(rest) => {
                let injector = self.injector.clone();
                Save::Rest(Box::pin(async move {
                    injector.around("machine.finish_save", rest).await
                }))
            }
        })
    }
    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        self.inner.disk_switch().map(|_| self as &dyn DiskSwitch)
    }
    async fn stalled(&self) {
        self.inner.stalled().await;
    }
    async fn exited(&self) -> ExitReason {
        self.inner.exited().await
    }
}

impl Faulty<dyn Machine> {
    fn switcher(&self) -> &dyn DiskSwitch {
        self.inner
            .disk_switch()
            .unwrap_or_else(|| unreachable!("only a VMM that can is asked to"))
    }
}

#[async_trait]
impl DiskSwitch for Faulty<dyn Machine> {
    async fn switch(&self, to: &BlockDevice) -> Result<(), HostError> {
        self.injector
            .around("machine.switch", self.switcher().switch(to))
            .await
    }
    async fn is_on(&self, head: &BlockDevice) -> Result<bool, HostError> {
        self.injector
            .around("machine.is_on", self.switcher().is_on(head))
            .await
    }
}

#[async_trait]
impl Network for Faulty<dyn Network> {
    fn capacity(&self) -> u16 {
        self.inner.capacity()
    }
    fn host_address(&self, slot: Slot) -> std::net::Ipv4Addr {
        self.inner.host_address(slot)
    }
    async fn ensure(&self, slot: Slot, egress: Egress) -> Result<SlotNetwork, HostError> {
        self.injector
            .around("network.ensure", self.inner.ensure(slot, egress))
            .await
    }
    async fn release(&self, slot: Slot) -> Result<Removed, HostError> {
        self.injector
            .around("network.release", self.inner.release(slot))
            .await
    }
    async fn list(&self) -> Result<Vec<Slot>, HostError> {
        self.injector
            .around("network.list", self.inner.list())
            .await
    }
    async fn probe(&self) -> Result<(), HostError> {
        self.injector
            .around("network.probe", self.inner.probe())
            .await
    }
    fn prepare(&self, slots: &[Slot]) {
        self.inner.prepare(slots);
    }
}

#[async_trait]
impl Boxes for Faulty<dyn Boxes> {
    async fn ensure(
        &self,
        sandbox: &SandboxId,
        slot: Slot,
        limits: Limits,
    ) -> Result<(), HostError> {
        self.injector
            .around("boxes.ensure", self.inner.ensure(sandbox, slot, limits))
            .await
    }
    async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError> {
        self.injector
            .around("boxes.release", self.inner.release(sandbox))
            .await
    }
    async fn list(&self) -> Result<Vec<SandboxId>, HostError> {
        self.injector.around("boxes.list", self.inner.list()).await
    }
    fn limits_in_force(&self) -> LimitsInForce {
        self.inner.limits_in_force()
    }
}

#[async_trait]
impl Kernels for Faulty<dyn Kernels> {
    async fn default_kernel(&self) -> Result<Digest, HostError> {
        self.injector
            .around("kernels.default_kernel", self.inner.default_kernel())
            .await
    }
    async fn boot_files(&self, kernel: &Digest) -> Result<BootFiles, HostError> {
        self.injector
            .around("kernels.boot_files", self.inner.boot_files(kernel))
            .await
    }
}

#[async_trait]
impl Guest for Faulty<dyn Guest> {
    async fn welcome(&self, at: GuestAddress, welcome: &Welcome) -> Result<(), HostError> {
        self.injector
            .around("guest.welcome", self.inner.welcome(at, welcome))
            .await
    }
    async fn prepare(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.injector
            .around("guest.prepare", self.inner.prepare(at, token))
            .await
    }
    async fn is_working(&self, at: GuestAddress, token: &Secret) -> Result<bool, HostError> {
        self.injector
            .around("guest.is_working", self.inner.is_working(at, token))
            .await
    }
    /// Beside verbs, and no step of theirs.
    async fn set_clock(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.inner.set_clock(at, token).await
    }
    async fn sync(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.injector
            .around("guest.sync", self.inner.sync(at, token))
            .await
    }
}
