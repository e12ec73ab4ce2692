//! Network slots: an address, a namespace and a tap that one sandbox has from create to destroy.
//!
//! ```text
//!   host                                            namespace ibx<tag>-<n>
//!   ┌──────────────────────────────┐               ┌─────────────────────────────────────────────┐
//!   │ table inet icebox_<tag>      │  veth         │ eth0  10.213.x.y+1   tap0 169.254.0.22/30   │
//!   │   judges what comes out of   ├───────────────┤   DNAT to the guest ⇄ masquerade            │
//!   │   ibx<tag>-*                 │ 10.213.x.y    │                          │                  │
//!   └──────────────────────────────┘               └──────────────────────────┼──────────────────┘
//!                                                                    guest 169.254.0.21, in its VMM
//! ```
//!
//! Every guest sees the same addresses and MACs, so a fork or a restore needs no reconfiguration in the guest; the
//! host tells sandboxes apart by the address that the namespace translates to. The guest's entry in the namespace's
//! neighbour table is permanent: a connection made before the guest is up does not wait for ARP's one-second retry.
//!
//! A sandbox reaches nothing by default: not other sandboxes, not the host, not its private networks, not cloud
//! metadata ([`host.nft`](host.nft) says it exactly). With [`Egress::Internet`] it reaches public addresses. The host
//! reaches every port of the guest at the slot's address. There is no IPv6.
//!
//! What this part deliberately does not do: name resolution, per-sandbox lists of allowed destinations, bandwidth.
//!
//! Links, addresses and routes are set over rtnetlink, rules by nft(8) off the hot path; no `ip`, no `iptables`.

mod error;
mod namespace;
mod naming;
mod netlink;
mod pool;
mod rules;
mod slots;
mod sys;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use icebox_engine::host::{Egress, HostError, Network, Removed, SlotNetwork};
use icebox_engine::id::Slot;
use ipnet::Ipv4Net;

use crate::instance::Instance;
use error::NetworkError;
use namespace::Namespace;
use naming::Naming;
pub use naming::{GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, GUEST_PREFIX_LEN, TAP};
use netlink::Netlink;
use pool::Pool;
use slots::{Hook, Slots};

/// How the slots of one installation are laid out.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Whose slots they are: part of every name.
    pub instance: Instance,
    /// Where slots take their addresses from, two each. Must not overlap with any network the host routes to.
    pub prefix: Ipv4Net,
    /// Where namespaces are published: `/run/netns`, so that ip-netns(8) shows them.
    pub directory: PathBuf,
    /// How many prepared namespaces to keep in stock.
    pub pool_size: usize,
}

impl NetworkConfig {
    /// The defaults: `10.213.0.0/16` (32,768 slots), `/run/netns`, a pool of 4.
    #[must_use]
    pub fn new(instance: Instance) -> Self {
        Self {
            instance,
            prefix: Ipv4Net::new_assert(Ipv4Addr::new(10, 213, 0, 0), 16),
            directory: PathBuf::from("/run/netns"),
            pool_size: 4,
        }
    }
}

/// Network slots on Linux.
///
/// Dropping it drops the stock of prepared namespaces; slots that are set up stay, and so do the host's rules: running
/// sandboxes do not notice. [`NetworkSlots::close`] removes the rules when nothing needs them.
pub struct NetworkSlots {
    slots: Arc<Slots>,
    pool: Arc<Pool>,
}

impl NetworkSlots {
    /// Puts the host's rules in place (replacing those of an earlier daemon in one transaction) and starts to fill
    /// the pool. Slots that exist are left as they are.
    ///
    /// # Errors
    /// Without the rights or programs, and when the prefix overlaps with a network that the host routes elsewhere;
    /// with a hint in each case.
    pub async fn open(config: NetworkConfig) -> Result<Self, HostError> {
        blocking(move || Self::open_with(&config, Box::new(|_| Ok(())))).await
    }

