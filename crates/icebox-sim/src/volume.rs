//! Volumes in memory: one driver whose disks the host freezes, and one that needs the VMM for it.

use std::path::Path;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, Removed,
    VolumeDriver,
};
use icebox_engine::id::{Digest, HeadId};
use icebox_engine::layout::{LAYER_DISK, Object};
use icebox_engine::unit::Bytes;

use crate::world::{File, Head, World};

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

    fn layers_are_whole(&self) -> bool {
        self.freeze == FreezeBy::Host
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
        let content = state.resolve(head)?;
        state.write(&staging.join(LAYER_DISK), File::Disk(content))?;
        state.heads.remove(head);
        Ok(())
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let source = under(chain)?;
        let file = state
            .objects
            .get(&source)
            .and_then(|directory| directory.files.values().next())
            .cloned();
        let Some(File::Disk(content) | File::Image { content, .. }) = file else {
            let message = format!("{source} does not exist");
            return Err(HostError::new(ErrorKind::NotFound, message));
        };
        state.write(
            out,
            File::Image {
                content,
                size: chain.size,
            },
        )
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

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        let state = self.world.lock();
        let ours = state
            .heads
            .iter()
            .filter(|(_, head)| head.driver == self.name());
        Ok(ours.map(|(id, _)| id.clone()).collect())
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
        let content = state.resolve(from)?;
        state.write(&staging.join(LAYER_DISK), File::Disk(content))?;
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
