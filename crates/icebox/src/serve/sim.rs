//! `icebox serve --sim`: a host in memory, for trying the interfaces out and for their tests.
//!
//! Verbs behave as on a real host; guests do not exist, and everything is gone when the daemon is. What runs commands
//! in "guests" is up to whoever needs it: with a base address, sandbox slots answer on loopback addresses from there
//! on, and an agent may be started on one.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use icebox_api::types::{BuildEvent, BuildSource, Kernel, KernelEvent, KernelSource, Report};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::host::{Egress, Host, HostError, Network, Removed, SlotNetwork, SystemClock};
use icebox_engine::id::{Digest, Slot};
use icebox_engine::unit::Bytes;
use icebox_sim::{FreezeBy, World};
use tokio::sync::mpsc;

use super::workshop::{RootImage, Workshop};
use super::{Ground, doctor};

/// The size of a simulated root image that nobody asked another size for.
const IMAGE_SIZE: Bytes = Bytes::mib(1024);

/// A new simulated host. With `guests`, slot n is reached at that address plus n.
pub(super) fn ground(guests: Option<Ipv4Addr>) -> Ground {
    let world = World::new();
    let mut host = world.host(FreezeBy::Vmm);
    // Who tries it out lives by the real one.
    host.clock = Arc::new(SystemClock);
    if let Some(first) = guests {
        host.network = Arc::new(OnLoopback {
            network: host.network,
            first,
        });
    }
    let workshop = Arc::new(SimWorkshop {
        world,
        host: host.clone(),
        images: AtomicU64::new(0),
    });
    Ground {
        host,
        workshop,
        fixtures: None,
    }
}

/// A network whose slots have chosen addresses.
struct OnLoopback {
    network: Arc<dyn Network>,
    first: Ipv4Addr,
}

#[async_trait]
impl Network for OnLoopback {
    fn capacity(&self) -> u16 {
        self.network.capacity()
    }

    fn host_address(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits().saturating_add(slot.0.into()))
    }

    async fn ensure(&self, slot: Slot, egress: Egress) -> Result<SlotNetwork, HostError> {
        let network = self.network.ensure(slot, egress).await?;
        Ok(SlotNetwork {
            host_address: self.host_address(slot),
            ..network
        })
    }

    async fn release(&self, slot: Slot) -> Result<Removed, HostError> {
        self.network.release(slot).await
    }

    async fn list(&self) -> Result<Vec<Slot>, HostError> {
        self.network.list().await
    }

    async fn probe(&self) -> Result<(), HostError> {
        self.network.probe().await
    }

    fn prepare(&self, slots: &[Slot]) {
        self.network.prepare(slots);
    }
}

struct SimWorkshop {
    world: World,
    host: Host,
    images: AtomicU64,
}

#[async_trait]
impl Workshop for SimWorkshop {
    async fn kernel(&self, _events: &mpsc::Sender<BuildEvent>) -> Result<Digest, ApiError> {
        let default = self.host.kernels.default_kernel().await;
        default.map_err(|error| super::host_error(&error))
    }

    async fn image(
        &self,
        _source: BuildSource,
        size: Option<Bytes>,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<RootImage, ApiError> {
        let stage = BuildEvent::Stage {
            name: "simulating a root image".to_owned(),
        };
        // Whether anybody listens is the caller's to watch.
        events.send(stage).await.ok();
        let number = self.images.fetch_add(1, Ordering::Relaxed);
        let path = format!("/sim/builds/{number}/image");
        self.world
            .add_image(path.as_str(), number, size.unwrap_or(IMAGE_SIZE));
        Ok(RootImage::elsewhere(path))
    }

    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        let default = self
            .host
            .kernels
            .default_kernel()
            .await
            .map_err(|error| super::host_error(&error))?;
        Ok(vec![Kernel {
            digest: default.to_string(),
            version: "simulated".to_owned(),
            origin: "the simulation".to_owned(),
            allocated_bytes: 0,
            default: true,
        }])
    }

    async fn import_kernel(
        &self,
        _source: KernelSource,
        _events: &mpsc::Sender<KernelEvent>,
    ) -> Result<Kernel, ApiError> {
        Err(ApiError::new(
            ErrorCode::Unsupported,
            "a simulation has its kernel and takes no other",
        ))
    }

    async fn doctor(&self) -> Report {
        let mut tried = Vec::new();
        for driver in &self.host.volumes {
            tried.push((driver.name(), driver.probe().await));
        }
        Report {
            checks: doctor::host(&self.host, tried, None).await,
        }
    }
}
