//! Files as this crate needs them: durable, sparse, shared where the file system can.
//!
//! Everything here blocks; callers on the async side go through a thread that may. A function says what is durable
//! when it returns. Errors name the operation and the path; one that the user can cure (no space, read-only) says how.

mod sys;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed, Space};
use icebox_engine::id::Digest;
use icebox_engine::unit::Bytes;
use rustix::fs::{FallocateFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

/// Bytes per block in `st_blocks`: stat(3type).
const STAT_BLOCK: u64 = 512;
/// How much is read at a time when data is copied or hashed.
const CHUNK: usize = 1 << 20;
/// The longest hole that is reported in one piece, so that hashing one reports progress.
const HOLE: u64 = 64 << 20;
/// The granularity at which copies look for zeros: the block size of the file systems underneath.
const ZERO_GRAIN: usize = 4096;

/// A [`HostError`] for `action` ("write", "rename") on `path`, with a hint where there is a cure.
pub(crate) fn failed(action: &str, path: &Path, error: io::Error) -> HostError {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(
            "free some space on that file system: `icebox rm` what is no longer needed, then `icebox gc`",
        ),
        io::ErrorKind::ReadOnlyFilesystem => Some(
            "the file system is mounted read-only, often after an I/O error: see `dmesg`, then remount it",
        ),
        _ => None,
    };
    let error = HostError::io(format!("{action} {}", path.display()), error);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Removes the remains of something that failed. The failure is what the caller reports; remains that will not go are
/// only logged, since whoever makes the same thing again begins by removing them.
pub(crate) fn remove_remains(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "could not remove an unfinished file");
    }
}

/// Makes what was renamed, made or removed in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), HostError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| failed("flush directory", directory, error))
}

/// Makes `path`, a directory only its owner can enter. Its parent exists. Not durable until the parent is synced.
pub(crate) fn ensure_directory(path: &Path) -> Result<Ensured, HostError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(Ensured::Created),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
            Ok(Ensured::AlreadyPresent)
        }
        Err(error) => Err(failed("make directory", path, error)),
    }
}

/// Makes a new file that only its owner can read, empty, to be written. An older one of that name is emptied.
pub(crate) fn create_file(path: &Path) -> Result<File, HostError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed("create", path, error))
}

/// Opens an existing file to be read.
pub(crate) fn open_file(path: &Path) -> Result<File, HostError> {
    File::open(path).map_err(|error| failed("open", path, error))
}

/// Opens a file or a device as `options` say.
///
/// The first to open a ZFS volume needs a lock that importing or making any pool holds, and after a second is told to try
/// again by a number that is meant for the kernel alone: `zvol_open` of module/os/linux/zfs/zvol_os.c in OpenZFS.
pub(crate) fn open_device(options: &OpenOptions, path: &Path) -> io::Result<File> {
    const ERESTARTSYS: i32 = 512;
    // Each takes a second.
    for _ in 0..20 {
        match options.open(path) {
            Err(error) if error.raw_os_error() == Some(ERESTARTSYS) => {}
            opened => return opened,
        }
    }
    options.open(path)
}

/// Renames `from` to `to`, which must not exist ([`ErrorKind::AlreadyExists`]). Not durable until both directories are
/// synced.
pub(crate) fn rename_to_new(from: &Path, to: &Path) -> Result<(), HostError> {
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        from,
        rustix::fs::CWD,
        to,
        RenameFlags::NOREPLACE,
    )
    .map_err(|error| {
        failed(
            &format!("rename {} to", from.display()),
            to,
            io::Error::from(error),
        )
    })
}

/// Whether something exists at `path`. Unlike [`Path::exists`], an error is not "no".
pub(crate) fn exists(path: &Path) -> Result<bool, HostError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// The length of a file.
pub(crate) fn length(path: &Path) -> Result<u64, HostError> {
    fs::metadata(path)
        .map(|metadata| metadata.len())
        .map_err(|error| failed("look at", path, error))
}

