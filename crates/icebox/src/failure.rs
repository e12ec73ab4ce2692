//! How a command fails: what it prints and which code it exits with.
//!
//! | code | meaning |
//! |---|---|
//! | 1 | the command failed |
//! | 2 | the command line was not understood |
//! | 125 | `exec` failed before or beside the guest's command |
//! | 126, 127 | the guest's command is not executable, or not there |

use std::error::Error;
use std::io;
use std::process::ExitCode;

use icebox_api::ErrorBody;
use icebox_api::client::ClientError;

/// A command that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    body: ErrorBody,
    exit: u8,
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
        }
    }

    /// A failure with its chain of causes.
    pub(crate) fn because(message: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        let mut this = Self::new(message);
        this.body.causes = chain(Some(error));
        this
    }

    /// Adds what the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
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

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        Self { body, exit: 1 }
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

/// stdout that went away (`icebox ls | head`) is the reader's choice, but the writer still says so.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::because("cannot write the output", &error)
    }
}
