//! The service `filesystem.Filesystem`: names and metadata. Bytes are the business of [`super::files`].

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use connectrpc::{
    ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use icebox_agent_api::proto::filesystem::{
    self as proto, CreateWatcherRequest, CreateWatcherResponse, EntryInfo, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse,
    MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
    RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};

use super::{auth::acting_user, entry, paths, state::Agent};
use crate::users::{Names, User};

/// The service.
pub(super) struct Service {
    agent: Arc<Agent>,
}

impl Service {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Who asks, and the path they mean.
    fn target(&self, ctx: &RequestContext, path: &str) -> Result<(User, PathBuf), ConnectError> {
        let user = acting_user(&self.agent, ctx.headers())
            .map_err(|unknown| ConnectError::unauthenticated(unknown.to_string()))?;
        let path = paths::resolve(&self.agent, &user, path);
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(ConnectError::invalid_argument(
                "the path contains a zero byte",
            ));
        }
        Ok((user, path))
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
) -> Result<T, ConnectError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| ConnectError::internal(error.to_string()))?
}

impl proto::Filesystem for Service {
    async fn stat<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<impl Encodable<StatResponse> + Send + use<'a>> {
        let (_, path) = self.target(&ctx, request.path)?;
        let entry = blocking(move || describe(&path)).await?;
        Response::ok(StatResponse {
            entry: entry.into(),
            ..StatResponse::default()
        })
    }

    async fn make_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<MakeDirResponse> + Send + use<'a>> {
        let (user, path) = self.target(&ctx, request.path)?;
        let entry = blocking(move || make_dir(&path, &user)).await?;
        Response::ok(MakeDirResponse {
            entry: entry.into(),
            ..MakeDirResponse::default()
        })
    }

    async fn r#move<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<impl Encodable<MoveResponse> + Send + use<'a>> {
        let (user, source) = self.target(&ctx, request.source)?;
        let (_, destination) = self.target(&ctx, request.destination)?;
        let entry = blocking(move || rename(&source, &destination, &user)).await?;
        Response::ok(MoveResponse {
            entry: entry.into(),
            ..MoveResponse::default()
        })
    }

    async fn list_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<impl Encodable<ListDirResponse> + Send + use<'a>> {
        let (_, path) = self.target(&ctx, request.path)?;
        let depth = request.depth.max(1);
        let entries = blocking(move || list(&path, depth)).await?;
        Response::ok(ListDirResponse {
            entries,
            ..ListDirResponse::default()
        })
    }

    async fn remove<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<impl Encodable<RemoveResponse> + Send + use<'a>> {
        let (_, path) = self.target(&ctx, request.path)?;
        blocking(move || remove(&path)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<WatchDirResponse> + Send + use<>>> {
        Err::<Response<ServiceStream<WatchDirResponse>>, _>(unwatchable())
    }

    async fn create_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<CreateWatcherResponse> + Send + use<'a>> {
        Err::<Response<CreateWatcherResponse>, _>(unwatchable())
    }

    async fn get_watcher_events<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<impl Encodable<GetWatcherEventsResponse> + Send + use<'a>> {
        Err::<Response<GetWatcherEventsResponse>, _>(unwatchable())
    }

    async fn remove_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<impl Encodable<RemoveWatcherResponse> + Send + use<'a>> {
        Err::<Response<RemoveWatcherResponse>, _>(unwatchable())
    }
}

fn unwatchable() -> ConnectError {
    ConnectError::unimplemented("this agent does not watch directories")
}

fn describe(path: &Path) -> Result<EntryInfo, ConnectError> {
    entry::describe(path, &Names::read()).map_err(|error| io_error(path, &error))
}

fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(ConnectError::already_exists(format!(
                "directory already exists: {}",
                path.display()
            )));
        }
        Ok(_) => {
            return Err(ConnectError::invalid_argument(format!(
                "path already exists but it is not a directory: {}",
                path.display()
            )));
        }
        Err(_) => {}
    }
    paths::create_dirs(path, user).map_err(|error| io_error(path, &error))?;
    describe(path)
}

fn rename(source: &Path, destination: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    fs::symlink_metadata(source).map_err(|error| io_error(source, &error))?;
    if let Some(parent) = destination.parent() {
        paths::create_dirs(parent, user).map_err(|error| io_error(parent, &error))?;
    }
    fs::rename(source, destination).map_err(|error| io_error(destination, &error))?;
    describe(destination)
}

fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, ConnectError> {
    let metadata = fs::metadata(path).map_err(|error| io_error(path, &error))?;
    if !metadata.is_dir() {
        return Err(ConnectError::invalid_argument(format!(
            "path is not a directory: {}",
            path.display()
        )));
    }
    let names = Names::read();
    let mut entries = Vec::new();
    walk(path, depth, &names, &mut entries).map_err(|error| io_error(path, &error))?;
    Ok(entries)
}

/// Depth first, in the order of names. Links are listed, not followed.
fn walk(path: &Path, depth: u32, names: &Names, entries: &mut Vec<EntryInfo>) -> io::Result<()> {
    let mut children: Vec<fs::DirEntry> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
    children.sort_by_key(fs::DirEntry::file_name);
    for child in children {
        let path = child.path();
        match entry::describe(&path, names) {
            Ok(entry) => entries.push(entry),
            // It was removed while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        }
        if depth > 1 && child.file_type().is_ok_and(|kind| kind.is_dir()) {
            match walk(&path, depth - 1, names, entries) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), ConnectError> {
    if path == Path::new("/") {
        return Err(ConnectError::invalid_argument(
            "the root directory cannot be removed",
        ));
    }
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|error| io_error(path, &error)),
    }
}

/// An I/O error by what the client can do about it.
fn io_error(path: &Path, error: &io::Error) -> ConnectError {
    let message = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound => ConnectError::not_found(message),
        io::ErrorKind::AlreadyExists => ConnectError::already_exists(message),
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::DirectoryNotEmpty => ConnectError::invalid_argument(message),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ConnectError::permission_denied(message)
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ConnectError::resource_exhausted(message)
        }
        _ => ConnectError::internal(message),
    }
}
