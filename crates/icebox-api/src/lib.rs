//! What the daemon says on the wire: types, error codes, the client and the server's routes.
//!
//! The shape is E2B's REST API where that has one, so that its SDKs find what they know; verbs it lacks are added in
//! the same style. Nothing here knows the engine: [`server`] serves any [`Daemon`], and every type under [`types`] is a
//! promise to clients that does not move when an internal type does.
//!
//! ```text
//!   a request --+-- routing headers, or Host: <port>-<id>.… --> proxy --> a port inside the sandbox
//!               +-- else -- key (TCP), or uid (socket) --> one route per verb --> Daemon, as the caller sees it
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod access;
pub mod client;
mod daemon;
mod error;
pub mod key;
pub mod server;
pub mod types;

pub use daemon::{BoxStream, Daemon, Pass, Route};
pub use error::{ApiError, ErrorBody, ErrorCode};

/// Where the agent listens in every sandbox, whatever else does: E2B's `envd` port.
pub const AGENT_PORT: u16 = 49983;

/// The `envd` release whose contract the agent keeps; SDKs switch features on by it.
pub const ENVD_VERSION: &str = "0.6.13";

/// Names the sandbox of a proxied request.
pub const SANDBOX_ID_HEADER: &str = "e2b-sandbox-id";

/// Names the port inside the sandbox of a proxied request.
pub const SANDBOX_PORT_HEADER: &str = "e2b-sandbox-port";

/// Carries the API key.
pub const API_KEY_HEADER: &str = "x-api-key";

/// Names the team that an administrator acts for.
pub const TEAM_HEADER: &str = "icebox-team";

/// Carries the token that a sandbox's ports ask for which do not serve everybody.
pub const TRAFFIC_TOKEN_HEADER: &str = "e2b-traffic-access-token";

/// Carries a sandbox's own token to its agent.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";
