//! Where the daemon is reached.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::failure::Failure;

/// The socket's file, removed when the daemon leaves, unless it is another daemon's by then.
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Tells a file from a later one of the same name. Its inode's number alone does not: it is soon used again.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    inode: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let file = std::fs::symlink_metadata(path)?;
        Ok(Self {
            inode: file.ino(),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = Identity::of(&self.path).is_ok_and(|there| there == self.identity);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "the socket's file stays");
        }
    }
}

/// Listens on a Unix socket that only this user may open. A file that a dead daemon left is removed.
///
/// # Errors
/// Another daemon serves there, or something that is no socket is in the way.
pub(super) async fn unix(path: &Path) -> Result<(UnixListener, SocketFile), Failure> {
    let cannot = |error: &io::Error| {
        let failure = Failure::because(format!("cannot listen on {}", path.display()), error);
        match error.kind() {
            io::ErrorKind::PermissionDenied => failure.hint(
                "that place is another user's: run the daemon with sudo, or name a socket of your own with --socket",
            ),
            _ => failure,
        }
    };
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| cannot(&error))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(Failure::new(format!(
                "cannot listen on {}: a file that is no socket is in the way",
                path.display()
            ))
            .hint("remove it, or name another socket with --socket"));
        }
        Ok(_) => match UnixStream::connect(path).await {
            Ok(other) => {
                let pid = other.peer_cred().ok().and_then(|peer| peer.pid());
                let who = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                return Err(Failure::new(format!(
                    "a daemon serves on {} already{who}",
                    path.display()
                ))
                .hint("stop that one first, or name another socket with --socket and another --data-dir"));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(|error| cannot(&error))?;
            }
            Err(error) => return Err(cannot(&error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(cannot(&error)),
    }
    // The mode must be right from the first instant: whoever may open the socket may do everything.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => cannot(&error).hint("a socket's path has at most 107 bytes"),
        _ => cannot(&error),
    })?;
    let identity = Identity::of(path).map_err(|error| cannot(&error))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity,
    };
    Ok((listener, file))
}

/// Listens on TCP.
///
/// # Errors
/// The port is in use, or the address is not this host's.
pub(super) async fn tcp(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        let failure = Failure::because(format!("cannot listen on {address}"), &error);
        match error.kind() {
            io::ErrorKind::AddrInUse => failure.hint(
                "another program has the port: choose another with --listen, or end that one",
            ),
            io::ErrorKind::AddrNotAvailable => {
                failure.hint("the address is none of this host's: `ip address` shows those")
            }
            io::ErrorKind::PermissionDenied => failure.hint("ports below 1024 need root"),
            _ => failure,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_removed_in_the_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/socket");
        let (_listener, file) = unix(&path).await.expect("it is free");
        let mode = std::fs::metadata(&path)
            .expect("the socket")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let (listener, file) = unix(&path).await.expect("it is free");
        let refused = unix(&path).await.map(drop).expect_err("it is in use");
        assert!(
            refused.body().message.contains("already (pid "),
            "{refused:?}"
        );
        assert!(path.exists(), "the live one stays");
        drop(listener);
        let (_listener, _file) = unix(&path).await.expect("nobody listens any more");
        drop(file);
        assert!(path.exists(), "it is another daemon's by now");
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "x").expect("write");
        assert!(unix(&plain).await.is_err());
        assert!(plain.exists());
    }

    #[tokio::test]
    async fn a_port_in_use_says_so() {
        let first = tcp("127.0.0.1:0".parse().expect("an address"))
            .await
            .expect("free");
        let address = first.local_addr().expect("an address");
        let refused = tcp(address).await.expect_err("in use");
        assert!(refused.body().hint.is_some());
    }
}
