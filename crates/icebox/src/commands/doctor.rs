//! `icebox doctor`

use std::io;
use std::process::ExitCode;

use icebox_api::client::ClientError;
use icebox_api::types::{Check, CheckResult, Report};

use super::{Context, Ended};
use crate::output::Table;
use crate::serve::{self, Settings};

/// Say what works on this host, what does not, why, and what to do about it.
///
/// Asks the daemon, and looks at this machine itself if none serves.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: Settings,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let socket = context.client.socket();
    let (mut report, daemon) = match context.client.version().await {
        Ok(version) => {
            let detail = format!(
                "{}, pid {}, on {}",
                version.version,
                version.pid,
                socket.display()
            );
            (
                context.client.doctor().await?,
                (CheckResult::Works, detail, None),
            )
        }
        Err(ClientError::Connect { source, .. }) => {
            let detail = format!("none on {}: {source}", socket.display());
            let hint = if source.kind() == io::ErrorKind::PermissionDenied {
                "the socket belongs to root: run this with sudo"
            } else {
                "start it with `icebox serve`"
            }
            .to_owned();
            let report = serve::survey(&args.settings, Some(socket)).await?;
            (report, (CheckResult::Absent, detail, Some(hint)))
        }
        Err(error) => return Err(error.into()),
    };
    let (result, detail, hint) = daemon;
    report.checks.insert(
        0,
        Check {
            name: "daemon".to_owned(),
            result,
            detail,
            hint,
        },
    );
    if context.output.is_json() {
        context.output.document(&report)?;
    } else {
        page(&report).print(false)?;
    }
    Ok(if report.healthy() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn page(report: &Report) -> Table {
    let mut table = Table::plain();
    for check in &report.checks {
        let result = match check.result {
            CheckResult::Works => "works",
            CheckResult::Absent => "absent",
            CheckResult::Fails => "FAILS",
        };
        table.row([check.name.clone(), result.to_owned(), check.detail.clone()]);
        if let Some(hint) = &check.hint {
            table.row([String::new(), String::new(), format!("hint: {hint}")]);
        }
    }
    table
}
