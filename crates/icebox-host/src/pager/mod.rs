//! Fills the memory of a restored guest from outside its VMM.
//!
//! A VMM that maps its memory from a file leaves it to the kernel when pages are loaded, one at a time in the order of their
//! faults. Whoever fills memory by a userfaultfd(2) can load ahead what the last guest on the same memory wanted first.
//!
//! ```text
//!   launcher, which goes on as the pager ── listens ◄── VMM: where its memory is, and a userfaultfd
//!     a page is missing  ─► from the base; zeros if it was removed since
//!     nothing is missing ─► the working set, as it was recorded, if it was; else record it
//!     pages are removed  ─► noted in the state file, for saves
//!     the VMM has ended  ─► end
//! ```
//!
//! It is a process in the box of its VMM: with its uid, in its cgroup, and with a file system that has nothing but the system's
//! libraries. What it uses it is started with. It outlives daemons with its VMM. If it ends, its guest hangs, so the daemon ends the VMM then.
//!
//! The VMM is not trusted: what it sends is bounded, and checked against the memory's length. It could misuse nothing but
//! what it has itself, since the base is its own to read.

mod handshake;
mod serve;
pub(crate) mod state;
mod sys;
#[cfg(test)]
mod tests;
mod working_set;

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use self::serve::Pager;
use self::state::State;
use crate::launcher::{BoxSpec, OpenFile, Source};

/// The file of a VMM's runtime directory that says which process its pager is: an identity, as a VMM's own.
pub(crate) const PAGER_PID_FILE: &str = "pager.pid";
/// The file of a VMM's runtime directory in which its pager says what only it knows.
pub(crate) const PAGER_STATE: &str = "pager-state";
/// The file beside a memory's base with its working set.
const WORKING_SET: &str = "working-set";

/// What one pager is made of.
#[derive(Debug)]
pub(crate) struct PagerPlan<'a> {
    /// The memory that is restored from.
    pub(crate) base: &'a Path,
    /// Its length.
    pub(crate) bytes: u64,
    /// The runtime directory of the VMM.
    pub(crate) runtime: &'a Path,
    /// Where it listens.
    pub(crate) socket: PathBuf,
    /// The VMM's network namespace.
    pub(crate) network_namespace: PathBuf,
    /// Where its last words go.
    pub(crate) stderr: PathBuf,
    /// Whose the box is.
    pub(crate) uid: u32,
    /// How it joins the VMM's cgroup.
    pub(crate) cgroup_procs: Vec<PathBuf>,
}

impl PagerPlan<'_> {
    /// The launcher's orders. Makes the files that the pager writes to.
    pub(crate) fn box_spec(self) -> io::Result<BoxSpec> {
        let state = self.runtime.join(PAGER_STATE);
        state::create(&state)?;
        let file = |name: &str, source| OpenFile {
            name: name.to_owned(),
            source,
        };
        let mut files = vec![
            file("memory", Source::Read(self.base.to_owned())),
            file("socket", Source::Listen(self.socket)),
            file("state", Source::ReadWrite(state)),
        ];
        // A hint: a guest runs without it, too.
        match working_set_beside(self.base) {
            Ok(path) => files.push(file(WORKING_SET, Source::ReadWrite(path))),
            Err(error) => {
                tracing::warn!(base = %self.base.display(), %error, "no working set is kept");
            }
        }
        Ok(BoxSpec {
            program: PathBuf::new(),
            pager: true,
            arguments: Vec::new(),
            cgroup_procs: self.cgroup_procs,
            pid_file: self.runtime.join(PAGER_PID_FILE),
            network_namespace: Some(self.network_namespace),
            uid: self.uid,
            file_bytes_max: state::length(self.bytes).max(working_set::FILE_BYTES_MAX),
            files,
            stdout: None,
            stderr: self.stderr,
            binds: Vec::new(),
            devices: Vec::new(),
        })
    }
}

/// The file with a memory's working set. It is made empty, and filled by whichever pager first knows it. It goes with the
/// memory's directory.
fn working_set_beside(base: &Path) -> io::Result<PathBuf> {
    let path = base.with_file_name(WORKING_SET);
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)?;
    Ok(path)
}

/// Is the pager of a VMM, until that has ended. `files` are those of [`PagerPlan::box_spec`].
pub(crate) fn run(files: Vec<(String, OwnedFd)>) -> io::Result<()> {
    let (mut memory, mut listener, mut state, mut hint) = (None, None, None, None);
    for (name, fd) in files {
        match &*name {
            "memory" => memory = Some(File::from(fd)),
            "socket" => listener = Some(UnixListener::from(fd)),
            "state" => state = Some(File::from(fd)),
            WORKING_SET => hint = Some(File::from(fd)),
            _ => {}
        }
    }
    let missing = || io::Error::other("a pager needs a memory, a socket and a state");
    let memory = memory.ok_or_else(missing)?;
    let bytes = memory.metadata()?.len();
    let met = handshake::accept(&listener.ok_or_else(missing)?, bytes)?;
    let state = State::begin(state.ok_or_else(missing)?, &met.regions, bytes)?;
    let known = hint.as_ref().and_then(|file| read_working_set(file, bytes));
    let mut pager = Pager::new(&met.userfault, &memory, met.regions, state, known);
    pager.serve(met.vmm.as_fd(), |recorded| {
        if let Some(file) = &hint
            // It would be recorded again by the next guest.
            && let Err(error) = working_set::write(file, recorded, bytes)
        {
            say(&format!("the working set is not kept: {error}"));
        }
    })
}

/// The working set in a file, if it is one of a memory of this length.
fn read_working_set(mut file: &File, bytes: u64) -> Option<Vec<u32>> {
    let mut content = Vec::new();
    let mut read = io::Read::by_ref(&mut file).take(working_set::FILE_BYTES_MAX + 1);
    read.read_to_end(&mut content).ok()?;
    working_set::parse(&content, bytes)
}

/// Last words, where a VMM's are.
pub(crate) fn say(words: &str) {
    use std::io::Write as _;
    // Nobody is left to be told that nobody can be told.
    let _unheard = writeln!(io::stderr(), "pager: {words}");
}
