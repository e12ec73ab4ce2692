//! Rollback: to another point of the sandbox's history, and nothing is lost on the way (INV-51).
//!
//! 1. Find the point: a generation whose disk is there, or a branch. With `run`, also that it can be run here.
//! 2. Running: close the gate, and let the guest write out its caches. Its memory is given up, as by a stop.
//! 3. Commit the intent: the newest disk will be a branch. From here on every start finishes the job. The VMM ends, if
//!    there is one; the disk is sealed, and published as a layer.
//! 4. Commit the branch and where the sandbox rests: `Paused` at the generation, or `Stopped` with a new head over the
//!    other branch.
//! 5. With `run`: as a [resume](super::resume), or a [start](super::start). If that fails, the sandbox rests at the point.
//!
//! A paused sandbox has no newer disk than its generation's, which stays listed: there is nothing to set aside. Later
//! generations stay listed too, and branches that are gone to stay: every point is there until it is removed, or retired.

use std::sync::Arc;

use crate::deadline::{self, within};
use crate::error::Error;
use crate::gate::Closed;
use crate::id::{GenerationNo, LayerId, Name, ParseIdError};
use crate::manifest::v1::{Branch, Hold, Intent, Point, Rest, Under};
use crate::phase::Verb;
use crate::sandbox::{Chained, Outcome, Sandbox};
use crate::steps::Steps;

impl Sandbox {
    pub(crate) async fn rollback(&mut self, to: &Point, run: bool) -> Result<Outcome, Error> {
        self.admit(Verb::Rollback).await?;
        self.check_point(to, run)?;
        let outcome = self.go_to(to).await?;
        if outcome == Outcome::Changed {
            let steps = self.steps.clone();
            self.emit("sandbox.rolled-back", format!("to {to}"), &steps);
        }
        match to {
            _ if !run => Ok(outcome),
            Point::Generation(_) => self.resume().await,
            Point::Branch(_) => self.start().await,
        }
    }

    /// Refuses a point that is not there, or of which the disk is not. To run a generation, all of it must be.
    pub(super) fn check_point(&self, point: &Point, run: bool) -> Result<(), Error> {
        let catalog = &self.shared.catalog;
        let layer = match point {
            Point::Generation(number) if run => {
                let capture = catalog.generation(self.id(), *number)?.capture;
                self.check_restorable(&format!("generation {number}"), &capture)?;
                capture.layer
            }
            Point::Generation(number) => catalog.generation_disk(self.id(), *number)?,
            Point::Branch(name) => self.branch(name)?.layer,
        };
        self.chain(&Under::Layer(layer)).map(drop)
    }

    /// A branch, by its name.
    pub(super) fn branch(&self, name: &Name) -> Result<Branch, Error> {
        let mut branches = self.record().branches.iter();
        let found = branches.find(|branch| branch.name == *name).cloned();
        found.ok_or_else(|| Error::Unknown {
            kind: "branch",
            wanted: name.to_string(),
            hint: "`icebox history` lists the branches of a sandbox".into(),
        })
    }

    /// Brings the sandbox to rest at a point that [is there](Self::check_point).
    pub(super) async fn go_to(&mut self, to: &Point) -> Result<Outcome, Error> {
        match (&self.record().rests, to) {
            (Rest::Paused { generation }, Point::Generation(number)) if generation == number => {
                return Ok(Outcome::AlreadyThere);
            }
            (Rest::Paused { .. }, Point::Generation(number)) => {
                let generation = *number;
                let commit = self.update(|record| {
                    record.rests = Rest::Paused { generation };
                    record.after = Some(generation);
                });
                commit.await?;
            }
            (Rest::Paused { .. }, Point::Branch(name)) => {
                let Branch { layer, after, .. } = self.branch(name)?;
                if let Err(error) = self.unpack(layer, after).await {
                    return Err(self.give_back(error).await);
                }
            }
            _ => self.set_aside(to).await?,
        }
        Ok(Outcome::Changed)
    }

