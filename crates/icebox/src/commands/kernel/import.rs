//! `icebox kernel import`

use std::path::PathBuf;
use std::process::ExitCode;

use futures_util::TryStreamExt as _;
use icebox_api::types::{KernelEvent, KernelSource, NewKernel};

use super::{Context, Ended};
use crate::commands::absolute;
use crate::failure::Failure;

/// Import a kernel: Debian's own package, downloaded and unpacked but not installed, or a file. Prints its digest.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A kernel image (bzImage or ELF) instead of Debian's.
    file: Option<PathBuf>,

    /// The directory with that kernel's modules, if virtio and ext4 are not built in.
    #[arg(long, value_name = "DIR", requires = "file")]
    modules: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let source = match &args.file {
        None => KernelSource::Debian,
        Some(file) => KernelSource::File {
            path: absolute(file)?,
            modules: args.modules.as_deref().map(absolute).transpose()?,
        },
    };
    let progress = context.output.progress();
    let mut events = std::pin::pin!(context.client.import_kernel(&NewKernel { source }).await?);
    while let Some(event) = events.try_next().await? {
        if context.output.is_json() {
            context.output.document(&event)?;
        }
        match event {
            KernelEvent::Stage { name } => progress.stage(&name),
            KernelEvent::Progress { done, total, bytes } => progress.advance(done, total, bytes),
            KernelEvent::Done { kernel } => {
                drop(progress);
                if !context.output.is_json() {
                    context.output.line(&kernel.digest)?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            KernelEvent::Error { error } => return Err(error.into()),
        }
    }
    Err(Failure::new("the daemon ended before the import did")
        .hint("nothing was imported; import again when the daemon runs"))
}
