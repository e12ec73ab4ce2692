//! `icebox logs`

use std::process::ExitCode;

use futures_util::TryStreamExt as _;
use tokio::io::AsyncWriteExt as _;

use super::{Context, Ended, reference};

/// Print what the guest wrote to its console.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox.
    #[arg(value_parser = reference)]
    sandbox: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Ended {
    let mut log = std::pin::pin!(context.client.console(&args.sandbox).await?);
    let mut out = tokio::io::stdout();
    while let Some(piece) = log.try_next().await? {
        if context.output.is_json() {
            let text = String::from_utf8_lossy(&piece);
            context
                .output
                .document(&serde_json::json!({ "console": text }))?;
        } else {
            out.write_all(&piece).await?;
        }
    }
    out.flush().await?;
    Ok(ExitCode::SUCCESS)
}
