//! What E2B's SDKs ask for and our own commands do not, or in other words: made of the same verbs.
//!
//! ```text
//!   list.rs       /v2/sandboxes in pages, filtered
//!   sandboxes.rs  create within its bounds, connect, refreshes, network, logs
//!   snapshots.rs  /snapshots
//!   builds.rs     templates that are built by steps, their files and tags
//!   absent.rs     what there is no such thing of here: 501
//!   form.rs       how a sandbox is shown to clients that know E2B's words alone
//!   page.rs       cursors and X-Next-Token
//! ```

pub(super) mod absent;
pub(super) mod builds;
pub(super) mod form;
pub(super) mod list;
mod page;
pub(super) mod sandboxes;
pub(super) mod snapshots;
