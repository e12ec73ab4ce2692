//! A pool: an XFS in a file, mounted as the data directory, for hosts whose file system shares no extents (ext4).
//!
//! ```text
//!   create   refuse ─> image.new: allocate, mkfs.xfs, fsync ─> rename ─> /etc/fstab ─> mount
//!   remove   refuse ─> unmount ─> /etc/fstab ─> delete the image
//! ```
//! Each step is a state that the next call finds: whatever is interrupted is finished by asking again.
//!
//! The image is allocated in full. A sparse one would take room from the host only as it fills, and on a full host the
//! writes that it then loses are metadata of a mounted file system: everything in it stops at once. For the same reason
//! nothing gives its blocks back: mkfs.xfs discards none, and the mount option keeps fstrim(8) away.
//!
//! It comes back at boot by a line in `/etc/fstab`, where administrators look for mounts and systemd makes units from. The
//! line has `nofail`, so that a host without its pool still boots; the mount point below holds a file that a daemon
//! refuses to take for a data directory, so that it does not begin an empty one there.
//!
//! Everything here blocks.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed, Space};
use icebox_engine::unit::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::fs::{self, failed};
use crate::guest_image::command::{Finished, Tool, installed};

/// Where mounts at boot are listed.
pub const FSTAB: &str = "/etc/fstab";
/// The smallest pool. XFS itself takes 300 MiB at least (mkfs.xfs(8)), and images and memories are no smaller.
pub const SIZE_MIN: Bytes = Bytes::mib(512);
/// Lies in the mount point, and is seen when nothing is mounted over it.
pub const NOT_MOUNTED: &str = "POOL-NOT-MOUNTED";
/// What stays free on the host's own file system beside the image.
const HOST_RESERVE: Bytes = Bytes::mib(256);
/// No trim: see above. No access times: nobody reads them, and a read would write.
const MOUNT_OPTIONS: &str = "loop,noatime,nodiscard,nofail,X-fstrim.notrim";

/// A pool, which may exist or not.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The data directory: where it is mounted.
    pub data: PathBuf,
    /// The file that holds it.
    pub image: PathBuf,
    /// The table of mounts at boot that names it, or is to. `None`: mounting it at boot is somebody else's.
    pub fstab: Option<PathBuf>,
}

/// What there is of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The image's length.
    pub size: Bytes,
    /// What the host stores for it. Less than its length if something has punched holes into it.
    pub allocated: Bytes,
    /// The room in it, if it is mounted.
    pub mounted: Option<Space>,
    /// Whether it comes back at boot.
    pub at_boot: bool,
}

impl Pool {
    /// The pool of a data directory: the one that is mounted there, or that `fstab` names, or the one that there would be.
    ///
    /// # Errors
    /// What is mounted cannot be read.
    pub fn of(data: &Path, fstab: &Path) -> Result<Self, HostError> {
        let by_mount = mount_at(data)?.and_then(|mount| mount.backing);
        let by_table = || {
            let lines = fstab_lines(fstab).unwrap_or_default();
            lines
                .iter()
                .filter_map(|line| entry(line))
                .find(|(_, at)| Path::new(at) == data)
                .map(|(source, _)| PathBuf::from(source))
        };
        let mut beside = data.as_os_str().to_owned();
        beside.push(".xfs");
        Ok(Self {
            data: data.to_owned(),
            image: by_mount.or_else(by_table).unwrap_or_else(|| beside.into()),
            fstab: Some(fstab.to_owned()),
        })
    }