    /// Keeps the newest disk as a branch, and goes to the point. A guest that runs is ended for it.
    async fn set_aside(&mut self, to: &Point) -> Result<(), Error> {
        let steps = self.steps.clone();
        let closed = match self.record().rests {
            Rest::Running => Some(self.quiet_guest(None, &steps).await),
            _ => None,
        };
        // Unique within the sandbox, since head numbers are never reused.
        let head = self.record().next_head;
        let branch = format!("disk-{head}");
        let branch: Name = branch
            .parse()
            .map_err(|error: ParseIdError| Error::Invalid {
                message: error.to_string(),
                hint: "please report this as a bug".into(),
            })?;
        let intent = Intent::SetAside {
            layer: LayerId::random(),
            branch,
            to: to.clone(),
            head,
        };
        let commit = self.update(|record| {
            record.rests = Rest::Stopped;
            record.intent = Some(intent);
            record.next_head += 1;
        });
        steps.time("commit", commit).await?;
        if let Some(closed) = closed {
            closed.keep();
            self.leave_guest();
        }
        // What has begun is written down and will be finished. At once, if a second try can do it.
        let Err(error) = steps.time("set-aside", self.settle()).await else {
            return Ok(());
        };
        tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "setting its disk aside is tried again");
        steps.time("set-aside", self.settle()).await
    }

    /// Finishes what [`set_aside`](Self::set_aside) wrote down.
    pub(crate) async fn settle_set_aside(
        &mut self,
        layer: &LayerId,
        branch: Name,
        to: Point,
        head: u32,
    ) -> Result<(), Error> {
        // A VMM that was left may still write.
        self.unwind().await?;
        let (newest, under) = self.head()?;
        let staging = self.staged_layer(layer).await?;
        within(
            deadline::DISK,
            "sealing the disk",
            self.volumes()?.seal(&newest, &staging),
        )
        .await?;
        self.publish_layer(layer, &under).await?;
        let (rests, over, after) = match &to {
            Point::Generation(number) => {
                let generation = *number;
                (Rest::Paused { generation }, None, Some(generation))
            }
            Point::Branch(name) => {
                let Branch { layer, after, .. } = self.branch(name)?;
                let over = Under::Layer(layer);
                self.make_head(head, &over).await?;
                (Rest::Stopped, Some(over), after)
            }
        };
        let said = format!("its newest disk is kept as branch {branch}");
        let kept = Branch {
            name: branch,
            layer: layer.clone(),
            after: self.record().after,
            created_at: self.shared.now(),
        };
        self.update(|record| {
            // What was above the head is released, also if that could not be written down.
            let is_head = |hold: &Hold| matches!(hold, Hold::Head { .. });
            let at = record.holds.iter().position(is_head);
            record.holds.truncate(at.unwrap_or(record.holds.len()));
            let number = head;
            record
                .holds
                .extend(over.map(|over| Hold::Head { number, over }));
            record.opened.clear();
            record.restored_from = None;
            record.branches.push(kept);
            record.intent = None;
            record.rests = rests;
            record.after = after;
        })
        .await?;
        self.emit("sandbox.set-aside", said, &Steps::default());
        self.look_back_soon();
        Ok(())
    }

    /// Lets connections to a guest that will be ended end, and the guest write out its caches: both for a while, and
    /// neither must succeed. `closed`: nobody is inside already.
    pub(super) async fn quiet_guest(&self, closed: Option<Closed>, steps: &Steps) -> Closed {
        let closed = match closed {
            Some(closed) => closed,
            None => steps.time("drain", self.gate.close(deadline::DRAIN)).await,
        };
        // A guest without room to write answers nothing.
        if self.stands_still() {
            return closed;
        }
        let guest = Arc::clone(&self.shared.host.guest);
        let token = self.record().token.clone();
        let synced = guest.sync(self.address(), &token);
        let synced = within(deadline::PREPARE, "syncing the guest", synced);
        if let Err(error) = steps.time("sync-guest", synced).await {
            tracing::info!(sandbox = %self.id(), error = %Chained(&error), "the guest did not sync before its end");
        }
        closed
    }

    /// Puts a head over a layer of a paused sandbox's history, and rests there.
    pub(super) async fn unpack(
        &mut self,
        layer: LayerId,
        after: Option<GenerationNo>,
    ) -> Result<(), Error> {
        let (number, over) = (self.record().next_head, Under::Layer(layer));
        let hold = Hold::Head {
            number,
            over: over.clone(),
        };
        self.update(|record| {
            record.holds.push(hold);
            record.next_head += 1;
        })
        .await?;
        self.make_head(number, &over).await?;
        self.update(|record| {
            record.rests = Rest::Stopped;
            record.after = after;
        })
        .await
    }

    async fn make_head(&self, number: u32, over: &Under) -> Result<(), Error> {
        let (volumes, chain) = (self.volumes()?, self.chain(over)?);
        let head = self.head_id(number);
        let made = volumes.ensure_head(&head, &chain);
        within(deadline::DISK, "making a head", made)
            .await
            .map(drop)
    }
}