    /// As [`NetworkSlots::open`], with a hook at every step.
    fn open_with(config: &NetworkConfig, hook: Hook) -> Result<Self, NetworkError> {
        let naming = Naming::new(&config.instance, config.prefix, &config.directory);
        let slots = Arc::new(Slots::new(naming, hook));
        slots.check_prefix()?;
        fs::create_dir_all(&config.directory).map_err(|source| NetworkError::Directory {
            path: config.directory.display().to_string(),
            source,
        })?;
        rules::apply_host(slots.naming()).map_err(NetworkError::HostRules)?;
        let pool = Pool::new(Arc::clone(&slots), config.pool_size)
            .map_err(|source| NetworkError::Prepare(source.into()))?;
        Ok(Self {
            slots,
            pool: Arc::new(pool),
        })
    }

    /// Removes the host's rules if no slot is left on the host; while there is one, they stay in force. No slot may be set
    /// up afterwards.
    ///
    /// # Errors
    /// When slots cannot be listed or nft fails.
    pub async fn close(&self) -> Result<(), HostError> {
        let slots = Arc::clone(&self.slots);
        blocking(move || {
            if slots.list()?.is_empty() {
                rules::remove_host(slots.naming()).map_err(NetworkError::HostRules)?;
            }
            Ok(())
        })
        .await
    }
}

#[async_trait]
impl Network for NetworkSlots {
    fn capacity(&self) -> u16 {
        self.slots.naming().capacity()
    }

    /// Past the capacity there is no address; a caller that asks anyway gets one that reaches nothing.
    fn host_address(&self, slot: Slot) -> Ipv4Addr {
        self.slots
            .naming()
            .slot(slot)
            .map_or(Ipv4Addr::UNSPECIFIED, |names| names.address)
    }

    async fn ensure(&self, slot: Slot, egress: Egress) -> Result<SlotNetwork, HostError> {
        let (slots, pool) = (Arc::clone(&self.slots), Arc::clone(&self.pool));
        blocking(move || {
            let ensured = slots.ensure(slot, egress, || pool.take());
            pool.replenish();
            let names = ensured?;
            Ok(SlotNetwork {
                host_address: names.address,
                namespace: names.namespace,
                tap: TAP.to_owned(),
                guest_mac: GUEST_MAC,
            })
        })
        .await
    }

    async fn release(&self, slot: Slot) -> Result<Removed, HostError> {
        let slots = Arc::clone(&self.slots);
        blocking(move || slots.release(slot)).await
    }

    async fn list(&self) -> Result<Vec<Slot>, HostError> {
        let slots = Arc::clone(&self.slots);
        blocking(move || slots.list()).await
    }

    async fn probe(&self) -> Result<(), HostError> {
        let slots = Arc::clone(&self.slots);
        blocking(move || {
            slots.check_prefix()?;
            // The proof is in the doing: everything a slot needs, in a namespace that goes again at once.
            slots.prepare().map(drop).map_err(NetworkError::Prepare)
        })
        .await
    }

    fn prepare(&self, slots: &[Slot]) {
        self.pool.expect(slots.len());
    }
}

/// Opens a slot's tap, for the launcher to hand to the VMM. Frames carry a virtio-net header (`IFF_VNET_HDR`); the
/// descriptor is non-blocking and closes on exec. A tap can be opened once at a time.
///
/// Blocks for well under a millisecond. Needs `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`.
///
/// # Errors
/// When `namespace` is not a network namespace or the tap is open already ([`Busy`](icebox_engine::host::ErrorKind::Busy)).
pub fn open_tap(namespace: &Path, tap: &str) -> Result<OwnedFd, HostError> {
    let message = || format!("open tap {tap} in {}", namespace.display());
    let opened = Namespace::open(namespace).and_then(|found| {
        let found = found.ok_or(io::ErrorKind::NotFound)?;
        found.run(|| {
            let attached = sys::attach_tap(tap)?;
            // Not for what it says: asking for the link makes the kernel (6.8) finish bringing it up, where a packet
            // sent before would be dropped and repeated a second later.
            Netlink::open()?.link(tap)?;
            Ok(attached)
        })
    });
    opened
        .map(OwnedFd::from)
        .map_err(|error| HostError::io(message(), error))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, HostError> {
    crate::blocking::blocking(move || work().map_err(HostError::from)).await
}
