//! Kernels, initramfs and root images, made for real: needs root, the distribution's tools and its package mirror.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is how a test fails, in its helpers too"
)]

#[path = "guest_image/debian.rs"]
mod debian;
#[path = "guest_image/dir.rs"]
mod dir;
#[path = "guest_image/image.rs"]
mod image;
#[path = "guest_image/kernel.rs"]
mod kernel;
#[path = "guest_image/tar.rs"]
mod tar;

use std::{fs, path::Path, process::Command};

use icebox_host::guest_image::{
    ImageError, Places, Silent,
    rootfs::{self, Recipe, RootImage, Source},
};

const MIB: u64 = 1 << 20;

/// A data directory of one test's own. Nothing may be left in its staging, or mounted below it, when it ends.
struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root"
        );
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn places(&self) -> Places {
        Places::under(self.path())
    }

    fn build(&self, source: Source, size: Option<u64>) -> Result<RootImage, ImageError> {
        rootfs::build(&self.places(), &Recipe { source, size }, &Silent)
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let staging = self.places().staging;
        let left: Vec<_> = fs::read_dir(&staging)
            .map(|dir| dir.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left in staging: {left:?}");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(
            !mounts.contains(&*self.path().to_string_lossy()),
            "left mounted:\n{mounts}"
        );
    }
}

/// Runs a tool of e2fsprogs and returns what it prints.
fn e2fs(tool: &str, args: &[&str], image: &Path) -> String {
    let output = Command::new(format!("/usr/sbin/{tool}"))
        .args(args)
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What `debugfs` answers about an image.
fn debugfs(image: &Path, request: &str) -> String {
    e2fs("debugfs", &["-R", request], image)
}

/// Writes to an image.
fn debugfs_write(image: &Path, request: &str) {
    let output = Command::new("/usr/sbin/debugfs")
        .args(["-w", "-R", request])
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success());
}

fn assert_clean(image: &Path) {
    let output = Command::new("/usr/sbin/e2fsck")
        .args(["-fn"])
        .arg(image)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}