/// Ensures that there is no file at `path`. Not durable until the directory is synced.
pub(crate) fn remove_file(path: &Path) -> Result<Removed, HostError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(Removed::Removed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::AlreadyAbsent),
        Err(error) => Err(failed("remove", path, error)),
    }
}

/// Ensures that there is nothing at `path`, whole trees included. Symbolic links are removed, not followed. Not durable
/// until the directory above is synced.
pub(crate) fn remove_tree(path: &Path) -> Result<Removed, HostError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => Ok(Removed::Removed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::AlreadyAbsent),
        Err(error) => Err(failed("remove", path, error)),
    }
}

/// Replaces the file `name` in `directory` by one with `content`, by one atomic rename. Durable on return.
///
/// A crash leaves either the old or the new content. If it fails, the old content is there, except when only the last
/// step, the flush of the directory, failed: then the new content is there and may not survive a power loss.
pub(crate) fn replace_file(directory: &Path, name: &str, content: &[u8]) -> Result<(), HostError> {
    let path = directory.join(name);
    let temporary = directory.join(format!("{name}.new"));
    let mut file = create_file(&temporary)?;
    let written = file
        .write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|error| failed("write", &temporary, error))
        .and_then(|()| {
            fs::rename(&temporary, &path).map_err(|error| failed("replace", &path, error))
        });
    if written.is_err() {
        remove_remains(&temporary);
    }
    written?;
    sync_directory(directory)
}

/// Writes a file that nobody reads before it is sealed. An older one of that name is overwritten. Not durable.
pub(crate) fn write_file(path: &Path, content: &[u8]) -> Result<(), HostError> {
    create_file(path)?
        .write_all(content)
        .map_err(|error| failed("write", path, error))
}

/// Makes a file that does not exist yet, with the content that `fill` writes. Durable on return; if it fails, the file
/// does not exist.
pub(crate) fn create_whole(
    path: &Path,
    fill: impl FnOnce(&File) -> Result<(), HostError>,
) -> Result<(), HostError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed("create", path, error))?;
    let made = fill(&file).and_then(|()| {
        file.sync_all()
            .map_err(|error| failed("flush", path, error))
    });
    if made.is_err() {
        remove_remains(path);
    }
    made?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Makes every file and directory under `directory` durable, itself included, deepest first.
pub(crate) fn sync_tree(directory: &Path) -> Result<(), HostError> {
    sync_tree_after(directory, &|_, _| Ok(()))
}

/// [`sync_tree`], and files become writable by nobody, readable by whom they were: whatever made them, a descriptor that
/// was opened to read cannot be reopened to write.
pub(crate) fn seal_tree(directory: &Path) -> Result<(), HostError> {
    sync_tree_after(directory, &set_read_only)
}

fn sync_tree_after(
    directory: &Path,
    prepare: &dyn Fn(&File, &Path) -> Result<(), HostError>,
) -> Result<(), HostError> {
    for entry in entries(directory)? {
        let path = entry.path();
        let kind = entry
            .file_type()
            .map_err(|error| failed("look at", &path, error))?;
        if kind.is_dir() {
            sync_tree_after(&path, prepare)?;
        } else if kind.is_file() {
            let file = open_file(&path)?;
            prepare(&file, &path)?;
            file.sync_all()
                .map_err(|error| failed("flush", &path, error))?;
        }
    }
    sync_directory(directory)
}

/// Says of a file that it will not change any more. Root is not held by it; other users are, also through a descriptor
/// in `/proc/self/fd` (INV-25).
pub(crate) fn set_read_only(file: &File, path: &Path) -> Result<(), HostError> {
    // Who may read it stays as it is: a box's own uid maps a memory.
    file.metadata()
        .map(|metadata| fs::Permissions::from_mode(metadata.permissions().mode() & 0o444))
        .and_then(|readable| file.set_permissions(readable))
        .map_err(|error| failed("set the permissions of", path, error))
}

