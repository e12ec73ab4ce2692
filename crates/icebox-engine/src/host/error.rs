//! The one error that crosses the driver traits.

use std::error::Error;
use std::fmt;

/// What a caller may want to branch on. Everything else is in the message and the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The thing does not exist.
    NotFound,
    /// It exists already and is not what was asked for.
    AlreadyExists,
    /// The input is not acceptable (a corrupt image, an impossible size).
    Invalid,
    /// This host, VMM or driver cannot do it.
    Unsupported,
    /// No space, no slot, no memory left.
    Exhausted,
    /// In use by something that would not let go.
    Busy,
    /// It did not answer in its time.
    Timeout,
    /// The VMM or guest went away.
    Gone,
    /// Anything else: I/O, a surprise of the kernel.
    Other,
}

/// An operation of a driver that failed.
///
/// The message names the operation and the thing; the cause stays in [`Error::source`]; the hint, where there is
/// one, says what a user can do.
#[derive(Debug)]
pub struct HostError {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl HostError {
    /// An error of `kind`. `message` names the operation and the thing: "attach disk of sandbox i…".
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            source: None,
        }
    }

    /// An error with the cause it came from. An I/O cause decides the kind: no space is [`ErrorKind::Exhausted`],
    /// a missing file [`ErrorKind::NotFound`], a busy device [`ErrorKind::Busy`], a read-only file system
    /// [`ErrorKind::Unsupported`].
    #[must_use]
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::AlreadyExists => ErrorKind::AlreadyExists,
            Io::StorageFull | Io::QuotaExceeded | Io::OutOfMemory => ErrorKind::Exhausted,
            Io::ResourceBusy | Io::DirectoryNotEmpty => ErrorKind::Busy,
            Io::TimedOut => ErrorKind::Timeout,
            Io::Unsupported | Io::ReadOnlyFilesystem => ErrorKind::Unsupported,
            Io::ConnectionRefused | Io::ConnectionReset | Io::BrokenPipe | Io::UnexpectedEof => {
                ErrorKind::Gone
            }
            _ => ErrorKind::Other,
        };
        Self::new(kind, message).caused_by(source)
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What a caller may branch on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the user can do, if anything.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for HostError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn Error + 'static))
    }
}
