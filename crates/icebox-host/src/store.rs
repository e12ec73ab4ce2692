//! The store on a file system: manifests, object directories, and the rule that one daemon owns them.
//!
//! ```text
//!   commit     manifest.json.new ── fsync ── rename ── fsync directory
//!   publish    staging/<object>/ ── fsync everything ── rename, never over another ── fsync both directories
//!   trash      <object>/ ── rename to trash/<object> ── fsync both directories       (deleted later, at leisure)
//! ```
//!
//! So an object either exists, whole, or does not exist, whatever crashes in between. What lies in `staging/` and
//! `trash/` is not an object; names that are not ours are left alone everywhere.
//!
//! Directories are made 0700 and files 0600, and what is published becomes writable by nobody (but for the hint beside a
//! memory that its pagers keep, [`crate::pager`]): a VMM's uid
//! reaches nothing in here by name, only through descriptors and mounts that the launcher made for it, and cannot make
//! more of those than they are.
//!
//! All work happens on threads that may block. Operations on one sandbox (or one other object) happen in the order in
//! which they were asked for, also when a caller stops waiting for an earlier one; operations on different ones overlap,
//! so that the file system's journal can commit them together.
//!
//! Deliberately not here: what manifests say. To the store they are bytes.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed, Space, Store, StoredDocument};
use icebox_engine::id::{Digest, GenerationNo, SandboxId};
use icebox_engine::layout::{Layout, MANIFEST, Object, parse_number};
use icebox_engine::unit::Bytes;
use serde::{Deserialize, Serialize};

use crate::blocking::blocking;
use crate::fs::{self, failed};
use crate::pool::NOT_MOUNTED;
use crate::turns::Turns;

/// The version of the layout that this program reads and writes.
pub const FORMAT: u32 = 1;
/// Far above any manifest; a bound so that a damaged file cannot fill the memory.
const MANIFEST_MAX: u64 = 16 << 20;
/// Far above the file; see [`MANIFEST_MAX`].
const FORMAT_MAX: u64 = 4096;
/// Directories of the layout that exist in every store.
const AREAS: [&str; 8] = [
    "kernels",
    "bases",
    "layers",
    "memories",
    "templates",
    "sandboxes",
    "staging",
    "trash",
];

/// What `format` holds.
#[derive(Serialize, Deserialize)]
struct FormatFile {
    format: u32,
    writer: String,
}

/// The part of `format` that every version has: read alone first, so that a newer file can be refused by its number
/// rather than for a field nobody here knows.
#[derive(Deserialize)]
struct FormatHeader {
    format: u32,
    writer: Option<String>,
}

/// The store in a directory that this process owns until the value is dropped.
pub struct FileStore {
    layout: Layout,
    turns: Turns,
    _lock: Lock,
}

/// Holds the flock. Closed on exec, so a VMM that outlives the daemon does not keep the tree locked.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // A child of this process that has not come to its exec has the file open, too.
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "the data directory stays locked until this process ends");
        }
    }
}

impl FileStore {
    /// Opens the data directory of `layout`, making it if it is absent or empty, and takes ownership of it. Blocks.
    ///
    /// # Errors
    /// - [`ErrorKind::Unsupported`]: it was written by a newer version. Nothing was changed.
    /// - [`ErrorKind::Invalid`]: it is not a data directory, or its `format` is damaged. Nothing was changed.
    /// - [`ErrorKind::Busy`]: another process owns it.
    /// - I/O errors.
    pub fn open(layout: Layout) -> Result<Self, HostError> {
        let data = layout.data();
        // Before the lock: a directory that is not ours, or not for us, is left without so much as a lock file.
        let known = read_format(&layout)?;
        if !known {
            refuse_foreign(&layout)?;
            std::fs::create_dir_all(data).map_err(|error| failed("make directory", data, error))?;
            set_owner_only(data)?;
        }
        let lock = lock(&layout)?;
        if !read_format(&layout)? {
            refuse_foreign(&layout)?;
            let content = serde_json::to_vec(&FormatFile {
                format: FORMAT,
                writer: format!("icebox {}", env!("CARGO_PKG_VERSION")),
            })
            .map_err(|error| {
                HostError::new(ErrorKind::Other, "encode the layout's version").caused_by(error)
            })?;
            fs::replace_file(data, "format", &content)?;
        }
        let mut created = false;
        for area in AREAS {
            created |= fs::ensure_directory(&data.join(area))? == Ensured::Created;
        }
        if created {
            fs::sync_directory(data)?;
        }
        Ok(Self {
            layout,
            turns: Turns::new(),
            _lock: Lock(lock),
        })
    }

