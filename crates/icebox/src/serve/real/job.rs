//! The daemon's side of a [worker](crate::worker): gives it a job, passes on what it says, and ends it when nobody
//! waits any more.

use std::path::Path;
use std::process::Stdio;

use icebox_api::types::{BuildEvent, KernelEvent};
use icebox_api::{ApiError, ErrorCode};
use icebox_host::guest_image::Places;
use tempfile::TempDir;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::serve::KEY_VARIABLE;
use crate::worker::{ARGUMENT, Job, Said, Step as Told, Work};

/// How much of a worker's last words an error repeats.
const LAST_WORDS: usize = 4096;

/// How far a job is.
pub(super) struct Step(Told);

impl Step {
    pub(super) fn into_build_event(self, prefix: &str) -> BuildEvent {
        match self.0 {
            Told::Stage(name) => BuildEvent::Stage {
                name: format!("{prefix}{name}"),
            },
            Told::Progress { done, total, bytes } => BuildEvent::Progress { done, total, bytes },
        }
    }

    pub(super) fn into_kernel_event(self) -> KernelEvent {
        match self.0 {
            Told::Stage(name) => KernelEvent::Stage { name },
            Told::Progress { done, total, bytes } => KernelEvent::Progress { done, total, bytes },
        }
    }
}

/// A directory for one job, removed when dropped. A start removes what a daemon that died has left.
pub(super) fn directory(places: &Places) -> Result<TempDir, ApiError> {
    tempfile::Builder::new()
        .prefix("build-job-")
        .tempdir_in(&places.staging)
        .map_err(|error| internal("cannot make a directory for the job", &error))
}

/// Does `work` in a passing directory. Returns the kernel's digest, if it was one.
pub(super) async fn run<E>(
    places: &Places,
    work: Work,
    events: &mpsc::Sender<E>,
    event: fn(Step) -> E,
) -> Result<Option<String>, ApiError> {
    let directory = directory(places)?;
    run_in(places, directory.path(), work, events, event).await
}

/// Does `work` in a directory that is the caller's. Dropping the call ends the worker and the tools it runs.
pub(super) async fn run_in<E>(
    places: &Places,
    directory: &Path,
    work: Work,
    events: &mpsc::Sender<E>,
    event: fn(Step) -> E,
) -> Result<Option<String>, ApiError> {
    let job = Job {
        kernels: places.kernels.clone(),
        staging: directory.to_owned(),
        cache: places.cache.clone(),
        work,
    };
    let mut line =
        serde_json::to_vec(&job).map_err(|error| internal("cannot write the job down", &error))?;
    line.push(b'\n');
    let mut worker = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        // Nor is it the business of the tools that a worker runs.
        .env_remove(KEY_VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| internal("cannot start a worker", &error))?;
    let (Some(mut input), Some(output), Some(errors)) = (
        worker.stdin.take(),
        worker.stdout.take(),
        worker.stderr.take(),
    ) else {
        return Err(ApiError::new(ErrorCode::Internal, "a worker has no pipes"));
    };
    input
        .write_all(&line)
        .await
        .map_err(|error| internal("cannot give a worker its job", &error))?;

    let listening = async {
        let mut lines = BufReader::new(output).lines();
        let mut end = None;
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                // Whether anybody listens is the caller's to watch.
                Ok(Said::Step(step)) => drop(events.send(event(Step(step))).await),
                Ok(last) => end = Some(last),
                Err(error) => tracing::warn!(%error, "a worker said something else"),
            }
        }
        end
    };
    let (end, last_words) = tokio::join!(listening, keep_end(errors));
    // Held until here: the worker ends itself when its input does.
    drop(input);
    let status = worker
        .wait()
        .await
        .map_err(|error| internal("cannot wait for a worker", &error))?;
    match end {
        Some(Said::Image) => Ok(None),
        Some(Said::Kernel { digest }) => Ok(Some(digest)),
        Some(Said::Failed(body)) => Err(ApiError::from_body(body)),
        Some(Said::Step(_)) | None => Err(ApiError::new(
            ErrorCode::Internal,
            format!(
                "a worker ended ({status}) without saying how: {}",
                last_words.trim()
            ),
        )),
    }
}

/// Reads to the end, so that the writer never waits, and keeps the last [`LAST_WORDS`] bytes.
async fn keep_end(mut stream: impl AsyncRead + Unpin) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; LAST_WORDS];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..read]);
        kept.drain(..kept.len().saturating_sub(LAST_WORDS));
    }
    String::from_utf8_lossy(&kept).into_owned()
}

fn internal(what: &str, error: &dyn std::error::Error) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("{what}: {error}"))
}
