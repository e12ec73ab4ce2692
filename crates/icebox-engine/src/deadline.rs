//! How long each wait may take. No wait has its caller's deadline: a verb ends by itself, in bounded time, whatever
//! the guest, the VMM or the client does (INV-20, INV-21).

use std::future::Future;
use std::time::Duration;

use crate::error::Error;
use crate::gate::Drain;
use crate::host::HostError;

/// Connections through the proxy end by themselves in this time, or are closed (INV-07). A stream that is about to end
/// may say so; one that is not keeps nobody waiting.
pub(crate) const DRAIN: Drain = Drain {
    requests: Duration::from_secs(5),
    streams: Duration::from_millis(50),
};
/// The guest's preparations for a capture (INV-05).
pub(crate) const PREPARE: Duration = Duration::from_secs(5);
/// The answer of a VMM to the question whether it lives (INV-06).
pub(crate) const PROBE: Duration = Duration::from_secs(3);
/// Stopping or starting the vCPUs.
pub(crate) const VCPUS: Duration = Duration::from_secs(30);
/// Device state and changed pages to disk. A guest of 64 GiB at 1 GiB/s takes 64 s.
pub(crate) const SAVE: Duration = Duration::from_secs(300);
/// One step at a disk: create, attach, flush, freeze.
pub(crate) const DISK: Duration = Duration::from_secs(60);
/// Setting up or removing a slot's network or a box.
pub(crate) const SETUP: Duration = Duration::from_secs(30);
/// Starting a VMM, up to vCPUs that may run.
pub(crate) const LAUNCH: Duration = Duration::from_secs(60);
/// From running vCPUs to a guest that answers. A cold boot under emulation on a busy host takes many seconds.
pub(crate) const WELCOME: Duration = Duration::from_secs(120);
/// From running vCPUs to the answer of a guest that has answered before: it has nothing to boot, and if its agent was wedged
/// when it was paused, it never will.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);
/// The answer of a guest that waits, to who it is from now on. Who wants it could have made another.
pub(crate) const TAKE: Duration = Duration::from_secs(5);
/// Releasing one hold.
pub(crate) const RELEASE: Duration = Duration::from_secs(60);
/// Forks that are still to copy a device state out of a sandbox that goes.
pub(crate) const COPIES: Duration = Duration::from_secs(60);
/// Durable documents.
pub(crate) const STORE: Duration = Duration::from_secs(120);

/// Bringing a base to where a driver keeps its own: for some, a copy of the whole image.
pub(crate) const IMPORT: Duration = Duration::from_secs(3600);
/// Writing a whole disk out. In the background: nobody stands still for it.
pub(crate) const FLATTEN: Duration = Duration::from_secs(3600);

/// Runs a step of the host with its own deadline.
pub(crate) async fn within<T>(
    limit: Duration,
    step: &'static str,
    work: impl Future<Output = Result<T, HostError>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.map_err(Error::step(step)),
        Err(_) => Err(Error::Deadline {
            step,
            seconds: limit.as_secs(),
        }),
    }
}
