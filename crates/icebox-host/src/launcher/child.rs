//! The launcher's own process: one step after the other, then exec.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, setrlimit, setsid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, LinkNameSpaceType, Uid, clear_ambient_capability_set,
    move_into_link_name_space, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{BoxSpec, OpenFile, Report, SPEC_BYTES_MAX, Source, landlock, process, sys, world};
use crate::fs::open_device;
use crate::network;
use crate::pager;

/// Descriptors are few; a VMM that wants more is misbehaving.
const MAX_OPEN_FILES: u64 = 1024;

/// A step that failed.
pub(super) struct Failure {
    step: String,
    error: io::Error,
}

/// Names the step of an error.
pub(super) trait Step<T> {
    /// `step` names the operation and the thing: "open disk /…".
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure {
            step: step(),
            error: error.into(),
        })
    }
}

/// The launcher: becomes the VMM, or reports why not and ends.
///
/// Call it first thing in `main` when the first argument is [`LAUNCHER_ARGUMENT`](super::LAUNCHER_ARGUMENT), before
/// any thread exists.
pub fn launcher_main() -> ! {
    // Whatever goes wrong before the control socket is ours can only be told by the exit status.
    let status = match control_socket() {
        Ok(mut control) => {
            let Err(failure) = run(&mut control);
            let report = Report::Failed {
                step: failure.step,
                errno: failure.error.raw_os_error(),
                error: failure.error.to_string(),
            };
            match send(&mut control, &report) {
                Ok(()) => 1,
                Err(_daemon_is_gone) => 2,
            }
        }
        Err(_no_socket) => 3,
    };
    #[allow(
        clippy::exit,
        reason = "the launcher is a whole process, and never returns to its caller's main"
    )]
    std::process::exit(status)
}

fn control_socket() -> io::Result<UnixStream> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket.into())
}

fn send(control: &mut UnixStream, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    control.write_all(&line)
}

fn receive_spec(control: &mut UnixStream) -> io::Result<BoxSpec> {
    let mut length = [0; 4];
    control.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > SPEC_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("spec of {length} bytes is longer than {SPEC_BYTES_MAX}"),
        ));
    }
    let mut json = vec![0; length as usize];
    control.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

fn run(control: &mut UnixStream) -> Result<std::convert::Infallible, Failure> {
    let spec = receive_spec(control).step(|| "read the box's spec".into())?;

    setsid().step(|| "start a session".into())?;
    umask(Mode::from_raw_mode(0o077));
    sys::close_all_but(control.as_fd()).step(|| "close inherited descriptors".into())?;
    for path in &spec.cgroup_procs {
        join_cgroup(path).step(|| format!("join cgroup by {}", path.display()))?;
    }
    if let Some(namespace) = &spec.network_namespace {
        File::open(namespace)
            .and_then(|ns| {
                Ok(move_into_link_name_space(
                    ns.as_fd(),
                    Some(LinkNameSpaceType::Network),
                )?)
            })
            .step(|| format!("enter network namespace {}", namespace.display()))?;
    }
    let files = open_files(&spec.files)?;
    let stderr = open_output(&spec.stderr)?;
    rustix::stdio::dup2_stderr(&stderr).step(|| "redirect stderr".into())?;
    if let Some(stdout) = &spec.stdout {
        let stdout = open_output(stdout)?;
        rustix::stdio::dup2_stdout(&stdout).step(|| "redirect stdout".into())?;
    }

    process::identity_of(std::process::id())
        .and_then(|process| write_pid_file(&spec.pid_file, &process))
        .step(|| format!("write {}", spec.pid_file.display()))?;

    // The VMM's uid walks through the directories that are made from here on.
    umask(Mode::from_raw_mode(0o022));
    // An empty directory to mount on; the mount itself is only seen by this process.
    let root = spec.pid_file.with_file_name("root");
    fs::create_dir_all(&root).step(|| format!("create {}", root.display()))?;
    world::enter(&root, &spec.binds, &spec.devices, spec.uid)?;
    landlock::restrict(&spec)
        .map_err(io::Error::other)
        .step(|| "restrict itself to the box by Landlock".into())?;
    limit_resources(spec.file_bytes_max).step(|| "limit resources".into())?;
    drop_privileges(spec.uid).step(|| format!("become uid {}", spec.uid))?;

    send(control, &Report::Ready).step(|| "report".into())?;
    control
        .read_exact(&mut [0])
        .step(|| "wait for the daemon".into())?;

    if spec.pager {
        // As exec would: what the daemon waits for.
        control
            .shutdown(Shutdown::Both)
            .step(|| "let go of the daemon".into())?;
        be_pager(files);
    }
    let error = Command::new(&spec.program)
        .args(arguments(&spec.arguments, &files))
        .env_clear()
        .exec();
    Err(error).step(|| format!("execute {}", spec.program.display()))
}

