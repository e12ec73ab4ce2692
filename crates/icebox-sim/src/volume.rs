//! Volumes in memory: one driver whose disks the host freezes, and one that needs the VMM for it. The former keeps layers
//! outside their directories.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, MergeLayers,
    Removed, Space, Trouble, VolumeDriver, Watch, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId};
use icebox_engine::layout::{LAYER_DISK, Object};
use icebox_engine::unit::Bytes;

use crate::world::{File, Head, State, World};

/// Who freezes the disk of a running guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeBy {
    /// The host, as with reflinks; layers stand alone.
    Host,
    /// The VMM, as with qcow2; layers need what is under them.
    Vmm,
}

pub(crate) struct SimVolumes {
    world: World,
    freeze: FreezeBy,
}

impl SimVolumes {
    pub(crate) fn new(world: World, freeze: FreezeBy) -> Self {
        Self { world, freeze }
    }

    /// Keeps what a head holds as the data of the layer that `staging` is for.
    fn keep(&self, state: &mut State, head: &HeadId, staging: &Path) -> Result<u64, HostError> {
        let content = state.resolve(head)?;
        match self.freeze {
            FreezeBy::Host => {
                let layer = staged_layer(staging)?;
                state.pool.insert(layer, content);
            }
            FreezeBy::Vmm => {
                let written = state.heads.get(head).and_then(|head| head.value);
                state.write(&staging.join(LAYER_DISK), File::Written(written))?;
            }
        }
        Ok(content)
    }
}

fn staged_layer(staging: &Path) -> Result<LayerId, HostError> {
    let name = staging.file_name().and_then(|name| name.to_str());
    match name.and_then(Object::from_flat_name) {
        Some(Object::Layer(layer)) => Ok(layer),
        _ => Err(HostError::new(
            ErrorKind::Invalid,
            format!("{} is not for a layer", staging.display()),
        )),
    }
}

/// The path of a head, which a VMM opens.
pub(crate) fn device_path(head: &HeadId) -> String {
    format!("/sim/heads/{head}")
}

/// The head that a VMM opened.
pub(crate) fn head_of(device: &BlockDevice) -> Result<HeadId, HostError> {
    let (BlockDevice::Raw { path } | BlockDevice::Qcow2 { head: path, .. }) = device;
    let text = path.to_string_lossy();
    let parsed = text.strip_prefix("/sim/heads/").and_then(|rest| {
        let (sandbox, number) = rest.split_once('/')?;
        Some(HeadId {
            sandbox: sandbox.parse().ok()?,
            number: number.parse().ok()?,
        })
    });
    parsed.ok_or_else(|| HostError::new(ErrorKind::Invalid, format!("{text} is no head")))
}

/// The layers that a VMM opened.
pub(crate) fn layers_of(device: &BlockDevice) -> Result<Vec<LayerId>, HostError> {
    let layers = match device {
        BlockDevice::Raw { .. } => &[][..],
        BlockDevice::Qcow2 { layers, .. } => layers,
    };
    let parse = |path: &PathBuf| {
        let text = path.to_string_lossy();
        text.parse()
            .map_err(|_| HostError::new(ErrorKind::Invalid, format!("{text} is no layer")))
    };
    layers.iter().map(parse).collect()
}

/// Refuses a chain of which something is not there. The newest layer may still be a head.
fn require_chain(state: &State, chain: &Chain) -> Result<(), HostError> {
    let missing = chain
        .layers
        .iter()
        .skip(1)
        .map(|layer| Object::Layer(layer.clone()))
        .find(|layer| !state.objects.contains_key(layer));
    match missing {
        None => Ok(()),
        Some(layer) => Err(HostError::new(
            ErrorKind::NotFound,
            format!("{layer} does not exist"),
        )),
    }
}

