//! Where a case happens: a directory in memory, with a store, a volume driver, and a world for the rest.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use icebox_engine::host::{Host, VolumeDriver};
use icebox_engine::layout::Layout;
use icebox_engine::unit::Bytes;
use icebox_host::store::FileStore;
use icebox_host::volume::{Qcow2, Reflink};
use icebox_sim::{FreezeBy, World};
use tempfile::TempDir;

use crate::guest::Guests;
use crate::mounts::can_mount;

/// Set in the process that runs inside the private mount namespace; names a directory on XFS.
const INSIDE: &str = "ICEBOX_TEST_XFS";

/// The least that mkfs.xfs takes, and a little.
const XFS_SIZE: u64 = 320 << 20;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Driver {
    Qcow2,
    Reflink,
}

pub(crate) struct Place {
    driver: Driver,
    directory: TempDir,
    layout: Layout,
    /// Networks, boxes and kernels.
    world: World,
    pub(crate) guests: Guests,
}

impl Place {
    pub(crate) fn new(driver: Driver) -> Self {
        let parent = match driver {
            Driver::Qcow2 => memory(),
            Driver::Reflink => std::env::var(INSIDE).unwrap().into(),
        };
        let directory = tempfile::tempdir_in(parent).unwrap();
        let layout = Layout::new(directory.path().join("data"), directory.path().join("run"));
        Self {
            driver,
            directory,
            layout,
            world: World::new(),
            guests: Guests::default(),
        }
    }

    /// A host with one volume driver. Owns the data directory until it is dropped.
    pub(crate) fn host(&self) -> Host {
        let volumes: Arc<dyn VolumeDriver> = match self.driver {
            Driver::Qcow2 => Arc::new(Qcow2::new(self.layout.clone())),
            Driver::Reflink => Arc::new(Reflink::new(self.layout.clone())),
        };
        Host {
            store: Arc::new(FileStore::open(self.layout.clone()).unwrap()),
            volumes: vec![volumes],
            vmms: vec![Arc::new(self.guests.clone())],
            guest: Arc::new(self.guests.clone()),
            ..self.world.host(FreezeBy::Host)
        }
    }

    /// A new raw image of 1 MiB on the store's file system, whose guest wrote 1.
    pub(crate) fn image(&self) -> PathBuf {
        let path = self.directory.path().join("image");
        let file = fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&1_u64.to_be_bytes(), 0).unwrap();
        path
    }

    /// Everything that a start must not change again.
    pub(crate) fn picture(&self) -> Vec<String> {
        let mut picture = self.world.in_use();
        picture.extend(self.guests.list());
        walk(self.layout.data(), &mut |path| {
            let manifest = path
                .extension()
                .is_some_and(|extension| extension == "json");
            let content = if manifest {
                fs::read_to_string(path).unwrap()
            } else {
                String::new()
            };
            picture.push(format!("{} {content}", path.display()));
        });
        picture.sort();
        picture
    }

    /// Nothing is left but the store itself.
    pub(crate) fn assert_empty(&self) {
        assert_eq!(self.world.in_use(), Vec::<String>::new());
        assert_eq!(self.guests.list(), Vec::<String>::new());
        let mut left = Vec::new();
        walk(self.layout.data(), &mut |path| left.push(path.to_owned()));
        left.retain(|path| ![self.layout.format_file(), self.layout.lock_file()].contains(path));
        left.retain(|path| path.parent() != Some(self.layout.data()));
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

/// A directory in memory, or the usual one where memory is scarce (containers have 64 MiB there).
fn memory() -> PathBuf {
    let shm = Path::new("/dev/shm");
    match icebox_host::fs::space(shm) {
        Ok(space) if space.available >= Bytes(XFS_SIZE) => shm.to_owned(),
        _ => std::env::temp_dir(),
    }
}

fn walk(directory: &Path, each: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        each(&path);
        if path.is_dir() {
            walk(&path, each);
        }
    }
}

fn tool(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// Runs `work` in a process of its own, with an XFS that nobody else sees.
pub(crate) fn in_private_mounts(test: &str, work: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return work();
    }
    if !can_mount("xfs", test) {
        return;
    }
    let directory = tempfile::tempdir_in(memory()).unwrap();
    let (image, mount) = (
        directory.path().join("image"),
        directory.path().join("mount"),
    );
    fs::create_dir(&mount).unwrap();
    fs::File::create(&image).unwrap().set_len(XFS_SIZE).unwrap();
    tool(Command::new("mkfs.xfs").arg("-q").arg(&image));
    // The shell stays, so that the file system is unmounted before the loop device is looked for.
    tool(
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-euc"])
            .arg(r#"mount -o loop "$1" "$2"; "$3" "$4" --exact --nocapture; umount "$2""#)
            .arg("sh")
            .args([&image, &mount])
            .arg(std::env::current_exe().unwrap())
            .arg(test)
            .env(INSIDE, &mount),
    );
}
