//! The service `filesystem.Filesystem`: names and metadata. Bytes are the business of [`super::files`].

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use connectrpc::{
    ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use icebox_agent_api::proto::filesystem::{
    self as proto, CreateWatcherRequest, CreateWatcherResponse, EntryInfo, EventType,
    FilesystemEvent, GetWatcherEventsRequest, GetWatcherEventsResponse, ListDirRequest,
    ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse, RemoveRequest,
    RemoveResponse, RemoveWatcherRequest, RemoveWatcherResponse, StatRequest, StatResponse,
    WatchDirRequest, WatchDirResponse, watch_dir_response,
};

use futures_util::{StreamExt as _, stream};
use tokio::{task::AbortHandle, time::timeout};

use super::{
    auth::acting_user,
    entry, keepalive_of,
    paths::{self, Anchored},
    state::Agent,
    watch::{self, Readiness, Watcher},
};
use crate::users::{Names, User};

/// The service.
pub(super) struct Service {
    agent: Arc<Agent>,
    watchers: Watchers,
}

impl Service {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            watchers: Watchers::default(),
        }
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
        let (user, path) = self.target(&ctx, request.path)?;
        blocking(move || remove(&path, &user)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<WatchDirResponse> + Send + use<>>> {
        let (_, path) = self.target(&ctx, request.path)?;
        let watched = watch(path, request.recursive, request.allow_network_mounts).await?;
        let readiness = watched.readiness();
        let include_entry = request.include_entry;
        let keepalive = keepalive_of(&ctx);
        let state = (watched, VecDeque::new());
        let changes = stream::try_unfold(state, move |(mut watcher, mut pending)| {
            let readiness = readiness.clone();
            async move {
                loop {
                    if let Some(event) = pending.pop_front() {
                        return Ok(Some((watch_event(event), (watcher, pending))));
                    }
                    if timeout(keepalive, readiness.changed()).await.is_err() {
                        let event = watch_dir_response::KeepAlive::default();
                        return Ok(Some((watch_event(event), (watcher, pending))));
                    }
                    (watcher, pending) = blocking(move || {
                        let events = collect(&mut watcher, include_entry)?;
                        Ok((watcher, events.into()))
                    })
                    .await?;
                }
            }
        });
        let start = watch_event(watch_dir_response::StartEvent::default());
        Ok(Response::stream(
            stream::once(async { Ok(start) }).chain(changes),
        ))
    }

    async fn create_watcher<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<CreateWatcherResponse> + Send + use<'a>> {
        let (_, path) = self.target(&ctx, request.path)?;
        let watcher = watch(path, request.recursive, request.allow_network_mounts).await?;
        let watcher_id = self.watchers.insert(watcher, request.include_entry);
        Response::ok(CreateWatcherResponse {
            watcher_id,
            ..CreateWatcherResponse::default()
        })
    }

    async fn get_watcher_events<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<impl Encodable<GetWatcherEventsResponse> + Send + use<'a>> {
        let polled = self.watchers.find(request.watcher_id)?;
        let events = blocking(move || {
            let mut watcher = polled
                .watcher
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            collect(&mut watcher, polled.include_entry)
        })
        .await?;
        Response::ok(GetWatcherEventsResponse {
            events,
            ..GetWatcherEventsResponse::default()
        })
    }

    async fn remove_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<impl Encodable<RemoveWatcherResponse> + Send + use<'a>> {
        self.watchers.remove(request.watcher_id)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

/// Watchers whose clients come and ask.
#[derive(Default)]
struct Watchers {
    by_id: Mutex<HashMap<String, Arc<Polled>>>,
    last: AtomicU64,
}

