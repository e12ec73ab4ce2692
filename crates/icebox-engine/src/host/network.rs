//! Network slots: a namespace, a tap and an address that one sandbox has from create to destroy.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{HostError, Removed};
use crate::id::Slot;

/// What a sandbox may reach beyond the host's replies to connections that the host opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Egress {
    /// Nothing.
    #[default]
    Deny,
    /// Public addresses. Never other sandboxes, the host, private ranges or cloud metadata.
    Internet,
}

/// A slot's network, set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotNetwork {
    /// Reaches the guest from the host, on any port. The same for every use of the slot.
    pub host_address: Ipv4Addr,
    /// The network namespace, as a path that can be opened and entered.
    pub namespace: PathBuf,
    /// The tap device in it.
    pub tap: String,
    /// The guest's MAC address, the same in every slot.
    pub guest_mac: [u8; 6],
}

/// Gives sandboxes a network.
#[async_trait]
pub trait Network: Send + Sync {
    /// How many slots there are, numbered from 0. Slots never wrap (INV-47).
    fn capacity(&self) -> u16;

    /// The host-reachable address of a slot, whether or not it is set up.
    fn host_address(&self, slot: Slot) -> Ipv4Addr;

    /// Sets up the slot, or finds it set up, with exactly this policy.
    async fn ensure(&self, slot: Slot, egress: Egress) -> Result<SlotNetwork, HostError>;

    /// Removes the slot's network. Tries every step and reports all that failed; touches only exactly named
    /// objects of ours; never switches `ip_forward` off (INV-48).
    async fn release(&self, slot: Slot) -> Result<Removed, HostError>;

    /// Slots that have anything on the host, held or not: what the sweep compares. Slots that wait in the
    /// implementation's own pool are not listed.
    async fn list(&self) -> Result<Vec<Slot>, HostError>;

    /// Proves that slots can be set up here.
    ///
    /// # Errors
    /// Says why not, with a hint.
    async fn probe(&self) -> Result<(), HostError>;

    /// Prepares `slots`, expected to be used soon, in the background. May do nothing.
    fn prepare(&self, slots: &[Slot]);
}