    /// Runs `work` after everything that was asked of the same object before.
    async fn in_turn<T: Send + 'static>(
        &self,
        object: &Object,
        work: impl FnOnce(&Layout) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        // A generation lives in its sandbox's directory: they share a queue.
        let owner = match object {
            Object::Generation(sandbox, _) => &Object::Sandbox(sandbox.clone()),
            other => other,
        };
        let layout = self.layout.clone();
        self.turns.run(owner, move || work(&layout)).await
    }

    /// Runs `work` in no particular order.
    async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Layout) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let layout = self.layout.clone();
        blocking(move || work(&layout)).await
    }
}

#[async_trait]
impl Store for FileStore {
    async fn load(&self) -> Result<Vec<StoredDocument>, HostError> {
        self.aside(load).await
    }

    async fn commit(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        let (of, manifest) = (object.clone(), manifest.to_vec());
        self.in_turn(object, move |layout| commit(layout, &of, &manifest))
            .await
    }

    async fn stage(&self, object: &Object) -> Result<PathBuf, HostError> {
        let of = object.clone();
        self.in_turn(object, move |layout| {
            let directory = layout.staging(&of);
            fs::remove_tree(&directory)?;
            // Not durable, unlike in `staged`: it begins empty, and whoever loses it has lost nothing.
            fs::ensure_directory(&directory)?;
            Ok(directory)
        })
        .await
    }

    async fn staged(&self, object: &Object) -> Result<PathBuf, HostError> {
        let of = object.clone();
        self.in_turn(object, move |layout| staged(layout, &of))
            .await
    }

    async fn publish(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        let (of, manifest) = (object.clone(), manifest.to_vec());
        self.in_turn(object, move |layout| publish(layout, &of, &manifest))
            .await
    }

    async fn discard(&self, object: &Object) -> Result<Removed, HostError> {
        let of = object.clone();
        self.in_turn(object, move |layout| {
            let removed = fs::remove_tree(&layout.staging(&of))?;
            fs::sync_directory(&layout.staging_area())?;
            Ok(removed)
        })
        .await
    }

    async fn trash(&self, object: &Object) -> Result<Removed, HostError> {
        let of = object.clone();
        self.in_turn(object, move |layout| trash(layout, &of)).await
    }

    async fn empty_trash(&self) -> Result<(), HostError> {
        self.aside(empty_trash).await
    }

    async fn list_staging(&self) -> Result<Vec<Object>, HostError> {
        self.aside(|layout| {
            Ok(fs::entries(&layout.staging_area())?
                .iter()
                .filter_map(|entry| Object::from_flat_name(entry.file_name().to_str()?))
                .collect())
        })
        .await
    }

    async fn digest(&self, file: &Path) -> Result<Digest, HostError> {
        let path = file.to_owned();
        blocking(move || {
            let file = fs::open_file(&path)?;
            fs::sha256(&file, |_, _| {}).map_err(|error| failed("read", &path, error))
        })
        .await
    }

    async fn file_size(&self, file: &Path) -> Result<Bytes, HostError> {
        let path = file.to_owned();
        blocking(move || {
            let metadata = path
                .metadata()
                .map_err(|error| failed("measure", &path, error))?;
            Ok(Bytes(metadata.len()))
        })
        .await
    }

    async fn move_into_staging(
        &self,
        file: &Path,
        object: &Object,
        as_file: &str,
    ) -> Result<(), HostError> {
        let (source, of, name) = (file.to_owned(), object.clone(), as_file.to_owned());
        self.in_turn(object, move |layout| {
            let staging = layout.staging(&of);
            fs::rename_to_new(&source, &staging.join(name))?;
            fs::sync_directory(&staging)?;
            source.parent().map_or(Ok(()), fs::sync_directory)
        })
        .await
    }

    async fn allocated(&self, object: &Object) -> Result<Bytes, HostError> {
        let directory = self.layout.object(object);
        let heads = match object {
            Object::Sandbox(sandbox) => Some(self.layout.heads(sandbox)),
            _ => None,
        };
        blocking(move || fs::allocated_without(&directory, heads.as_deref())).await
    }

    async fn space(&self) -> Result<Space, HostError> {
        self.aside(|layout| fs::space(layout.data())).await
    }

    fn path(&self, object: &Object, file: &str) -> PathBuf {
        self.layout.object(object).join(file)
    }

    async fn copy_into_staging(
        &self,
        from: &Object,
        file: &str,
        to: &Object,
    ) -> Result<(), HostError> {
        let source = self.path(from, file);
        let (of, file) = (to.clone(), file.to_owned());
        self.in_turn(to, move |layout| {
            let target = layout.staging(&of).join(&file);
            let copied = fs::open_file(&source).and_then(|from| {
                let to = fs::create_file(&target)?;
                fs::sparse_copy(&from, &to)
                    .and_then(|_| to.sync_all())
                    .map_err(|error| {
                        failed(&format!("copy {} to", source.display()), &target, error)
                    })
            });
            if copied.is_err() {
                fs::remove_remains(&target);
            }
            copied
        })
        .await
    }
}

