//! A place between a daemon and one QEMU's monitor, where commands can be refused.
//!
//! The daemon reaches a monitor by its path. So while no daemon runs, the socket there is replaced by one of ours, which
//! passes on everything that it does not refuse, descriptors included.

use std::fs;
use std::io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};

/// Descriptors that one message carries at most; the daemon sends one.
const DESCRIPTORS_MAX: usize = 4;

/// What to refuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Refuse {
    #[default]
    Nothing,
    /// The command that comes after this many others.
    Nth(usize),
    /// All commands of these names.
    Named(&'static [&'static str]),
}

#[derive(Default)]
struct Plan {
    refuse: Refuse,
    /// Commands since the plan was made.
    commands: usize,
    refused: Vec<String>,
}

/// Stands there until it is dropped.
pub(crate) struct Monitor {
    ours: PathBuf,
    theirs: PathBuf,
    plan: Arc<Mutex<Plan>>,
}

impl Monitor {
    /// Takes the place of the socket at `path`, which moves to `theirs`.
    pub(crate) fn at(path: &Path, theirs: PathBuf) -> Self {
        fs::rename(path, &theirs).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        let plan = Arc::<Mutex<Plan>>::default();
        let (shared, target) = (Arc::clone(&plan), theirs.clone());
        // Ends with the test program, as do its connections' threads unless one of their sides ends first.
        thread::spawn(move || {
            for daemon in listener.incoming() {
                let daemon = daemon.unwrap();
                // A QEMU that has ended answers nobody: so does this.
                if let Ok(qemu) = UnixStream::connect(&target) {
                    pass(&daemon, &qemu, &shared);
                }
            }
        });
        Self {
            ours: path.to_owned(),
            theirs,
            plan,
        }
    }

    /// Begins anew, with something else to refuse.
    pub(crate) fn refuse(&self, refuse: Refuse) {
        *lock(&self.plan) = Plan {
            refuse,
            ..Plan::default()
        };
    }

    /// The commands that have been refused.
    pub(crate) fn refused(&self) -> Vec<String> {
        lock(&self.plan).refused.clone()
    }
}

impl Drop for Monitor {
    /// The VMM may have gone, with all of its files but the one that the daemon does not know.
    fn drop(&mut self) {
        if self.ours.exists() {
            fs::rename(&self.theirs, &self.ours).unwrap_or_default();
        } else {
            fs::remove_file(&self.theirs).unwrap_or_default();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes messages on in both directions until one side ends.
fn pass(daemon: &UnixStream, qemu: &UnixStream, plan: &Arc<Mutex<Plan>>) {
    let copy = |stream: &UnixStream| stream.try_clone().unwrap();
    // Whole lines at a time, since both threads write to the daemon.
    let answers = Arc::new(Mutex::new(copy(daemon)));
    let (from, to) = (copy(qemu), Arc::clone(&answers));
    thread::spawn(move || {
        let mut lines = BufReader::new(from).split(b'\n');
        while let Some(Ok(mut line)) = lines.next() {
            line.push(b'\n');
            if lock(&to).write_all(&line).is_err() {
                break;
            }
        }
        lock(&to)
            .shutdown(std::net::Shutdown::Both)
            .unwrap_or_default();
    });
    let (from, to, plan) = (copy(daemon), copy(qemu), Arc::clone(plan));
    thread::spawn(move || {
        while let Ok(Some((command, descriptors))) = receive(&from) {
            let passed = match plan_for(&plan, &command) {
                None => send(&to, &command, &descriptors),
                Some(answer) => lock(&answers).write_all(&answer),
            };
            if passed.is_err() {
                break;
            }
        }
        to.shutdown(std::net::Shutdown::Both).unwrap_or_default();
    });
}

/// The answer to a command that is refused.
fn plan_for(plan: &Mutex<Plan>, command: &[u8]) -> Option<Vec<u8>> {
    let command: Value = serde_json::from_slice(command).unwrap();
    let name = command["execute"].as_str().unwrap().to_owned();
    let mut plan = lock(plan);
    // How every connection begins.
    if name == "qmp_capabilities" {
        return None;
    }
    let refused = match plan.refuse {
        Refuse::Nothing => false,
        Refuse::Nth(number) => plan.commands == number,
        Refuse::Named(names) => names.contains(&name.as_str()),
    };
    plan.commands += 1;
    if !refused {
        return None;
    }
    let error = json!({"class": "GenericError", "desc": format!("{name} is refused by the test")});
    plan.refused.push(name);
    let mut answer = json!({"error": error, "id": command["id"]}).to_string();
    answer.push_str("\r\n");
    Some(answer.into_bytes())
}

/// One command, with the descriptors that came along. `None` at the end.
///
/// The daemon waits for the answer to each, so what comes up to the end of a line is one.
fn receive(from: &UnixStream) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut command, mut descriptors) = (Vec::new(), Vec::new());
    while command.last() != Some(&b'\n') {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            from,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if received.bytes == 0 {
            return Ok(None);
        }
        command.extend_from_slice(&bytes[..received.bytes]);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
    }
    Ok(Some((command, descriptors)))
}

fn send(mut to: &UnixStream, command: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let rights: Vec<_> = descriptors
        .iter()
        .map(|descriptor| descriptor.as_fd())
        .collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !rights.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&rights)));
    }
    let sent = sendmsg(
        to,
        &[IoSlice::new(command)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    to.write_all(&command[sent..])
}