fn under(chain: &Chain) -> Result<Object, HostError> {
    let layer = chain.layers.first().cloned().map(Object::Layer);
    layer
        .or_else(|| chain.base.clone().map(Object::Base))
        .ok_or_else(|| HostError::new(ErrorKind::Invalid, "a chain without layers and base"))
}

#[async_trait]
impl VolumeDriver for SimVolumes {
    fn name(&self) -> &'static str {
        match self.freeze {
            FreezeBy::Host => "sim-by-host",
            FreezeBy::Vmm => "sim-by-vmm",
        }
    }

    async fn probe(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        match self.freeze {
            FreezeBy::Host => LiveFreeze::ByHost(self),
            FreezeBy::Vmm => LiveFreeze::ByVmm,
        }
    }

    /// Only in a world that loses heads: the clock of the others need not stop for looks that show nothing.
    fn watch(&self) -> Option<&dyn WatchHeads> {
        self.world.lock().loses_heads.then_some(self)
    }

    fn layers_are_whole(&self) -> bool {
        self.freeze == FreezeBy::Host
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        (self.freeze == FreezeBy::Vmm).then_some(self)
    }

    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        if self
            .world
            .lock()
            .objects
            .contains_key(&Object::Base(base.clone()))
        {
            Ok(Ensured::AlreadyPresent)
        } else {
            Err(HostError::new(
                ErrorKind::NotFound,
                format!("base {base} does not exist"),
            ))
        }
    }

    async fn remove_base(&self, _base: &Digest) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        let mut state = self.world.lock();
        state.tick();
        require_chain(&state, chain)?;
        if state.heads.contains_key(head) {
            return Ok(Ensured::AlreadyPresent);
        }
        let new = Head {
            driver: self.name(),
            value: None,
            under: under(chain)?,
            attached: false,
        };
        state.heads.insert(head.clone(), new);
        Ok(Ensured::Created)
    }

    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        if state.vms.values().any(|vm| vm.head == *head) {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("head {head} is in use by a VMM"),
            ));
        }
        let was_there = state.heads.remove(head).is_some();
        Ok(if was_there {
            Removed::Removed
        } else {
            Removed::AlreadyAbsent
        })
    }

    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        let mut state = self.world.lock();
        state.tick();
        require_chain(&state, chain)?;
        let found = state.heads.get_mut(head);
        let found = found.ok_or_else(|| {
            HostError::new(ErrorKind::NotFound, format!("head {head} does not exist"))
        })?;
        found.attached = true;
        let path = device_path(head).into();
        Ok(match (self.freeze, &chain.base) {
            (FreezeBy::Vmm, Some(base)) => BlockDevice::Qcow2 {
                head: path,
                layers: chain
                    .layers
                    .iter()
                    .map(|layer| layer.as_str().into())
                    .collect(),
                base: base.as_str().into(),
            },
            _ => BlockDevice::Raw { path },
        })
    }

    async fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        if state.vms.values().any(|vm| vm.head == *head) {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("head {head} is in use by a VMM"),
            ));
        }
        match state.heads.get_mut(head) {
            Some(found) if found.attached => {
                found.attached = false;
                Ok(Removed::Removed)
            }
            _ => Ok(Removed::AlreadyAbsent),
        }
    }

    async fn flush(&self, _head: &HeadId) -> Result<(), HostError> {
        self.world.lock().tick();
        Ok(())
    }

    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        if state.vms.values().any(|vm| vm.head == *head) {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("head {head} is written to"),
            ));
        }
        if !state.heads.contains_key(head) {
            // Sealed already; the layer is staged or published.
            return Ok(());
        }
        self.keep(&mut state, head, staging)?;
        state.heads.remove(head);
        Ok(())
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let content = state.resolve_object(&under(chain)?)?;
        state.write(
            out,
            File::Image {
                content,
                size: chain.size,
            },
        )
    }

    async fn remove_layer(&self, layer: &LayerId) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        let was_there = self.freeze == FreezeBy::Host && state.pool.remove(layer).is_some();
        Ok(if was_there {
            Removed::Removed
        } else {
            Removed::AlreadyAbsent
        })
    }

    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let written = self
            .world
            .lock()
            .heads
            .get(head)
            .is_some_and(|head| head.value.is_some());
        Ok(Bytes(if written { 4096 } else { 0 }))
    }

    async fn layer_usage(&self, _layer: &LayerId) -> Result<Bytes, HostError> {
        Ok(Bytes(4096))
    }

    async fn space(&self) -> Result<Option<Space>, HostError> {
        Ok(None)
    }

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        let state = self.world.lock();
        let ours = state
            .heads
            .iter()
            .filter(|(_, head)| head.driver == self.name());
        Ok(ours.map(|(id, _)| id.clone()).collect())
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        if self.freeze == FreezeBy::Vmm {
            return Ok(Vec::new());
        }
        Ok(self.world.lock().pool.keys().cloned().collect())
    }
}

