//! Changes below a directory, as the kernel reports them (inotify(7)).
//!
//! inotify watches one directory each. A recursive watcher adds one for every directory below and for those that
//! appear; what was put into a new directory before its watch was there is found by looking, and told as created.
//! Something created at that very moment may be told twice; nothing is told never.

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use icebox_agent_api::proto::filesystem::EventType;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Room for some hundred events of the kernel at a time.
const BUFFER_BYTES: usize = 16 << 10;
/// Changes that wait for a client; more are a client that forgot its watcher.
const MAX_PENDING: usize = 1 << 16;

/// Filesystems that other machines change without this kernel knowing: NFS, SMB, CIFS, SMB2 and FUSE by their numbers in
/// linux/magic.h.
const NETWORK_FILESYSTEMS: [u64; 5] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546];

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Relative to the watched directory.
    pub(super) name: PathBuf,
    pub(super) kind: EventType,
}

/// Watches one directory, or a whole tree.
pub(super) struct Watcher {
    inotify: Arc<AsyncFd<OwnedFd>>,
    root: PathBuf,
    recursive: bool,
    /// Watched directories, relative to the root, by the kernel's number for them.
    directories: HashMap<i32, PathBuf>,
    pending: VecDeque<Change>,
    lost: bool,
}

/// Changes came faster than they were fetched, and some are gone.
#[derive(Debug, thiserror::Error)]
#[error("changes came faster than they were fetched: some are lost")]
pub(super) struct Lost;

/// Whether changes of the filesystem at `path` can come from elsewhere. Blocks.
pub(super) fn is_on_network(path: &Path) -> io::Result<bool> {
    let number = u64::try_from(rustix::fs::statfs(path)?.f_type).unwrap_or(0);
    Ok(NETWORK_FILESYSTEMS.contains(&(number & 0xffff_ffff)))
}

