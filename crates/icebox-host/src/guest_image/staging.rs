//! Where work happens, and how its result gets its name: all at once.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{ImageError, Io};

/// The directories this module works in. All must be on one filesystem; they are made when missing, for root only.
#[derive(Clone, Debug)]
pub struct Places {
    /// `kernels/<digest>/`: complete kernels.
    pub kernels: PathBuf,
    /// Work in progress. Whatever is in it when nothing is being built is rubbish.
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
            .prefix(&format!("{what}-"))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.staging)
            .at("make a directory in", &self.staging)
    }
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
    let parent = path.parent().unwrap_or(Path::new("/"));
    sync(parent)
}

/// Syncs one file or directory.
pub(super) fn sync(path: &Path) -> Result<(), ImageError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .at("sync", path)
}

fn sync_tree(dir: &Path) -> Result<(), ImageError> {
    for entry in fs::read_dir(dir).at("read the directory", dir)? {
        let entry = entry.at("read the directory", dir)?;
        let kind = entry.file_type().at("look at", &entry.path())?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(dir)
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
    fn abandoned_work_is_removed() {
        let data = tempfile::tempdir().unwrap();
        let places = Places::under(data.path());
        let staged = places.stage("test").unwrap();
        fs::write(staged.path().join("file"), "half").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(&places.staging).unwrap().count(), 0);
    }
}
