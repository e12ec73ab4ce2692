//! What host and guest share: the agent's services, its constants, its control calls, and the host's client.
//!
//! The agent serves three kinds of request on one port:
//!
//! | who asks | what | where it is defined |
//! |---|---|---|
//! | SDKs, CLI, daemon | Connect RPC `process.Process` and `filesystem.Filesystem` | `proto/`, generated into [`proto`] |
//! | the same | files as plain HTTP, `GET` and `POST` [`FILES_PATH`]; [`HEALTH_PATH`]; [`METRICS_PATH`] | [`control`] for the JSON shapes |
//! | the daemon only | [`INIT_PATH`], [`CLOCK_PATH`], [`PREPARE_PATH`] and [`DIAL_PATH`] | [`control`] |
//!
//! The first two follow the public E2B `envd` protocol, so that its SDKs work unmodified; the third is ours.
//!
//! Without the feature `client` this crate holds types and generated code only; the agent links it statically.

pub mod control;
pub mod exit;
mod secret;

#[cfg(feature = "client")]
pub mod client;

pub use secret::Token;

/// Messages and service stubs of `proto/*.proto`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::pedantic,
    clippy::restriction,
    unreachable_pub,
    reason = "generated code has a style of its own"
)]
pub mod proto {
    connectrpc::include_generated!("services.rs");
}

/// The port the agent listens on inside the guest (E2B's envd uses the same, SDKs address it by number).
pub const AGENT_PORT: u16 = 49983;

/// The envd version whose behaviour the agent implements, as reported to SDKs, which switch features on it.
///
/// Never raise it past what is implemented: newer ones promise fields and calls of their own.
pub const ENVD_VERSION: &str = "0.6.13";

/// The tag of a process that a template's start command is: it belongs to every sandbox made from that, and is no work of
/// somebody's.
pub const START_TAG: &str = "icebox.start";

/// Carries the sandbox's access token on every request but health checks and signed file URLs.
pub const TOKEN_HEADER: &str = "x-access-token";
/// Tells a proxy which sandbox a request is for.
pub const SANDBOX_ID_HEADER: &str = "e2b-sandbox-id";
/// Tells a proxy which port inside the sandbox a request is for.
pub const SANDBOX_PORT_HEADER: &str = "e2b-sandbox-port";
/// Seconds of silence after which a stream carries a keepalive event.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
/// Prefix of the upload headers that become extended attributes [`METADATA_XATTR_PREFIX`].
pub const METADATA_HEADER_PREFIX: &str = "x-metadata-";
/// Prefix of the extended attributes that hold a file's metadata.
pub const METADATA_XATTR_PREFIX: &str = "user.e2b.";

/// `GET`: 204 once the agent serves. Needs no token.
pub const HEALTH_PATH: &str = "/health";
/// `GET`: resource usage, [`control::Metrics`].
pub const METRICS_PATH: &str = "/metrics";
/// `GET`, `POST`: the bytes of files.
pub const FILES_PATH: &str = "/files";
/// `POST` [`control::Init`], answers [`control::InitReport`]. For the host only: a proxy must not forward it.
pub const INIT_PATH: &str = "/init";
/// `POST` [`control::Prepare`], answers [`control::PrepareReport`]. For the host only: a proxy must not forward it.
pub const PREPARE_PATH: &str = "/prepare";
/// Moves the guest's clock, and reads it.
pub const CLOCK_PATH: &str = "/clock";
/// `GET ?port=N` with an upgrade to [`DIAL_PROTOCOL`]: the connection becomes one to that port of the guest's own loopback
/// address; 502 if nobody listens there. For the host only: a proxy must not forward it.
pub const DIAL_PATH: &str = "/dial";
/// What a connection becomes by [`DIAL_PATH`].
pub const DIAL_PROTOCOL: &str = "icebox-port";

/// Parameters of the kernel command line that the agent reads as process 1.
pub mod cmdline {
    /// Authenticates the first `/init` after a boot.
    pub const TOKEN: &str = "icebox.token";
    /// Block device with the root filesystem; `/dev/vda` when absent.
    pub const ROOT: &str = "icebox.root";
    /// Type of the root filesystem; `ext4` when absent.
    pub const ROOT_FS_TYPE: &str = "icebox.rootfstype";
    /// Address of `eth0` with prefix length; [`DEFAULT_ADDRESS`] when absent, `none` leaves the network alone.
    pub const ADDRESS: &str = "icebox.address";
    /// Default gateway; [`DEFAULT_GATEWAY`] when absent.
    pub const GATEWAY: &str = "icebox.gateway";
    /// Host name until `/init` sets one.
    pub const HOSTNAME: &str = "icebox.hostname";
    /// Name servers, separated by commas, for images without a usable `/etc/resolv.conf`.
    pub const DNS: &str = "icebox.dns";

    /// How the machine is turned off; by asking for it when absent. `reset`, where it can only be reset, and its VMM ends
    /// then.
    pub const OFF: &str = "icebox.off";

    /// The guest's address in every sandbox.
    pub const DEFAULT_ADDRESS: &str = "169.254.0.21/30";
    /// The host's end of the link in every sandbox.
    pub const DEFAULT_GATEWAY: &str = "169.254.0.22";
}
