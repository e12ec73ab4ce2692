//! The process that makes one root image or imports one kernel for the daemon.
//!
//! It is a process of its own so that it can be ended at any moment, whatever it is doing, by closing its input: a
//! build's client may go away, and so may the daemon. The tools that it runs die with it. And what it parses may come
//! from anywhere; here that is far from the daemon's memory and sockets.
//!
//! ```text
//!   daemon -- one Job, as a line; then the pipe stays open --> worker
//!          <-- Said, a line each; the last is Image, Kernel or Failed --
//! ```

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use icebox_api::ErrorBody;
use icebox_api::types::{BuildSource, KernelSource};
use icebox_engine::host::HostError;
use icebox_host::guest_image::{ImageError, Places, Progress, Stage, kernel, rootfs};
use serde::{Deserialize, Serialize};

use crate::serve::host_error;

/// The first argument of a worker process.
pub(crate) const ARGUMENT: &str = "worker";

/// What to do, and where.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) kernels: PathBuf,
    /// The job's own: whoever gave the job removes it.
    pub(crate) staging: PathBuf,
    pub(crate) cache: PathBuf,
    pub(crate) work: Work,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Work {
    Image {
        source: BuildSource,
        size: Option<u64>,
        out: PathBuf,
    },
    Kernel(KernelSource),
}

/// A line of the worker's output.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Said {
    Step(Step),
    Image,
    Kernel { digest: String },
    Failed(ErrorBody),
}

/// How far it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Step {
    Stage(String),
    Progress {
        done: u64,
        total: Option<u64>,
        bytes: bool,
    },
}

/// Does the job on its input.
pub(crate) fn run() -> ExitCode {
    let mut input = std::io::stdin().lines();
    let job = input.next().and_then(Result::ok);
    let Some(job) = job.and_then(|line| serde_json::from_str::<Job>(&line).ok()) else {
        eprintln!("icebox worker: there is no job on its input; it is started by `icebox serve`");
        return ExitCode::from(2);
    };
    drop(input);
    std::thread::spawn(end_with_input);
    let said = do_job(&job).unwrap_or_else(|error| {
        let answer = host_error(&HostError::from(error));
        Said::Failed(answer.into_body())
    });
    say(&said);
    ExitCode::SUCCESS
}

/// Ends this process when nobody waits for it any more.
fn end_with_input() {
    let mut nothing = [0; 1];
    // The giver of the job writes nothing more: whatever ends the read, the pipe is closed.
    std::io::stdin().read_exact(&mut nothing).ok();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).ok();
}

fn do_job(job: &Job) -> Result<Said, ImageError> {
    let places = Places {
        kernels: job.kernels.clone(),
        staging: job.staging.clone(),
        cache: job.cache.clone(),
    };
    let progress = Lines::default();
    match &job.work {
        Work::Image { source, size, out } => {
            let recipe = rootfs::Recipe {
                source: match source.clone() {
                    BuildSource::Debian { suite, include } => {
                        rootfs::Source::Debian { suite, include }
                    }
                    BuildSource::Tar(path) => rootfs::Source::Tar(path.into()),
                    BuildSource::Directory(path) => rootfs::Source::Dir(path.into()),
                    BuildSource::Image(path) => rootfs::Source::Image(path.into()),
                },
                size: *size,
            };
            rootfs::build(&places, &recipe, &progress)?.persist(out)?;
            Ok(Said::Image)
        }
        Work::Kernel(source) => {
            let kernel = match source {
                KernelSource::Debian => kernel::fetch(&places, kernel::DEFAULT_PACKAGE, &progress)?,
                KernelSource::File { path, modules } => {
                    kernel::import(&places, Path::new(path), modules.as_deref().map(Path::new))?
                }
            };
            Ok(Said::Kernel {
                digest: kernel.digest().to_string(),
            })
        }
    }
}

/// Progress as lines, no more of them than a person can see.
#[derive(Default)]
struct Lines {
    last: Mutex<Option<(Stage, u64)>>,
}

impl Progress for Lines {
    fn report(&self, stage: Stage, done: u64, total: Option<u64>) {
        let Ok(mut last) = self.last.lock() else {
            return;
        };
        let step = total.map_or(1, |total| (total / 200).max(1));
        match *last {
            Some((before, said)) if before == stage => {
                if done < said.saturating_add(step) && total != Some(done) {
                    return;
                }
            }
            _ => say(&Said::Step(Step::Stage(stage.to_string()))),
        }
        *last = Some((stage, done));
        if done > 0 || total.is_some() {
            say(&Said::Step(Step::Progress {
                done,
                total,
                bytes: stage.counts_bytes(),
            }));
        }
    }
}

fn say(said: &Said) {
    let line = serde_json::to_string(said);
    let mut out = std::io::stdout().lock();
    // Who no longer listens has closed our input too, and that ends us.
    if let Ok(line) = line {
        writeln!(out, "{line}").and_then(|()| out.flush()).ok();
    }
}