    /// What there is of it. `None` if there is no image.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn status(&self) -> Result<Option<Status>, HostError> {
        if !fs::exists(&self.image)? {
            return Ok(None);
        }
        let mounted = match mount_at(&self.data)? {
            Some(mount) if mount.is_of(&self.image) => Some(fs::space(&self.data)?),
            _ => None,
        };
        Ok(Some(Status {
            size: Bytes(fs::length(&self.image)?),
            allocated: fs::allocated(&self.image)?,
            mounted,
            at_boot: self.is_in_table()?,
        }))
    }

    /// Makes the pool and mounts it, or finds it made and mounted. What an interrupted call left is finished.
    ///
    /// # Errors
    /// - [`ErrorKind::Unsupported`]: not as root; something needed is not installed; there is nothing to gain here.
    /// - [`ErrorKind::Invalid`]: too small.
    /// - [`ErrorKind::AlreadyExists`]: the data directory is not empty, or something else is there.
    /// - [`ErrorKind::Exhausted`]: the image does not fit.
    ///
    /// Nothing has been changed then.
    pub fn create(&self, size: Bytes) -> Result<Ensured, HostError> {
        require_root()?;
        if let Some(mount) = mount_at(&self.data)? {
            return self.found_mounted(&mount, size);
        }
        self.check(size)?;
        let made = if fs::exists(&self.image)? {
            self.require_size(size)?;
            false
        } else {
            self.make_image(size)?;
            true
        };
        let mounted = self.mount();
        if mounted.is_err() && made {
            // It holds nothing.
            fs::remove_remains(&self.image);
        }
        mounted.map(|()| Ensured::Created)
    }

    fn found_mounted(&self, mount: &Mount, size: Bytes) -> Result<Ensured, HostError> {
        if !mount.is_of(&self.image) {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!(
                    "{} is a mount point already, of {}",
                    self.data.display(),
                    mount.source
                ),
            )
            .hint("`umount` it, or use another data directory; `icebox pool ls` shows a pool"));
        }
        self.require_size(size)?;
        self.list_in_table()?;
        Ok(Ensured::AlreadyPresent)
    }

    fn require_size(&self, size: Bytes) -> Result<(), HostError> {
        let found = Bytes(fs::length(&self.image)?);
        if found == size {
            return Ok(());
        }
        Err(HostError::new(
            ErrorKind::AlreadyExists,
            format!(
                "{} exists already, with {found} instead of {size}",
                self.image.display()
            ),
        )
        .hint("a pool keeps its size: ask for the size that it has, or `icebox pool rm` it first"))
    }

    /// Everything that could be refused later is refused here, before anything is made.
    fn check(&self, size: Bytes) -> Result<(), HostError> {
        if size < SIZE_MIN {
            return Err(HostError::new(
                ErrorKind::Invalid,
                format!("a pool of {size} is too small"),
            )
            .hint(format!(
                "ask for at least {SIZE_MIN}: `--size 100G` holds a few dozen sandboxes"
            )));
        }
        if !fs::entries(&self.data)?
            .iter()
            .all(|entry| entry.file_name() == NOT_MOUNTED)
        {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!("{} is not empty: a pool would hide what is in it", self.data.display()),
            )
            .hint(format!(
                "stop the daemon, `mv {0} {0}.old`, create the pool, then `cp -a --sparse=always {0}.old/. {0}/`",
                self.data.display()
            )));
        }
        for tool in ["mkfs.xfs", "mount"] {
            if !installed(tool) {
                return Err(HostError::new(
                    ErrorKind::Unsupported,
                    format!("{tool} is not installed"),
                )
                .hint(
                    "a pool is an XFS: install its tools, on Debian with `apt install xfsprogs`",
                ));
            }
        }
        if !Path::new("/dev/loop-control").exists() {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                "there are no loop devices here (/dev/loop-control)",
            )
            .hint("`modprobe loop`; in a container, its host must offer them"));
        }
        if fs::exists(&self.image)? {
            return Ok(());
        }
        let parent = self.image_parent()?;
        if shares_extents(parent) {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                format!(
                    "the file system of {} ({}) shares extents already: a pool in it would only be slower",
                    parent.display(),
                    fs::file_system(parent)
                ),
            )
            .hint("the reflink driver works there without one"));
        }
        let space = fs::space(parent)?;
        if space.available < size + HOST_RESERVE {
            return Err(HostError::new(
                ErrorKind::Exhausted,
                format!(
                    "a pool of {size} does not fit: {} of {} are free on {}, and {HOST_RESERVE} must stay",
                    space.available, space.total, space.place
                ),
            )
            .hint("ask for less, free some space, or name a file on another file system with --path"));
        }
        Ok(())
    }

    fn image_parent(&self) -> Result<&Path, HostError> {
        let parent = self.image.parent().filter(|parent| parent.is_dir());
        parent.ok_or_else(|| {
            HostError::new(
                ErrorKind::NotFound,
                format!("the directory of {} does not exist", self.image.display()),
            )
            .hint("make it, or name another file with --path")
        })
    }

    /// Under another name until it is complete and durable.
    fn make_image(&self, size: Bytes) -> Result<(), HostError> {
        let mut unfinished = self.image.clone().into_os_string();
        unfinished.push(".new");
        let unfinished = PathBuf::from(unfinished);
        let made = self.fill_image(&unfinished, size);
        if made.is_err() {
            fs::remove_remains(&unfinished);
        }
        made?;
        fs::rename_to_new(&unfinished, &self.image)?;
        fs::sync_directory(self.image_parent()?)
    }

    fn fill_image(&self, path: &Path, size: Bytes) -> Result<(), HostError> {
        fs::remove_file(path)?;
        let file = fs::create_file(path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size.0) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => {
                return Err(HostError::new(
                    ErrorKind::Unsupported,
                    format!(
                        "the file system of {} ({}) cannot allocate a file ahead",
                        path.display(),
                        fs::file_system(path)
                    ),
                )
                .hint("name a file on another file system with --path"));
            }
            Err(error) => return Err(failed("allocate", path, error.into())),
        }
        // -K: no discard, which would give the blocks back.
        Tool::new("mkfs.xfs")
            .args(["-q", "-K", "-m", "reflink=1"])
            .arg(path)
            .run()
            .and_then(Finished::success)?;
        file.sync_all()
            .map_err(|error| failed("flush", path, error))
    }

    fn mount(&self) -> Result<(), HostError> {
        self.mark_mount_point()?;
        let listed = self.list_in_table()?;
        let mounted = Tool::new("mount")
            .args(["-t", "xfs", "-o", MOUNT_OPTIONS])
            .arg(&self.image)
            .arg(&self.data)
            .run()
            .and_then(Finished::success);
        if let Err(error) = mounted {
            if listed == Ensured::Created {
                self.strike_from_table()?;
            }
            return Err(HostError::from(error).hint(
                "`dmesg` has the kernel's reason; XFS must be in the kernel or a module of it",
            ));
        }
        std::fs::set_permissions(&self.data, std::fs::Permissions::from_mode(0o700))
            .map_err(|error| failed("set the permissions of", &self.data, error))?;
        fs::sync_directory(&self.data)
    }

    /// What a daemon finds if nothing is mounted: no data directory, and why.
    fn mark_mount_point(&self) -> Result<(), HostError> {
        std::fs::create_dir_all(&self.data)
            .map_err(|error| failed("make directory", &self.data, error))?;
        let words = format!(
            "A pool of icebox belongs here: mount {} on this directory, or remove this file if there is to be none.\n",
            self.image.display()
        );
        let mark = self.data.join(NOT_MOUNTED);
        fs::write_file(&mark, words.as_bytes())?;
        fs::sync_directory(&self.data)
    }

    /// Unmounts the pool and deletes it with everything in it.
    ///
    /// # Errors
    /// - [`ErrorKind::Busy`]: a daemon or a sandbox uses it, or it holds something and `force` is not set. Nothing has
    ///   been changed then.
    pub fn remove(&self, force: bool) -> Result<Removed, HostError> {
        require_root()?;
        let mount = mount_at(&self.data)?.filter(|mount| mount.is_of(&self.image));
        if mount.is_some() {
            self.require_unused(force)?;
            rustix::mount::unmount(&self.data, rustix::mount::UnmountFlags::empty()).map_err(
                |error| {
                    let failure = failed("unmount", &self.data, error.into());
                    match error {
                        Errno::BUSY => failure
                            .hint("something in it is in use: `fuser -vm` on it says by whom"),
                        _ => failure,
                    }
                },
            )?;
        }
        let struck = self.strike_from_table()?;
        let marked = fs::remove_file(&self.data.join(NOT_MOUNTED))?;
        let deleted = fs::remove_file(&self.image)?;
        if deleted == Removed::Removed {
            fs::sync_directory(self.image_parent()?)?;
        }
        Ok(match (mount, struck, marked, deleted) {
            (None, Removed::AlreadyAbsent, Removed::AlreadyAbsent, Removed::AlreadyAbsent) => {
                Removed::AlreadyAbsent
            }
            _ => Removed::Removed,
        })
    }

    fn require_unused(&self, force: bool) -> Result<(), HostError> {
        let lock = self.data.join("lock");
        if let Ok(file) = File::open(&lock)
            && matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock))
        {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("a daemon uses {}", self.data.display()),
            )
            .hint("`icebox rm` its sandboxes and stop it first"));
        }
        let count = |area: &str| fs::entries(&self.data.join(area)).map(|found| found.len());
        let (sandboxes, templates) = (count("sandboxes")?, count("templates")?);
        if !force && sandboxes + templates > 0 {
            return Err(HostError::new(
                ErrorKind::Busy,
                format!(
                    "{} holds {sandboxes} sandboxes and {templates} templates, which would go with it",
                    self.data.display()
                ),
            )
            .hint("remove them, or say --force"));
        }
        Ok(())
    }

    // The table of mounts at boot.

    fn is_in_table(&self) -> Result<bool, HostError> {
        let Some(fstab) = &self.fstab else {
            return Ok(false);
        };
        let lines = fstab_lines(fstab)?;
        Ok(lines.iter().any(|line| self.is_our_line(line)))
    }

    fn is_our_line(&self, line: &str) -> bool {
        entry(line).is_some_and(|(source, at)| {
            Path::new(&source) == self.image && Path::new(&at) == self.data
        })
    }

    /// The line that mounts the pool at boot.
    #[must_use]
    pub fn table_line(&self) -> String {
        format!(
            "{} {} xfs {MOUNT_OPTIONS} 0 0",
            escaped(&self.image),
            escaped(&self.data)
        )
    }

    fn list_in_table(&self) -> Result<Ensured, HostError> {
        let Some(fstab) = &self.fstab else {
            return Ok(Ensured::AlreadyPresent);
        };
        let mut lines = fstab_lines(fstab)?;
        if lines.iter().any(|line| self.is_our_line(line)) {
            return Ok(Ensured::AlreadyPresent);
        }
        let taken = lines
            .iter()
            .filter_map(|line| entry(line))
            .find(|(_, at)| Path::new(at) == self.data);
        if let Some((source, _)) = taken {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!(
                    "{} has another mount on {}: {source}",
                    fstab.display(),
                    self.data.display()
                ),
            )
            .hint("remove that line, or say --no-fstab and see to the mount at boot yourself"));
        }
        lines.push(self.table_line());
        replace_lines(fstab, &lines)?;
        Ok(Ensured::Created)
    }

    fn strike_from_table(&self) -> Result<Removed, HostError> {
        let Some(fstab) = &self.fstab else {
            return Ok(Removed::AlreadyAbsent);
        };
        let mut lines = fstab_lines(fstab)?;
        let before = lines.len();
        lines.retain(|line| !self.is_our_line(line));
        if lines.len() == before {
            return Ok(Removed::AlreadyAbsent);
        }
        replace_lines(fstab, &lines)?;
        Ok(Removed::Removed)
    }
}

