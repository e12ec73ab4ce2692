//! The machine under the server: its clock, its name, its randomness, its disk.
//!
//! Everything here blocks. Outside a sandbox (tests) the machine is someone else's and is left alone.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use icebox_agent_api::{
    ENVD_VERSION,
    control::{Identity, Init, InitReport},
};
use rustix::{
    fs::{Mode, OFlags},
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};

use super::connections;
use crate::sys;

/// Fewer would not make two forks differ for sure.
const MIN_ENTROPY_BYTES: usize = 32;
/// `HOST_NAME_MAX` of Linux.
const MAX_HOSTNAME_BYTES: usize = 64;
/// Marks the line of `/etc/hosts` that is ours.
const HOSTS_MARK: &str = "# the sandbox";

/// Whose machine it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    /// The guest the agent was made for.
    Guest,
    /// Any other: nothing on it is changed.
    Foreign,
}

/// A request that makes no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidInit {
    #[error("invalid hostname {0:?}: 1 to 64 letters, digits, '-' and '.' are")]
    Hostname(String),
    #[error("invalid machine id {0:?}: 32 lower-case hex digits are")]
    MachineId(String),
    #[error("{0} bytes of entropy are too few: 32 are needed")]
    Entropy(usize),
}

/// What a sandbox cannot do without and the machine would not do.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
pub(super) struct MachineError {
    operation: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> MachineError {
    move |source| MachineError {
        operation,
        source: source.into(),
    }
}

/// Refuses what would be applied half.
pub(super) fn validate(init: &Init) -> Result<(), InvalidInit> {
    let Identity {
        hostname,
        machine_id,
        ..
    } = &init.identity;
    let valid_hostname = (1..=MAX_HOSTNAME_BYTES).contains(&hostname.len())
        && hostname
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if !valid_hostname {
        return Err(InvalidInit::Hostname(hostname.clone()));
    }
    if machine_id.len() != 32
        || !machine_id
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err(InvalidInit::MachineId(machine_id.clone()));
    }
    if init.entropy.len() < MIN_ENTROPY_BYTES {
        return Err(InvalidInit::Entropy(init.entropy.len()));
    }
    Ok(())
}

impl Machine {
    /// Makes this machine the one `init` describes. `caller` is the other end of the connection the call came by.
    ///
    /// Clock, entropy, host name and machine id must succeed; the rest is reported. Safe to repeat.
    pub(super) fn apply(self, init: &Init, caller: SocketAddr) -> Result<InitReport, MachineError> {
        let mut report = InitReport {
            envd_version: ENVD_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .map_err(failed("read the boot id"))?,
            clock_step_ns: 0,
            connections_closed: 0,
            problems: Vec::new(),
        };
        if self == Self::Foreign {
            report
                .problems
                .push("this machine is not a sandbox: it was left as it is".to_owned());
            return Ok(report);
        }
        report.clock_step_ns = set_clock(init.clock_unix_ns).map_err(failed("set the clock"))?;
        let random = fs::File::open("/dev/urandom").map_err(failed("open /dev/urandom"))?;
        sys::reseed(random, &init.entropy).map_err(failed("reseed the random number generator"))?;
        let Identity {
            hostname,
            machine_id,
            ..
        } = &init.identity;
        rustix::system::sethostname(hostname.as_bytes()).map_err(failed("set the host name"))?;
        // An image may be so bare that it has none; what follows writes there.
        fs::create_dir_all("/etc").map_err(failed("make /etc"))?;
        set_machine_id(machine_id).map_err(failed("write /etc/machine-id"))?;
        let mut optional = |what: &str, result: io::Result<()>| {
            if let Err(error) = result {
                report.problems.push(format!("{what}: {error}"));
            }
        };
        optional(
            "/etc/hostname was not written",
            replace(Path::new("/etc/hostname"), &format!("{hostname}\n"), 0o644),
        );
        optional("/etc/hosts was not written", set_hosts(hostname));
        if init.close_connections {
            match connections::close_external(caller) {
                Ok(closed) => report.connections_closed = closed,
                Err(error) => optional(
                    "TCP connections from before the capture stay open",
                    Err(error),
                ),
            }
        }
        Ok(report)
    }

    /// Moves the clock by so many nanoseconds, and returns what it shows then, in nanoseconds since 1970.
    pub(super) fn move_clock(self, step_ns: i64) -> io::Result<u64> {
        if step_ns != 0 && self == Self::Guest {
            let moved = nanoseconds(clock_gettime(ClockId::Realtime))?
                .checked_add_signed(step_ns)
                .ok_or_else(|| io::Error::other("there is no such time"))?;
            set_clock(moved)?;
        }
        nanoseconds(clock_gettime(ClockId::Realtime))
    }

    /// Writes everything that is dirty to the disk.
    pub(super) fn sync(self) -> io::Result<()> {
        if self == Self::Guest {
            rustix::fs::sync();
        }
        Ok(())
    }