/// The entries of a directory; none if it does not exist.
pub(crate) fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>, HostError> {
    match fs::read_dir(directory) {
        Ok(entries) => entries
            .collect::<io::Result<_>>()
            .map_err(|error| failed("list", directory, error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("list", directory, error)),
    }
}

/// Bytes that the file system stores for the file at `path`, what it shares with other files included (INV-27).
///
/// # Errors
/// The file cannot be looked at.
pub fn allocated(path: &Path) -> Result<Bytes, HostError> {
    fs::symlink_metadata(path)
        .map(|metadata| Bytes(metadata.blocks() * STAT_BLOCK))
        .map_err(|error| failed("look at", path, error))
}

/// Bytes that the file system stores for everything under `path`. What disappears meanwhile counts as nothing.
///
/// # Errors
/// A directory cannot be listed.
pub fn allocated_tree(path: &Path) -> Result<Bytes, HostError> {
    allocated_without(path, None)
}

/// [`allocated_tree`], without what is at `except`.
pub(crate) fn allocated_without(path: &Path, except: Option<&Path>) -> Result<Bytes, HostError> {
    if except == Some(path) {
        return Ok(Bytes(0));
    }
    let own = match allocated(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Bytes(0)),
        own => own?,
    };
    if !path.is_dir() || path.is_symlink() {
        return Ok(own);
    }
    entries(path)?.iter().try_fold(own, |sum, entry| {
        Ok(sum + allocated_without(&entry.path(), except)?)
    })
}

/// Bytes that the file system stores for `file` alone: extents it shares with another file (a clone) do not count.
///
/// Asks the file system for its extents (`FS_IOC_FIEMAP`, Documentation/filesystems/fiemap.rst in Linux) and flushes
/// the file first, since data not yet written has no extent. Costs time in proportion to the number of extents. A file
/// system without extents never shares them: there it is [`allocated`].
///
/// # Errors
/// The file cannot be opened, flushed or mapped.
pub fn allocated_exclusively(path: &Path) -> Result<Bytes, HostError> {
    let file = open_file(path)?;
    match sys::exclusive_extents(&file) {
        Ok(bytes) => Ok(Bytes(bytes)),
        Err(Errno::OPNOTSUPP | Errno::NOTTY) => allocated(path),
        Err(error) => Err(failed("list the extents of", path, error.into())),
    }
}

/// A stretch of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Bytes that are stored.
    Data(&'a [u8]),
    /// This many bytes that the file system stores nothing for; they read as zeros.
    Hole(u64),
}

impl Chunk<'_> {
    /// Its length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no stretch is empty")]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Hole(length) => *length,
        }
    }
}

/// Walks `file` from its start to its end: holes as holes where the file system can tell (`SEEK_DATA`, lseek(2)), as
/// data where it cannot. Data comes in pieces of at most 1 MiB, holes in pieces of at most 64 MiB.
///
/// # Errors
/// Reading failed, the file was cut short meanwhile, or `each` failed.
pub fn for_each_chunk(
    file: &File,
    mut each: impl FnMut(Chunk<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let end = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    let hole = |mut length: u64, each: &mut dyn FnMut(Chunk<'_>) -> io::Result<()>| {
        while length > 0 {
            let part = length.min(HOLE);
            each(Chunk::Hole(part))?;
            length -= part;
        }
        io::Result::Ok(())
    };
    let mut done = 0;
    for_each_extent(file, |extent| {
        hole(extent.start - done, &mut each)?;
        let mut at = extent.start;
        while at < extent.end {
            let part = clamp_usize(extent.end - at).min(buffer.len());
            let bytes = &mut buffer[..part];
            file.read_exact_at(bytes, at)?;
            each(Chunk::Data(bytes))?;
            at += part as u64;
        }
        done = extent.end;
        Ok(())
    })?;
    hole(end.saturating_sub(done), &mut each)
}

/// Where `file` stores something, from its start to its end; all of it where the file system cannot tell.
pub(crate) fn for_each_extent(
    file: &File,
    mut each: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            // From here to the end there is only a hole.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        if start == end {
            break;
        }
        at = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(hole) => hole.min(end),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(error) => return Err(error.into()),
        };
        each(start..at)?;
    }
    Ok(())
}