fn require_root() -> Result<(), HostError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(
        HostError::new(ErrorKind::Unsupported, "only root can mount a pool")
            .hint("run it with sudo"),
    )
}

fn shares_extents(directory: &Path) -> bool {
    let shared = || -> std::io::Result<()> {
        let (mut from, to) = (
            tempfile::tempfile_in(directory)?,
            tempfile::tempfile_in(directory)?,
        );
        from.write_all(&[1; 4096])?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from)?)
    };
    shared().is_ok()
}

/// What is mounted on a directory.
#[derive(Debug)]
struct Mount {
    /// As the kernel names it.
    source: String,
    /// The file of the loop device, if it is one.
    backing: Option<PathBuf>,
}

impl Mount {
    fn is_of(&self, image: &Path) -> bool {
        let same = |backing: &PathBuf| {
            let number = |path: &Path| std::fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
            number(backing).is_some() && number(backing) == number(image)
        };
        self.backing.as_ref().is_some_and(same)
    }
}

/// What is mounted on `directory`, the newest if several are: proc_pid_mountinfo(5).
fn mount_at(directory: &Path) -> Result<Option<Mount>, HostError> {
    const TABLE: &str = "/proc/self/mountinfo";
    let Ok(directory) = directory.canonicalize() else {
        return Ok(None);
    };
    let mounts =
        std::fs::read_to_string(TABLE).map_err(|error| failed("read", Path::new(TABLE), error))?;
    let found = mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let at = unescaped(fields.nth(1)?);
        let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
        (Path::new(&at) == directory).then(|| Mount {
            source: unescaped(source),
            backing: std::fs::read_to_string(format!("/sys/dev/block/{device}/loop/backing_file"))
                .ok()
                .map(|path| PathBuf::from(path.trim_end_matches('\n'))),
        })
    });
    Ok(found)
}