/// A watcher, how its changes are told, and who collects them in between.
struct Polled {
    watcher: Arc<Mutex<Watcher>>,
    include_entry: bool,
    follower: AbortHandle,
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Watchers {
    fn insert(&self, watcher: Watcher, include_entry: bool) -> String {
        let id = format!("w{}", self.last.fetch_add(1, Ordering::Relaxed));
        let readiness = watcher.readiness();
        let watcher = Arc::new(Mutex::new(watcher));
        let follower = tokio::spawn(follow(watcher.clone(), readiness)).abort_handle();
        self.all().insert(
            id.clone(),
            Arc::new(Polled {
                watcher,
                include_entry,
                follower,
            }),
        );
        id
    }

    fn find(&self, id: &str) -> Result<Arc<Polled>, ConnectError> {
        self.all()
            .get(id)
            .cloned()
            .ok_or_else(|| unknown_watcher(id))
    }

    fn remove(&self, id: &str) -> Result<(), ConnectError> {
        self.all()
            .remove(id)
            .map(|_| ())
            .ok_or_else(|| unknown_watcher(id))
    }

    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Polled>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown_watcher(id: &str) -> ConnectError {
    ConnectError::not_found(format!("watcher with id {id} not found"))
}

/// Collects changes as they come: a new directory has to be watched when it appears, not when someone asks.
async fn follow(watcher: Arc<Mutex<Watcher>>, readiness: Readiness) {
    while readiness.changed().await.is_ok() {
        let watcher = watcher.clone();
        let collected = blocking(move || {
            let mut watcher = watcher.lock().unwrap_or_else(PoisonError::into_inner);
            watcher
                .collect()
                .map_err(|error| io_error(watcher.root(), &error))
        });
        // Whoever asks next is told by the same error.
        if collected.await.is_err() {
            return;
        }
    }
}

async fn watch(path: PathBuf, recursive: bool, on_network: bool) -> Result<Watcher, ConnectError> {
    // The runtime is entered from the thread too: what is waited on is registered with it.
    blocking(move || {
        let failed = |error: io::Error| io_error(&path, &error);
        if !fs::metadata(&path).map_err(failed)?.is_dir() {
            return Err(ConnectError::invalid_argument(format!(
                "path is not a directory: {}",
                path.display()
            )));
        }
        if !on_network && watch::is_on_network(&path).map_err(failed)? {
            return Err(ConnectError::invalid_argument(format!(
                "path is on a network filesystem, whose changes may go unnoticed: {}",
                path.display()
            )));
        }
        Watcher::start(&path, recursive).map_err(failed)
    })
    .await
}

/// What has changed since the last time. Blocks.
fn collect(
    watcher: &mut Watcher,
    include_entry: bool,
) -> Result<Vec<FilesystemEvent>, ConnectError> {
    watcher
        .collect()
        .map_err(|error| io_error(watcher.root(), &error))?;
    let changes = watcher
        .fetch()
        .map_err(|lost| ConnectError::resource_exhausted(lost.to_string()))?;
    let names = include_entry.then(Names::read);
    Ok(changes
        .into_iter()
        .map(|change| {
            let gone = matches!(
                change.kind,
                EventType::EVENT_TYPE_REMOVE | EventType::EVENT_TYPE_RENAME
            );
            let names = names.as_ref().filter(|_| !gone);
            let entry = names
                .and_then(|names| entry::describe(&watcher.root().join(&change.name), names).ok());
            FilesystemEvent {
                name: change.name.to_string_lossy().into_owned(),
                r#type: change.kind.into(),
                entry: entry.into(),
                ..FilesystemEvent::default()
            }
        })
        .collect())
}

fn watch_event(event: impl Into<watch_dir_response::Event>) -> WatchDirResponse {
    WatchDirResponse {
        event: Some(event.into()),
        ..WatchDirResponse::default()
    }
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
    paths::spelled_or_as(
        user,
        || Anchored::open(path, Some(user))?.make_dir(user),
        || paths::create_dirs(path, user),
    )
    .map_err(|error| io_error(path, &error))?;
    describe(path)
}

fn rename(source: &Path, destination: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    fs::symlink_metadata(source).map_err(|error| io_error(source, &error))?;
    // What is moved, and what is replaced, may itself be a link: neither is followed.
    paths::spelled_or_as(
        user,
        || {
            let from = Anchored::open(source, None)?;
            let to = Anchored::open(destination, Some(user))?;
            fs::rename(from.path(), to.path())
        },
        || {
            if let Some(parent) = destination.parent() {
                paths::create_dirs(parent, user)?;
            }
            fs::rename(source, destination)
        },
    )
    .map_err(|error| io_error(destination, &error))?;
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

fn remove(path: &Path, user: &User) -> Result<(), ConnectError> {
    if path == Path::new("/") {
        return Err(ConnectError::invalid_argument(
            "the root directory cannot be removed",
        ));
    }
    // A link is removed, not what it leads to.
    let remove = |path: &Path| {
        if fs::symlink_metadata(path)?.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    };
    let removed = paths::spelled_or_as(
        user,
        || remove(&Anchored::open(path, None)?.path()),
        || remove(path),
    );
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
