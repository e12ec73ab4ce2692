//! `POST /files`.

use std::{
    collections::{BTreeMap, HashSet},
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json,
    body::Body,
    extract::{FromRequest as _, Multipart, Query, Request, State, multipart::Field},
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use http_body_util::BodyExt as _;
use icebox_agent_api::{METADATA_HEADER_PREFIX, control::UploadedFile};
use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
    process::{Gid, Uid},
};
use tokio::sync::mpsc;

use super::{
    Agent, FileQuery, HttpError, Operation, QUEUE, authorise, blocking, owner, reopen,
    require_regular, resolve,
};
use crate::{
    server::{
        entry,
        paths::{self, Anchored},
    },
    users::User,
};

/// Field of a multipart body that holds a file.
const FILE_FIELD: &str = "file";
/// How long the rest of a refused body is read.
const LINGER: Duration = Duration::from_secs(10);

/// Writes one file (`application/octet-stream`) or several (`multipart/form-data`).
///
/// An existing file is overwritten in place: it keeps its inode, and with it its links, its mode and whoever has it
/// open. An upload that fails half-way leaves what came before the failure.
pub(in crate::server) async fn upload(
    State(agent): State<Arc<Agent>>,
    Query(query): Query<FileQuery>,
    request: Request,
) -> Result<Json<Vec<UploadedFile>>, HttpError> {
    let headers = request.headers().clone();
    authorise(&agent, &headers, &query, Operation::Write)?;
    let user = owner(&agent, &headers, &query)?;
    let metadata = metadata(&headers)?;
    let gzip = content_encoding(&headers)?;
    let query_path = query.path.as_deref().filter(|path| !path.is_empty());
    let target = |path: &str| resolve(&agent, &user, path);

    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if !content_type.starts_with("multipart/form-data") {
        let path = query_path
            .ok_or_else(|| HttpError::bad_request("the query parameter 'path' is missing"))?;
        let file = Incoming {
            path: target(path)?,
            user,
            metadata,
            gzip,
        };
        return Ok(Json(vec![receive_one(file, request.into_body()).await?]));
    }
    if gzip {
        return Err(HttpError::bad_request(
            "a multipart body cannot be compressed",
        ));
    }
    let mut multipart = Multipart::from_request(request, &())
        .await
        .map_err(|error| invalid_multipart(&error))?;
    let files = async {
        let mut files = Vec::new();
        let mut seen = HashSet::new();
        while let Some(field) = multipart
            .next_field()
            .await
            .map_err(|error| invalid_multipart(&error))?
        {
            if field.name() != Some(FILE_FIELD) {
                continue;
            }
            let path = match (query_path, field.file_name()) {
                (Some(path), _) => target(path)?,
                (None, Some(name)) if !name.is_empty() => target(name)?,
                _ => {
                    return Err(HttpError::bad_request(
                        "a file has neither a path nor a file name",
                    ));
                }
            };
            if !seen.insert(path.clone()) {
                return Err(HttpError::bad_request(format!(
                    "you cannot upload multiple files to the same path '{}' in one upload request",
                    path.display()
                )));
            }
            let file = Incoming {
                path,
                user: user.clone(),
                metadata: metadata.clone(),
                gzip: false,
            };
            files.push(receive_field(file, field).await?);
        }
        Ok(files)
    }
    .await;
    if files.is_err() {
        linger(async { while let Ok(Some(_)) = multipart.next_field().await {} }).await;
    }
    Ok(Json(files?))
}

fn invalid_multipart(error: &dyn fmt::Display) -> HttpError {
    HttpError::bad_request(format!("invalid multipart body: {error}"))
}

async fn receive_field(file: Incoming, mut field: Field<'_>) -> Result<UploadedFile, HttpError> {
    let mut writer = Writer::open(file).await?;
    while let Some(chunk) = field
        .chunk()
        .await
        .map_err(|error| invalid_multipart(&error))?
    {
        writer.write(chunk).await?;
    }
    writer.finish().await
}

async fn receive_one(file: Incoming, mut body: Body) -> Result<UploadedFile, HttpError> {
    let received = async {
        let mut writer = Writer::open(file).await?;
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|error| HttpError::bad_request(format!("the body broke off: {error}")))?;
            if let Ok(chunk) = frame.into_data() {
                writer.write(chunk).await?;
            }
        }
        writer.finish().await
    }
    .await;
    if received.is_err() {
        linger(async { while let Some(Ok(_)) = body.frame().await {} }).await;
    }
    received
}

/// Reads what is left of a refused body, within reason. A connection that is closed with unread bytes is reset, and
/// the client would learn that instead of the reason.
async fn linger(rest: impl Future<Output = ()>) {
    tokio::time::timeout(LINGER, rest).await.ok();
}

/// Whether the body is compressed by gzip.
fn content_encoding(headers: &HeaderMap) -> Result<bool, HttpError> {
    match headers
        .get(header::CONTENT_ENCODING)
        .map(|value| value.to_str().unwrap_or_default().trim())
    {
        None | Some("" | "identity") => Ok(false),
        Some("gzip" | "x-gzip") => Ok(true),
        Some(other) => Err(HttpError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("unsupported content encoding '{other}'"),
        )),
    }
}

/// The metadata that comes in headers. Names of headers have no case; here they are lower.
fn metadata(headers: &HeaderMap) -> Result<BTreeMap<String, String>, HttpError> {
    headers
        .iter()
        .filter_map(|(name, value)| {
            let key = name
                .as_str()
                .strip_prefix(METADATA_HEADER_PREFIX)
                .filter(|key| !key.is_empty())?;
            let value = value.to_str().map_err(|_| {
                HttpError::bad_request(format!("the metadata '{key}' is not plain text"))
            });
            Some(value.map(|value| (key.to_owned(), value.to_owned())))
        })
        .collect()
}

