//! Guests that were resumed and do not answer: their agent was wedged when they were paused.
//!
//! They run, since what else runs in them is worth as much as before. Whoever asks is told; what such a guest has to be told
//! (its clock, random bytes, which connections are dead) it is told as soon as it answers.

use std::sync::Arc;
use std::time::Duration;

use crate::deadline::{self, within};
use crate::host::GuestOrigin;
use crate::sandbox::{Chained, Life, Sandbox};
use crate::steps::Steps;

/// Between two attempts. A guest with nobody at the agent's port refuses at once.
const BETWEEN: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Says of a guest that was resumed that it does not answer.
    pub(crate) fn say_whether_it_answers(&self) {
        if self.record().unwelcomed {
            let detail =
                "its agent does not answer: no command can be run in it, and its clock was not set";
            self.emit("sandbox.unanswering", detail, &Steps::default());
        }
    }

    /// Completes when a guest that did not answer does, and has been told. Never, if it did.
    pub(crate) fn welcomed(&self) -> impl Future<Output = ()> + use<> {
        let runs = matches!(self.life, Life::Running(_));
        let asked = (runs && self.record().unwelcomed).then(|| {
            let guest = Arc::clone(&self.shared.host.guest);
            let token = self.record().token.clone();
            (
                guest,
                self.address(),
                self.welcome(token, GuestOrigin::Resume),
            )
        });
        async move {
            let Some((guest, address, welcome)) = asked else {
                return std::future::pending().await;
            };
            loop {
                let told = guest.welcome(address, &welcome);
                match within(deadline::ANSWER, "waiting for the guest", told).await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::debug!(sandbox = %welcome.sandbox, error = %Chained(&error), "it still does not answer");
                        tokio::time::sleep(BETWEEN).await;
                    }
                }
            }
        }
    }

    /// The guest has answered after all.
    pub(crate) async fn answers(&mut self) {
        self.happened(|record| record.unwelcomed = false).await;
        let detail = "its agent answers again";
        self.emit("sandbox.answering", detail, &Steps::default());
    }
}
