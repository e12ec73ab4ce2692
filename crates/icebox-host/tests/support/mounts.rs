//! Whether this machine can mount a file system out of a file, and what to say if not.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use icebox_host::skip::skip;

/// Whether `test` can mount a file system of this `kind` here. If not, the reason goes to standard error and to the list
/// of skipped tests that `cargo xtask check` prints (the file that `ICEBOX_SKIPPED` names).
pub(crate) fn can_mount(kind: &str, test: &str) -> bool {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounting a file system needs root"
    );
    let why = if !Path::new("/dev/loop-control").exists() {
        "there are no loop devices here (/dev/loop-control)".to_owned()
    } else if !kernel_knows(kind) {
        format!("this kernel has no {kind}")
    } else {
        return true;
    };
    skip(test, &why);
    false
}

/// Whether `test` can make device-mapper devices here. If not, it is said in the same way.
#[allow(dead_code, reason = "not every test that mounts something does")]
pub(crate) fn can_map(test: &str) -> bool {
    let there = Path::new("/dev/mapper/control").exists();
    if !there {
        skip(test, "there is no device-mapper here (/dev/mapper/control)");
    }
    there
}

/// Whether `test` can make a ZFS pool here. If not, it is said in the same way.
#[allow(dead_code, reason = "not every test that mounts something does")]
pub(crate) fn can_pool(test: &str) -> bool {
    let there = Path::new("/dev/zfs").exists();
    if !there {
        skip(test, "there is no ZFS in this kernel (/dev/zfs)");
    }
    there
}

fn kernel_knows(kind: &str) -> bool {
    let listed = || {
        fs::read_to_string("/proc/filesystems")
            .unwrap()
            .lines()
            .any(|line| line.split_whitespace().last() == Some(kind))
    };
    // As mounting one would; where there is no modprobe, or no module, nothing changes.
    let load = || {
        Command::new("modprobe")
            .args(["--quiet", kind])
            .stderr(Stdio::null())
            .status()
            .is_ok()
    };
    listed() || load() && listed()
}
