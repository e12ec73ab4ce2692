//! `icebox fork`

use std::process::ExitCode;

use icebox_api::types::{Forked, NewFork};

use super::{Context, Ended, reference};
use crate::failure::Failure;

/// Make running copies of a sandbox as it is this instant. Prints their ids.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,

    /// How many copies.
    #[arg(
        short = 'n',
        long = "count",
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true
    )]
    count: i64,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let new = NewFork {
        count: args.count,
        timeout: None,
    };
    let forks = context.client.fork(&args.sandbox, &new).await?;
    if context.output.is_json() {
        context.output.document(&forks)?;
    }
    let mut ended = ExitCode::SUCCESS;
    for fork in forks {
        match fork {
            Forked::Sandbox(sandbox) if !context.output.is_json() => {
                context.output.line(&sandbox.listed.sandbox_id)?;
            }
            Forked::Sandbox(_) => {}
            Forked::Error(body) => {
                let failure = Failure::from(body);
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}
