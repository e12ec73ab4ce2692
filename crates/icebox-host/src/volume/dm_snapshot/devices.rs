//! Device-mapper's devices, by ioctl.
//!
//! Source: include/uapi/linux/dm-ioctl.h in Linux. Every function is one ioctl and says in its error which device it was
//! about. Names and identities are ours to choose; a device of our name without our identity is somebody else's, and is
//! refused, never touched.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError, Removed};
use rustix::io::Errno;

use super::sys::{self, HEADER};
use crate::fs::failed;

const CONTROL: &str = "/dev/mapper/control";
/// The interface that the kernel must have: the newest that anything here needs is 4.0.
const VERSION: [u32; 3] = [4, 0, 0];

// Commands.
const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const TABLE_LOAD: u8 = 9;
const TABLE_CLEAR: u8 = 10;
const TABLE_STATUS: u8 = 12;

// Flags.
const READ_ONLY: u32 = 1;
const SUSPEND: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const ACTIVE_PRESENT: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
/// A question is answered from memory, and waits for nothing.
const NO_FLUSH: u32 = 1 << 11;

/// In the upper half of the event number: no rule of udev is to look into a guest's disk (`DM_UDEV_DISABLE_…` for
/// subsystem, disk and other rules, and for libdevmapper's fallback; libdevmapper.h).
const HANDS_OFF: u32 = 0x002e << 16;

// Places in the header.
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const OPEN_COUNT: usize = 24;
const FLAGS: usize = 28;
const EVENT: usize = 32;
const DEVICE: usize = 40;
const NAME: usize = 48;
const IDENTITY: usize = 176;
/// Bytes for the name, its final zero included.
const NAME_MAX: usize = 128;
/// Bytes for the identity, its final zero included.
const IDENTITY_MAX: usize = 129;
/// Bytes of `struct dm_target_spec`, which a target's parameters follow.
const TARGET: usize = 40;
/// What an answer may need at first; doubled as long as it is not enough.
const ANSWER: usize = 4096;
const ANSWER_MAX: usize = 16 << 20;

/// How long to be patient with the kernel: twelve times, each twice as long as the one before, are four seconds.
const PATIENCE_FIRST: Duration = Duration::from_millis(1);
const PATIENCE_TRIES: u32 = 12;

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number {
    major: u32,
    minor: u32,
}

impl Number {
    /// From what `st_rdev` or device-mapper says.
    pub(super) fn from_raw(device: u64) -> Self {
        Self {
            major: rustix::fs::major(device),
            minor: rustix::fs::minor(device),
        }
    }

    /// The node of a device-mapper device. The kernel makes it (devtmpfs); no udev is needed.
    pub(super) fn node(self) -> PathBuf {
        PathBuf::from(format!("/dev/dm-{}", self.minor))
    }
}

/// As tables spell it.
impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A line of a table: `length` sectors from `start`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: String,
    pub(super) parameters: String,
}

impl Target {
    pub(super) fn new(start: u64, length: u64, kind: &str, parameters: String) -> Self {
        Self {
            start,
            length,
            kind: kind.to_owned(),
            parameters,
        }
    }
}

/// What device-mapper says about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) number: Number,
    pub(super) is_open: bool,
    /// It has a table and lets I/O through, or would if it were not suspended.
    pub(super) is_active: bool,
    pub(super) is_suspended: bool,
    identity: String,
}

/// What to send, and what came back.
struct Message(Vec<u8>);

impl Message {
    fn new(name: &str) -> Result<Self, HostError> {
        let mut message = Self(vec![0; HEADER]);
        for (index, number) in VERSION.into_iter().enumerate() {
            message.put(index * 4, number);
        }
        message.put(DATA_START, number(HEADER));
        message.put_text(NAME, NAME_MAX, name)?;
        Ok(message)
    }

    fn put(&mut self, at: usize, number: u32) {
        self.0[at..at + 4].copy_from_slice(&number.to_ne_bytes());
    }

    fn put_text(&mut self, at: usize, room: usize, text: &str) -> Result<(), HostError> {
        if text.len() >= room {
            return Err(HostError::new(
                ErrorKind::Invalid,
                format!("{text:?} is too long for a device-mapper device"),
            ));
        }
        self.0[at..at + text.len()].copy_from_slice(text.as_bytes());
        Ok(())
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self
            .0
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    }

