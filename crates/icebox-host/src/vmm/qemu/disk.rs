//! A sandbox's disk as QEMU block nodes.
//!
//! Every file is opened by the launcher and reaches QEMU as a descriptor in an *fdset*, a numbered set from which
//! QEMU takes the descriptor with the access mode it needs. The head's set holds a read-write and a read-only one,
//! since QEMU reopens the node read-only when a switch puts it under a new head.
//!
//! ```text
//!   guest ── virtio-blk ── head (qcow2) ── layer (qcow2) ── … ── base (raw)
//!                            │ file          │ file              │ file
//!                          fdset           fdset               fdset
//! ```
//!
//! The chain is spelled out node by node: what a file's header says about its backing file or format is never
//! believed. Nodes are named after a hash of their path, so that a daemon that did not start this QEMU can tell which
//! head is active.
//!
//! Cache mode of files: host page cache, guest flushes honoured (`cache.direct=off`, `cache.no-flush=off`). Bases and layers
//! are read by many sandboxes, and the page cache is where they share them; direct I/O would read them from disk once
//! per sandbox. Of block devices: around the page cache (`cache.direct=on`). What sandboxes share is cached below the
//! device, as the base's file; the device's own pages would be a second copy for each sandbox, and an error that comes when
//! such a page is written would come after the guest was told that all is well.
//!
//! `aio=threads`, since io_uring is unavailable in many hosts' containers and `native` needs direct I/O.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use icebox_engine::host::{BlockDevice, ErrorKind, HostError};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::volume::qcow2::format::{Overlay, SIZE_MAX};

/// The disk's device: what `query-block` calls it.
pub(super) const DISK_DEVICE: &str = "disk0";

/// First number of the fdsets of disk files. Below are those of the console and of device state.
const FIRST_FDSET: i64 = 16;

/// Room that a head gets beyond the disk that it holds: qcow2's tables and refcounts take less than a four-thousandth of
/// the disk, and clusters that were given up leave gaps.
const HEAD_SLACK_SHARE: u64 = 256;
/// The least such room, for small disks.
const HEAD_SLACK_MIN: u64 = 16 << 20;

/// Access that QEMU gets to a disk file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Layers and bases.
    ReadOnly,
    /// Heads.
    ReadWrite,
}

/// A disk file, its nodes and the set that its descriptors are in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskFile<'a> {
    /// The host's path.
    pub(super) path: &'a Path,
    /// What QEMU may do with it.
    pub(super) access: Access,
    /// Number of its fdset.
    pub(super) fdset: i64,
    /// Name of its format node.
    pub(super) node: String,
    format: &'static str,
    /// A block device of the host, not a file: one descriptor, around the page cache.
    pub(super) is_device: bool,
}

impl DiskFile<'_> {
    /// `blockdev-add` of this file over the node `backing`.
    fn node(&self, backing: Option<&str>) -> Value {
        let cache = json!({ "direct": self.is_device, "no-flush": false });
        let driver = if self.is_device {
            "host_device"
        } else {
            "file"
        };
        let mut node = json!({
            "driver": self.format,
            "node-name": self.node,
            "read-only": self.access == Access::ReadOnly,
            "cache": cache,
            "discard": "unmap",
            // Inside, not a node of its own that this one refers to: only then does QEMU reopen it read-only together with
            // this one, and closes its writable descriptor.
            "file": {
                "driver": driver,
                "filename": format!("/dev/fdset/{}", self.fdset),
                "aio": "threads",
                "cache": cache,
                "discard": "unmap",
            },
        });
        if self.format == "qcow2" {
            node["backing"] = backing.map_or(Value::Null, Value::from);
            // A guest's trim frees clusters of the head; it must also reach the file under it.
            node["pass-discard-request"] = true.into();
            // A table is written in pieces of this size, not as a whole cluster of 128 KiB for each new one in it.
            node["l2-cache-entry-size"] = 4096.into();
        }
        node
    }
}

/// The name of the node for a file: a letter and 20 hexadecimal digits, within QEMU's 31 characters.
pub(super) fn node_name(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let hash = Sha256::digest(path.as_os_str().as_bytes());
    let digits: String = hash
        .iter()
        .take(10)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("n{digits}")
}

/// What there is to know about a disk before QEMU opens it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    /// The most that its head may grow to, in bytes, whatever the VMM does to it.
    pub(super) head_bytes_max: u64,
    /// It is a block device of the host, not files.
    pub(super) is_device: bool,
}

/// Looks at a disk's head.
///
/// # Errors
/// It cannot be read, or is none of ours.
pub(super) fn look_at(disk: &BlockDevice) -> Result<Storage, HostError> {
    let (BlockDevice::Raw { path } | BlockDevice::Qcow2 { head: path, .. }) = disk;
    let failed = |error| HostError::io(format!("read head {}", path.display()), error);
    let mut file = File::open(path).map_err(failed)?;
    let (size, is_device) = match disk {
        BlockDevice::Raw { .. } => {
            let kind = file.metadata().map_err(failed)?.file_type();
            // Also of a device, whose metadata do not say it.
            let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
            (size, kind.is_block_device())
        }
        BlockDevice::Qcow2 { .. } => {
            let overlay = Overlay::open(file, SIZE_MAX).map_err(|error| {
                HostError::new(
                    ErrorKind::Invalid,
                    format!("{} is not a usable head", path.display()),
                )
                .caused_by(error)
            })?;
            (overlay.size(), false)
        }
    };
    Ok(Storage {
        head_bytes_max: size + HEAD_SLACK_MIN.max(size / HEAD_SLACK_SHARE),
        is_device,
    })
}