impl Watcher {
    /// Starts to watch. Blocks for as long as it takes to walk the tree.
    pub(super) fn start(root: &Path, recursive: bool) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut watcher = Self {
            inotify: Arc::new(sys::watch(inotify)?),
            root: root.to_owned(),
            recursive,
            directories: HashMap::new(),
            pending: VecDeque::new(),
            lost: false,
        };
        watcher.add(Path::new(""), false)?;
        Ok(watcher)
    }

    /// What to wait on, while others have the watcher.
    pub(super) fn readiness(&self) -> Readiness {
        Readiness(self.inotify.clone())
    }

    /// Moves what the kernel has for us to the pending changes. Blocks where directories appeared.
    pub(super) fn collect(&mut self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut events = Vec::new();
        {
            let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let name = event
                            .file_name()
                            .map(|name| Path::new(os_str(name.to_bytes())).to_owned());
                        events.push((event.wd(), event.events(), name));
                    }
                    Err(Errno::AGAIN) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        for (watch, flags, name) in events {
            self.take(watch, flags, name.as_deref())?;
        }
        Ok(())
    }

    /// The pending changes.
    pub(super) fn fetch(&mut self) -> Result<VecDeque<Change>, Lost> {
        let pending = std::mem::take(&mut self.pending);
        if std::mem::take(&mut self.lost) {
            Err(Lost)
        } else {
            Ok(pending)
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn take(&mut self, watch: i32, flags: ReadFlags, name: Option<&Path>) -> io::Result<()> {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.lost = true;
            return Ok(());
        }
        if flags.contains(ReadFlags::IGNORED) {
            self.directories.remove(&watch);
            return Ok(());
        }
        // What a directory does to itself, its parent tells by name; a removed root tells by silence.
        let (Some(directory), Some(name)) = (self.directories.get(&watch), name) else {
            return Ok(());
        };
        let name = directory.join(name);
        for (flag, kind) in [
            (
                ReadFlags::CREATE | ReadFlags::MOVED_TO,
                EventType::EVENT_TYPE_CREATE,
            ),
            (ReadFlags::MODIFY, EventType::EVENT_TYPE_WRITE),
            (ReadFlags::ATTRIB, EventType::EVENT_TYPE_CHMOD),
            (ReadFlags::DELETE, EventType::EVENT_TYPE_REMOVE),
            (ReadFlags::MOVED_FROM, EventType::EVENT_TYPE_RENAME),
        ] {
            if flags.intersects(flag) {
                self.push(Change {
                    name: name.clone(),
                    kind,
                });
            }
        }
        let appeared = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
        if self.recursive && appeared && flags.contains(ReadFlags::ISDIR) {
            match self.add(&name, true) {
                // It went away again.
                Err(error) if is_gone(&error) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn push(&mut self, change: Change) {
        if self.pending.len() == MAX_PENDING {
            self.pending.pop_front();
            self.lost = true;
        }
        self.pending.push_back(change);
    }

    /// Watches a directory and, if asked to, those below. `new` tells what is found in it as created.
    fn add(&mut self, directory: &Path, new: bool) -> io::Result<()> {
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::ONLYDIR;
        let path = self.root.join(directory);
        // The root may be a link; below it, links are not followed.
        let flags = if directory.as_os_str().is_empty() {
            flags
        } else {
            flags | WatchFlags::DONT_FOLLOW
        };
        let watch = inotify::add_watch(self.inotify.get_ref(), &path, flags)?;
        self.directories.insert(watch, directory.to_owned());
        if !self.recursive {
            return Ok(());
        }
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let name = directory.join(entry.file_name());
            if new {
                self.push(Change {
                    name: name.clone(),
                    kind: EventType::EVENT_TYPE_CREATE,
                });
            }
            if entry.file_type()?.is_dir() {
                match self.add(&name, new) {
                    Err(error) if is_gone(&error) => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }
}

/// Tells that a watcher has something to collect.
#[derive(Clone)]
pub(super) struct Readiness(Arc<AsyncFd<OwnedFd>>);

impl Readiness {
    /// Waits until the watcher may have something to collect. Cancel-safe.
    pub(super) async fn changed(&self) -> io::Result<()> {
        // What comes from here on makes it ready again, collected or not.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

fn os_str(bytes: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(watcher: &mut Watcher) -> Vec<(String, EventType)> {
        watcher.collect().unwrap();
        let changes = watcher.fetch().unwrap();
        changes
            .into_iter()
            .map(|change| (change.name.display().to_string(), change.kind))
            .collect()
    }

    #[tokio::test]
    async fn changes_are_there_as_soon_as_they_are_made() {
        use EventType::*;
        let root = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::start(root.path(), false).unwrap();
        let file = root.path().join("f");
        fs::write(&file, "x").unwrap();
        let own = |kinds: &[EventType]| {
            kinds
                .iter()
                .map(|kind| ("f".to_owned(), *kind))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(&mut watcher),
            own(&[EVENT_TYPE_CREATE, EVENT_TYPE_WRITE])
        );
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        assert_eq!(names(&mut watcher), own(&[EVENT_TYPE_CHMOD]));
        fs::rename(&file, root.path().join("g")).unwrap();
        let moved = [
            ("f".to_owned(), EVENT_TYPE_RENAME),
            ("g".to_owned(), EVENT_TYPE_CREATE),
        ];
        assert_eq!(names(&mut watcher), moved);
        fs::remove_file(root.path().join("g")).unwrap();
        assert_eq!(names(&mut watcher), [("g".to_owned(), EVENT_TYPE_REMOVE)]);
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/below"), "").unwrap();
        assert_eq!(names(&mut watcher), [("d".to_owned(), EVENT_TYPE_CREATE)]);
    }

    #[tokio::test]
    async fn a_recursive_watcher_follows_new_directories() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("old/er")).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("old/link")).unwrap();
        let mut watcher = Watcher::start(root.path(), true).unwrap();
        fs::write(root.path().join("old/er/f"), "").unwrap();
        assert_eq!(
            names(&mut watcher),
            [("old/er/f".to_owned(), EventType::EVENT_TYPE_CREATE)]
        );
        fs::create_dir_all(root.path().join("new/er")).unwrap();
        fs::write(root.path().join("new/er/f"), "").unwrap();
        let found = names(&mut watcher);
        for name in ["new", "new/er", "new/er/f"] {
            assert!(
                found.contains(&(name.to_owned(), EventType::EVENT_TYPE_CREATE)),
                "{name}: {found:?}"
            );
        }
        fs::write(root.path().join("new/er/g"), "").unwrap();
        assert!(
            names(&mut watcher).contains(&("new/er/g".to_owned(), EventType::EVENT_TYPE_CREATE))
        );
        fs::remove_dir_all(root.path().join("new")).unwrap();
        names(&mut watcher);
        assert_eq!(watcher.directories.len(), 3);
    }
}