    fn double(&self, at: usize) -> u64 {
        let bytes = self
            .0
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_ne_bytes)
    }

    /// Text up to its final zero.
    fn text(&self, at: usize) -> String {
        let bytes = self.0.get(at..).unwrap_or_default();
        let end = bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    }

    fn flags(&self) -> u32 {
        self.word(FLAGS)
    }

    fn add_target(&mut self, target: &Target) {
        // Each begins where the one before says, at a multiple of eight.
        let room = (TARGET + target.parameters.len() + 1).next_multiple_of(8);
        let mut line = Vec::with_capacity(room);
        line.extend(target.start.to_ne_bytes());
        line.extend(target.length.to_ne_bytes());
        line.extend(0_u32.to_ne_bytes());
        line.extend(number(room).to_ne_bytes());
        let mut kind = target.kind.clone().into_bytes();
        kind.resize(16, 0);
        line.extend(kind);
        line.extend(target.parameters.as_bytes());
        line.resize(room, 0);
        self.0.extend(line);
        self.put(TARGET_COUNT, self.word(TARGET_COUNT) + 1);
    }
}

/// Device-mapper's control node.
#[derive(Debug)]
pub(super) struct Control(File);

impl Control {
    pub(super) fn open() -> Result<Self, HostError> {
        let path = Path::new(CONTROL);
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.map(Self).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let error = failed("open", path, error);
            if missing {
                HostError::new(ErrorKind::Unsupported, "there is no device-mapper here")
                    .caused_by(error)
                    .hint("load the kernel's driver (modprobe dm_mod), or choose another volume driver")
            } else {
                error
            }
        })
    }

    fn send(&self, command: u8, message: &mut Message) -> Result<(), Errno> {
        sys::device_mapper(&self.0, command, &mut message.0)
    }

    /// Makes a device without a table.
    pub(super) fn create(&self, name: &str) -> Result<(), HostError> {
        let mut message = Message::new(name)?;
        message.put_text(IDENTITY, IDENTITY_MAX, &identity(name))?;
        self.send(DEV_CREATE, &mut message)
            .map_err(|error| about("make", name, error))
    }

    /// Gives a device a table, which takes effect when it is resumed. What the table names is kept from now on.
    ///
    /// Patient with a kernel that says it has no memory. Since Linux 6.0 (0495e337b703), a slab cache that goes leaves its
    /// name in sysfs for a moment, and device-mapper makes one of the same name for each snapshot: next to another one's
    /// end it fails with ENOMEM, and there is nothing wrong.
    pub(super) fn load(
        &self,
        name: &str,
        table: &[Target],
        read_only: bool,
    ) -> Result<(), HostError> {
        let mut message = Message::new(name)?;
        message.put(FLAGS, if read_only { READ_ONLY } else { 0 });
        for target in table {
            message.add_target(target);
        }
        // The kernel answers in the message only if it did it.
        let load = || self.send(TABLE_LOAD, &mut message);
        patiently(|error| *error == Errno::NOMEM, load).map_err(|error| {
            let error = about("load a table into", name, error);
            error.hint("`dmesg` says what the kernel did not like about it")
        })
    }

    /// Forgets a table that was loaded and did not take effect.
    pub(super) fn clear(&self, name: &str) -> Result<(), HostError> {
        self.send(TABLE_CLEAR, &mut Message::new(name)?)
            .map_err(|error| about("clear the next table of", name, error))
    }

    /// Lets I/O through, by the table that was loaded last.
    pub(super) fn resume(&self, name: &str) -> Result<(), HostError> {
        let mut message = Message::new(name)?;
        message.put(EVENT, HANDS_OFF);
        self.send(DEV_SUSPEND, &mut message)
            .map_err(|error| about("resume", name, error))
    }

    /// Holds I/O back. Returns when all that was begun has ended, and what its own page cache held is written.
    pub(super) fn suspend(&self, name: &str) -> Result<(), HostError> {
        let mut message = Message::new(name)?;
        message.put(FLAGS, SUSPEND);
        self.send(DEV_SUSPEND, &mut message)
            .map_err(|error| about("suspend", name, error))
    }

    /// Looks at a device of ours; `None` if there is none.
    ///
    /// # Errors
    /// One of that name is somebody else's.
    pub(super) fn info(&self, name: &str) -> Result<Option<Info>, HostError> {
        let found = self.look(name)?;
        if let Some(info) = &found
            && info.identity != identity(name)
        {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                format!(
                    "there is a device-mapper device {name} that is not ours (its identity is {:?})",
                    info.identity
                ),
            )
            .hint(format!("`dmsetup info {name}` may tell whose it is; rename or remove it")));
        }
        Ok(found)
    }

    fn look(&self, name: &str) -> Result<Option<Info>, HostError> {
        let mut message = Message::new(name)?;
        match self.send(DEV_STATUS, &mut message) {
            Ok(()) => {
                let flags = message.flags();
                Ok(Some(Info {
                    number: Number::from_raw(message.double(DEVICE)),
                    is_open: message.word(OPEN_COUNT) > 0,
                    is_active: flags & ACTIVE_PRESENT != 0,
                    is_suspended: flags & SUSPEND != 0,
                    identity: message.text(IDENTITY),
                }))
            }
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(about("look at", name, error)),
        }
    }

    /// The table that is in effect; empty if there is none.
    pub(super) fn table(&self, name: &str) -> Result<Vec<Target>, HostError> {
        self.ask(TABLE_STATUS, name, STATUS_TABLE)
            .map(|answer| targets(&answer))
            .map_err(|error| about("read the table of", name, error))
    }

    /// What the targets of a device say of themselves, as their parameters; `None` if there is no such device.
    pub(super) fn status(&self, name: &str) -> Result<Option<Vec<Target>>, HostError> {
        match self.ask(TABLE_STATUS, name, NO_FLUSH) {
            Ok(answer) => Ok(Some(targets(&answer))),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(about("read the status of", name, error)),
        }
    }

    /// Names of the devices that begin with `prefix` and are ours.
    pub(super) fn list(&self, prefix: &str) -> Result<Vec<String>, HostError> {
        let answer = self
            .ask(LIST_DEVICES, "", 0)
            .map_err(|error| HostError::io("list device-mapper's devices", error.into()))?;
        let mut names = Vec::new();
        let mut at = answer.word(DATA_START) as usize;
        // A device number of 0 says that there is none at all.
        while answer.double(at) != 0 {
            let name = answer.text(at + 12);
            if name.starts_with(prefix) {
                names.push(name);
            }
            match answer.word(at + 8) {
                0 => break,
                next => at += next as usize,
            }
        }
        Ok(names)
    }

    /// Sends a command whose answer has any length.
    fn ask(&self, command: u8, name: &str, flags: u32) -> Result<Message, Errno> {
        let mut room = ANSWER;
        loop {
            let mut message = Message::new(name).map_err(|_| Errno::INVAL)?;
            message.put(FLAGS, flags);
            message.0.resize(HEADER + room, 0);
            self.send(command, &mut message)?;
            if message.flags() & BUFFER_FULL == 0 {
                return Ok(message);
            }
            room *= 2;
            if room > ANSWER_MAX {
                return Err(Errno::OVERFLOW);
            }
        }
    }

    /// Ensures that a device of ours is not there. One that is in use stays, with [`ErrorKind::Busy`] at once.
    pub(super) fn remove(&self, name: &str) -> Result<Removed, HostError> {
        let mut message = Message::new(name)?;
        message.put(EVENT, HANDS_OFF);
        match self.send(DEV_REMOVE, &mut message) {
            Ok(()) => Ok(Removed::Removed),
            Err(Errno::NXIO) => Ok(Removed::AlreadyAbsent),
            Err(error) => Err(about("remove", name, error)),
        }
    }

    /// [`remove`](Self::remove) of one that should not be in use, and may be for a moment (INV-13): somebody looks at a new
    /// block device, and goes away again. Blocks for up to four seconds.
    pub(super) fn remove_patiently(&self, name: &str) -> Result<Removed, HostError> {
        let is_busy = |error: &HostError| error.kind() == ErrorKind::Busy;
        patiently(is_busy, || self.remove(name)).map_err(|error| {
            if !is_busy(&error) {
                return error;
            }
            let node = self.look(name).ok().flatten().map(|info| info.number.node());
            let node = node.unwrap_or_default();
            error.hint(format!(
                "something still has it open: `fuser -v {}` says what, `dmsetup ls --tree` what is above it",
                node.display()
            ))
        })
    }
}