/// SHA-256 of a file's content, holes read as the zeros they stand for: they cost the hashing of zeros but no reading.
/// `progress` hears how many bytes have been hashed, and of how many.
///
/// # Errors
/// Reading failed.
pub fn sha256(file: &File, mut progress: impl FnMut(u64, u64)) -> io::Result<Digest> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let total = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut done = 0;
    for_each_chunk(file, |chunk| {
        match chunk {
            Chunk::Data(bytes) => hash.update(bytes),
            Chunk::Hole(mut length) => {
                while length > 0 {
                    let part = clamp_usize(length).min(ZEROS.len());
                    hash.update(&ZEROS[..part]);
                    length -= part as u64;
                }
            }
        }
        done += chunk.len();
        progress(done, total);
        Ok(())
    })?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// `n` as an index. Every `n` here is bounded by the length of a buffer, or is about to be.
pub(crate) fn clamp_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Whether all of `bytes` are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // The compiler turns the fold of a fixed-size piece into vector instructions; an early exit per byte would not be.
    let (pieces, rest) = bytes.as_chunks::<64>();
    pieces
        .iter()
        .all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Writes `bytes` at `offset` of a sparse file: blocks of zeros become holes instead of data.
pub(crate) fn write_sparse(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    for_each_stretch(bytes, offset, |at, stretch, is_zero| {
        if is_zero {
            punch(file, at, stretch.len() as u64)
        } else {
            file.write_all_at(stretch, at)
        }
    })
}

/// The same where the file has a hole: blocks of zeros are there already.
pub(crate) fn write_into_hole(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    for_each_stretch(bytes, offset, |at, stretch, is_zero| {
        if is_zero {
            Ok(())
        } else {
            file.write_all_at(stretch, at)
        }
    })
}

/// Cuts what goes to `offset` of a file into stretches of blocks that are all zero, or all not.
fn for_each_stretch(
    bytes: &[u8],
    offset: u64,
    mut each: impl FnMut(u64, &[u8], bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        // Up to the next block boundary of the file, so that a hole is one the file system can make.
        let to_boundary = ZERO_GRAIN - clamp_usize(at % ZERO_GRAIN as u64);
        let first = &rest[..to_boundary.min(rest.len())];
        let zero = is_zero(first);
        let mut length = first.len();
        for block in rest[length..].chunks(ZERO_GRAIN) {
            if is_zero(block) != zero {
                break;
            }
            length += block.len();
        }
        let (stretch, after) = rest.split_at(length);
        each(at, stretch, zero)?;
        at += stretch.len() as u64;
        rest = after;
    }
    Ok(())
}

/// Writes what the page cache has of a file out, and waits for the disk to have it. Not durable: that takes more.
pub(crate) fn write_out(file: &File) -> io::Result<()> {
    match sys::write_out(file) {
        // A file system that has no such thing writes when it likes.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        written => written,
    }
}

/// Drops what the page cache has of a file that is durable, so that what is read next comes from the disk. As far as the
/// file system does that: it is advice.
pub(crate) fn forget_cached(file: &File) {
    if let Err(error) = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed) {
        tracing::debug!(%error, "what was written is read back from memory");
    }
}

