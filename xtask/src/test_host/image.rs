//! The kernel and the root disk: built from Debian's packages once, and kept.
//!
//! Both are named by the digest of everything in this repository that goes into them, so that a changed script makes a
//! new one. The kernel comes first and by itself: compiling ZFS for it takes minutes, and a new package on the root disk
//! should not.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::at;
use crate::run::{Failure, root, run};

const ARCHIVE: &str = "archive.sh";
const KERNEL: &[&str] = &[ARCHIVE, "kernel.sh", "initramfs_init.sh"];
const ROOT: &[&str] = &[ARCHIVE, "root.sh"];

/// What a test host is started from.
pub(super) struct Image {
    kernel: PathBuf,
    root: PathBuf,
}

impl Image {
    pub(super) fn vmlinuz(&self) -> PathBuf {
        self.kernel.join("vmlinuz")
    }

    pub(super) fn initramfs(&self) -> PathBuf {
        self.kernel.join("initramfs.cpio")
    }

    /// An ext4 file system. Nobody writes to it.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }
}

/// Where the scripts are that run here and in the test host.
pub(super) fn scripts() -> PathBuf {
    root().join("xtask/src/test_host")
}

/// Builds what is not in the cache, and drops what it replaces.
pub(super) fn ensure(cache: &Path) -> Result<Image, Failure> {
    let kernel_digest = digest(KERNEL, "")?;
    let kernel = cache.join(format!("kernel-{kernel_digest}"));
    if !kernel.exists() {
        let building = cache.join("building-kernel");
        remove_tree(&building)?;
        fs::create_dir(&building).map_err(at("make", &building))?;
        let mut build = Command::new(scripts().join("kernel.sh"));
        run("the test host's kernel", build.arg(&building))?;
        fs::rename(&building, &kernel).map_err(at("put in place", &kernel))?;
        drop_others(cache, "kernel-", &kernel)?;
    }
    // Modules are on the root disk, and only those of its own kernel load.
    let root_digest = digest(ROOT, &kernel_digest)?;
    let root = cache.join(format!("root-{root_digest}.ext4"));
    if !root.exists() {
        let mut build = Command::new(scripts().join("root.sh"));
        run("the test host's root disk", build.arg(&root).arg(&kernel))?;
        drop_others(cache, "root-", &root)?;
    }
    Ok(Image { kernel, root })
}

/// Digest of some scripts' text and what they depend on beside it.
fn digest(names: &[&str], depends_on: &str) -> Result<String, Failure> {
    let mut text = depends_on.as_bytes().to_vec();
    for name in names {
        let path = scripts().join(name);
        text.extend(fs::read(&path).map_err(at("read", &path))?);
        text.push(0);
    }
    let fail = |error| Failure(format!("sha256sum: {error}"));
    let mut sum = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    // Dropped when it is written, which ends the input.
    if let Some(mut stdin) = sum.stdin.take() {
        stdin.write_all(&text).map_err(fail)?;
    }
    let output = sum.wait_with_output().map_err(fail)?;
    match str::from_utf8(&output.stdout)
        .ok()
        .and_then(|text| text.get(..16))
    {
        Some(digest) if output.status.success() => Ok(digest.to_owned()),
        _ => Err(Failure(format!("sha256sum failed: {}", output.status))),
    }
}

fn drop_others(cache: &Path, prefix: &str, keep: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(cache).map_err(at("read", cache))? {
        let path = entry.map_err(at("read", cache))?.path();
        let ours = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        if ours && path != keep {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

/// Removes a file or a directory, if it is there.
pub(super) fn remove_tree(path: &Path) -> Result<(), Failure> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(at("remove", path)(error))
        }
        _ => Ok(()),
    }
}
