//! Durable documents and the directories of objects.

use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::{HostError, Removed};
use crate::id::Digest;
use crate::layout::Object;
use crate::unit::Bytes;

/// An object that was found at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDocument {
    /// Which object it is.
    pub object: Object,
    /// Its manifest, unparsed. `None` if the directory has none: not an object yet, or damaged.
    pub manifest: Option<Vec<u8>>,
}

/// How much room there is in a place where data are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Which place, for people: "the file system of /var/lib/icebox".
    pub place: String,
    /// All of it.
    pub total: Bytes,
    /// What can still be written, without what is reserved for the superuser.
    pub available: Bytes,
}

/// Keeps manifests and object directories. One process at a time owns a store.
///
/// Every method that changes something is durable on return: files fsynced, renames followed by an fsync of the
/// directory.
#[async_trait]
pub trait Store: Send + Sync {
    /// Everything that exists, in no particular order. Directories whose names are not ids are not listed: they are
    /// not ours.
    async fn load(&self) -> Result<Vec<StoredDocument>, HostError>;

    /// Replaces an object's manifest by one atomic rename, making the object's directory if it does not exist.
    async fn commit(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError>;

    /// Makes an empty staging directory for `object`, removing what an earlier attempt left there.
    async fn stage(&self, object: &Object) -> Result<PathBuf, HostError>;

    /// The staging directory for `object` with whatever it holds, made if it does not exist: for steps that roll
    /// forward.
    async fn staged(&self, object: &Object) -> Result<PathBuf, HostError>;

    /// Writes `manifest` into the staging directory, makes everything in it durable, and puts it in place by one
    /// atomic rename. If the object exists already and nothing is staged, or an empty directory
    /// (a repetition after a crash), succeeds.
    async fn publish(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError>;

    /// Removes the staging directory for `object`.
    async fn discard(&self, object: &Object) -> Result<Removed, HostError>;

    /// Puts the object into the trash by one atomic rename: from here on it does not exist.
    async fn trash(&self, object: &Object) -> Result<Removed, HostError>;

    /// Deletes what is in the trash. What will not go is reported and does not stop the rest.
    async fn empty_trash(&self) -> Result<(), HostError>;

    /// Objects that have a staging directory: what the sweep looks at.
    async fn list_staging(&self) -> Result<Vec<Object>, HostError>;

    /// SHA-256 of a file's content, holes read as zeros. Takes time in proportion to its size.
    async fn digest(&self, file: &Path) -> Result<Digest, HostError>;

    /// A file's length, holes included.
    async fn file_size(&self, file: &Path) -> Result<Bytes, HostError>;

    /// Moves a file of the same file system into the staging directory of `object`, under the name `as_file`.
    async fn move_into_staging(
        &self,
        file: &Path,
        object: &Object,
        as_file: &str,
    ) -> Result<(), HostError>;

    /// Allocated bytes of a published object's directory, as the file system counts them. Of a sandbox: without its
    /// heads, which are its volume driver's to measure, and with its generations.
    async fn allocated(&self, object: &Object) -> Result<Bytes, HostError>;

    /// The room where the store keeps everything.
    async fn space(&self) -> Result<Space, HostError>;

    /// A read-only path to a file of a published object.
    fn path(&self, object: &Object, file: &str) -> PathBuf;

    /// Copies a small file of one object into the staging directory of another.
    async fn copy_into_staging(
        &self,
        from: &Object,
        file: &str,
        to: &Object,
    ) -> Result<(), HostError>;
}
