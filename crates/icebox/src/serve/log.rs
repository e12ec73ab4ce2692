//! The daemon's log, on stderr.

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;

/// How lines of the log look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging what `filter` lets through.
///
/// # Errors
/// The filter is not understood.
pub(super) fn start(filter: &str, format: Format) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| {
        Failure::because(
            format!("the log filter {filter:?} is not understood"),
            &error,
        )
        .hint("use a level (error, warn, info, debug, trace), or module=level pairs with commas")
    })?;
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter);
    match format {
        Format::Text => log
            .with_ansi(
                anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never,
            )
            .init(),
        Format::Json => log.json().init(),
    }
    Ok(())
}
