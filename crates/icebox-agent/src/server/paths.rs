//! Paths as clients write them, and with whose rights they are followed.
//!
//! Whoever may call may reach every path of the guest: that is E2B's contract, and so the agent acts as root and gives
//! what it makes to the user that the call names. But what a path *leads to* is not only the caller's to say: any process
//! of the guest can put a symbolic link into a directory of its own, and a write that followed it with root's rights
//! would change, and give away, a file of root's. So where something is changed, root's rights go as far as a path is
//! spelled. Where a link comes in between, the user's own rights have to do.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags},
    io::Errno,
    process::{Gid, Uid},
};

use super::state::Agent;
use crate::users::User;

/// Makes a path absolute: `~` is the user's home, a relative path begins at the working directory, `.` and `..` are
/// resolved by name.
pub(super) fn resolve(agent: &Agent, user: &User, path: &str) -> PathBuf {
    let path = match path.strip_prefix('~') {
        Some("") => user.home.clone(),
        Some(rest) if rest.starts_with('/') => user.home.join(rest.trim_start_matches('/')),
        _ => agent.workdir(user).join(path),
    };
    normalise(&path)
}

fn normalise(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                normal.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}

/// Does something to a path as it is spelled, with root's rights, or where a link is in the way (`ELOOP`) as `user`, who
/// may follow it. Links are root's to follow when root is asked for. Blocks.
pub(super) fn spelled_or_as<T: Send>(
    user: &User,
    spelled: impl FnOnce() -> io::Result<T>,
    followed: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    if user.uid == 0 {
        return followed();
    }
    match spelled() {
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            user.act(followed)
        }
        result => result,
    }
}

/// A name in a directory that was reached without following a link.
pub(super) struct Anchored {
    directory: OwnedFd,
    name: OsString,
}

impl Anchored {
    /// Opens the directory that `path` names something in. With an `owner`, directories that are missing are made, and
    /// are theirs. Blocks.
    ///
    /// # Errors
    /// `ELOOP` where a link is in the way.
    pub(super) fn open(path: &Path, owner: Option<&User>) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut directory = rustix::fs::openat(CWD, "/", DIRECTORY, Mode::empty())?;
        for component in parent.components() {
            if let Component::Normal(name) = component {
                directory = enter(&directory, name, owner)?;
            }
        }
        Ok(Self {
            directory,
            name: name.to_owned(),
        })
    }

    /// A path for it, which leads through the directory that was opened. The name itself is not looked at yet: it may be
    /// a link.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(&self.name)
    }

    /// Makes it a directory of `owner`'s. Blocks.
    pub(super) fn make_dir(&self, owner: &User) -> io::Result<()> {
        make_dir(&self.directory, &self.name, owner).map(drop)
    }
}

/// How a directory is opened on the way: to go through, and only if it is one.
const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn enter(directory: &OwnedFd, name: &OsStr, owner: Option<&User>) -> io::Result<OwnedFd> {
    match (
        rustix::fs::openat(directory, name, DIRECTORY, Mode::empty()),
        owner,
    ) {
        (Err(Errno::NOTDIR), _) => {
            let there = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            Err(match FileType::from_raw_mode(there.st_mode) {
                FileType::Symlink => Errno::LOOP.into(),
                _ => Errno::NOTDIR.into(),
            })
        }
        (Err(Errno::NOENT), Some(owner)) => match make_dir(directory, name, owner) {
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                enter(directory, name, None)
            }
            made => made,
        },
        (opened, _) => Ok(opened?),
    }
}

fn make_dir(directory: &OwnedFd, name: &OsStr, owner: &User) -> io::Result<OwnedFd> {
    rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o777))?;
    let made = rustix::fs::openat(directory, name, DIRECTORY, Mode::empty())?;
    rustix::fs::chownat(
        &made,
        "",
        Some(Uid::from_raw(owner.uid)),
        Some(Gid::from_raw(owner.gid)),
        AtFlags::EMPTY_PATH,
    )?;
    Ok(made)
}

/// Creates a directory and what is missing above it, owned by `user`, whose rights this is called with. Blocks.
pub(super) fn create_dirs(path: &Path, user: &User) -> io::Result<()> {
    match fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
            return Ok(());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().ok_or(error)?;
            create_dirs(parent, user)?;
            match fs::create_dir(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
                    return Ok(());
                }
                result => result?,
            }
        }
        Err(error) => return Err(error),
    }
    Ok(rustix::fs::chown(
        path,
        Some(Uid::from_raw(user.uid)),
        Some(Gid::from_raw(user.gid)),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_are_resolved_by_name() {
        for (given, expected) in [
            ("/a/./b/../c/", "/a/c"),
            ("/../..", "/"),
            ("a", "/a"),
            ("/", "/"),
        ] {
            assert_eq!(normalise(Path::new(given)), Path::new(expected));
        }
    }
}
