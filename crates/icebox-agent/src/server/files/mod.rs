//! `/files`: the bytes of files, down and up.
//!
//! Nothing is held in memory but what is on its way: a thread that may block on the disk and a connection that may
//! block on the network hand each other pieces through a short queue. What is served or overwritten is a regular
//! file, always: a device or a pipe is never even opened, since opening one can have effects of its own.

mod download;
mod range;
mod signature;
mod upload;

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use axum::http::{HeaderMap, StatusCode};
use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use serde::Deserialize;

pub(super) use self::{download::download, upload::upload};
use super::{auth::presented_token, error::HttpError, paths, state::Agent};
use crate::users::User;

/// Size of one piece, and how many wait for the slower side.
const CHUNK: usize = 64 << 10;
const QUEUE: usize = 4;

/// What the query says.
#[derive(Debug, Default, Deserialize)]
pub(super) struct FileQuery {
    path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    /// Seconds since 1970.
    signature_expiration: Option<i64>,
}

/// What is being done with a file; part of what a signature signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
}

/// Lets a request through that carries the token, a signature of its own, or reaches an open sandbox.
fn authorise(
    agent: &Agent,
    headers: &HeaderMap,
    query: &FileQuery,
    operation: Operation,
) -> Result<(), HttpError> {
    if agent.allows_access(presented_token(headers)) {
        return Ok(());
    }
    let token = agent.access_token();
    signature::check(token.as_ref(), query, operation)
        .map_err(|refusal| HttpError::unauthorized(refusal.to_string()))
}

/// Whose file it is: the user of the query, else of the request, else of the sandbox.
fn owner(agent: &Agent, headers: &HeaderMap, query: &FileQuery) -> Result<User, HttpError> {
    let user = match query.username.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => User::find(name),
        None => super::auth::acting_user(agent, headers),
    };
    user.map_err(|unknown| HttpError::unauthorized(unknown.to_string()))
}

fn resolve(agent: &Agent, user: &User, path: &str) -> Result<PathBuf, HttpError> {
    if path.contains('\0') {
        return Err(HttpError::bad_request("the path contains a zero byte"));
    }
    Ok(paths::resolve(agent, user, path))
}

/// Finds the regular file at `path` without opening it. Blocks.
fn locate(path: &Path) -> Result<OwnedFd, HttpError> {
    let handle =
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
            match errno {
                Errno::NOENT => HttpError::new(
                    StatusCode::NOT_FOUND,
                    format!("path '{}' does not exist", path.display()),
                ),
                errno => HttpError::io(
                    &format!("failed to open '{}'", path.display()),
                    &errno.into(),
                ),
            }
        })?;
    let status = rustix::fs::fstat(&handle).map_err(|errno| {
        HttpError::io(
            &format!("failed to inspect '{}'", path.display()),
            &errno.into(),
        )
    })?;
    require_regular(FileType::from_raw_mode(status.st_mode), path)?;
    Ok(handle)
}

fn require_regular(kind: FileType, path: &Path) -> Result<(), HttpError> {
    match kind {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(HttpError::bad_request(format!(
            "path '{}' is a directory",
            path.display()
        ))),
        _ => Err(HttpError::bad_request(format!(
            "path '{}' is not a regular file",
            path.display()
        ))),
    }
}

/// Opens what [`locate`] found, and not what may have taken its place. Blocks.
fn reopen(handle: &OwnedFd, options: &fs::OpenOptions) -> io::Result<fs::File> {
    options.open(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HttpError> + Send + 'static,
) -> Result<T, HttpError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| HttpError::internal(error.to_string()))?
}