/// Reads the layout's version. `false` if there is none.
fn read_format(layout: &Layout) -> Result<bool, HostError> {
    let path = layout.format_file();
    let content = match fs::read_bounded(&path, FORMAT_MAX) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let damaged = |message: String| {
        HostError::new(ErrorKind::Invalid, message).hint(format!(
            "restore the file (its content is {{\"format\":{FORMAT},\"writer\":\"icebox\"}}), or use another data directory; nothing was changed"
        ))
    };
    let header: FormatHeader = serde_json::from_slice(&content)
        .map_err(|error| damaged(format!("{} is damaged", path.display())).caused_by(error))?;
    if header.format > FORMAT {
        return Err(HostError::new(
            ErrorKind::Unsupported,
            format!(
                "{} has layout version {}, written by {}; this is icebox {}, which knows versions up to {FORMAT}",
                layout.data().display(),
                header.format,
                header.writer.as_deref().unwrap_or("a newer program"),
                env!("CARGO_PKG_VERSION"),
            ),
        )
        .hint("use the newer icebox, or another data directory; nothing was changed"));
    }
    if header.format != FORMAT {
        return Err(damaged(format!(
            "{} names layout version {}, which never existed",
            path.display(),
            header.format
        )));
    }
    Ok(true)
}

/// Refuses a directory without `format` that holds anything: it is somebody else's, or ours and damaged. What a fresh
/// file system or an interrupted first start leaves is fine.
fn refuse_foreign(layout: &Layout) -> Result<(), HostError> {
    let data = layout.data();
    let foreign = fs::entries(data)?
        .iter()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|name| !matches!(name.as_str(), "lock" | "format.new" | "lost+found"));
    match foreign {
        None => Ok(()),
        Some(name) if name == NOT_MOUNTED => Err(HostError::new(
            ErrorKind::Invalid,
            format!("a pool belongs on {} and is not mounted", data.display()),
        )
        .hint(format!(
            "`mount {0}` mounts it if /etc/fstab names it; {0}/{NOT_MOUNTED} says which file it is, and is to be removed if there is to be no pool",
            data.display()
        ))),
        Some(name) => Err(HostError::new(
            ErrorKind::Invalid,
            format!(
                "{} is not an icebox data directory: it has no file named format, but holds {name:?}",
                data.display()
            ),
        )
        .hint("use an empty or absent directory; nothing was changed")),
    }
}

fn set_owner_only(directory: &Path) -> Result<(), HostError> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700))
        .map_err(|error| failed("set the permissions of", directory, error))
}

/// Takes the lock and writes this process's id into it, for the message to whoever comes second.
fn lock(layout: &Layout) -> Result<File, HostError> {
    let path = layout.lock_file();
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| failed("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            // Whatever the file says is only decoration of a message: an unreadable one is as good as an empty one.
            let mut owner = String::new();
            let owner = match file.read_to_string(&mut owner) {
                Ok(_) => owner.trim().parse::<u32>().ok(),
                Err(_) => None,
            };
            let owner = owner.map_or_else(
                || "another process".to_owned(),
                |pid| format!("process {pid}"),
            );
            return Err(HostError::new(
                ErrorKind::Busy,
                format!("{} is in use by {owner}", layout.data().display()),
            )
            .hint("stop the icebox daemon that uses it, or give this one another data directory"));
        }
        Err(TryLockError::Error(error)) => return Err(failed("lock", &path, error)),
    }
    let named = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    if let Err(error) = named {
        // On a full disk: sandboxes that run there need their daemon all the same.
        tracing::warn!(%error, path = %path.display(), "the lock does not say whose it is");
    }
    Ok(file)
}

/// The directory that `object`'s directory is in. Made if it is one that comes and goes with its contents; an object in
/// an object (a generation) needs the outer one to exist.
fn ensure_parent(layout: &Layout, object: &Object) -> Result<PathBuf, HostError> {
    let target = layout.object(object);
    let parent = target.parent().unwrap_or(layout.data()).to_owned();
    if let Object::Generation(sandbox, _) = object {
        let outer = Object::Sandbox(sandbox.clone());
        if fs::ensure_directory(&parent)? == Ensured::Created {
            fs::sync_directory(&layout.object(&outer))?;
        }
    }
    Ok(parent)
}

fn commit(layout: &Layout, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
    let directory = layout.object(object);
    let parent = ensure_parent(layout, object)?;
    let made = fs::ensure_directory(&directory)?;
    fs::replace_file(&directory, MANIFEST, manifest)?;
    if made == Ensured::Created {
        fs::sync_directory(&parent)?;
    }
    Ok(())
}

