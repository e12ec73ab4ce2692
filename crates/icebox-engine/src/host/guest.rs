//! The agents inside guests, as far as the lifecycle needs them. Exec and files do not pass through here: they are
//! the daemon's data path, straight from the client to the agent.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use async_trait::async_trait;
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use super::HostError;
use crate::id::SandboxId;
use crate::manifest::v1::Login;

/// Where a guest's agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAddress {
    /// The slot's host-reachable address.
    pub ip: Ipv4Addr,
}

/// A token. Its `Debug` and `Display` do not show it (INV-43).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// A new secret: 256 bits from the operating system, in hexadecimal.
    #[must_use]
    pub fn random() -> Self {
        let bytes: [u8; 32] = rand::rng().random();
        Self(crate::id::Digest::from_bytes(bytes).into())
    }

    /// The secret itself, for the one place that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a guest was just before it is welcomed. Clock and entropy are set whatever it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestOrigin {
    /// Nothing: its kernel has just started.
    Boot,
    /// The same sandbox, paused.
    Resume,
    /// Another sandbox: its machine-id changes (INV-37).
    Fork,
}

/// What a guest is told before anything else runs in it: who it is now.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// The token that the agent accepts at this moment: from its command line after a boot, or the captured
    /// guest's after a restore.
    pub current_token: Secret,
    /// The token that it accepts from now on.
    pub token: Secret,
    /// The sandbox that this guest is.
    pub sandbox: SandboxId,
    /// The template that it came from, in words.
    pub template: String,
    /// The guest's hostname.
    pub hostname: String,
    /// Variables for every later command.
    pub env: BTreeMap<String, String>,
    /// Who runs commands that name nobody, and where.
    pub login: Login,
    /// What the guest was a moment ago.
    pub origin: GuestOrigin,
}

/// Talks to agents.
#[async_trait]
pub trait Guest: Send + Sync {
    /// Waits until the agent answers, and tells it who it is: one full round trip. Its success is READY (INV-36).
    /// Runs until it succeeds or fails for good; the engine bounds it and gives up when the VMM ends.
    async fn welcome(&self, at: GuestAddress, welcome: &Welcome) -> Result<(), HostError>;

    /// Asks the guest to sync, drop caches and trim, so that a capture is small. Best effort.
    async fn prepare(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError>;

    /// Whether commands run in the guest that somebody started there: not what its template brought with it.
    async fn is_working(&self, at: GuestAddress, token: &Secret) -> Result<bool, HostError>;

    /// Sets the guest's clock to the host's, after it stood still while the time went on. Best effort.
    async fn set_clock(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError>;

    /// Asks the guest to write out what it has cached, before its VMM is ended. Best effort.
    async fn sync(&self, at: GuestAddress, token: &Secret) -> Result<(), HostError>;
}