fn fstab_lines(fstab: &Path) -> Result<Vec<String>, HostError> {
    match std::fs::read_to_string(fstab) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("read", fstab, error)),
    }
}

/// Source and mount point of a line of fstab(5). `None` for a comment.
fn entry(line: &str) -> Option<(String, String)> {
    let mut fields = line.split_whitespace();
    let source = fields.next().filter(|source| !source.starts_with('#'))?;
    Some((unescaped(source), unescaped(fields.next()?)))
}

/// By one atomic rename, with the permissions that the table had.
fn replace_lines(fstab: &Path, lines: &[String]) -> Result<(), HostError> {
    let directory = fstab.parent().unwrap_or(Path::new("/"));
    let cannot = |error| failed("replace", fstab, error);
    let mode = match std::fs::metadata(fstab) {
        Ok(metadata) => metadata.permissions(),
        Err(_) => std::fs::Permissions::from_mode(0o644),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".fstab-")
        .tempfile_in(directory)
        .map_err(cannot)?;
    let written = lines
        .iter()
        .try_for_each(|line| writeln!(file, "{line}"))
        .and_then(|()| file.as_file().set_permissions(mode))
        .and_then(|()| file.as_file().sync_all());
    written.map_err(cannot)?;
    file.persist(fstab).map_err(|error| cannot(error.error))?;
    fs::sync_directory(directory)
}

