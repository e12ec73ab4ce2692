//! Disks: immutable bases and layers, and the writable heads on top of them.
//!
//! `freeze` is the heart. The head becomes an immutable layer and a new, empty head goes on top of it, live, in
//! O(1), under a running guest. Pause, snapshot and fork are all built from it, so a driver that gets it right
//! gets them right.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use super::{Ensured, HostError, Removed, Space};
use crate::id::{Digest, HeadId, LayerId};
use crate::unit::Bytes;

/// What lies under a head: layers, newest first, down to a base. The engine derives it from the layers' manifests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Immutable layers, newest first. Empty for a head that sits on its base.
    pub layers: Vec<LayerId>,
    /// The imported image at the bottom. `None` only above a layer that stands alone
    /// ([`VolumeDriver::layers_are_whole`]).
    pub base: Option<Digest>,
    /// The size of the disk that the guest sees. A multiple of 512, at least the base's size.
    pub size: Bytes,
}

/// What a VMM opens. Paths are host paths; the VMM driver decides how its box sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockDevice {
    /// A file or block device that holds the disk as the guest sees it.
    Raw {
        /// Opened read-write.
        path: PathBuf,
    },
    /// A chain of qcow2 overlays over a raw base. The paths in the files' headers are not used.
    Qcow2 {
        /// The writable top. Opened read-write.
        head: PathBuf,
        /// Immutable overlays under it, newest first. Opened read-only.
        layers: Vec<PathBuf>,
        /// The raw image at the bottom. Opened read-only.
        base: PathBuf,
    },
}

/// How a driver freezes the head of a running sandbox.
pub enum LiveFreeze<'a> {
    /// The host does it; the VMM keeps its file descriptor and notices nothing.
    ByHost(&'a dyn FreezeByHost),
    /// The VMM switches to a new head that the engine has created ([`super::DiskSwitch`]); the old one is then
    /// [sealed](VolumeDriver::seal).
    ByVmm,
}

/// A way to store disks copy-on-write.
///
/// What is asked of one sandbox's heads happens in the order in which it is asked, also when the caller stops waiting
/// for an earlier call: the engine asks how far a freeze came after it has given up on it, and acts on the answer.
#[async_trait]
pub trait VolumeDriver: Send + Sync {
    /// The driver's name in manifests, options and messages: `qcow2`, `reflink`, `dm-snapshot`, `zfs`.
    fn name(&self) -> &'static str;

    /// Proves on a scratch volume that the driver works on this host.
    ///
    /// # Errors
    /// Says why it does not, with a hint.
    async fn probe(&self) -> Result<(), HostError>;

    /// How the head of a running sandbox is frozen.
    fn live_freeze(&self) -> LiveFreeze<'_>;

    /// How heads are watched while guests write to them. `None` where nothing can happen to a head that its VMM would not
    /// see as an error of a single write.
    fn watch(&self) -> Option<&dyn WatchHeads>;

    /// Whether a layer's data stands alone. If not, it needs the layers and the base under it.
    fn layers_are_whole(&self) -> bool;

    /// How neighbours in a chain become one layer. `None` if [layers stand alone](Self::layers_are_whole): no chain is
    /// ever read through then, so none needs to be short.
    fn merges_layers(&self) -> Option<&dyn MergeLayers>;

    /// Makes whatever the driver needs, beside `bases/<digest>/image`, to put heads on a base. Idempotent; a crash
    /// in the middle never leaves a base that looks finished. The image is read, never written.
    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError>;

    /// Removes what [`ensure_base`](Self::ensure_base) made. The image itself is the engine's.
    async fn remove_base(&self, base: &Digest) -> Result<Removed, HostError>;

    /// Makes an empty, durable head on top of `chain`. If `head` exists (a retried step), its content is kept.
    ///
    /// Where [`LiveFreeze::ByVmm`] freezes, the chain's newest layer need not exist yet here and in
    /// [`attach`](Self::attach): it is the head that the VMM is about to switch from.
    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError>;

    /// Removes a head and what was written to it. The head is not attached.
    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError>;