/// Makes a stretch of `file` zero, without storage where the file system can do that. The file's length stays.
pub(crate) fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match rustix::fs::fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        offset,
        length,
    ) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let end = (offset + length).min(file.metadata()?.len());
            let zeros = [0; ZERO_GRAIN];
            let mut at = offset;
            while at < end {
                let part = clamp_usize(end - at).min(zeros.len());
                file.write_all_at(&zeros[..part], at)?;
                at += part as u64;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives the storage of a stretch of `file` back, which reads as zero then. Where the file system cannot, nothing changes.
pub(crate) fn give_back(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// How [`sparse_copy`] got the data across.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// The file system shares the extents: nothing was copied.
    Shared,
    /// Data was read and written; holes and blocks of zeros stayed holes.
    Copied,
}

/// Makes `to`, an empty file, equal to `from`: by sharing extents where the file system can (`FICLONE`, ioctl_ficlone(2)),
/// else by copying what is not zero. Not durable until `to` is synced.
///
/// # Errors
/// Reading or writing failed; `to` is then incomplete.
pub fn sparse_copy(from: &File, to: &File) -> io::Result<Copied> {
    if share(from, to)? {
        return Ok(Copied::Shared);
    }
    to.set_len(from.metadata()?.len())?;
    let mut at = 0;
    for_each_chunk(from, |chunk| {
        if let Chunk::Data(bytes) = chunk {
            write_into_hole(to, bytes, at)?;
        }
        at += chunk.len();
        Ok(())
    })?;
    Ok(Copied::Copied)
}

/// Makes `to`, an empty file, equal to `from` by sharing its extents (`FICLONE`, ioctl_ficlone(2)). Whether that could be
/// done.
pub(crate) fn share(from: &File, to: &File) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        // What the manual page lists for "cannot share these two": another file system, one that cannot share at all,
        // one of the files not being suitable.
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::PERM) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether files in a directory can [share](share) their blocks. That cannot be tried where nothing can be written: then
/// they cannot.
pub(crate) fn shares_blocks(directory: &Path) -> bool {
    let tried = tempfile::tempfile_in(directory).and_then(|mut from| {
        from.write_all(&[1; ZERO_GRAIN])?;
        share(&from, &tempfile::tempfile_in(directory)?)
    });
    tried.unwrap_or(false)
}

/// The room on the file system of `path`.
///
/// # Errors
/// The file system does not answer.
pub fn space(path: &Path) -> Result<Space, HostError> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|error| failed("ask for the free space of", path, error.into()))?;
    Ok(Space {
        place: format!("the file system of {}", path.display()),
        total: Bytes(stat.f_blocks.saturating_mul(stat.f_frsize)),
        available: Bytes(stat.f_bavail.saturating_mul(stat.f_frsize)),
    })
}

/// What kind of file system `path` is on, for people: its name, or its number in hexadecimal.
pub(crate) fn file_system(path: &Path) -> String {
    // Magic numbers: statfs(2).
    const NAMES: [(u64, &str); 7] = [
        (0xef53, "ext2/3/4"),
        (0x5846_5342, "XFS"),
        (0x9123_683e, "btrfs"),
        (0x0102_1994, "tmpfs"),
        (0x794c_7630, "overlayfs"),
        (0x6969, "NFS"),
        (0x2fc1_2fc1, "ZFS"),
    ];
    match rustix::fs::statfs(path) {
        Ok(stat) => {
            // Signed on some architectures, and then sign-extended: the numbers have 32 bits.
            let magic = u64::from_ne_bytes(stat.f_type.to_ne_bytes()) & 0xffff_ffff;
            NAMES.iter().find(|(known, _)| *known == magic).map_or_else(
                || format!("type {magic:#x}"),
                |(_, name)| (*name).to_owned(),
            )
        }
        Err(error) => format!("type unknown: {error}"),
    }
}