/// A path as a field of fstab(5).
fn escaped(path: &Path) -> String {
    path.to_string_lossy()
        .replace('\\', "\\134")
        .replace(' ', "\\040")
        .replace('\t', "\\011")
        .replace('\n', "\\012")
}

fn unescaped(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(directory: &Path) -> Pool {
        Pool {
            data: directory.join("da ta"),
            image: directory.join("da ta.xfs"),
            fstab: Some(directory.join("fstab")),
        }
    }

    #[test]
    fn the_table_of_mounts_gets_one_line_and_loses_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let pool = pool(directory.path());
        let fstab = directory.path().join("fstab");
        let before = "# a comment /x /y\nUUID=1 / ext4 defaults 0 1\n";
        std::fs::write(&fstab, before).unwrap();
        assert_eq!(pool.list_in_table().unwrap(), Ensured::Created);
        assert_eq!(pool.list_in_table().unwrap(), Ensured::AlreadyPresent);
        let text = std::fs::read_to_string(&fstab).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.starts_with(before) && text.contains("da\\040ta.xfs"));
        assert!(pool.is_in_table().unwrap());
        let mode = std::fs::metadata(&fstab).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(pool.strike_from_table().unwrap(), Removed::Removed);
        assert_eq!(pool.strike_from_table().unwrap(), Removed::AlreadyAbsent);
        assert_eq!(std::fs::read_to_string(&fstab).unwrap(), before);
    }

    #[test]
    fn a_mount_of_somebody_else_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let pool = pool(directory.path());
        let fstab = directory.path().join("fstab");
        let taken = format!("/dev/sdb1 {} ext4 defaults 0 2\n", escaped(&pool.data));
        std::fs::write(&fstab, &taken).unwrap();
        let error = pool.list_in_table().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert!(error.hint_text().is_some());
        assert_eq!(std::fs::read_to_string(&fstab).unwrap(), taken);
    }
}