    /// Makes the head available as something a VMM can open. Removes a stale device of the same name first, and
    /// never touches one that is in use (INV-14).
    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError>;

    /// Undoes [`attach`](Self::attach). The head's content stays.
    async fn detach(&self, head: &HeadId) -> Result<Removed, HostError>;

    /// Makes everything written to the attached head durable, host caches included.
    async fn flush(&self, head: &HeadId) -> Result<(), HostError>;

    /// Turns a head that nobody writes to any more into the data of a layer, in `staging` (the layer's staging
    /// directory). The head is gone afterwards. Idempotent: a repetition after a crash finishes the work.
    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError>;

    /// Writes the disk as of `chain` (its first layer, or its base) as a sparse raw image to `out`, which does not
    /// exist yet. Reads only what is allocated. The source is immutable, so guests keep running.
    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError>;

    /// Removes a layer's data where it is not in the layer's directory, so that nothing is lost or left when that
    /// directory goes next. Idempotent, and asked of every driver: whoever knows nothing of the layer answers
    /// [`Removed::AlreadyAbsent`]. Layers go in any order; what other layers and heads need of it stays with them.
    async fn remove_layer(&self, layer: &LayerId) -> Result<Removed, HostError>;

    /// Allocated bytes of a head.
    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError>;

    /// Allocated bytes of a layer's data, wherever it is: what it added to what is below. A driver that cannot tell
    /// whose shared bytes are answers what the layer stores alone.
    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError>;

    /// The room where heads and layers are kept, if that is not the store's.
    async fn space(&self) -> Result<Option<Space>, HostError>;

    /// Heads that exist on the host, whether or not a manifest holds them: what the sweep compares.
    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError>;

    /// Layers with data outside their directories, whether or not they have one: what the sweep compares. None for a
    /// driver that keeps layers in their directories. A removal that was killed is finished first.
    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError>;
}

/// Live freeze without the VMM's help.
#[async_trait]
pub trait FreezeByHost: Send + Sync {
    /// The content of `from` becomes the data of a layer in `staging` (the layer's staging directory), and the
    /// attached device goes on as `to`, empty on top of it. Guest writes are paused. Idempotent: a repetition after
    /// a crash finishes the work.
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError>;

    /// Whether a freeze of `from` has gone past the point where it can be undone: the device goes on as `to`.
    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError>;
}

/// What has become, or is about to become, of a head that a guest writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing can be read from it any more, and nothing written. Layers below it are whole.
    Lost {
        /// What happened, for people.
        why: String,
    },
    /// The next writes may find no room, and the head would be lost by that: its guest must not write now. Over as soon as a
    /// look does not say it any more.
    Starved {
        /// What there is too little of, for people.
        why: String,
    },
}

/// What a look at heads has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Heads that are not as they should be. Of those that were asked for; one that is not attached is not among them.
    pub troubled: Vec<(HeadId, Trouble)>,
    /// When to look again, so that nothing is seen too late.
    pub again_in: Duration,
}

/// For drivers whose heads can be lost as a whole while a guest writes to them (INV-28).
#[async_trait]
pub trait WatchHeads: Send + Sync {
    /// Looks at attached heads. Cheap, and never waits for their I/O.
    async fn look(&self, heads: &[HeadId]) -> Result<Watch, HostError>;
}

/// One layer of several, so that chains stay short.
///
/// Layers are immutable, and what is made of them is beside them: guests that read through them run on and notice
/// nothing. Both methods take time in proportion to what the layers hold, and neither waits for the head of a sandbox.
#[async_trait]
pub trait MergeLayers: Send + Sync {
    /// Writes what the layers of `run` (newest first, each on the next) hold together, as the data of one layer in
    /// `staging` (that layer's staging directory, which is empty). Over what lies under the run it shows what the run
    /// shows. Durable on return; on failure nothing of it counts.
    async fn merge(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError>;

    /// Reads what [`merge`](Self::merge) wrote back from the disk, and compares it with the run: the same places are
    /// held, with the same content.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](super::ErrorKind::Invalid) if it differs, and where.
    async fn verify(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError>;
}
