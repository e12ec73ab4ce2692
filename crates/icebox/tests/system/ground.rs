//! What a site stands on: a file system, or a pool, that its volume driver works on.
//!
//! | driver | its data directory | and |
//! |---|---|---|
//! | `qcow2` | in the site's directory, whatever that is on | |
//! | `reflink` | on an XFS in a file | |
//! | `dm-snapshot` | on an ext4 in a file | |
//! | `zfs` | in the site's directory | a pool in a file |

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use icebox_host::skip::skip;

use crate::mounts::{can_map, can_mount};
use crate::site::{quietly, run};

/// Of file systems and pools; sparse.
const SIZE: u64 = 12 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    DmSnapshot,
    Zfs,
    Reflink,
    Qcow2,
}

impl Driver {
    pub(crate) const ALL: [Self; 4] = [Self::DmSnapshot, Self::Zfs, Self::Reflink, Self::Qcow2];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DmSnapshot => "dm-snapshot",
            Self::Zfs => "zfs",
            Self::Reflink => "reflink",
            Self::Qcow2 => "qcow2",
        }
    }

    /// Whether `test` can run with it here. If not, the reason is said.
    pub(crate) fn can_run(self, test: &str) -> bool {
        match self {
            Self::Qcow2 => true,
            Self::Reflink => can_mount("xfs", test),
            Self::DmSnapshot => can_map(test) && can_mount("ext4", test),
            Self::Zfs => {
                let there = Path::new("/dev/zfs").exists();
                if !there {
                    skip(test, "there is no ZFS here (/dev/zfs)");
                }
                there
            }
        }
    }

    fn file_system(self) -> Option<&'static str> {
        match self {
            Self::DmSnapshot => Some("ext4"),
            Self::Reflink => Some("xfs"),
            Self::Zfs | Self::Qcow2 => None,
        }
    }
}

/// Gone when it is dropped, but for its files.
pub(crate) struct Ground {
    driver: Driver,
    directory: PathBuf,
}

impl Ground {
    /// Makes it, in files in a directory.
    pub(crate) fn make(driver: Driver, directory: &Path) -> Self {
        let ground = Self {
            driver,
            directory: directory.to_owned(),
        };
        std::fs::create_dir(ground.mount_point()).unwrap();
        if driver.file_system().is_some() || driver == Driver::Zfs {
            let file = File::create(ground.file()).unwrap();
            file.set_len(SIZE).unwrap();
        }
        if let Some(kind) = driver.file_system() {
            run(Command::new(format!("mkfs.{kind}"))
                .arg("-q")
                .arg(ground.file()));
            ground.mount();
        }
        if driver == Driver::Zfs {
            // Its own name, so that sites stand beside each other; no cache of pools for the next boot; and what is freed is
            // given back, as by a file system below.
            run(Command::new("zpool")
                .args(["create", "-m", "none", "-o", "cachefile=none"])
                .args(["-o", "autotrim=on"])
                .args(["-O", "compression=off"])
                .arg(ground.pool())
                .arg(ground.file()));
        }
        if let Some(dataset) = ground.dataset() {
            run(Command::new("zfs").args(["create", &dataset]));
        }
        ground
    }

    /// Takes up what was made before the machine was started.
    pub(crate) fn open(driver: Driver, directory: &Path) -> Self {
        let ground = Self {
            driver,
            directory: directory.to_owned(),
        };
        if driver.file_system().is_some() {
            ground.mount();
        }
        if driver == Driver::Zfs {
            run(Command::new("zpool")
                .args(["import", "-N", "-o", "cachefile=none", "-d"])
                .args([&ground.directory])
                .arg(ground.pool()));
        }
        ground
    }

    fn mount(&self) {
        // What is removed gives its blocks back, to a file that may be in memory.
        run(Command::new("mount")
            .args(["-o", "loop,discard"])
            .args([self.file(), self.mount_point()]));
    }

    fn file(&self) -> PathBuf {
        self.directory.join("ground")
    }

    fn mount_point(&self) -> PathBuf {
        self.directory.join("fs")
    }

    fn pool(&self) -> String {
        let site = self.directory.file_name().unwrap_or_default();
        format!("icebox-test{}", site.to_string_lossy())
    }

    /// The data directory on it.
    pub(crate) fn data(&self) -> PathBuf {
        self.mount_point().join("data")
    }

    /// The dataset that the daemon may use.
    pub(crate) fn dataset(&self) -> Option<String> {
        (self.driver == Driver::Zfs).then(|| format!("{}/icebox", self.pool()))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.driver.file_system().is_some() {
            quietly(Command::new("umount").arg("--lazy").arg(self.mount_point()));
        }
        if self.driver == Driver::Zfs {
            quietly(Command::new("zpool").args(["destroy", "-f", &self.pool()]));
        }
    }
}
