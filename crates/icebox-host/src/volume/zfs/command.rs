//! Running `zfs`.
//!
//! The library behind it has no stable interface and needs its C headers to be built against; the kernel's ioctls change
//! between releases. The program's arguments and its `-H -p` output do not. One command takes a few milliseconds more than
//! its ioctl.
//!
//! Every command has a bound: one on a pool whose disks are gone waits in the kernel for good, and cannot be killed there.

use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use icebox_engine::host::{ErrorKind, HostError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::fcntl_setpipe_size;

/// How long a command may take. Most wait for the pool's next transaction group, which under a heavy load can take
/// longer than its usual five seconds.
const LONGEST: Duration = Duration::from_secs(45);
/// How long a command that was killed may take to end.
const KILLED: Duration = Duration::from_secs(1);
/// Bytes of a pipe that much comes through: as many as anybody may ask for, pipe(7).
const PIPE: usize = 1 << 20;
/// Of a command's messages, as much as helps.
const MESSAGE_MAX: usize = 2000;
/// Where `zfs` is on the distributions that have it.
const DIRECTORIES: &str = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin";

/// The `zfs` program.
#[derive(Clone, Debug)]
pub(super) struct Program(PathBuf);

impl Program {
    /// Finds it.
    ///
    /// # Errors
    /// The kernel has no ZFS, or its tools are not installed.
    pub(super) fn find() -> Result<Self, HostError> {
        if !Path::new("/dev/zfs").exists() {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                "there is no ZFS in this kernel (/dev/zfs)",
            )
            .hint(
                "install OpenZFS (Debian: zfs-dkms, Ubuntu: zfsutils-linux) and `modprobe zfs`",
            ));
        }
        let path = std::env::var("PATH").unwrap_or_default();
        path.split(':')
            .chain(DIRECTORIES.split(':'))
            .filter(|directory| directory.starts_with('/'))
            .map(|directory| Path::new(directory).join("zfs"))
            .find(|path| path.is_file())
            .map(Self)
            .ok_or_else(|| {
                HostError::new(ErrorKind::Unsupported, "there is no program `zfs` here")
                    .hint("install zfsutils-linux")
            })
    }

    /// Runs `zfs` with `arguments` to its end and returns what it printed.
    ///
    /// # Errors
    /// What it said, typed by [`explain`]; or it took too long.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<String, HostError> {
        let what = in_words(arguments);
        let end = Instant::now() + LONGEST;
        let mut running = self.start(arguments)?;
        let mut printed = Vec::new();
        let read = Patient::until(running.stdout()?, end).read_to_end(&mut printed);
        running.end(end, read.map(drop), &what)?;
        String::from_utf8(printed).map_err(|error| {
            HostError::new(ErrorKind::Other, format!("{what}: it printed no text")).caused_by(error)
        })
    }

    /// Runs `zfs` with `arguments` and hands what it prints to `take` as it comes. It may take as long as it likes, as long
    /// as something comes.
    ///
    /// # Errors
    /// As of [`Self::run`], or what `take` returns.
    pub(super) fn stream(
        &self,
        arguments: &[&str],
        take: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> Result<(), HostError> {
        let mut running = self.start(arguments)?;
        let printed = running.stdout()?;
        // What comes may be gigabytes, in pieces of some kilobytes: whoever writes and who reads are to take turns seldom.
        if let Err(error) = fcntl_setpipe_size(&printed, PIPE) {
            tracing::debug!(%error, "a pipe stays as it was, and is slower");
        }
        let mut printed = BufReader::with_capacity(PIPE, Patient::between(printed, LONGEST));
        let taken = take(&mut printed);
        running.end(Instant::now() + LONGEST, taken, &in_words(arguments))
    }

    fn start(&self, arguments: &[&str]) -> Result<Running, HostError> {
        Command::new(&self.0)
            .args(arguments)
            .env_clear()
            // What it says is read here.
            .env("LC_ALL", "C")
            .env("PATH", DIRECTORIES)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map(Running)
            .map_err(|error| HostError::io(format!("start {}", self.0.display()), error))
    }
}

