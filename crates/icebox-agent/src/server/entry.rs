//! What is known about a file, directory or link, as clients see it. Everything here blocks.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
};

use icebox_agent_api::{
    METADATA_XATTR_PREFIX,
    proto::filesystem::{EntryInfo, FileType},
};
use rustix::{buffer::spare_capacity, io::Errno};

use crate::users::Names;

/// An extended attribute is at most this long on Linux (`XATTR_SIZE_MAX`), and so is a list of names.
const XATTR_MAX: usize = 64 << 10;

/// Describes what is at `path`. A symbolic link is described itself, but its type and mode are those of what it leads
/// to: that is what SDKs expect.
pub(super) fn describe(path: &Path, names: &Names) -> io::Result<EntryInfo> {
    let own = fs::symlink_metadata(path)?;
    let target = own.is_symlink().then(|| fs::canonicalize(path).ok());
    let (kind, mode) = match &target {
        None => (file_type(&own), own.mode()),
        Some(target) => match target.as_ref().and_then(|target| fs::metadata(target).ok()) {
            Some(metadata) => (file_type(&metadata), metadata.mode()),
            None => (FileType::FILE_TYPE_SYMLINK, 0),
        },
    };
    let symlink_target = target.map(|target| match target {
        Some(target) => target.to_string_lossy().into_owned(),
        // It leads nowhere: say where to.
        None => fs::read_link(path)
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    });
    let modified = buffa_types::google::protobuf::Timestamp {
        seconds: own.mtime(),
        nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
        ..Default::default()
    };
    Ok(EntryInfo {
        name: path
            .file_name()
            .unwrap_or(OsStr::new("/"))
            .to_string_lossy()
            .into_owned(),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode: mode & 0o7777,
        permissions: permissions(&own),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: modified.into(),
        symlink_target,
        metadata: metadata_of(path).into_iter().collect(),
        ..EntryInfo::default()
    })
}

fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else if metadata.is_symlink() {
        FileType::FILE_TYPE_SYMLINK
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

/// Type and permission bits in the notation of Go's `fs.FileMode.String`, which SDKs hand on as it is.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let mode = metadata.mode();
    let is_device = kind.is_block_device() || kind.is_char_device();
    let flags = [
        (kind.is_dir(), 'd'),
        (kind.is_symlink(), 'L'),
        (is_device, 'D'),
        (kind.is_fifo(), 'p'),
        (kind.is_socket(), 'S'),
        (mode & 0o4000 != 0, 'u'),
        (mode & 0o2000 != 0, 'g'),
        (kind.is_char_device(), 'c'),
        (mode & 0o1000 != 0, 't'),
    ];
    let mut text: String = flags
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, flag)| flag)
        .collect();
    if text.is_empty() {
        text.push('-');
    }
    let bits = (0..9).map(|bit| {
        if mode & (0o400 >> bit) != 0 {
            b"rwx"[bit % 3]
        } else {
            b'-'
        }
    });
    text.extend(bits.map(char::from));
    text
}

/// The metadata that was uploaded with a file. None where the filesystem keeps none.
pub(super) fn metadata_of(path: &Path) -> BTreeMap<String, String> {
    let mut list = Vec::with_capacity(XATTR_MAX);
    if rustix::fs::llistxattr(path, spare_capacity(&mut list)).is_err() {
        return BTreeMap::new();
    }
    list.split(|byte| *byte == 0)
        .filter_map(|name| {
            let key = std::str::from_utf8(name)
                .ok()?
                .strip_prefix(METADATA_XATTR_PREFIX)?;
            let mut value = Vec::with_capacity(XATTR_MAX);
            rustix::fs::lgetxattr(path, OsStr::from_bytes(name), spare_capacity(&mut value))
                .ok()?;
            Some((key.to_owned(), String::from_utf8_lossy(&value).into_owned()))
        })
        .collect()
}

/// Replaces the metadata of an open file.
pub(super) fn set_metadata(file: &fs::File, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    let mut list = Vec::with_capacity(XATTR_MAX);
    match rustix::fs::flistxattr(file, spare_capacity(&mut list)) {
        Ok(_) => {}
        // Where there are no attributes there are none to remove.
        Err(Errno::NOTSUP) if metadata.is_empty() => return Ok(()),
        Err(errno) => return Err(errno.into()),
    }
    for name in list.split(|byte| *byte == 0) {
        let key = std::str::from_utf8(name)
            .ok()
            .and_then(|name| name.strip_prefix(METADATA_XATTR_PREFIX));
        if key.is_some_and(|key| !metadata.contains_key(key)) {
            rustix::fs::fremovexattr(file, OsStr::from_bytes(name))?;
        }
    }
    for (key, value) in metadata {
        let name = format!("{METADATA_XATTR_PREFIX}{key}");
        rustix::fs::fsetxattr(
            file,
            name,
            value.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn permissions_are_written_as_go_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        fs::write(&file, "").unwrap();
        for (mode, text) in [
            (0o644, "-rw-r--r--"),
            (0o4755, "urwxr-xr-x"),
            (0, "----------"),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(permissions(&fs::metadata(&file).unwrap()), text);
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(
            permissions(&fs::metadata(directory.path()).unwrap()),
            "dtrwxrwxrwx"
        );
        assert_eq!(
            permissions(&fs::metadata("/dev/null").unwrap()),
            "Dcrw-rw-rw-"
        );
    }

    #[test]
    fn a_link_has_the_type_and_mode_of_its_target() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        symlink(directory.path(), &link).unwrap();
        let entry = describe(&link, &Names::read()).unwrap();
        assert_eq!(entry.r#type, FileType::FILE_TYPE_DIRECTORY);
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
        assert_eq!(
            entry.symlink_target.as_deref(),
            directory.path().canonicalize().unwrap().to_str()
        );
        fs::remove_file(&link).unwrap();
        symlink("/nowhere", &link).unwrap();
        let entry = describe(&link, &Names::read()).unwrap();
        assert_eq!(entry.r#type, FileType::FILE_TYPE_SYMLINK);
        assert_eq!(entry.symlink_target.as_deref(), Some("/nowhere"));
    }
}
