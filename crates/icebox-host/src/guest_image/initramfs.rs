//! The initramfs: the agent as `/init`, and the kernel modules it loads before it can see a disk.
//!
//! ```text
//!   /init                          icebox-agent, static
//!   /etc/modules.load-order        absolute paths, one per line, in the order to load them
//!   /lib/modules/001-name.ko       uncompressed
//!   /dev/console                   character device 5:1, so that /init has standard streams from the start
//!   /dev /proc /sys /run           empty
//! ```
//!
//! The archive is the same, byte for byte, for the same kernel and agent. It is not compressed: it is read from the page
//! cache, and unpacking costs the guest more than copying (most of all under emulation).

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use cpio::newc::{self, ModeFileType};
use icebox_engine::id::Digest;

use super::{ImageError, Io, digest::digest_of, kernel::Kernel, staging::sync_parent};

/// Where the agent finds the paths of the modules to load.
pub const LOAD_ORDER: &str = "/etc/modules.load-order";

/// An initramfs in its place.
#[derive(Clone, Debug)]
pub struct Initramfs {
    /// The digest of the archive.
    pub digest: Digest,
    /// The digest of the agent in it.
    pub agent: Digest,
    /// Where it is.
    pub path: PathBuf,
}

/// The initramfs of `kernel` with the agent at `agent`, made if it is not there yet. Blocks briefly.
///
/// # Errors
/// The agent or a module cannot be read, or the archive cannot be written.
pub fn ensure(kernel: &Kernel, agent: &Path) -> Result<Initramfs, ImageError> {
    let agent_bytes = fs::read(agent).at("read the agent", agent)?;
    let mut modules = Vec::new();
    for path in kernel.modules() {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        modules.push((name, fs::read(&path).at("read", &path)?));
    }
    let mut archive = Vec::new();
    write(&mut archive, &agent_bytes, &modules).at("assemble the initramfs for", kernel.dir())?;

    let digest = digest_of(&archive);
    let agent = digest_of(&agent_bytes);
    let path = kernel.dir().join(format!("initramfs-{agent}.cpio"));
    // An older version of this code may have made another archive of the same two; the bytes decide.
    if fs::read(&path).is_ok_and(|there| there == archive) {
        fs::set_permissions(&path, readable()).at("set the mode of", &path)?;
        return Ok(Initramfs {
            digest,
            agent,
            path,
        });
    }
    let mut file =
        tempfile::NamedTempFile::new_in(kernel.dir()).at("make a file in", kernel.dir())?;
    file.write_all(&archive)
        .and_then(|()| file.as_file().set_permissions(readable()))
        .and_then(|()| file.as_file().sync_all())
        .at("write", file.path())?;
    file.persist(&path)
        .map_err(|error| error.error)
        .at("move an initramfs to", &path)?;
    sync_parent(&path)?;
    Ok(Initramfs {
        digest,
        agent,
        path,
    })
}

/// VMMs open it by path, each as a uid of its own; what keeps others away is the data directory.
fn readable() -> fs::Permissions {
    fs::Permissions::from_mode(0o444)
}

/// Writes the archive. `modules` are (file name, content) in load order.
fn write(out: &mut Vec<u8>, agent: &[u8], modules: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut entries = Entries { out, next_inode: 1 };
    for dir in ["dev", "proc", "sys", "run", "etc", "lib", "lib/modules"] {
        entries.add(dir, ModeFileType::Directory, 0o755, &[], (0, 0))?;
    }
    entries.add("dev/console", ModeFileType::Char, 0o600, &[], (5, 1))?;
    entries.add("init", ModeFileType::Regular, 0o755, agent, (0, 0))?;
    let mut order = String::new();
    for (name, bytes) in modules {
        let path = format!("lib/modules/{name}");
        entries.add(&path, ModeFileType::Regular, 0o644, bytes, (0, 0))?;
        order += &format!("/{path}\n");
    }
    entries.add(
        LOAD_ORDER.trim_start_matches('/'),
        ModeFileType::Regular,
        0o644,
        order.as_bytes(),
        (0, 0),
    )?;
    newc::trailer(out)?;
    Ok(())
}

struct Entries<'a> {
    out: &'a mut Vec<u8>,
    next_inode: u32,
}

impl Entries<'_> {
    /// Owner root, time 0, inodes in sequence: nothing that differs between two runs.
    fn add(
        &mut self,
        path: &str,
        kind: ModeFileType,
        permissions: u32,
        content: &[u8],
        device: (u32, u32),
    ) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other("a member of 4 GiB or more"))?;
        let mut writer = newc::Builder::new(path)
            .ino(self.next_inode)
            .nlink(1)
            .mode(permissions)
            .set_mode_file_type(kind)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut *self.out, size);
        writer.write_all(content)?;
        writer.finish()?;
        self.next_inode += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn modules() -> Vec<(String, Vec<u8>)> {
        vec![
            ("001-virtio_ring.ko".to_owned(), vec![1; 1001]),
            ("002-virtio.ko".to_owned(), vec![2; 3]),
        ]
    }

    #[test]
    fn the_archive_holds_what_the_agent_expects() {
        let mut archive = Vec::new();
        write(&mut archive, b"the agent", &modules()).unwrap();
        let mut rest = archive.as_slice();
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            let (name, mode) = (entry.name().to_owned(), entry.mode());
            let device = (entry.rdev_major(), entry.rdev_minor());
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            rest = reader.finish().unwrap();
            seen.push((name, mode, device, content));
        }
        let find = |name: &str| seen.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!(find("init").1, 0o100_755);
        assert_eq!(find("init").3, b"the agent");
        assert_eq!(find("dev/console").1, 0o020_600);
        assert_eq!(find("dev/console").2, (5, 1));
        assert_eq!(find("lib/modules/001-virtio_ring.ko").3, vec![1; 1001]);
        assert_eq!(
            find("etc/modules.load-order").3,
            b"/lib/modules/001-virtio_ring.ko\n/lib/modules/002-virtio.ko\n"
        );
        // The kernel makes no missing directories: each must come before what is in it.
        for (at, (name, ..)) in seen.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(
                    seen[..at].iter().any(|entry| entry.0 == parent),
                    "{name} before {parent}"
                );
            }
        }
    }

    #[test]
    fn the_archive_is_the_same_for_the_same_content() {
        let (mut one, mut two) = (Vec::new(), Vec::new());
        write(&mut one, b"agent", &modules()).unwrap();
        write(&mut two, b"agent", &modules()).unwrap();
        assert!(one == two);
    }
}
