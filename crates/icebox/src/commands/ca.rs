//! `icebox ca`: what programs have to trust. Works on this machine itself, without a daemon.

use std::process::ExitCode;

use super::Ended;
use crate::output::Output;
use crate::serve::{Settings, authority};

/// Print the certificate authority that signs for `icebox serve --tls-local`, PEM, and make it if there is none.
///
/// Programs that are told to trust it reach this daemon by HTTPS: with `SSL_CERT_FILE` those in Python, with
/// `NODE_EXTRA_CA_CERTS` those in Node, with `--cacert` curl.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: Settings,

    /// Print where it is, and not what it says.
    #[arg(long)]
    path: bool,
}

pub(crate) fn run(args: &Args, output: Output) -> Ended {
    let authority = authority(&args.settings)?;
    let path = authority.path().display();
    if output.is_json() {
        output.document(&serde_json::json!({
            "domain": authority.domain(),
            "path": path.to_string(),
            "certificate": authority.pem(),
        }))?;
    } else if args.path {
        output.line(path.to_string())?;
    } else {
        output.line(authority.pem().trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}
