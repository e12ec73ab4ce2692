//! Volume drivers. All but one keep disks in files of the data directory.
//!
//! | driver | head | layer | freeze under a running guest | where |
//! |---|---|---|---|---|
//! | [`Qcow2`] | an overlay, `heads/<n>.qcow2` | the overlay, sealed | by the VMM, which opens a new overlay on top | anywhere |
//! | [`DmSnapshot`] | a store of changed chunks, `heads/<n>.cow` | the store, sealed | by the host: the kernel moves a device | with device-mapper |
//! | [`Zfs`] | a volume, cloned of what is below | a snapshot | by the host: a snapshot | with a ZFS pool |
//! | [`Reflink`] | a clone of what is below, `heads/<n>.raw` | a clone of the head | by the host: a clone and a rename | btrfs, XFS |
//!
//! Heads in files lie in their sandbox's directory and move to the trash with it. The file's extension says whose
//! they are, so that a driver never lists or removes what another made, whatever a guest wrote into it.
//!
//! Nothing here starts a process, but for [`Zfs`], which has no other way to reach a pool.

mod dm_snapshot;
mod exercise;
mod flatten;
mod heads;
mod in_files;
pub mod qcow2;
mod reflink;
mod zfs;

pub use dm_snapshot::DmSnapshot;
pub use exercise::{Scratch, exercise};
pub use qcow2::Qcow2;
pub use reflink::Reflink;
pub use zfs::Zfs;
#[cfg(feature = "fixture")]
pub use zfs::digest_of_stream;
