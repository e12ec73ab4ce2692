//! A tar archive as a root directory. The archive is not trusted.
//!
//! Members are unpacked below a directory of our own and nowhere else: names that are absolute or climb out are refused,
//! and so is a member whose directory is, by way of a link, outside (the `tar` crate checks). Devices are refused; a guest
//! has its own. What a decoder or a header can make us read, store or remember is bounded.

use std::{
    cell::Cell,
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Component, Path},
};

use tar::{Archive, EntryType};

use super::{
    super::{ImageError, Io, Progress, Stage, archive::Compression, staging::make_private_dir},
    mib,
};

/// More names than any root filesystem has.
const MAX_MEMBERS: u64 = 8_000_000;
/// What the headers of one member may take, long names and extended attributes included. They are held in memory.
const MAX_HEADER_BYTES: u64 = 4 << 20;

/// Unpacks `archive` into the new directory `root`, at most `limit` bytes of it.
pub(super) fn unpack(
    archive: &Path,
    root: &Path,
    limit: u64,
    progress: &dyn Progress,
) -> Result<(), ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NeedsRoot {
            op: "unpacking an archive with its owners",
        });
    }
    let file = File::open(archive).at("open", archive)?;
    let total = file.metadata().at("look at", archive)?.len();
    let read = Cell::new(0);
    let counted = Counted {
        from: file,
        read: &read,
    };
    make_private_dir(root)?;
    let bad = |reason: String| ImageError::BadArchive {
        path: archive.to_owned(),
        reason,
    };
    let stream = Compression::reader(counted).map_err(|error| bad(error.to_string()))?;

    // The crate reads a member's extension headers into memory when it goes to the next member. Only then is the allowance
    // finite: each member's data is read to its end before.
    let allowance = Cell::new(u64::MAX);
    let mut tar = Archive::new(Allowed {
        from: stream,
        allowance: &allowance,
    });
    tar.set_preserve_permissions(true);
    tar.set_preserve_ownerships(true);
    tar.set_preserve_mtime(true);
    tar.set_unpack_xattrs(true);
    tar.set_overwrite(true);

    let mut members = 0;
    let mut bytes = 0;
    let mut entries = tar.entries().map_err(|error| bad(error.to_string()))?;
    loop {
        allowance.set(MAX_HEADER_BYTES);
        let Some(entry) = entries.next() else { break };
        let too_long = allowance.replace(u64::MAX) == 0;
        let mut entry = entry.map_err(|error| {
            // The crate repeats the bytes that should have been a number, and of a foreign file they are anything.
            bad(if members == 0 && !too_long {
                "it is no tar archive".to_owned()
            } else {
                error.to_string()
            })
        })?;
        let name = entry
            .path()
            .map_err(|error| bad(error.to_string()))?
            .into_owned();
        let member = |reason: &str| bad(format!("member {:?} {reason}", name.display()));
        members += 1;
        bytes = u64::saturating_add(bytes, entry.size());
        if members > MAX_MEMBERS {
            return Err(bad(format!("it has more than {MAX_MEMBERS} members")));
        }
        if bytes > limit {
            return Err(ImageError::TooSmall {
                size_mib: mib(limit),
            });
        }
        progress.report(Stage::Unpack, read.get(), Some(total));
        if !stays_inside(&name) {
            return Err(member("leads out of the root directory"));
        }
        if is_pax_sparse(&mut entry).map_err(|error| bad(error.to_string()))? {
            return Err(member(
                "is a sparse file in PAX format; use --format=gnu, or no --sparse",
            ));
        }
        match entry.header().entry_type() {
            EntryType::Block | EntryType::Char => {
                // Every container image has some below /dev, where the guest mounts its own.
                if name
                    .components()
                    .find(|part| matches!(part, Component::Normal(_)))
                    != Some(Component::Normal("dev".as_ref()))
                {
                    return Err(member("is a device"));
                }
            }
            EntryType::Fifo => {
                // Nothing that is at rest needs one; the crate would make a regular file of it.
            }
            EntryType::Link => {
                let target = entry
                    .link_name()
                    .map_err(|error| bad(error.to_string()))?
                    .unwrap_or_default()
                    .into_owned();
                if !stays_inside(&target) {
                    return Err(member(
                        "is a hard link that leads out of the root directory",
                    ));
                }
                extract(&mut entry, root, archive, &name)?;
            }
            _ => extract(&mut entry, root, archive, &name)?,
        }
        io::copy(&mut entry, &mut io::sink()).map_err(|error| bad(error.to_string()))?;
    }
    if members == 0 {
        return Err(bad("it is empty or no tar archive".to_owned()));
    }
    if is_container_image(root) {
        return Err(bad(
            "it is a container image, layers and all; `docker export` or `podman export` makes a root of one".to_owned(),
        ));
    }
    // It is ours until here: the crate leaves the top directory alone.
    fs::set_permissions(root, Permissions::from_mode(0o755)).at("set the mode of", root)
}