/// What the layers of a run hold together.
fn merged(state: &State, run: &[LayerId]) -> Result<Option<u64>, HostError> {
    let mut newest = None;
    for (layer, below) in run.iter().zip(run.iter().skip(1).map(Some).chain([None])) {
        let object = Object::Layer(layer.clone());
        if below.is_some_and(|below| {
            !state
                .below(&object)
                .is_ok_and(|found| found == Object::Layer(below.clone()))
        }) {
            let message = format!("{object} is no neighbour of the next of its run");
            return Err(HostError::new(ErrorKind::Invalid, message));
        }
        let published = state.objects.get(&object);
        match published.and_then(|directory| directory.files.get(LAYER_DISK)) {
            Some(File::Written(written)) => newest = newest.or(*written),
            _ => {
                let message = format!("{object} does not exist");
                return Err(HostError::new(ErrorKind::NotFound, message));
            }
        }
    }
    Ok(newest)
}

#[async_trait]
impl MergeLayers for SimVolumes {
    async fn merge(&self, run: &[LayerId], _size: Bytes, staging: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let newest = merged(&state, run)?;
        let written = newest.filter(|_| !state.merges_corrupt);
        state.write(&staging.join(LAYER_DISK), File::Written(written))
    }

    async fn verify(&self, run: &[LayerId], _size: Bytes, staging: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let newest = merged(&state, run)?;
        let found = state.read(&staging.join(LAYER_DISK))?;
        if found == File::Written(newest) {
            return Ok(());
        }
        let message = format!("the merged layer holds {found:?} instead of {newest:?}");
        Err(HostError::new(ErrorKind::Invalid, message))
    }
}

#[async_trait]
impl FreezeByHost for SimVolumes {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        if state.heads.contains_key(to) {
            return Ok(());
        }
        let content = self.keep(&mut state, from, staging)?;
        let mut head = state
            .heads
            .remove(from)
            .unwrap_or_else(|| unreachable!("it was resolved just now"));
        head.value = Some(content);
        state.heads.insert(to.clone(), head);
        for vm in state.vms.values_mut().filter(|vm| vm.head == *from) {
            vm.head = to.clone();
        }
        Ok(())
    }

    async fn is_frozen(&self, _from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        Ok(self.world.lock().heads.contains_key(to))
    }
}

#[async_trait]
impl WatchHeads for SimVolumes {
    async fn look(&self, heads: &[HeadId]) -> Result<Watch, HostError> {
        let state = self.world.lock();
        let trouble = |head: &HeadId| {
            if state.lost.contains(head) {
                let why = "the world lost it".to_owned();
                return Some(Trouble::Lost { why });
            }
            let why = || "the world has no room for it".to_owned();
            state.starves.then(|| Trouble::Starved { why: why() })
        };
        let troubled = heads
            .iter()
            .filter_map(|head| Some((head.clone(), trouble(head)?)));
        Ok(Watch {
            troubled: troubled.collect(),
            again_in: Duration::from_millis(500),
        })
    }
}
