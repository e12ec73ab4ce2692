//! Paths as clients write them.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use rustix::process::{Gid, Uid};

use super::state::Agent;
use crate::users::User;

/// Makes a path absolute: `~` is the user's home, a relative path begins at the working directory, `.` and `..` are
/// resolved by name. Nothing is escaped from: whoever may call may reach every path of the guest.
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

/// Creates a directory and what is missing above it, owned by `user`. Blocks.
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