/// Reads a file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, HostError> {
    let mut content = Vec::new();
    open_file(path)?
        .take(limit + 1)
        .read_to_end(&mut content)
        .map_err(|error| failed("read", path, error))?;
    if content.len() as u64 > limit {
        return Err(HostError::new(
            ErrorKind::Invalid,
            format!(
                "{} is longer than {}: it is not what its name says",
                path.display(),
                Bytes(limit)
            ),
        ));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; clamp_usize(file.metadata().unwrap().len())];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    #[test]
    fn zeros_are_zero_wherever_the_other_byte_is() {
        assert!(is_zero(&[]));
        for length in [1, 63, 64, 65, 4096, 4097] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in [0, length / 2, length - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn inv_29_sparse_writes_replace_what_was_there_at_any_alignment() {
        for offset in [0_usize, 1, 511, 4095, 4096, 5000] {
            for length in [1, 512, 4096, 8193, 20_000] {
                for pattern in 0..4_usize {
                    let file = tempfile::tempfile().unwrap();
                    let mut expected = vec![0xee; 32 << 10];
                    file.write_all_at(&expected, 0).unwrap();
                    // Nothing, all, every other block, and a byte at the end that is not zero.
                    let mut bytes = vec![0; length];
                    for (block, part) in bytes.chunks_mut(ZERO_GRAIN).enumerate() {
                        if pattern == 1 || pattern == 2 && block % 2 == 1 {
                            part.fill(7);
                        }
                    }
                    if pattern == 3 {
                        bytes[length - 1] = 9;
                    }
                    write_sparse(&file, &bytes, offset as u64).unwrap();
                    expected[offset..offset + length].copy_from_slice(&bytes);
                    assert_eq!(content(&file), expected, "{offset} {length} {pattern}");
                }
            }
        }
    }

    #[test]
    fn inv_27_a_sparse_copy_is_equal_and_stores_no_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let from = create_file(&directory.path().join("from")).unwrap();
        from.set_len((200 << 20) + 123).unwrap();
        from.write_all_at(&[1; 5000], 0).unwrap();
        from.write_all_at(&vec![0; 8 << 20], 4 << 20).unwrap();
        from.write_all_at(&[2; 70_000], (150 << 20) - 1).unwrap();
        from.write_all_at(&[3; 3], 200 << 20).unwrap();
        from.sync_all().unwrap();
        let path = directory.path().join("to");
        let to = create_file(&path).unwrap();
        let copied = sparse_copy(&from, &to).unwrap();
        to.sync_all().unwrap();
        assert_eq!(
            sha256(&from, |_, _| {}).unwrap(),
            sha256(&to, |_, _| {}).unwrap()
        );
        let mut seen = 0;
        for_each_chunk(&to, |chunk| {
            seen += chunk.len();
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, (200 << 20) + 123);
        if copied == Copied::Copied {
            let stored = allocated(&path).unwrap();
            assert!(stored < Bytes(256 << 10), "{stored}");
        }
    }

    #[test]
    fn inv_11_a_replacement_that_fails_leaves_the_old_file_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        replace_file(directory.path(), "file", b"old").unwrap();
        replace_file(directory.path(), "file", b"new").unwrap();
        // A directory cannot be replaced by a file: the rename is what fails.
        fs::create_dir(directory.path().join("directory")).unwrap();
        replace_file(directory.path(), "directory", b"content").unwrap_err();
        let mut names: Vec<_> = entries(directory.path())
            .unwrap()
            .iter()
            .map(fs::DirEntry::file_name)
            .collect();
        names.sort();
        assert_eq!(names, ["directory", "file"]);
        assert_eq!(fs::read(directory.path().join("file")).unwrap(), b"new");
    }

    #[test]
    fn what_is_made_whole_is_not_there_when_it_fails() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let failure = create_whole(&path, |file| {
            file.write_all_at(b"half", 0).unwrap();
            Err(HostError::new(ErrorKind::Other, "interrupted"))
        });
        assert!(failure.is_err());
        assert!(!exists(&path).unwrap());
        create_whole(&path, |_| Ok(())).unwrap();
        let again = create_whole(&path, |_| Ok(())).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        assert!(exists(&path).unwrap(), "what was there stays");
    }

    #[test]
    fn links_in_a_tree_are_removed_and_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, outside) = (
            directory.path().join("tree"),
            directory.path().join("outside"),
        );
        fs::create_dir_all(tree.join("inner")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), b"kept").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("inner/link")).unwrap();
        assert_eq!(remove_tree(&tree).unwrap(), Removed::Removed);
        assert_eq!(remove_tree(&tree).unwrap(), Removed::AlreadyAbsent);
        std::os::unix::fs::symlink(&outside, &tree).unwrap();
        assert_eq!(allocated_tree(&tree).unwrap(), allocated(&tree).unwrap());
        assert_eq!(remove_tree(&tree).unwrap(), Removed::Removed);
        assert!(outside.join("kept").exists());
    }

    #[test]
    fn a_file_longer_than_its_bound_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [1; 10]).unwrap();
        assert_eq!(read_bounded(&path, 10).unwrap(), [1; 10]);
        let error = read_bounded(&path, 9).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