fn staged(layout: &Layout, object: &Object) -> Result<PathBuf, HostError> {
    let directory = layout.staging(object);
    fs::ensure_directory(&directory)?;
    // Also if it was there: whoever made it may not have come this far. The only copy of a head may be moved in here.
    fs::sync_directory(&layout.staging_area())?;
    Ok(directory)
}

fn publish(layout: &Layout, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
    let staging = layout.staging(object);
    let target = layout.object(object);
    let parent = ensure_parent(layout, object)?;
    let sync_both = || {
        fs::sync_directory(&parent)?;
        fs::sync_directory(&layout.staging_area())
    };
    let published = fs::exists(&target.join(MANIFEST))?;
    let mut is_staged = fs::exists(&staging)?;
    if is_staged && published && fs::entries(&staging)?.is_empty() {
        // A repetition that asked for the directory before it asked whether there was anything left to do.
        fs::remove_tree(&staging)?;
        is_staged = false;
    }
    match (is_staged, published) {
        (false, true) => return sync_both(),
        (false, false) => {
            return Err(HostError::new(
                ErrorKind::NotFound,
                format!("publish {object}: nothing is staged"),
            ));
        }
        (true, true) => {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!("publish {object}: it exists already"),
            ));
        }
        (true, false) => {}
    }
    // Not an object yet, so nobody reads it half-written; sealing makes it durable with the rest.
    fs::write_file(&staging.join(MANIFEST), manifest)?;
    fs::seal_tree(&staging)?;
    fs::rename_to_new(&staging, &target)?;
    sync_both()
}

fn trash(layout: &Layout, object: &Object) -> Result<Removed, HostError> {
    let source = layout.object(object);
    let first = layout.trash(object);
    let mut target = first.clone();
    let mut attempt = 0_u32;
    let removed = loop {
        match fs::rename_to_new(&source, &target) {
            Ok(()) => break Removed::Removed,
            Err(error) if error.kind() == ErrorKind::NotFound => break Removed::AlreadyAbsent,
            // A content-addressed object can come and go twice before the trash is emptied.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && attempt < 1000 => {
                attempt += 1;
                target = first.with_file_name(format!("{}~{attempt}", object.flat_name()));
            }
            Err(error) => return Err(error),
        }
    };
    // Also if it was absent: the process that renamed it may have died before its rename was durable.
    if let Some(parent) = source.parent()
        && fs::exists(parent)?
    {
        fs::sync_directory(parent)?;
    }
    fs::sync_directory(&layout.trash_area())?;
    Ok(removed)
}

fn empty_trash(layout: &Layout) -> Result<(), HostError> {
    let area = layout.trash_area();
    let mut failures = Vec::new();
    for entry in fs::entries(&area)? {
        if let Err(error) = fs::remove_tree(&entry.path()) {
            failures.push(error);
        }
    }
    fs::sync_directory(&area)?;
    let count = failures.len();
    match failures.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(HostError::new(
            first.kind(),
            format!("empty the trash: {count} of its objects would not go, the first because of"),
        )
        .caused_by(first)),
    }
}

fn load(layout: &Layout) -> Result<Vec<StoredDocument>, HostError> {
    let mut found = Vec::new();
    let mut add = |object: Object| {
        let manifest = match fs::read_bounded(&layout.object(&object).join(MANIFEST), MANIFEST_MAX)
        {
            Ok(manifest) => Some(manifest),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            // Not "damaged, so absent": a manifest that exists and cannot be read must stop whoever would clean up.
            Err(error) => return Err(error),
        };
        found.push(StoredDocument { object, manifest });
        Ok(())
    };
    fn ours<T>(directory: &Path, parse: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, HostError> {
        Ok(fs::entries(directory)?
            .iter()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| parse(entry.file_name().to_str()?))
            .collect())
    }
    let data = layout.data();
    for digest in ours(&data.join("kernels"), |name| name.parse().ok())? {
        add(Object::Kernel(digest))?;
    }
    for digest in ours(&data.join("bases"), |name| name.parse().ok())? {
        add(Object::Base(digest))?;
    }
    for id in ours(&data.join("layers"), |name| name.parse().ok())? {
        add(Object::Layer(id))?;
    }
    for id in ours(&data.join("memories"), |name| name.parse().ok())? {
        add(Object::Memory(id))?;
    }
    for id in ours(&data.join("templates"), |name| name.parse().ok())? {
        add(Object::Template(id))?;
    }
    for id in ours(&data.join("sandboxes"), |name| {
        name.parse::<SandboxId>().ok()
    })? {
        let sandbox = Object::Sandbox(id.clone());
        let generations = layout.object(&sandbox).join("generations");
        add(sandbox)?;
        for number in ours(&generations, parse_number)? {
            add(Object::Generation(id.clone(), GenerationNo(number)))?;
        }
    }
    Ok(found)
}
