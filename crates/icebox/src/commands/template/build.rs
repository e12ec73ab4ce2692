//! `icebox template build`

use std::path::PathBuf;
use std::process::ExitCode;

use futures_util::TryStreamExt as _;
use icebox_api::types::{BuildEvent, BuildSource, NewBuild};

use super::{Context, Ended};
use crate::commands::absolute;
use crate::commands::size::mib;
use crate::failure::Failure;

/// Make a template from Debian packages, an archive, a directory or an image. Prints its id.
///
/// Interrupting the command cancels the build.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to call the template.
    name: String,

    #[command(flatten)]
    from: From,

    /// Debian packages to include.
    #[arg(
        long,
        value_name = "PACKAGES",
        value_delimiter = ',',
        conflicts_with_all = ["from_tar", "from_dir", "from_image"]
    )]
    include: Vec<String>,

    /// With what programs for E2B's SDKs expect to find, and as a snapshot, which sandboxes are restored from.
    #[arg(long, requires = "suite")]
    e2b: bool,

    /// Disk size in MiB, or with a suffix: 2G.
    #[arg(long, value_name = "SIZE", value_parser = mib, allow_negative_numbers = true)]
    size: Option<i64>,

    /// Virtual CPUs of its sandboxes, unless they say otherwise.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<i64>,

    /// Memory of its sandboxes in MiB, or with a suffix, unless they say otherwise.
    #[arg(long, value_name = "SIZE", value_parser = mib, allow_negative_numbers = true)]
    memory: Option<i64>,

    /// Run this shell command once and keep its running state: creating from the template is then a restore.
    #[arg(long, value_name = "COMMAND")]
    start_cmd: Option<String>,

    /// With --start-cmd: a shell command that succeeds once it is ready.
    #[arg(long, value_name = "COMMAND", requires = "start_cmd")]
    ready_cmd: Option<String>,

    /// With --start-cmd: run it, and so sandboxes created from the template, on this VMM.
    #[arg(long, requires = "start_cmd")]
    vmm: Option<String>,
}

/// What the root filesystem is made from: exactly one.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct From {
    /// A Debian suite: debian:bookworm.
    #[arg(long = "from", id = "suite", value_name = "debian:SUITE", value_parser = suite)]
    suite: Option<String>,

    /// A tar archive of a root filesystem.
    #[arg(long, value_name = "FILE")]
    from_tar: Option<PathBuf>,

    /// A directory that holds a root filesystem.
    #[arg(long, value_name = "DIR")]
    from_dir: Option<PathBuf>,

    /// A raw ext4 image.
    #[arg(long, value_name = "FILE")]
    from_image: Option<PathBuf>,
}

fn suite(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some(("debian", suite)) if !suite.is_empty() => Ok(suite.to_owned()),
        _ => Err("expected debian:SUITE, for example debian:bookworm".to_owned()),
    }
}

/// What E2B's own base image has and Debian's does not: its programs count on these.
const E2B_PACKAGES: [&str; 11] = [
    "ca-certificates",
    "curl",
    "git",
    "less",
    "ncurses-bin",
    "procps",
    "python-is-python3",
    "python3",
    "python3-pip",
    "python3-venv",
    "sudo",
];

pub(crate) async fn run(context: &Context, mut args: Args) -> Ended {
    if args.e2b {
        args.include.extend(E2B_PACKAGES.map(ToOwned::to_owned));
        // Nothing has to run in it: it is enough that it has booted.
        args.start_cmd.get_or_insert_with(|| "true".to_owned());
    }
    let source = match args.from {
        From {
            suite: Some(suite), ..
        } => BuildSource::Debian {
            suite,
            include: args.include,
        },
        From {
            from_tar: Some(path),
            ..
        } => BuildSource::Tar(absolute(&path)?),
        From {
            from_dir: Some(path),
            ..
        } => BuildSource::Directory(absolute(&path)?),
        From {
            from_image: Some(path),
            ..
        } => BuildSource::Image(absolute(&path)?),
        _ => return Err(Failure::new("nothing to build from was given")),
    };
    let new = NewBuild {
        name: args.name,
        source,
        disk_size_mb: args.size,
        cpu_count: args.cpus,
        memory_mb: args.memory,
        start_cmd: args.start_cmd,
        ready_cmd: args.ready_cmd,
        vmm: args.vmm,
    };
    let progress = context.output.progress();
    let mut events = std::pin::pin!(context.client.build(&new).await?);
    while let Some(event) = events.try_next().await? {
        if context.output.is_json() {
            context.output.document(&event)?;
        }
        match event {
            BuildEvent::Stage { name } => progress.stage(&name),
            BuildEvent::Progress { done, total, bytes } => progress.advance(done, total, bytes),
            BuildEvent::Message { text } => progress.message(&text),
            BuildEvent::Done { template } => {
                drop(progress);
                if !context.output.is_json() {
                    context.output.line(&template.template_id)?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            BuildEvent::Error { error } => return Err(error.into()),
        }
    }
    Err(Failure::new("the daemon ended before the build did")
        .hint("nothing was made; build again when the daemon runs"))
}
