//! `icebox drain`

use std::process::ExitCode;

use icebox_api::client::ClientError;

use super::{Context, Ended};

/// Pause every running sandbox and end the daemon.
///
/// Nothing new begins from now on. A sandbox that cannot be paused is named, and runs on without the daemon: the next one
/// finds it again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) async fn run(context: &Context, _args: &Args) -> Ended {
    let report = context.client.drain().await?;
    if context.output.is_json() {
        context.output.document(&report)?;
    }
    for sandbox in &report.paused {
        context.output.say(format!("paused {sandbox}"));
    }
    if report.failed.is_empty() {
        context.output.say("drained; the daemon leaves");
        return Ok(ExitCode::SUCCESS);
    }
    for failed in report.failed {
        let mut error = failed.error;
        error.message = format!("sandbox {} runs on: {}", failed.sandbox, error.message);
        let failure = ClientError::Refused(Box::new(error)).into();
        context.output.failure(&failure);
    }
    Ok(ExitCode::FAILURE)
}
