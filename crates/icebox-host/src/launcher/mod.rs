//! Puts one VMM into its box, then becomes it.
//!
//! A VMM must start confined: in its cgroup, network namespace and mount namespace, as its own uid, without
//! capabilities, yet holding files that its uid may not open. Doing this between fork and exec of the daemon is
//! both dangerous (several threads) and slow (fork copies page tables: 56 ms at 2 GiB). So the daemon starts *this
//! program again* with posix_spawn, and the fresh, single-threaded process does it one step at a time:
//!
//! ```text
//!   daemon                                launcher (the same binary)
//!     spawn ───────────────────────────►  read BoxSpec from the control socket (its stdin)
//!                                         session · cgroup · netns · tap · open files · pid file
//!                                         mount namespace · pivot_root · Landlock · drop groups, uid, capabilities
//!     record the process  ◄── ready ────  pid, start time
//!     one byte  ── go ─────────────────►  exec the VMM
//!     end of file: it is the VMM now ◄──  (the control socket closes on exec)
//! ```
//!
//! A step that fails is reported by name over the same socket, and the launcher ends. If the daemon dies before
//! *go*, the launcher reads end of file and ends too: so a VMM either never exists or can be found by its pid file
//! and its cgroup, both made before *ready* (INV-46). Everything a box consists of beyond that (namespaces, mounts)
//! belongs to the process and goes with it.
//!
//! What fills a VMM's memory (`pager`) is in a box, too, and started in the same way: but instead of executing a program, the
//! launcher goes on as it.
//!
//! What it deliberately does not do: know any VMM. The driver says which files, devices and arguments.

mod child;
mod control;
mod landlock;
mod process;
mod sys;
mod world;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use child::launcher_main;
pub use control::{LaunchError, Launcher};
pub use landlock::{LANDLOCK_NEWEST, landlock_version};
pub use process::{Ended, Process, boot_id, identity_of, is_of_the_kernel};

/// The hidden first argument with which a binary is asked to be the launcher.
pub const LAUNCHER_ARGUMENT: &str = "box-launch";

/// Where every VMM finds its files, whichever box it is in: saved device state therefore never names a path of one
/// sandbox.
pub const BOX_DIRECTORY: &str = "/run/icebox/box";

/// Everything the launcher does, as data.
///
/// Arguments may contain `{name}`: the number of the descriptor of that [name](OpenFile::name).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoxSpec {
    /// The VMM, as a host path. Its directory must be visible in the box: under `/usr`, or in [`binds`](Self::binds).
    pub program: PathBuf,
    /// Whether the launcher executes nothing, and goes on as the pager of the VMM whose box it is: what a pager needs is
    /// [passed](Self::files) to it, and its box has nothing but the system's libraries.
    pub pager: bool,
    /// The VMM's arguments, without its name.
    pub arguments: Vec<String>,
    /// Files into which the launcher writes its pid to join its cgroups.
    pub cgroup_procs: Vec<PathBuf>,
    /// Receives the process identity, as JSON, before the VMM starts.
    pub pid_file: PathBuf,
    /// The network namespace to enter, as a path.
    pub network_namespace: Option<PathBuf>,
    /// The uid and gid that the VMM runs as. Not root's.
    pub uid: u32,
    /// The largest file that the VMM can write, in bytes (`RLIMIT_FSIZE`): the disk's head. More is refused by an error
    /// (`EFBIG`), not by the signal that would end the VMM. Pipes and devices have no such limit.
    pub file_bytes_max: u64,
    /// Descriptors that the VMM inherits.
    pub files: Vec<OpenFile>,
    /// Where the VMM's stdout goes, if anywhere: a FIFO like that of stderr. What does not fit into it is lost.
    pub stdout: Option<PathBuf>,
    /// Where the VMM's stderr goes: a FIFO that somebody else drains.
    pub stderr: PathBuf,
    /// Files and directories of the host that appear in the box.
    pub binds: Vec<Bind>,
    /// Device nodes that appear in the box beside null, zero and urandom, owned by its uid.
    pub devices: Vec<Node>,
}

/// One descriptor for the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenFile {
    /// What arguments call it: `{name}`.
    pub name: String,
    /// What it is.
    pub source: Source,
}

/// What a descriptor refers to. Opened by root, outside the box's mounts and inside its network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// An existing file, read-only.
    Read(PathBuf),
    /// An existing file, write-only and non-blocking: the writing end of a FIFO.
    Write(PathBuf),
    /// An existing file, read and write.
    ReadWrite(PathBuf),
    /// An existing file or device, read and write, around the page cache (`O_DIRECT`, open(2)).
    ReadWriteDirect(PathBuf),
    /// A Unix socket that listens at this path, which only root can reach. Replaces a stale one.
    Listen(PathBuf),
    /// A tap in a network namespace.
    Tap {
        /// The namespace, as a path.
        namespace: PathBuf,
        /// The interface in it.
        name: String,
    },
}

/// A host path that the box sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// The host's path. The VMM opens it by its path in the box, and has a uid of its own. If it is read-only, its mode must
    /// let everybody read it; that nobody else on the host can is its directory's doing. If it is writable, it must
    /// belong to that uid.
    pub source: PathBuf,
    /// The absolute path in the box.
    pub target: PathBuf,
    /// Whether the VMM may write to it.
    pub writable: bool,
}

impl Bind {
    /// What a VMM reads.
    pub fn read_only(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            target: target.into(),
            writable: false,
        }
    }

    /// What a VMM writes to, and nobody else does.
    pub fn writable(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            target: target.into(),
            writable: true,
        }
    }
}

/// A device of the host that the box has a node of its own for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The host's node, or a link to it.
    pub source: PathBuf,
    /// The absolute path in the box.
    pub target: PathBuf,
}

impl Node {
    /// A node with the same path in the box.
    pub fn same(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            source: path.clone(),
            target: path,
        }
    }
}

/// What the launcher says to the daemon: one JSON document per line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// Confined; waiting for *go*.
    Ready,
    /// A step failed; the launcher has ended.
    Failed {
        /// What it was doing, with the thing: "open disk /…".
        step: String,
        /// The operating system's error number, if there was one.
        errno: Option<i32>,
        /// The error in words.
        error: String,
    },
}

/// Longest accepted spec: far above any real one, far below what could hurt.
const SPEC_BYTES_MAX: u32 = 1 << 20;
