//! The clock of a guest that stood still: for a capture, for want of room, because a daemon ended in between. It goes on
//! from where it stopped, and what it is behind adds up, so the guest is told the time whenever it goes on.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::sandbox::{Chained, Sandbox};

impl Sandbox {
    /// Sets the guest's clock right. Best effort, and bounded: what does not answer keeps its clock.
    ///
    /// Beside a verb, so it is no step of one.
    pub(crate) fn tell_time(&self) -> impl Future<Output = ()> + Send + use<> {
        let guest = Arc::clone(&self.shared.host.guest);
        let (sandbox, address) = (self.id().clone(), self.address());
        let token = self.record().token.clone();
        async move {
            let told = guest.set_clock(address, &token);
            if let Err(error) = within(deadline::PREPARE, "setting the guest's clock", told).await {
                tracing::info!(%sandbox, error = %Chained(&error), "its clock is behind by as long as it stood still");
            }
        }
    }

    /// The same, with nobody waiting for it.
    pub(crate) fn tell_time_soon(&self) {
        drop(tokio::spawn(self.tell_time()));
    }
}
