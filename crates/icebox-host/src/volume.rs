//! Volume drivers that keep disks in files.
//!
//! | driver | head | layer | freeze under a running guest | where |
//! |---|---|---|---|---|
//! | [`Qcow2`] | an overlay, `heads/<n>.qcow2` | the overlay, sealed | by the VMM, which opens a new overlay on top | anywhere |
//! | [`Reflink`] | a clone of what is below, `heads/<n>.raw` | a clone of the head | by the host: a clone and a rename | btrfs, XFS |
//!
//! Heads of all drivers lie in their sandbox's directory and move to the trash with it. The file's extension says whose
//! they are, so that a driver never lists or removes what another made, whatever a guest wrote into it.
//!
//! Nothing here starts a process.

mod heads;
pub mod qcow2;
mod reflink;

pub use qcow2::Qcow2;
pub use reflink::Reflink;
