//! Networks and boxes in memory.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use icebox_engine::host::{
    Boxes, Egress, ErrorKind, HostError, Limits, LimitsInForce, Network, Removed, SlotNetwork,
};
use icebox_engine::id::{SandboxId, Slot};

use crate::world::World;

pub(crate) struct SimNetwork {
    world: World,
}

pub(crate) struct SimBoxes {
    world: World,
}

impl SimNetwork {
    pub(crate) fn new(world: World) -> Self {
        Self { world }
    }
}

impl SimBoxes {
    pub(crate) fn new(world: World) -> Self {
        Self { world }
    }
}

#[async_trait]
impl Network for SimNetwork {
    fn capacity(&self) -> u16 {
        256
    }

    fn host_address(&self, slot: Slot) -> Ipv4Addr {
        let [high, low] = slot.0.to_be_bytes();
        Ipv4Addr::new(192, 0, high + 2, low)
    }

    async fn ensure(&self, slot: Slot, _egress: Egress) -> Result<SlotNetwork, HostError> {
        let mut state = self.world.lock();
        state.tick();
        state.networks.insert(slot);
        Ok(SlotNetwork {
            host_address: self.host_address(slot),
            namespace: PathBuf::from(format!("/sim/netns/{slot}")),
            tap: "tap0".into(),
            guest_mac: [2, 0, 0, 0, 0, 1],
        })
    }

    async fn release(&self, slot: Slot) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        Ok(if state.networks.remove(&slot) {
            Removed::Removed
        } else {
            Removed::AlreadyAbsent
        })
    }

    async fn list(&self) -> Result<Vec<Slot>, HostError> {
        Ok(self.world.lock().networks.iter().copied().collect())
    }

    async fn probe(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn prepare(&self, _slots: &[Slot]) {}
}

#[async_trait]
impl Boxes for SimBoxes {
    async fn ensure(
        &self,
        sandbox: &SandboxId,
        _slot: Slot,
        _limits: Limits,
    ) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        state.boxes.insert(sandbox.clone());
        Ok(())
    }

    async fn release(&self, sandbox: &SandboxId) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        if state.vms.contains_key(sandbox) {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("a VMM runs in the box of {sandbox}"),
            ));
        }
        Ok(if state.boxes.remove(sandbox) {
            Removed::Removed
        } else {
            Removed::AlreadyAbsent
        })
    }

    async fn list(&self) -> Result<Vec<SandboxId>, HostError> {
        Ok(self.world.lock().boxes.iter().cloned().collect())
    }

    fn limits_in_force(&self) -> LimitsInForce {
        LimitsInForce {
            mechanism: "none".into(),
            detail: "a simulation limits nothing".into(),
        }
    }
}
