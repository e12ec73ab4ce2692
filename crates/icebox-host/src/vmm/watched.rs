//! A VMM's process that is watched: what it says while it runs, how it ended, and errors that say so.

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use icebox_engine::host::{ErrorKind, ExitReason, HostError};
use icebox_engine::id::SandboxId;
use tokio::sync::watch;

use crate::launcher::{Ended, Process};
use crate::vmm::console::{self, Outputs};

/// A socket closes a moment before the process that had it has ended.
const MOMENT: Duration = Duration::from_secs(3);

/// An error of talking to a VMM.
pub(crate) trait TalkError: Into<HostError> {
    /// Whether the VMM is not there any more, as far as the connection shows.
    fn is_gone(&self) -> bool;
}

/// The process, and its end.
#[derive(Debug)]
pub(crate) struct Watched {
    /// What kind of VMM it is, in words.
    name: &'static str,
    sandbox: SandboxId,
    process: Process,
    exit: watch::Receiver<Option<ExitReason>>,
}

impl Watched {
    /// Begins to watch a VMM: its console, its stderr, its end. These go on until it ends, whether or not this value still
    /// exists. `reason` says why it ended, from how and from its last words.
    pub(crate) fn begin<F>(
        name: &'static str,
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        console_log: PathBuf,
        reason: impl FnOnce(Ended, String) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ExitReason> + Send,
    {
        let (sender, exit) = watch::channel(None);
        tokio::spawn(console::keep_log(
            outputs.console,
            process.clone(),
            console_log,
        ));
        let watched = process.clone();
        tokio::spawn(async move {
            let last_words = console::keep_tail(outputs.stderr, watched.clone()).await;
            let ended = watched.ended().await;
            sender.send_replace(Some(reason(ended, last_words).await));
        });
        Self {
            name,
            sandbox: sandbox.clone(),
            process,
            exit,
        }
    }

    /// Whose it is.
    pub(crate) fn sandbox(&self) -> &SandboxId {
        &self.sandbox
    }

    /// Which process it is.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Waits for its end.
    pub(crate) async fn exited(&self) -> ExitReason {
        let mut exit = self.exit.clone();
        let reason = exit.wait_for(Option::is_some).await.ok();
        reason
            .and_then(|reason| reason.clone())
            .unwrap_or_else(|| ExitReason {
                by_guest: false,
                reset: false,
                detail: format!("nobody watched {} any more", self.name),
            })
    }

    /// Runs `work`; if the VMM ends meanwhile, says why instead of "connection lost".
    pub(crate) async fn or_its_end<T, E: TalkError>(
        &self,
        operation: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, HostError> {
        let error = tokio::select! {
            biased;
            result = work => match result {
                Ok(value) => return Ok(value),
                Err(error) => error,
            },
            reason = self.exited() => return Err(self.ended(operation, &reason)),
        };
        if error.is_gone()
            && let Ok(reason) = tokio::time::timeout(MOMENT, self.exited()).await
        {
            return Err(self.ended(operation, &reason));
        }
        Err(error.into())
    }

    fn ended(&self, operation: &str, reason: &ExitReason) -> HostError {
        self.error(ErrorKind::Gone, format!("{operation}: {}", reason.detail))
    }

    /// An error that says whose VMM it is of.
    pub(crate) fn error(&self, kind: ErrorKind, message: impl Display) -> HostError {
        HostError::new(kind, format!("VMM of sandbox {}: {message}", self.sandbox))
    }
}

/// How a VMM ended, for people, with its last words.
pub(crate) fn how_it_ended<'a>(
    name: &str,
    ended: Ended,
    last_words: impl Iterator<Item = &'a str>,
) -> String {
    let how = match ended {
        Ended::Exited(0) => format!("{name} exited"),
        Ended::Exited(status) => format!("{name} exited with status {status}"),
        Ended::Signalled(signal) => format!("{name} was killed by signal {signal}"),
        Ended::Unknown => format!("{name} ended"),
    };
    let words: Vec<&str> = last_words.collect();
    if words.is_empty() {
        how
    } else {
        format!("{how}: {}", words.join("; "))
    }
}