/// A file that is about to be written.
struct Incoming {
    path: PathBuf,
    user: User,
    metadata: BTreeMap<String, String>,
    gzip: bool,
}

/// A file that is being written, on a thread of its own.
struct Writer {
    queue: mpsc::Sender<Bytes>,
    thread: tokio::task::JoinHandle<Result<UploadedFile, HttpError>>,
}

impl Writer {
    /// Opens the file first: a target that cannot be written is refused before anything is read.
    async fn open(incoming: Incoming) -> Result<Self, HttpError> {
        let Incoming {
            path,
            user,
            metadata,
            gzip,
        } = incoming;
        let (path, mut file) = blocking(move || {
            let file = open(&path, &user)?;
            Ok((path, file))
        })
        .await?;
        let (queue, mut chunks) = mpsc::channel::<Bytes>(QUEUE);
        let thread = tokio::task::spawn_blocking(move || {
            let failed = |error: io::Error| {
                HttpError::io(&format!("failed to write '{}'", path.display()), &error)
            };
            if gzip {
                let mut decoder = MultiGzDecoder::new(&mut file);
                copy(&mut chunks, &mut decoder)
                    .and_then(|()| decoder.try_finish())
                    .map_err(|error| match error.raw_os_error() {
                        Some(_) => failed(error),
                        None => {
                            HttpError::bad_request(format!("the body is not valid gzip: {error}"))
                        }
                    })?;
            } else {
                copy(&mut chunks, &mut file).map_err(failed)?;
            }
            entry::set_metadata(&file, &metadata).map_err(|error| {
                match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::NOTSUP) => {
                        HttpError::bad_request("the file system keeps no metadata")
                    }
                    _ => failed(error),
                }
            })?;
            Ok(UploadedFile {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                path: path.to_string_lossy().into_owned(),
                kind: "file".to_owned(),
                metadata,
            })
        });
        Ok(Self { queue, thread })
    }

    async fn write(&mut self, chunk: Bytes) -> Result<(), HttpError> {
        if self.queue.send(chunk).await.is_ok() {
            return Ok(());
        }
        // The thread gave up, and says why.
        match (&mut self.thread).await {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => Err(HttpError::internal("the file was closed early")),
            Err(error) => Err(HttpError::internal(error.to_string())),
        }
    }

    async fn finish(self) -> Result<UploadedFile, HttpError> {
        drop(self.queue);
        self.thread
            .await
            .map_err(|error| HttpError::internal(error.to_string()))?
    }
}

fn copy(chunks: &mut mpsc::Receiver<Bytes>, to: &mut impl Write) -> io::Result<()> {
    while let Some(chunk) = chunks.blocking_recv() {
        to.write_all(&chunk)?;
    }
    Ok(())
}

/// What is done about a link where the file should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Links {
    Followed,
    /// Refused with `ELOOP`, and with it a file that has a second name elsewhere and another owner.
    Refused,
}

/// Opens a file to be overwritten, or creates it and what is missing above it; either way it is `user`'s, unless a link
/// led to somebody else's. Blocks.
fn open(path: &Path, user: &User) -> Result<fs::File, HttpError> {
    let opened = paths::spelled_or_as(
        user,
        || {
            let anchored = Anchored::open(path, Some(user))?;
            let opened = open_at(&anchored.path(), path, user, Links::Refused)?;
            opened
                .map(|file| give(&file, user).map(|()| file))
                .map_or_else(|refused| Ok(Err(refused)), |file| file.map(Ok))
        },
        || {
            if let Some(parent) = path.parent() {
                paths::create_dirs(parent, user)?;
            }
            let opened = open_at(path, path, user, Links::Followed)?;
            if user.uid == 0
                && let Ok(file) = &opened
            {
                give(file, user)?;
            }
            Ok(opened)
        },
    );
    opened.unwrap_or_else(|error| {
        Err(HttpError::io(
            &format!("failed to write '{}'", path.display()),
            &error,
        ))
    })
}

fn give(file: &fs::File, user: &User) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    Ok(rustix::fs::fchown(file, Some(uid), Some(gid))?)
}

/// Opens the file at `path`, which the client called `shown`, or creates it.
fn open_at(
    path: &Path,
    shown: &Path,
    user: &User,
    links: Links,
) -> io::Result<Result<fs::File, HttpError>> {
    let no_follow = match links {
        Links::Followed => OFlags::empty(),
        Links::Refused => OFlags::NOFOLLOW,
    };
    loop {
        let flags = OFlags::PATH | OFlags::CLOEXEC | no_follow;
        let handle = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(handle) => handle,
            Err(Errno::NOENT) => {
                let created = fs::OpenOptions::new()
                    .write(true)
                    .create(links == Links::Followed)
                    .create_new(links == Links::Refused)
                    .mode(0o644)
                    .open(path);
                match created {
                    // Somebody else was faster: it is to be looked at first.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                    created => return created.map(Ok),
                }
            }
            Err(errno) => return Err(errno.into()),
        };
        let status = rustix::fs::fstat(&handle)?;
        let kind = FileType::from_raw_mode(status.st_mode);
        let elsewhere =
            kind == FileType::RegularFile && status.st_nlink > 1 && status.st_uid != user.uid;
        if links == Links::Refused && (kind == FileType::Symlink || elsewhere) {
            return Err(Errno::LOOP.into());
        }
        if let Err(refused) = require_regular(kind, shown) {
            return Ok(Err(refused));
        }
        let mut options = fs::OpenOptions::new();
        return reopen(&handle, options.write(true).truncate(true)).map(Ok);
    }
}
