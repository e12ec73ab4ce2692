//! What the benchmark looks for in data directories.

use std::fs;
use std::path::{Path, PathBuf};

use crate::run::Failure;

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error| Failure(format!("read {}: {error}", directory.display()));
    fs::read_dir(directory)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
        .collect()
}

pub(super) fn only_directory(directory: &Path) -> Result<PathBuf, Failure> {
    let found = entries(directory)?;
    found
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| Failure(format!("{} is empty", directory.display())))
}

/// The image of a base: its largest file.
pub(super) fn only_file(directory: &Path) -> Result<PathBuf, Failure> {
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    entries(directory)?
        .into_iter()
        .max_by_key(size)
        .ok_or_else(|| Failure(format!("{} is empty", directory.display())))
}

pub(super) fn newest_with(directory: &Path, prefix: &str) -> Result<PathBuf, Failure> {
    let fits = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    let age = |path: &PathBuf| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    entries(directory)?
        .into_iter()
        .filter(fits)
        .max_by_key(age)
        .ok_or_else(|| Failure(format!("no {prefix}… in {}", directory.display())))
}
