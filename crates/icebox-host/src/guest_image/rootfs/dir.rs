//! A directory of the host as a root.

use std::{fs, path::Path};

use super::super::{ImageError, Io};

/// A directory, not a link to one: what is read must be what was named.
pub(super) fn check(path: &Path) -> Result<(), ImageError> {
    let metadata = fs::symlink_metadata(path).at("look at", path)?;
    if metadata.is_dir() {
        Ok(())
    } else {
        Err(ImageError::NotADirectory {
            path: path.to_owned(),
        })
    }
}