/// A command as a user would type it.
fn in_words(arguments: &[&str]) -> String {
    format!("zfs {}", arguments.join(" "))
}

/// A command that was started.
struct Running(Child);

impl Running {
    fn stdout(&mut self) -> Result<ChildStdout, HostError> {
        let piped = self.0.stdout.take();
        piped.ok_or_else(|| HostError::new(ErrorKind::Other, "the output of zfs is not piped"))
    }

    /// Waits for the end, at most until `end`, or kills it if what it printed could not be `read`.
    fn end(mut self, end: Instant, read: io::Result<()>, what: &str) -> Result<(), HostError> {
        let mut said = Vec::new();
        if let (Ok(()), Some(stderr)) = (&read, self.0.stderr.take()) {
            // It closes its last descriptor when it ends.
            let waited = Patient::until(stderr, end).read_to_end(&mut said);
            if waited.is_ok() {
                let status = self
                    .0
                    .wait()
                    .map_err(|error| HostError::io(format!("wait for {what}"), error))?;
                return if status.success() {
                    Ok(())
                } else {
                    let said = String::from_utf8_lossy(&said);
                    Err(explain(what, said.trim(), &status.to_string()))
                };
            }
        }
        let why = read.err();
        let timed_out = why
            .as_ref()
            .is_none_or(|error| error.kind() == io::ErrorKind::TimedOut);
        self.kill();
        Err(match why {
            Some(error) if !timed_out => HostError::io(what, error),
            _ => HostError::new(
                ErrorKind::Timeout,
                format!("{what}: no answer in {} s", LONGEST.as_secs()),
            )
            .hint("`zpool status` says whether the pool's disks are there"),
        })
    }

    /// Kills it. One that waits in the kernel goes when the kernel lets it; a thread sees to it then.
    fn kill(mut self) {
        if let Err(error) = self.0.kill() {
            tracing::warn!(%error, "could not kill a command that did not end");
        }
        let mut child = self.0;
        let reaper = std::thread::spawn(move || child.wait().map(drop));
        drop(reaper);
    }
}

/// Reads from a pipe, and gives up when nothing comes.
struct Patient<T> {
    pipe: T,
    patience: Patience,
}

enum Patience {
    Until(Instant),
    Between(Duration),
}

impl<T> Patient<T> {
    fn until(pipe: T, end: Instant) -> Self {
        let patience = Patience::Until(end.max(Instant::now() + KILLED));
        Self { pipe, patience }
    }

    fn between(pipe: T, longest: Duration) -> Self {
        let patience = Patience::Between(longest);
        Self { pipe, patience }
    }
}

impl<T: Read + AsFd> Read for Patient<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = match self.patience {
            Patience::Until(end) => end.saturating_duration_since(Instant::now()),
            Patience::Between(longest) => longest,
        };
        wait_readable(&self.pipe, left)?;
        self.pipe.read(buffer)
    }
}

/// Waits until `pipe` can be read or is closed.
pub(super) fn wait_readable(pipe: &impl AsFd, longest: Duration) -> io::Result<()> {
    let timeout = Timespec {
        tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: longest.subsec_nanos().into(),
    };
    let mut descriptors = [PollFd::new(pipe, PollFlags::IN)];
    match poll(&mut descriptors, Some(&timeout)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) => Ok(()),
        // Whoever reads tries again.
        Err(error) => Err(error.into()),
    }
}