/// Is the pager of a VMM, to its end.
fn be_pager(files: Vec<(String, OwnedFd)>) -> ! {
    let status = match pager::run(files) {
        Ok(()) => 0,
        Err(error) => {
            pager::say(&error.to_string());
            1
        }
    };
    #[allow(
        clippy::exit,
        reason = "a pager is a whole process, and never returns to its caller's main"
    )]
    std::process::exit(status)
}

/// A FIFO to print into: never waits, and has a reader, so that printing does not fail while no daemon reads.
fn open_output(path: &Path) -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .step(|| format!("open {}", path.display()))
}

/// Moves this process into a cgroup by `0`, which means the writer in whatever pid namespace it is.
///
/// Version 1 is told of the one *thread* that there is: the kernel then need not wait until no process anywhere is
/// forking, which takes it up to ten milliseconds.
fn join_cgroup(procs: &Path) -> io::Result<()> {
    let tasks = procs.with_file_name("tasks");
    let file = if tasks.exists() { &tasks } else { procs };
    OpenOptions::new().write(true).open(file)?.write_all(b"0")
}

/// Opens everything and lets exec pass it on.
fn open_files(files: &[OpenFile]) -> Result<Vec<(String, OwnedFd)>, Failure> {
    files
        .iter()
        .map(|file| {
            let fd = open(&file.source).step(|| match &file.source {
                Source::Read(path)
                | Source::Write(path)
                | Source::ReadWrite(path)
                | Source::ReadWriteDirect(path) => {
                    format!("open {} {}", file.name, path.display())
                }
                Source::Listen(path) => format!("listen on {}", path.display()),
                Source::Tap { name, .. } => format!("open tap {name}"),
            })?;
            fcntl_setfd(&fd, FdFlags::empty()).step(|| format!("pass on {}", file.name))?;
            Ok((file.name.clone(), fd))
        })
        .collect()
}

fn open(source: &Source) -> io::Result<OwnedFd> {
    Ok(match source {
        Source::Read(path) => open_device(OpenOptions::new().read(true), path)?.into(),
        Source::Write(path) => OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)?
            .into(),
        Source::ReadWrite(path) => {
            open_device(OpenOptions::new().read(true).write(true), path)?.into()
        }
        Source::ReadWriteDirect(path) => {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .custom_flags(OFlags::DIRECT.bits().cast_signed());
            open_device(&options, path)?.into()
        }
        Source::Listen(path) => {
            match fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            UnixListener::bind(path)?.into()
        }
        Source::Tap { namespace, name } => network::open_tap(namespace, name).map_err(innermost)?,
    })
}

/// The operating system's error inside one of ours: the step already says what was tried.
fn innermost(error: icebox_engine::host::HostError) -> io::Error {
    let errno = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    errno.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

fn write_pid_file(path: &Path, process: &icebox_engine::host::ProcessIdentity) -> io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(process)?)?;
    fs::rename(temporary, path)
}

/// Replaces `{name}` by the number of that descriptor.
fn arguments(templates: &[String], files: &[(String, OwnedFd)]) -> Vec<String> {
    templates
        .iter()
        .map(|template| {
            files.iter().fold(template.clone(), |argument, (name, fd)| {
                argument.replace(&format!("{{{name}}}"), &fd.as_raw_fd().to_string())
            })
        })
        .collect()
}

/// What no control group limits. A core file would hold the guest's memory, and nobody has asked for one.
fn limit_resources(file_bytes_max: u64) -> io::Result<()> {
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, MAX_OPEN_FILES),
        (Resource::Fsize, file_bytes_max),
    ] {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)?;
    }
    sys::ignore_file_size_signal()
}

fn drop_privileges(uid: u32) -> io::Result<()> {
    if uid == 0 {
        return Err(io::Error::other("a VMM never runs as root"));
    }
    set_no_new_privs(true)?;
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    clear_ambient_capability_set()?;
    set_thread_groups(&[])?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    // Leaving uid 0 has cleared the effective and permitted sets; this also clears the inheritable one.
    set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_descriptors() {
        let fd: OwnedFd = File::open("/dev/null").unwrap().into();
        let number = fd.as_raw_fd();
        let files = vec![("disk".to_owned(), fd)];
        assert_eq!(
            arguments(&["fd={disk},set=1".into(), "{other}".into()], &files),
            [format!("fd={number},set=1"), "{other}".into()]
        );
    }

    #[test]
    fn root_is_refused() {
        assert!(drop_privileges(0).is_err());
    }
}
