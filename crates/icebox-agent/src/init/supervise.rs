//! Process 1 in the real root: sets the guest up, then reaps orphans, keeps the server running and powers off.
//!
//! | what | from | does |
//! |---|---|---|
//! | `SIGCHLD` | the kernel | reaps; starts the server again if that is what ended, lets it go on if it was stopped |
//! | `SIGTERM`, `SIGUSR1`, `SIGUSR2`, `SIGPWR` | `poweroff` and `halt` of busybox, whoever may | powers off in order |
//! | `SIGINT` | ctrl-alt-del | reboots in order, which ends the machine as well |
//! | `/run/initctl` | `poweroff`, `reboot`, `shutdown` of sysvinit and systemd | either of the two |

use std::{
    convert::Infallible,
    error::Error,
    fs, io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use icebox_agent_api::cmdline;
use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags},
    process::{Resource, Rlimit, WaitOptions, kill_process},
    system::RebootCommand,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::sleep_until,
};

use super::{
    KernelParameters,
    initctl::Requests,
    network,
    power::{self, After},
};
use crate::{THIS_PROGRAM, server};

/// Between two starts of the server: one that fails again and again must not keep the processor busy.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// The kernel's own limit, 4096, is too low for servers; this is what systemd gives.
const MAX_FILES: u64 = 512 << 10;

/// `SIGPWR` on Linux, which tokio has no name for.
const SIGPWR: i32 = 30;

/// Filesystems that every program expects: type, where, flags, options.
const MOUNTS: [(&str, &str, MountFlags, &str); 3] = [
    (
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        "gid=5,mode=0620,ptmxmode=0666",
    ),
    (
        "tmpfs",
        "/dev/shm",
        MountFlags::NOSUID.union(MountFlags::NODEV),
        "mode=1777",
    ),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        MountFlags::NOSUID
            .union(MountFlags::NODEV)
            .union(MountFlags::NOEXEC),
        "nsdelegate",
    ),
];

/// Links in /dev that programs expect and the kernel does not make.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

pub(super) fn run() -> Result<Infallible, Box<dyn Error>> {
    let parameters = KernelParameters::read(Path::new("/proc/cmdline"))?;
    set_up(&parameters)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(supervise())
}

/// Prepares the guest for the server. Only the network is indispensable: without it nobody can be served.
fn set_up(parameters: &KernelParameters) -> Result<(), Box<dyn Error>> {
    // Ctrl-alt-del is a signal to us, not the end of everything unsaved.
    best_effort(
        "take over ctrl-alt-del",
        rustix::system::reboot(RebootCommand::CadOff),
    );
    for (kind, target, flags, options) in MOUNTS {
        best_effort(
            &format!("mount {kind} on {target}"),
            mount(kind, target, flags, options),
        );
    }
    let private = MountPropagationFlags::REC | MountPropagationFlags::SHARED;
    best_effort(
        "let mounts propagate",
        rustix::mount::mount_change("/", private),
    );
    for (target, link) in LINKS {
        match std::os::unix::fs::symlink(target, link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => best_effort(&format!("make {link}"), result),
        }
    }
    let files = Rlimit {
        current: Some(MAX_FILES),
        maximum: Some(MAX_FILES),
    };
    best_effort(
        "raise the limit of open files",
        rustix::process::setrlimit(Resource::Nofile, files),
    );
    // The out-of-memory killer takes what the user runs, not what the host needs to reach the guest.
    best_effort(
        "protect the agent from the out-of-memory killer",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    if let Some(name) = parameters.get(cmdline::HOSTNAME) {
        best_effort(
            "set the host name",
            rustix::system::sethostname(name.as_bytes()),
        );
    }
    network::set_up(parameters)?;
    best_effort("write /etc/resolv.conf", network::name_servers(parameters));
    Ok(())
}

fn mount(kind: &str, target: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let options = std::ffi::CString::new(options)?;
    match rustix::mount::mount(kind, target, kind, flags, options.as_c_str()) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn best_effort<E: Into<io::Error>>(what: &str, result: Result<(), E>) {
    if let Err(error) = result {
        eprintln!("icebox: failed to {what}: {}", error.into());
    }
}

async fn supervise() -> Result<Infallible, Box<dyn Error>> {
    let mut children = signal(SignalKind::child())?;
    let mut power_off = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::user_defined1())?,
        signal(SignalKind::user_defined2())?,
        signal(SignalKind::from_raw(SIGPWR))?,
    ];
    let mut reboot = signal(SignalKind::interrupt())?;
    let mut requests = Requests::open();
    let mut server: Option<Child> = None;
    let mut next_start = Instant::now();
    let after = loop {
        let [term, usr1, usr2, pwr] = &mut power_off;
        tokio::select! {
            () = sleep_until(next_start.into()), if server.is_none() => {
                next_start = Instant::now() + RESTART_DELAY;
                match start_server() {
                    Ok(child) => server = Some(child),
                    // Perhaps the guest is out of processes or memory for now.
                    Err(error) => eprintln!("icebox: failed to start the server: {error}"),
                }
            }
            _ = children.recv() => if reap(server.as_ref()) {
                server = None;
            },
            () = any_of(term, usr1, usr2, pwr) => break After::Off,
            _ = reboot.recv() => break After::Reboot,
            after = requests.next() => break after,
        }
    };
    power::off(after, &mut children).await;
    Err(io::Error::other("the machine is still on").into())
}

async fn any_of(a: &mut Signal, b: &mut Signal, c: &mut Signal, d: &mut Signal) {
    tokio::select! {
        _ = a.recv() => {}
        _ = b.recv() => {}
        _ = c.recv() => {}
        _ = d.recv() => {}
    }
}

/// Starts the server. The handle is only used for its pid: [`reap`] waits for every child alike.
fn start_server() -> io::Result<Child> {
    Command::new(THIS_PROGRAM)
        .arg0("icebox-agent")
        .arg(server::ROLE)
        .env_clear()
        .spawn()
}

/// Waits for every child that has ended. Whether the server was among them. A server that somebody has stopped goes on:
/// nobody else could tell it to, since every way into the guest leads through it.
fn reap(server: Option<&Child>) -> bool {
    let mut ended = false;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            Ok(Some((pid, status))) => {
                let id = u32::try_from(pid.as_raw_nonzero().get()).ok();
                if id.is_none() || id != server.map(Child::id) {
                    continue;
                }
                if status.stopped() {
                    eprintln!("icebox: the server was stopped, and goes on");
                    best_effort(
                        "let the server go on",
                        kill_process(pid, rustix::process::Signal::CONT),
                    );
                } else {
                    eprintln!("icebox: the server ended: {status:?}");
                    ended = true;
                }
            }
            Ok(None) | Err(_) => return ended,
        }
    }
}
