//! What the verbs that move a sandbox from one phase to another have in common.

use std::process::ExitCode;

use icebox_api::client::ClientError;
use icebox_api::types::{Outcome, SandboxDetail, VerbResult};

use super::{Context, Ended};

/// Runs `verb` on each sandbox in turn. One that fails does not stop the others.
pub(super) async fn each<F: Future<Output = Result<VerbResult, ClientError>>>(
    context: &Context,
    sandboxes: &[String],
    past: &str,
    verb: impl Fn(String) -> F,
) -> Ended {
    let mut ended = ExitCode::SUCCESS;
    for sandbox in sandboxes {
        match verb(sandbox.clone()).await {
            Ok(result) => {
                if context.output.is_json() {
                    context.output.document(&result)?;
                }
                let label = label(&result.sandbox);
                context.output.say(match result.outcome {
                    Outcome::Changed => format!("{past} {label}"),
                    Outcome::AlreadyThere => {
                        format!("{label} is already {}", result.sandbox.listed.state)
                    }
                });
                if let Some(unanswering) = &result.sandbox.listed.unanswering {
                    context.output.say(unanswering);
                }
                if let Some(hint) = &result.hint {
                    context.output.hint(hint);
                }
            }
            Err(error) => {
                let failure = error.into();
                context.output.failure(&failure);
                ended = failure.exit_code();
            }
        }
    }
    Ok(ended)
}

/// What people call a sandbox: its name, else its id.
pub(super) fn label(sandbox: &SandboxDetail) -> &str {
    let listed = &sandbox.listed;
    listed.name.as_deref().unwrap_or(&listed.sandbox_id)
}