/// Repeats what fails as `passes` says, for as long as that may take to pass.
#[expect(
    clippy::disallowed_methods,
    reason = "the kernel has no event for any of it"
)]
fn patiently<T, E>(
    passes: impl Fn(&E) -> bool,
    mut work: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let mut pause = PATIENCE_FIRST;
    for _ in 0..PATIENCE_TRIES {
        match work() {
            Err(error) if passes(&error) => thread::sleep(pause),
            other => return other,
        }
        pause *= 2;
    }
    work()
}

/// The lines of a table or a status.
fn targets(answer: &Message) -> Vec<Target> {
    let begin = answer.word(DATA_START) as usize;
    let mut targets = Vec::new();
    let mut at = begin;
    for _ in 0..answer.word(TARGET_COUNT) {
        targets.push(Target {
            start: answer.double(at),
            length: answer.double(at + 8),
            kind: answer.text(at + 24),
            parameters: answer.text(at + TARGET),
        });
        // Counted from the first.
        at = begin + answer.word(at + 20) as usize;
    }
    targets
}

/// A length as device-mapper counts it. It refuses messages that are nearly as long as that.
fn number(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// What tells a device of ours from another of the same name.
fn identity(name: &str) -> String {
    format!("ICEBOX-{name}")
}

fn about(action: &str, name: &str, error: Errno) -> HostError {
    HostError::io(
        format!("{action} the device-mapper device {name}"),
        error.into(),
    )
}
