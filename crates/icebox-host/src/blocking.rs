//! File system work away from the threads that serve everything else.

use icebox_engine::host::{ErrorKind, HostError};

/// Runs `work` on a thread that may block.
///
/// Cancel-safe: once begun, `work` runs to its end even if nobody waits for it any more, so a step is never left
/// half-way by a caller that went away.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => {
                Err(HostError::new(ErrorKind::Gone, "the daemon is shutting down").caused_by(error))
            }
        },
    }
}
