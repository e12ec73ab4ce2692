//! Processes without pid races: a later process with the same pid is never taken for the one that was meant.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;

use icebox_engine::host::{ProcessIdentity, Removed};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::sys;

/// This boot's id: start times of different boots do not compare.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// The identity of the process that has this pid now. A zombie still has one.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is none.
pub fn identity_of(pid: u32) -> io::Result<ProcessIdentity> {
    Ok(ProcessIdentity {
        pid,
        start_ticks: start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?,
        boot_id: boot_id()?,
    })
}

/// Whether this is a thread of the kernel. KVM's workers join the control groups of the VMM that they work for
/// (`kvm_vm_create_worker_thread` in `virt/kvm/kvm_main.c`), and are nobody's VMM.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is no such process.
pub fn is_of_the_kernel(pid: u32) -> io::Result<bool> {
    /// `include/linux/sched.h`.
    const PF_KTHREAD: u64 = 0x0020_0000;
    let flags = field(&fs::read_to_string(format!("/proc/{pid}/stat"))?, 9)?;
    Ok(flags & PF_KTHREAD != 0)
}

fn start_ticks(stat: &str) -> io::Result<u64> {
    field(stat, 22)
}

/// A field of `/proc/<pid>/stat`, which are numbered from 1. The second is the command in parentheses and may itself contain
/// spaces and parentheses, so counting starts at the last one, proc(5).
fn field(stat: &str, number: usize) -> io::Result<u64> {
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(number - 3))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/<pid>/stat"))
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// Only its parent could know, and that is or was another process.
    Unknown,
}

/// A process that can be signalled and waited for: a pidfd and a task that watches it.
#[derive(Clone, Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    ended: watch::Receiver<Option<Ended>>,
}

impl Process {
    /// Watches a child of this process, and reaps it when it ends, whether or not this
    /// value still exists then. Needs a tokio runtime.
    ///
    /// # Errors
    /// The process is not a child any more, or descriptors have run out.
    pub fn watch_child(child: Child) -> io::Result<Self> {
        let pid = child.id();
        // Closes its standard streams, if any are ours. Reaping is the watcher's.
        drop(child);
        Self::watch(pid, WaitIdOptions::EXITED)
    }

    /// The process that has this pid now, whoever's child it is. `None` if there is none.
    ///
    /// Whether it is the one that a pid was read of is to be asked afterwards, of something that would know another
    /// process apart: as long as this one has not ended, its pid is nobody else's.
    ///
    /// # Errors
    /// Descriptors have run out.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        // NOWAIT: if it is our child, the status belongs to the watcher that was there first.
        match Self::watch(pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(process) => Ok(Some(process)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Finds a process that may be anybody's child. `None` if it has ended, or its pid belongs to another one now.
    ///
    /// # Errors
    /// Descriptors have run out.
    pub fn find(identity: &ProcessIdentity) -> io::Result<Option<Self>> {
        // Compared only now, since from here on the pidfd keeps meaning the process that was looked at.
        Ok(Self::open(identity.pid)?.filter(|process| process.identity == *identity))
    }

    fn watch(pid: u32, options: WaitIdOptions) -> io::Result<Self> {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not a pid"))?;
        let pidfd = Arc::new(sys::watch_readable(pidfd_open(raw, PidfdFlags::NONBLOCK)?)?);
        let identity = identity_of(pid)?;
        let (sender, ended) = watch::channel(None);
        let watched = Arc::clone(&pidfd);
        tokio::spawn(async move {
            let how = match watched.readable().await {
                Ok(_ready) => status(watched.get_ref(), options),
                // The runtime shuts down; nobody is left to be told.
                Err(_) => return,
            };
            sender.send_replace(Some(how));
        });
        Ok(Self {
            identity,
            pidfd,
            ended,
        })
    }

    /// Which process it is.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Kills it if it has not ended. Does not wait.
    ///
    /// # Errors
    /// The system refuses the signal.
    pub fn kill(&self) -> io::Result<Removed> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) => Ok(Removed::Removed),
            Err(rustix::io::Errno::SRCH) => Ok(Removed::AlreadyAbsent),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut pidfd = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        // A failure to ask is not an end.
        poll(&mut pidfd, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Completes when it has ended: its files are closed and its memory is gone.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(how) => how.unwrap_or(Ended::Unknown),
            // The watching task went with its runtime.
            Err(_) => Ended::Unknown,
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn status(pidfd: &OwnedFd, options: WaitIdOptions) -> Ended {
    match waitid(
        WaitId::PidFd(pidfd.as_fd()),
        options | WaitIdOptions::NOHANG,
    ) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ended::Exited(code),
            (None, Some(signal)) => Ended::Signalled(signal),
            (None, None) => Ended::Unknown,
        },
        // ECHILD: not our child, or reaped by the watcher that was there first.
        Ok(None) | Err(_) => Ended::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_hostile_command_name_does_not_shift_the_fields() {
        let fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        let stat = format!("77 (a) 9 9 (b) {}", fields.join(" "));
        assert_eq!(start_ticks(&stat).unwrap(), 22);
        assert_eq!(field(&stat, 9).unwrap(), 9);
        assert!(start_ticks("77 (cut").is_err());
    }

    #[test]
    fn this_process_is_not_of_the_kernel() {
        assert!(!is_of_the_kernel(std::process::id()).unwrap());
        let missing = is_of_the_kernel(u32::MAX).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_child_is_watched_killed_and_reaped() {
        let child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process::watch_child(child).unwrap();
        let second = Process::find(process.identity()).unwrap().expect("it runs");
        assert_eq!(process.kill().unwrap(), Removed::Removed);
        second.ended().await;
        assert_eq!(process.ended().await, Ended::Signalled(9));
        assert_eq!(process.kill().unwrap(), Removed::AlreadyAbsent);
        assert!(Process::find(process.identity()).unwrap().is_none());
        assert!(Process::open(process.identity().pid).unwrap().is_none());
    }

    #[tokio::test]
    async fn another_start_time_is_another_process() {
        let mut identity = identity_of(std::process::id()).unwrap();
        assert!(Process::find(&identity).unwrap().is_some());
        let whoever = Process::open(identity.pid).unwrap().unwrap();
        assert_eq!(*whoever.identity(), identity);
        identity.start_ticks += 1;
        assert!(Process::find(&identity).unwrap().is_none());
    }
}
