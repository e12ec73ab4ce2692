//! `icebox doctor`

use std::process::ExitCode;

use icebox_api::types::{CheckResult, Report};

use super::{Context, Ended};
use crate::output::Table;

/// Say what works on this host, what does not, why, and what to do about it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) async fn run(context: &Context, _: &Args) -> Ended {
    let report = context.client.doctor().await?;
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