/// What `docker save` and its like write, told by the files that only they have at the top.
fn is_container_image(root: &Path) -> bool {
    let regular =
        |name: &str| fs::symlink_metadata(root.join(name)).is_ok_and(|file| file.is_file());
    regular("oci-layout") || (regular("manifest.json") && regular("repositories"))
}

/// Makes the directories above a member that the archive does not mention, readable like any system directory.
/// Descends through real directories only: what lies behind a link is for the crate to refuse.
fn make_missing_parents(root: &Path, name: &Path) -> Result<(), ImageError> {
    let Some(parent) = name.parent() else {
        return Ok(());
    };
    let mut dir = root.to_owned();
    for part in parent.components() {
        dir.push(part);
        match fs::symlink_metadata(&dir) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(&dir).at("make the directory", &dir)?;
                fs::set_permissions(&dir, Permissions::from_mode(0o755))
                    .at("set the mode of", &dir)?;
            }
            Err(error) => return Err(ImageError::io("look at", &dir, error)),
        }
    }
    Ok(())
}

fn extract(
    entry: &mut tar::Entry<'_, impl Read>,
    root: &Path,
    archive: &Path,
    name: &Path,
) -> Result<(), ImageError> {
    let bad = |reason: String| ImageError::BadArchive {
        path: archive.to_owned(),
        reason,
    };
    make_missing_parents(root, name)?;
    match entry.unpack_in(root) {
        Ok(true) => Ok(()),
        Ok(false) => Err(bad(format!(
            "member {:?} leads out of the root directory",
            name.display()
        ))),
        Err(error) => match ImageError::io("unpack into", root, error) {
            full @ ImageError::NoSpace { .. } => Err(full),
            ImageError::Io { source, .. } => {
                let cause = std::error::Error::source(&source)
                    .map(|cause| format!(": {cause}"))
                    .unwrap_or_default();
                Err(bad(format!("member {:?}: {source}{cause}", name.display())))
            }
            other => Err(other),
        },
    }
}

/// The crate would take the map of such a file for its content.
fn is_pax_sparse(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<bool> {
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            if extension?.key_bytes().starts_with(b"GNU.sparse.") {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Relative, and never above where it starts.
fn stays_inside(path: &Path) -> bool {
    path.components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// Counts what is read from the archive, for progress.
struct Counted<'a> {
    from: File,
    read: &'a Cell<u64>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// Fails once its allowance is used up.
struct Allowed<'a, R> {
    from: R,
    allowance: &'a Cell<u64>,
}

impl<R: Read> Read for Allowed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.allowance.get();
        if left == 0 {
            return Err(io::Error::other("the headers of a member are too large"));
        }
        let most = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = self.from.read(&mut buffer[..most])?;
        self.allowance.set(left - read as u64);
        Ok(read)
    }
}