    /// Frees the clean pages of the page cache. Names and inodes stay: they are small and dear to read again.
    pub(super) fn drop_caches(self) -> io::Result<()> {
        match self {
            Self::Guest => fs::write("/proc/sys/vm/drop_caches", "1"),
            Self::Foreign => Ok(()),
        }
    }

    /// Tells the disk which blocks of the root filesystem are free. Returns the number of bytes.
    pub(super) fn trim(self) -> io::Result<u64> {
        if self == Self::Foreign {
            return Ok(0);
        }
        let root = rustix::fs::open(
            "/",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        sys::trim(root)
    }
}

const NS_PER_S: u64 = 1_000_000_000;

/// Nanoseconds since 1970.
fn nanoseconds(time: Timespec) -> io::Result<u64> {
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanoseconds = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(seconds.saturating_mul(NS_PER_S).saturating_add(nanoseconds))
}

/// Sets the clock and returns by how many nanoseconds it was moved.
fn set_clock(unix_ns: u64) -> io::Result<i64> {
    let before = clock_gettime(ClockId::Realtime);
    let seconds = i64::try_from(unix_ns / NS_PER_S).map_err(io::Error::other)?;
    let nanoseconds = i64::try_from(unix_ns % NS_PER_S).map_err(io::Error::other)?;
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
    )?;
    let step = (seconds.saturating_sub(before.tv_sec)).saturating_mul(1_000_000_000);
    Ok(step.saturating_add(nanoseconds - before.tv_nsec))
}

/// Writes `/etc/machine-id`, or lays a file over it where it cannot be written (a full or read-only disk): two forks
/// with one machine id would be one machine to whatever goes by it.
fn set_machine_id(id: &str) -> io::Result<()> {
    const FILE: &str = "/etc/machine-id";
    const COVER: &str = "/run/icebox/machine-id";
    let text = format!("{id}\n");
    if replace(Path::new(FILE), &text, 0o444).is_ok() {
        return Ok(());
    }
    // A cover from an earlier call is written through.
    fs::write(COVER, &text)?;
    if fs::read_to_string(FILE).is_ok_and(|current| current == text) {
        return Ok(());
    }
    rustix::mount::mount_bind(COVER, FILE)?;
    Ok(())
}

/// Makes the host name resolve, which `sudo` and many others look up.
fn set_hosts(hostname: &str) -> io::Result<()> {
    let path = Path::new("/etc/hosts");
    let current = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned()
        }
        Err(error) => return Err(error),
    };
    replace(path, &hosts_with(&current, hostname), 0o644)
}

fn hosts_with(current: &str, hostname: &str) -> String {
    let others = current
        .lines()
        .filter(|line| !line.ends_with(HOSTS_MARK))
        .map(|line| format!("{line}\n"));
    others
        .chain([format!("127.0.1.1\t{hostname}\t{HOSTS_MARK}\n")])
        .collect()
}

/// Replaces a file in one step, unless it already has this content.
///
/// Content of the same length goes over the old, which is one step too, for a few bytes: a new file and a rename are
/// what a fork's first moments are spent on otherwise.
fn replace(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let current = fs::read_to_string(path).ok();
    if current.as_deref() == Some(content) {
        return Ok(());
    }
    if current.is_some_and(|current| current.len() == content.len())
        && overwrite(path, content).is_ok()
    {
        return Ok(());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".icebox-new");
    let temporary = PathBuf::from(temporary);
    let written = fs::write(&temporary, content)
        .and_then(|()| fs::set_permissions(&temporary, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() && fs::exists(&temporary)? {
        fs::remove_file(&temporary)?;
    }
    written
}

/// Writes over the beginning of a file that has one name and is no link.
fn overwrite(path: &Path, content: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    file.write_all_at(content.as_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keeps_what_is_not_ours() {
        let first = hosts_with("127.0.0.1 localhost\n10.0.0.1 db", "one");
        let second = hosts_with(&first, "two");
        assert_eq!(
            second,
            "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1\ttwo\t# the sandbox\n"
        );
    }

    #[test]
    fn replace_changes_content_and_mode_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("machine-id");
        for content in ["a\n", "b\n", "b\n"] {
            replace(&path, content, 0o444).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o444
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn replace_writes_through_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let theirs = directory.path().join("theirs");
        fs::write(&theirs, "a\n").unwrap();
        let symlink = directory.path().join("symlink");
        std::os::unix::fs::symlink(&theirs, &symlink).unwrap();
        let hard = directory.path().join("hard");
        fs::hard_link(&theirs, &hard).unwrap();
        for path in [symlink, hard] {
            replace(&path, "b\n", 0o644).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "b\n");
            assert_eq!(fs::read_to_string(&theirs).unwrap(), "a\n");
        }
    }
}
