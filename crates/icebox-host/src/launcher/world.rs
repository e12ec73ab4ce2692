//! The file system that a VMM sees: a read-only tmpfs with the host's programs and libraries, three device nodes, and
//! the box's own files at constant paths.
//!
//! It is made in the launcher's private mount namespace, so it never appears on the host and needs no undoing.
//! There is no `/proc`, `/sys`, `/tmp` or home directory in it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Gid, Mode, Uid, chmod, chown, mknodat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};

use super::child::{Failure, Step};
use super::{BOX_DIRECTORY, Bind, Node, sys};

/// What any dynamically linked program needs. What the host does not have is left out; a symbolic link (merged /usr)
/// stays one.
const SYSTEM: [&str; 6] = [
    "/usr",
    "/lib",
    "/lib64",
    "/lib32",
    "/etc/ld.so.cache",
    "/etc/alternatives",
];

/// Devices that libraries expect. Everybody may use them.
pub(super) const COMMON_DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];

/// Enough for the empty files, directories and links of the world; there is no data in it.
const TMPFS_OPTIONS: &std::ffi::CStr = c"mode=0755,size=1m,nr_inodes=1024";

/// Moves the calling process into the world. `root` is any directory; what it held is not visible afterwards.
pub(super) fn enter(
    root: &Path,
    binds: &[Bind],
    devices: &[Node],
    uid: u32,
) -> Result<(), Failure> {
    sys::unshare_mounts().step(|| "unshare mount namespace".into())?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .step(|| "make mounts private".into())?;
    mount(
        "tmpfs",
        root,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        TMPFS_OPTIONS,
    )
    .step(|| format!("mount tmpfs on {}", root.display()))?;

    fs::create_dir_all(inside(root, Path::new(BOX_DIRECTORY)))
        .step(|| format!("create {BOX_DIRECTORY} in the box"))?;
    for path in SYSTEM {
        expose_system(root, Path::new(path)).step(|| format!("expose {path} in the box"))?;
    }
    for bind in binds {
        let target = inside(root, &bind.target);
        fs::metadata(&bind.source)
            .and_then(|meta| {
                check_access(bind, &meta, uid)?;
                expose(&bind.source, &target, &meta, bind.writable)
            })
            .step(|| format!("expose {} in the box", bind.source.display()))?;
    }
    fs::create_dir_all(root.join("dev")).step(|| "create /dev in the box".into())?;
    for path in COMMON_DEVICES {
        make_device(root, &Node::same(path), None).step(|| format!("make {path} in the box"))?;
    }
    for node in devices {
        make_device(root, node, Some(uid))
            .step(|| format!("make {} in the box", node.target.display()))?;
    }
    mount_remount(
        root,
        MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC,
        TMPFS_OPTIONS,
    )
    .step(|| "make the box's root read-only".into())?;

    // pivot_root(2): with both arguments ".", the old root ends up on top of the new one and is taken off again.
    chdir(root)
        .and_then(|()| pivot_root(".", "."))
        .and_then(|()| unmount(".", UnmountFlags::DETACH))
        .and_then(|()| chdir("/"))
        .step(|| "change root into the box".into())
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn expose_system(root: &Path, path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let target = inside(root, path);
    if meta.is_symlink() {
        symlink(fs::read_link(path)?, target)
    } else {
        expose(path, &target, &meta, false)
    }
}

/// Refuses what the VMM could not use, before it says so in its own words.
fn check_access(bind: &Bind, meta: &fs::Metadata, uid: u32) -> io::Result<()> {
    let why = match bind.writable {
        true if meta.uid() != uid => "it does not belong to the box's uid",
        false if !meta.is_dir() && meta.mode() & 0o004 == 0 => {
            "its mode keeps the box's uid from reading it; make it 0444 in a private directory"
        }
        _ => return Ok(()),
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// Binds a file or directory to a target that is made for it.
fn expose(source: &Path, target: &Path, meta: &fs::Metadata, writable: bool) -> io::Result<()> {
    if meta.is_dir() {
        fs::create_dir_all(target)?;
    } else {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::create_new(target)?;
    }
    mount_bind(source, target)?;
    mount_remount(
        target,
        if writable {
            MountFlags::BIND | MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::NODEV
        } else {
            MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV
        },
        c"",
    )?;
    Ok(())
}

/// Makes a node of the same device as the host's, for everybody or for one uid.
fn make_device(root: &Path, node: &Node, owner: Option<u32>) -> io::Result<()> {
    let meta = fs::metadata(&node.source)?;
    let kind = match meta.file_type() {
        kind if kind.is_char_device() => FileType::CharacterDevice,
        kind if kind.is_block_device() => FileType::BlockDevice,
        _ => return Err(io::Error::other("not a device")),
    };
    let path = inside(root, &node.target);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    mknodat(CWD, &path, kind, Mode::RUSR | Mode::WUSR, meta.rdev())?;
    match owner {
        // chmod, since mknod applies the umask.
        None => chmod(&path, Mode::from_raw_mode(0o666))?,
        Some(uid) => chown(&path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?,
    }
    Ok(())
}
