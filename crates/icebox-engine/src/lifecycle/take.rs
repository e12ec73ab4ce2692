//! Take: a sandbox that waits becomes that of who creates one, and is made like any other from then on.
//!
//! 1. The guest is told who it is, as a fork is (INV-37). It answers at once, or is not what was waited for.
//! 2. Commit: the record is that of the sandbox that was asked for. Before this write it is nobody's.
//! 3. The gate opens.
//!
//! A failure before the commit ends with the sandbox removed, and the create that wanted it goes on without it.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::catalog::NameReservation;
use crate::deadline;
use crate::error::Error;
use crate::host::{GuestOrigin, Secret};
use crate::id::Name;
use crate::manifest::v1::{Lifetime, Rest, Spec};
use crate::panics::caught;
use crate::sandbox::{Chained, Fate, Life, Sandbox};

/// What a sandbox that waits is to become.
pub(crate) struct Taking {
    pub(crate) spec: Spec,
    pub(crate) lifetime: Lifetime,
    pub(crate) name: Option<Name>,
    /// Keeps the name until the sandbox has it.
    pub(crate) reserved: Option<NameReservation>,
}

impl Sandbox {
    /// Serves a create. Whether the sandbox is its own now, or gone; an error if that is not known.
    pub(crate) async fn give(
        &mut self,
        mut taking: Taking,
        reply: oneshot::Sender<Result<bool, Error>>,
    ) -> Fate {
        let id = self.id().clone();
        self.shared.catalog.set_busy(&id, Some("creating"));
        let timed = self.begin_timing("create");
        let reserved = taking.reserved.take();
        let taken = caught("taking a warm sandbox", self.take(taking)).await;
        self.end_timing(timed, &taken);
        let (fate, answer) = match taken {
            Ok(()) => (Fate::Lives, Ok(true)),
            Err(error) => {
                tracing::warn!(sandbox = %id, error = %Chained(&error), "a warm sandbox could not be taken");
                match caught("removing a warm sandbox", self.destroy()).await {
                    Ok(()) => (Fate::Gone, Ok(false)),
                    Err(stuck) => {
                        tracing::error!(sandbox = %id, error = %Chained(&stuck), "nor removed");
                        // Its manifest may say that it has the name.
                        self.reserved = reserved;
                        (Fate::Lives, Err(error))
                    }
                }
            }
        };
        self.shared.catalog.set_busy(&id, None);
        drop(reply.send(answer));
        fate
    }

    async fn take(&mut self, taking: Taking) -> Result<(), Error> {
        self.tend().await?;
        self.shared.require_open()?;
        let machine = match &self.life {
            Life::Running(machine) if self.record().rests == Rest::Running => Arc::clone(machine),
            _ => return Err(Error::Destroyed),
        };
        let steps = self.steps.clone();
        let now = self.shared.now();
        let mut record = self.record().clone();
        record.waits = false;
        record.name = taking.name;
        record.created_at = now;
        record.spec = taking.spec;
        record.lifetime = taking.lifetime;
        record.lifetime.begin_run(now);
        let before = std::mem::replace(&mut record.token, Secret::random());
        let welcome = Self::welcome_of(&record, before, GuestOrigin::Fork);
        let guest = Arc::clone(&self.shared.host.guest);
        let answer = guest.welcome(self.address(), &welcome);
        let answer = Self::while_alive(&machine, deadline::TAKE, "waiting for the guest", answer);
        steps.time("welcome", answer).await?;
        let commit = self.update(|it| *it = record);
        steps.time("commit", commit).await?;
        self.open_guest(&*machine);
        self.schedule_checkpoint();
        let from = format!("from {}, warm", self.record().spec.template_name);
        self.emit("sandbox.created", from, &steps);
        Ok(())
    }

    /// Removes the sandbox if it still waits. Whether it did.
    pub(crate) async fn discard_if_it_waits(
        &mut self,
        reply: oneshot::Sender<Result<bool, Error>>,
    ) -> Fate {
        if !self.record().waits {
            drop(reply.send(Ok(false)));
            return Fate::Lives;
        }
        let destroyed = caught("removing a warm sandbox", self.destroy()).await;
        let fate = match destroyed {
            Ok(()) => Fate::Gone,
            Err(_) => Fate::Lives,
        };
        drop(reply.send(destroyed.map(|()| true)));
        fate
    }
}
