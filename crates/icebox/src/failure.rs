//! How a command fails: what it prints and which code it exits with.
//!
//! | code | meaning |
//! |---|---|
//! | 1 | the command failed |
//! | 2 | the command line was not understood |
//! | 124 | `exec --timeout`: the time was over, as timeout(1) has it |
//! | 125 | `exec` failed before or beside the guest's command |
//! | 126, 127 | the guest's command is not executable, or not there, as shells have it |
//! | 141 | the reader of the output has gone (`icebox ls \| head -1`): as if by SIGPIPE, without a word |

use std::error::Error;
use std::io;
use std::process::ExitCode;

use icebox_api::client::ClientError;
use icebox_api::{ApiError, ErrorBody};

/// `exec`: the command's time was over.
pub(crate) const TIMED_OUT: u8 = 124;
/// `exec`: it is us who failed.
pub(crate) const OURS: u8 = 125;
/// `exec`: the program is not executable.
pub(crate) const NOT_EXECUTABLE: u8 = 126;
/// `exec`: there is no such program.
pub(crate) const NOT_FOUND: u8 = 127;
/// Nobody reads the output any more: 128 and the number of SIGPIPE, which ends other programs then.
pub(crate) const UNREAD: u8 = 141;

/// A command that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    body: ErrorBody,
    exit: u8,
    quiet: bool,
}

impl Failure {
    /// A failure of this process itself.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            body: ErrorBody {
                code: 0,
                message: message.into(),
                causes: Vec::new(),
                hint: None,
                error_code: None,
            },
            exit: 1,
            quiet: false,
        }
    }

    /// A failure with its chain of causes.
    pub(crate) fn because(message: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        let mut this = Self::new(message);
        this.body.causes = chain(Some(error));
        this
    }

    /// What `error` says, with its chain of causes.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> Self {
        let mut this = Self::new(error.to_string());
        this.body.causes = chain(error.source());
        this
    }

    /// Exits with `code` instead of 1.
    pub(crate) fn exit(mut self, code: u8) -> Self {
        self.exit = code;
        self
    }

    /// Adds what the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// Whether nobody wants to be told.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    pub(crate) fn body(&self) -> &ErrorBody {
        &self.body
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }
}

/// What `error` and its causes say, outermost first. An error that repeats its cause is not repeated.
fn chain(mut error: Option<&(dyn Error + 'static)>) -> Vec<String> {
    let mut said: Vec<String> = Vec::new();
    while let Some(this) = error {
        let text = this.to_string();
        if said.last() != Some(&text) {
            said.push(text);
        }
        error = this.source();
    }
    said
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        error.into_body().into()
    }
}

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        Self {
            body,
            exit: 1,
            quiet: false,
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(body) => (*body).into(),
            ClientError::Connect { ref source, .. } => {
                let hint = match source.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "the socket belongs to root: run this with sudo"
                    }
                    _ => {
                        "start it with `icebox serve`, or name another socket with --socket or ICEBOX_SOCKET"
                    }
                };
                Self::because(error.to_string(), source).hint(hint)
            }
            ClientError::Broken(ref source) => Self::because(error.to_string(), source.as_ref())
                .hint("the daemon finishes what it began; `icebox ls` shows how it ended"),
            ClientError::NotUnderstood { ref source, .. } => {
                Self::because(error.to_string(), source)
                    .hint("the daemon may be of another version: compare with `icebox doctor`")
            }
        }
    }
}

/// The output could not be written. A reader that has gone (`icebox ls | head -1`) is no failure to speak of.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let failure = Self::because("cannot write the output", &error);
        if error.kind() != io::ErrorKind::BrokenPipe {
            return failure;
        }
        Self {
            quiet: true,
            ..failure.exit(UNREAD)
        }
    }
}
