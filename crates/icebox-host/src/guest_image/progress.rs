//! How long work tells where it is, without knowing who listens.

/// A stretch of work that a person would recognise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::Display)]
#[strum(serialize_all = "lowercase")]
pub enum Stage {
    /// Asking the package manager what to download. Counts nothing.
    #[strum(serialize = "resolving packages")]
    Resolve,
    /// Counts packages, or percent where only that is known.
    #[strum(serialize = "downloading")]
    Download,
    /// Counts bytes of the archive read.
    #[strum(serialize = "unpacking")]
    Unpack,
    /// Counts packages unpacked and configured.
    #[strum(serialize = "installing packages")]
    Install,
    /// Counts bytes read from an image or directory.
    #[strum(serialize = "copying")]
    Copy,
    /// Counts nothing.
    #[strum(serialize = "making the filesystem")]
    Filesystem,
    /// Counts nothing.
    #[strum(serialize = "checking the filesystem")]
    Check,
    /// Counts bytes, holes included.
    #[strum(serialize = "computing the digest")]
    Digest,
}

impl Stage {
    /// Whether the counts reported in this stage are bytes.
    #[must_use]
    pub fn counts_bytes(self) -> bool {
        matches!(self, Self::Unpack | Self::Copy | Self::Digest)
    }
}

/// Told about every stage, from the thread that does the work or one it started. Must not block for long.
pub trait Progress: Send + Sync {
    /// `done` of `total` in `stage`; `total` is `None` while it is unknown. A stage may come back, `done` never shrinks
    /// within one visit.
    fn report(&self, stage: Stage, done: u64, total: Option<u64>);
}

/// Listens to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _stage: Stage, _done: u64, _total: Option<u64>) {}
}