/// The files of a disk, bottom first: the order in which nodes are made.
pub(super) fn files(disk: &BlockDevice, storage: Storage) -> Vec<DiskFile<'_>> {
    let file = |path, access, format| DiskFile {
        path,
        access,
        fdset: 0,
        node: node_name(path),
        format,
        is_device: storage.is_device,
    };
    let mut files = match disk {
        BlockDevice::Raw { path } => vec![file(path.as_path(), Access::ReadWrite, "raw")],
        BlockDevice::Qcow2 { head, layers, base } => {
            let mut files = vec![file(base.as_path(), Access::ReadOnly, "raw")];
            files.extend(
                layers
                    .iter()
                    .rev()
                    .map(|layer| file(layer.as_path(), Access::ReadOnly, "qcow2")),
            );
            files.push(file(head.as_path(), Access::ReadWrite, "qcow2"));
            files
        }
    };
    for (fdset, file) in (FIRST_FDSET..).zip(&mut files) {
        file.fdset = fdset;
    }
    files
}

/// The head alone, as a switch adds it: over the node that is active then.
pub(super) fn head(disk: &BlockDevice, fdset: i64) -> DiskFile<'_> {
    let (path, format) = match disk {
        BlockDevice::Raw { path } => (path, "raw"),
        BlockDevice::Qcow2 { head, .. } => (head, "qcow2"),
    };
    DiskFile {
        path,
        access: Access::ReadWrite,
        fdset,
        node: node_name(path),
        format,
        // Only a VMM that freezes by itself is given another head, and it does that with files.
        is_device: false,
    }
}

/// The node of a new head that is not over anything yet: `blockdev-snapshot` puts it over the active node.
pub(super) fn detached_node(head: &DiskFile<'_>) -> Value {
    head.node(None)
}

/// Every node of the chain, each after the one it refers to.
pub(super) fn nodes(files: &[DiskFile<'_>]) -> Vec<Value> {
    let mut backing = None;
    files
        .iter()
        .map(|file| {
            let node = file.node(backing);
            backing = Some(file.node.as_str());
            node
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_chain_is_spelled_out_from_the_base_up() {
        let disk = BlockDevice::Qcow2 {
            head: PathBuf::from("/d/head"),
            layers: vec![PathBuf::from("/d/new"), PathBuf::from("/d/old")],
            base: PathBuf::from("/d/base"),
        };
        let storage = Storage {
            head_bytes_max: 0,
            is_device: false,
        };
        let files = files(&disk, storage);
        let paths: Vec<_> = files
            .iter()
            .map(|file| file.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/d/base", "/d/old", "/d/new", "/d/head"]);
        assert_eq!(
            files.iter().map(|file| file.fdset).collect::<Vec<_>>(),
            [16, 17, 18, 19]
        );

        let nodes = nodes(&files);
        assert_eq!(nodes[0]["driver"], "raw");
        assert!(
            nodes[0].get("backing").is_none(),
            "a raw node has no backing"
        );
        for (above, below) in nodes[1..].iter().zip(&nodes) {
            assert_eq!(above["driver"], "qcow2");
            assert_eq!(above["backing"], below["node-name"]);
        }
        let writable: Vec<_> = nodes
            .iter()
            .filter(|node| node["read-only"] == false)
            .collect();
        assert_eq!(writable, [&nodes[3]], "the head, nothing else");
        assert!(
            detached_node(&head(&disk, 20))["backing"].is_null(),
            "no header is believed"
        );
    }

    #[test]
    fn a_block_device_is_opened_as_one_and_around_the_page_cache() {
        let disk = BlockDevice::Raw {
            path: PathBuf::from("/dev/dm-7"),
        };
        let node = |is_device| {
            let storage = Storage {
                head_bytes_max: 0,
                is_device,
            };
            nodes(&files(&disk, storage)).remove(0)
        };
        let (device, file) = (node(true), node(false));
        assert_eq!(device["file"]["driver"], "host_device");
        assert_eq!(file["file"]["driver"], "file");
        for (node, direct) in [(device, true), (file, false)] {
            assert_eq!(node["cache"]["direct"], direct);
            assert_eq!(node["file"]["cache"]["direct"], direct);
        }
    }

    #[test]
    fn node_names_are_what_qemu_accepts() {
        let name = node_name(Path::new("/var/lib/icebox/sandboxes/i0/heads/3"));
        assert!(name.len() <= 31 && name.starts_with('n'), "{name}");
        assert_ne!(node_name(Path::new("/a")), node_name(Path::new("/b")));
    }
}
