//! Turning the machine off.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use icebox_agent_api::cmdline;
use rustix::{
    mount::MountFlags,
    process::{Pid, Signal, WaitOptions},
    system::RebootCommand,
};
use tokio::{signal::unix::Signal as SignalStream, time::timeout_at};

use super::KernelParameters;

/// How long programs have to end by themselves.
const GRACE: Duration = Duration::from_secs(2);
/// How long they have to be gone once killed. One that hangs in the kernel does not keep the machine on.
const KILLED: Duration = Duration::from_secs(1);

/// What comes after everything has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Off,
    Reboot,
}

/// Stops every process, writes everything to the disk, leaves the root filesystem clean, and turns the machine off.
/// `children` yields when a child of process 1 has ended.
pub(super) async fn off(after: After, children: &mut SignalStream) {
    for (signal, patience) in [(Signal::TERM, GRACE), (Signal::KILL, KILLED)] {
        signal_everyone(signal);
        let deadline = Instant::now() + patience;
        while !reap_all() {
            match timeout_at(deadline.into(), children.recv()).await {
                Ok(Some(())) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
    now(after);
}

/// Signals every process but this one. Kernel threads do not mind.
fn signal_everyone(signal: Signal) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| {
        entry
            .file_name()
            .to_str()?
            .parse()
            .ok()
            .and_then(Pid::from_raw)
    }) {
        if !pid.is_init() {
            // It may have ended meanwhile.
            rustix::process::kill_process(pid, signal).ok();
        }
    }
}

/// Reaps what has ended. Whether nothing is left.
fn reap_all() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

/// As [`off`], without asking anyone.
pub(super) fn off_now() {
    now(After::Off);
}

/// Resets the machine, without asking anyone.
pub(super) fn reset_now() {
    now(After::Reboot);
}

fn now(after: After) {
    rustix::fs::sync();
    // Written files are on the disk; this marks the filesystem clean. One that is busy replays its journal instead.
    rustix::mount::mount_remount("/", MountFlags::RDONLY, "").ok();
    let command = match after {
        After::Off if is_off_by_reset() => RebootCommand::Restart,
        After::Off => RebootCommand::PowerOff,
        After::Reboot => RebootCommand::Restart,
    };
    if let Err(errno) = rustix::system::reboot(command) {
        eprintln!("icebox: failed to turn the machine off: {errno}");
    }
}

/// Whether the machine has nothing to turn it off with: its kernel would stand still for ever.
fn is_off_by_reset() -> bool {
    KernelParameters::read(Path::new("/proc/cmdline"))
        .is_ok_and(|parameters| parameters.get(cmdline::OFF) == Some("reset"))
}
