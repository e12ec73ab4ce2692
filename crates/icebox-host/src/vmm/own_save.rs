//! Saves that a VMM writes by itself, to a directory of its own.
//!
//! What it wrote it could have kept open, and may be anything: nothing of it is ever published. State and memory are looked
//! at and copied, and the directory is empty between saves.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown,
};
use std::path::{Path, PathBuf};

use icebox_engine::host::{ErrorKind, HostError};
use icebox_engine::unit::PAGE_SIZE;
use rustix::fs::OFlags;

/// Largest device state that is accepted. Real ones have some hundred kilobytes.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// Largest guest memory that is believed.
const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Where one VMM writes its saves.
#[derive(Clone, Debug)]
pub(crate) struct SaveArea {
    directory: PathBuf,
}

impl SaveArea {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Makes it, for the uid of a box, if it is not there.
    pub(crate) fn create(&self, uid: u32) -> io::Result<()> {
        create_for(&self.directory, uid)
    }

    /// Removes everything in it.
    pub(crate) fn empty(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Copies the device state `name` to `path`, where it is to be kept. Returns its length. `message` says what is done.
    pub(crate) fn take_state(
        &self,
        name: &str,
        path: &Path,
        message: &str,
    ) -> Result<u64, HostError> {
        let failed = |error| HostError::io(message.to_owned(), error);
        let (state, bytes) = self.open(name).map_err(failed)?;
        if bytes == 0 || bytes > STATE_BYTES_MAX {
            return Err(not_credible(message, "device state", bytes));
        }
        copy_state(&state, bytes, path).map_err(failed)?;
        Ok(bytes)
    }

    /// Opens the memory `name`, which is to be copied and given back. Returns its length, too. `message` says what is done.
    pub(crate) fn open_memory(&self, name: &str, message: &str) -> Result<(File, u64), HostError> {
        let opened = self.open(name);
        let (memory, bytes) = opened.map_err(|error| HostError::io(message.to_owned(), error))?;
        if bytes == 0 || bytes > MEMORY_BYTES_MAX || bytes % PAGE_SIZE as u64 != 0 {
            return Err(not_credible(message, "guest memory", bytes));
        }
        Ok((memory, bytes))
    }

    /// A file that the VMM says it has written: nothing that it may have put there instead is followed or waited for.
    fn open(&self, name: &str) -> io::Result<(File, u64)> {
        let path = self.directory.join(name);
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&path)?;
        let meta = file.metadata()?;
        // With another name it would be something else, too.
        if meta.is_file() && meta.nlink() == 1 {
            Ok((file, meta.len()))
        } else {
            let what = format!("{} is no file of its own", path.display());
            Err(io::Error::other(what))
        }
    }
}

fn not_credible(message: &str, what: &str, bytes: u64) -> HostError {
    HostError::new(
        ErrorKind::Invalid,
        format!("{message}: {what} of {bytes} bytes is not credible"),
    )
}

fn copy_state(state: &File, length: u64, path: &Path) -> io::Result<()> {
    let mut bytes = Vec::new();
    state.take(length).read_to_end(&mut bytes)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)?
        .write_all(&bytes)
}

/// Makes a directory that only the uid of a box can use, if it is not there.
pub(crate) fn create_for(directory: &Path, uid: u32) -> io::Result<()> {
    if let Err(error) = DirBuilder::new().mode(0o700).create(directory)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error);
    }
    chown(directory, Some(uid), Some(uid))
}

/// Writes a file that the box's uid reads under a bind mount; nobody else on the host can enter its directory.
pub(crate) fn expose(path: &Path, content: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::write(path, content)?;
    fs::set_permissions(path, Permissions::from_mode(0o444))
}
