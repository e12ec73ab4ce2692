//! Where work happens, and how its result gets its name: all at once.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{ImageError, Io};
use crate::fs::{entries, remove_tree, sync_directory, sync_tree};

/// What the names of our staging directories begin with. Objects in the same directory are never called so.
const PREFIX: &str = "build-";

/// The directories this module works in. All must be on one filesystem; they are made when missing, for root only.
#[derive(Clone, Debug)]
pub struct Places {
    /// `kernels/<digest>/`: complete kernels.
    pub kernels: PathBuf,
    /// Work in progress, shared with others who do not touch our names. See [`sweep`].
    pub staging: PathBuf,
    /// Downloads that may be thrown away at any time.
    pub cache: PathBuf,
}

impl Places {
    /// The places below one data directory.
    #[must_use]
    pub fn under(data: &Path) -> Self {
        Self {
            kernels: data.join("kernels"),
            staging: data.join("staging"),
            cache: data.join("cache"),
        }
    }

    /// A fresh directory in staging, removed when dropped.
    pub(super) fn stage(&self, what: &str) -> Result<TempDir, ImageError> {
        make_private_dir(&self.staging)?;
        tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{what}-"))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.staging)
            .at("make a directory in", &self.staging)
    }
}

/// Removes what builds of a daemon that died have left in staging, and says how many. To be called before the first
/// build, by the process that owns the data directory. Blocks; what is not ours is left alone.
///
/// # Errors
/// Something cannot be listed or removed.
pub fn sweep(places: &Places) -> Result<usize, ImageError> {
    let dir = &places.staging;
    let mut removed = 0;
    for entry in entries(dir)? {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            remove_tree(&entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Makes `path` and its missing parents, readable for the owner alone.
pub(super) fn make_private_dir(path: &Path) -> Result<(), ImageError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .at("make the directory", path)
}

/// How publishing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    Created,
    /// Something is there under that name already; as names are digests, it is the same thing.
    AlreadyPresent,
}

/// Gives a finished staging directory its name: everything in it is synced, then one rename makes it appear, then the
/// parent is synced. A crash leaves either nothing or all of it.
pub(super) fn publish_dir(staged: TempDir, dest: &Path) -> Result<Published, ImageError> {
    sync_tree(staged.path())?;
    match fs::rename(staged.path(), dest) {
        Ok(()) => {
            // The directory has moved; there is nothing left for the guard to remove.
            let _moved = staged.keep();
            sync_parent(dest)?;
            Ok(Published::Created)
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
            ) =>
        {
            Ok(Published::AlreadyPresent)
        }
        Err(error) => Err(ImageError::io("move a finished directory to", dest, error)),
    }
}

/// Syncs the directory that holds `path`.
pub(super) fn sync_parent(path: &Path) -> Result<(), ImageError> {
    Ok(sync_directory(path.parent().unwrap_or(Path::new("/")))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publishing_twice_keeps_the_first_and_leaves_nothing_in_staging() {
        let data = tempfile::tempdir().unwrap();
        let places = Places::under(data.path());
        make_private_dir(&places.kernels).unwrap();
        let dest = places.kernels.join("x");
        for (content, expected) in [
            ("one", Published::Created),
            ("two", Published::AlreadyPresent),
        ] {
            let staged = places.stage("test").unwrap();
            fs::write(staged.path().join("file"), content).unwrap();
            assert_eq!(publish_dir(staged, &dest).unwrap(), expected);
        }
        assert_eq!(fs::read_to_string(dest.join("file")).unwrap(), "one");
        assert_eq!(fs::read_dir(&places.staging).unwrap().count(), 0);
    }

    #[test]
    fn sweeping_removes_our_dead_work_and_nothing_else() {
        let data = tempfile::tempdir().unwrap();
        let places = Places::under(data.path());
        assert_eq!(sweep(&places).unwrap(), 0);
        let dead = places.stage("test").unwrap().keep();
        fs::create_dir_all(dead.join("tree/deep")).unwrap();
        let other = places.staging.join("layer-x");
        fs::create_dir(&other).unwrap();
        assert_eq!(sweep(&places).unwrap(), 1);
        assert!(!dead.exists() && other.exists());
    }

    #[test]
    fn abandoned_work_is_removed() {
        let data = tempfile::tempdir().unwrap();
        let places = Places::under(data.path());
        let staged = places.stage("test").unwrap();
        fs::write(staged.path().join("file"), "half").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(&places.staging).unwrap().count(), 0);
    }
}
