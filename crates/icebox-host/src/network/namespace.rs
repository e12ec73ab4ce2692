//! Network namespaces: made without a name, given one when they are in use.
//!
//! A namespace lives as long as a descriptor, a mount or a process refers to it. Ours begin as a descriptor of the
//! daemon only; what a daemon killed at that point had prepared, the kernel removes. *Publishing* binds it to a
//! path, in the way of ip-netns(8), and from then on it outlives the daemon.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::fs::statfs;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::sys;

/// `NSFS_MAGIC` of linux/magic.h: the filesystem type of a published namespace.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// How many mounts may be stacked on one path before we call it a failure: ours makes one.
const UNMOUNT_LIMIT: usize = 8;

/// A network namespace, held open.
#[derive(Debug)]
pub(super) struct Namespace(OwnedFd);

impl Namespace {
    /// Makes a namespace and runs `prepare` inside it, on a thread of its own. If that fails, nothing remains.
    pub(super) fn create<T: Send, E: From<io::Error> + Send>(
        prepare: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<(Self, T), E> {
        on_own_thread(|| {
            sys::unshare_network()?;
            let namespace = Self(File::open("/proc/thread-self/ns/net")?.into());
            Ok((namespace, prepare()?))
        })
    }

    /// The namespace published at `path`, if there is one. A path that is a plain file (left by a crash between
    /// creating and binding it) is not a namespace.
    pub(super) fn open(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let is_namespace = rustix::fs::fstatfs(&file)?.f_type == NSFS_MAGIC;
        Ok(is_namespace.then(|| Self(file.into())))
    }

    /// Runs `work` inside the namespace, on a thread of its own: the caller's thread never changes namespace, so
    /// nothing can leave it in the wrong one.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        on_own_thread(|| {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }

    /// Binds the namespace to `path`. Fails with `EEXIST` semantics only if another namespace is there already.
    pub(super) fn publish(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        if statfs(path)?.f_type == NSFS_MAGIC {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let own = format!("/proc/thread-self/fd/{}", self.0.as_raw_fd());
        mount_bind(own, path)?;
        Ok(())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Ensures that nothing is bound to `path`. Says whether something was.
pub(super) fn unbind(path: &Path) -> io::Result<bool> {
    let mut was_bound = false;
    for _ in 0..UNMOUNT_LIMIT {
        // Detached, since somebody may be looking at it (`ip netns exec`); unlinking the file then removes it from
        // other mount namespaces too.
        match unmount(path, UnmountFlags::DETACH) {
            Ok(()) => was_bound = true,
            Err(Errno::INVAL | Errno::NOENT) => return Ok(was_bound),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other(format!(
        "more than {UNMOUNT_LIMIT} mounts are stacked on it"
    )))
}

/// Ensures that there is no file at `path`. Says whether there was. One that a namespace is bound to stays and is busy.
pub(super) fn unlink(path: &Path) -> io::Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            if statfs(path)?.f_type == NSFS_MAGIC {
                return Err(error);
            }
            unlink_covered(path)
        }
        Err(error) => Err(error),
    }
}

/// Unlinks a file that has a namespace bound to it where no path leads: the first `ip netns add` of anybody binds the
/// directory over itself, with all that is in it, and so covers what is bound already.
///
/// A file can be unlinked where nothing is mounted on it, and then it goes everywhere (rename(2) and unlink(2) of
/// mount points, since Linux 3.18). Such a place is a copy of the mounts, of this thread's own, with the cover taken off.
fn unlink_covered(path: &Path) -> io::Result<bool> {
    on_own_thread(|| {
        sys::unshare_mounts()?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
        for _ in 0..UNMOUNT_LIMIT {
            unbind(path)?;
            match std::fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let directory = path.parent().unwrap_or(path);
                    unmount(directory, UnmountFlags::DETACH)?;
                }
                done => return done.map(|()| true),
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    })
}

fn on_own_thread<T: Send, E: From<io::Error> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("icebox-netns".into())
            .spawn_scoped(scope, work)?;
        match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