/// What `zfs` says when it fails, as far as somebody can do something about it. The texts are those of `libzfs` in the
/// C locale (lib/libzfs/libzfs_util.c), unchanged for many years.
const MEANINGS: &[(&str, ErrorKind, Option<&str>)] = &[
    (
        "out of space",
        ErrorKind::Exhausted,
        Some(
            "free some space in the pool: `icebox rm` what is no longer needed, then `icebox gc`; `zfs list -o space` shows who has it",
        ),
    ),
    (
        "quota exceeded",
        ErrorKind::Exhausted,
        Some("raise the dataset's quota, or remove what is no longer needed"),
    ),
    (
        "read-only",
        ErrorKind::Unsupported,
        Some("the pool was imported read-only: export it, and import it without readonly=on"),
    ),
    (
        "I/O is currently suspended",
        ErrorKind::Unsupported,
        Some(
            "`zpool status` says which disks are missing; `zpool clear` goes on when they are back",
        ),
    ),
    ("does not exist", ErrorKind::NotFound, None),
    ("could not find any snapshots", ErrorKind::NotFound, None),
    ("no such pool", ErrorKind::NotFound, None),
    ("already exists", ErrorKind::AlreadyExists, None),
    (
        "dataset is busy",
        ErrorKind::Busy,
        Some("something has the volume open: `fuser -v` on its device says who"),
    ),
    ("pool or dataset is busy", ErrorKind::Busy, None),
    (
        "has children",
        ErrorKind::Busy,
        Some("somebody else took snapshots of it: `zfs list -t snapshot` shows them"),
    ),
    ("has dependent clones", ErrorKind::Busy, None),
    (
        "permission denied",
        ErrorKind::Unsupported,
        Some("run the daemon as root"),
    ),
    (
        "modules are not loaded",
        ErrorKind::Unsupported,
        Some("`modprobe zfs`"),
    ),
];

/// The error that a command's messages stand for.
fn explain(what: &str, said: &str, status: &str) -> HostError {
    let said: String = said.chars().take(MESSAGE_MAX).collect();
    let meaning = MEANINGS.iter().find(|(text, ..)| said.contains(text));
    let message = match said.as_str() {
        "" => format!("{what}: {status}"),
        said => format!("{what}: {said}"),
    };
    match meaning {
        Some((_, kind, Some(hint))) => HostError::new(*kind, message).hint(*hint),
        Some((_, kind, None)) => HostError::new(*kind, message),
        None => HostError::new(ErrorKind::Other, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell() -> Program {
        Program(PathBuf::from("/bin/sh"))
    }

    #[test]
    fn what_it_says_becomes_a_typed_error() {
        for (said, kind) in [
            (
                "cannot create snapshot 'tank/a@b': out of space",
                ErrorKind::Exhausted,
            ),
            (
                "cannot open 'tank/icebox': dataset does not exist",
                ErrorKind::NotFound,
            ),
            (
                "cannot create 'tank/a': dataset already exists",
                ErrorKind::AlreadyExists,
            ),
            ("cannot destroy 'tank/a': dataset is busy", ErrorKind::Busy),
            (
                "cannot create 'tank/a': pool is read-only",
                ErrorKind::Unsupported,
            ),
            ("something new", ErrorKind::Other),
        ] {
            let script = format!("echo \"{said}\" >&2; exit 1");
            let error = shell().run(&["-c", &script]).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().ends_with(said), "{error}");
        }
        let silent = shell().run(&["-c", "exit 3"]).unwrap_err();
        assert!(silent.to_string().contains("exit status: 3"), "{silent}");
        assert_eq!(
            shell().run(&["-c", "echo said; echo warned >&2"]).unwrap(),
            "said\n"
        );
    }

    #[test]
    fn a_stream_that_nobody_can_use_ends_the_command() {
        let refuse = |_: &mut dyn Read| Err(io::Error::other("not that"));
        let error = shell()
            .stream(&["-c", "exec cat /dev/zero"], refuse)
            .unwrap_err();
        assert!(error.to_string().contains("cat /dev/zero"), "{error}");
        let mut all = Vec::new();
        let read = |from: &mut dyn Read| from.read_to_end(&mut all).map(drop);
        let script = "head -c 300000 /dev/zero";
        shell().stream(&["-c", script], read).unwrap();
        assert_eq!(all.len(), 300_000);
        let fails = |from: &mut dyn Read| io::copy(from, &mut io::sink()).map(drop);
        let error = shell()
            .stream(&["-c", "echo part; exit 1"], fails)
            .unwrap_err();
        assert!(error.to_string().contains("exit status: 1"), "{error}");
    }
}
