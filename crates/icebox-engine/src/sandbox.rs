//! One task per sandbox: it owns the sandbox's state, takes one request after another, and watches the VMM between
//! them.
//!
//! A client that goes away changes nothing: it only stops listening for the answer (INV-20). Verbs on one sandbox
//! take turns, so equal verbs that were asked for at once coalesce: the second finds the sandbox there already
//! (INV-19). Sandboxes never wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};

use crate::catalog::{Catalog, NameReservation, Pin, PinnedChain};
use crate::chores::Chores;
use crate::deadline::{self, within};
use crate::engine::Config;
use crate::engine::Defaults;
use crate::error::Error;
use crate::event::Events;
use crate::gate::Gate;
use crate::host::{
    ErrorKind, ExitReason, GuestAddress, Host, HostError, Machine, Trouble, Vmm, VolumeDriver,
};
use crate::id::{GenerationNo, HeadId, Name, SandboxId};
use crate::layout::Object;
use crate::ledger::Ledger;
use crate::lifecycle::Taking;
use crate::lifetime::{LifetimeChange, Timer};
use crate::manifest::v1::{self, Capture, Exit, Hold, Point, Rest, Under};
use crate::metrics::Metrics;
use crate::panics::caught;
use crate::phase::{Phase, Refusal, Step, Verb};
use crate::space::Stall;
use crate::steps::{Steps, Timed};
use crate::undone::Undone;
use crate::wake::Wakes;

/// How many verbs may wait for their turn at one sandbox. Equal ones coalesce, so a client with a purpose has few.
pub(crate) const QUEUE: usize = 64;

pub(crate) type Mailbox = mpsc::Sender<Request>;

/// What all sandboxes share.
pub(crate) struct Shared {
    pub(crate) host: Host,
    pub(crate) catalog: Catalog,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    pub(crate) wakes: Wakes,
    /// Set when nothing new may begin any more.
    pub(crate) draining: AtomicBool,
    pub(crate) config: Config,
    /// Serialises what could make a content-addressed object with what could remove it.
    pub(crate) collecting: tokio::sync::Mutex<()>,
    /// Serialises what changes a template's manifest with what removes the template.
    pub(crate) publishing: tokio::sync::Mutex<()>,
    /// Held by who makes sandboxes that wait, and who wants none of a template to wait.
    pub(crate) warming: tokio::sync::Mutex<()>,
    /// Something may have to be made, or removed, that waits.
    pub(crate) warmth: watch::Sender<()>,
}

impl Shared {
    /// Refuses what would begin something new while everything that runs is being paused.
    pub(crate) fn require_open(&self) -> Result<(), Error> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Error::Draining);
        }
        Ok(())
    }

    /// What time it is, by the wall clock.
    pub(crate) fn now(&self) -> Timestamp {
        self.host.clock.now()
    }
}

/// What a sandbox's task can be asked for.
pub(crate) enum Request {
    Start(oneshot::Sender<Result<Outcome, Error>>),
    Pause(oneshot::Sender<Result<Outcome, Error>>),
    Resume(
        Option<GenerationNo>,
        oneshot::Sender<Result<Outcome, Error>>,
    ),
    Rollback(Point, bool, oneshot::Sender<Result<Outcome, Error>>),
    Stop(oneshot::Sender<Result<Outcome, Error>>),
    Checkpoint(oneshot::Sender<Result<Outcome, Error>>),
    Forget(Point, oneshot::Sender<Result<(), Error>>),
    Snapshot(
        Name,
        Option<Defaults>,
        oneshot::Sender<Result<v1::Template, Error>>,
    ),
    Fork(oneshot::Sender<Result<Origin, Error>>),
    Freeze(oneshot::Sender<Result<Frozen, Error>>),
    Destroy(oneshot::Sender<Result<(), Error>>),
    /// Become what somebody has asked for. Whether it did.
    Take(Box<Taking>, oneshot::Sender<Result<bool, Error>>),
    /// Destroy, if nobody has asked for it. Whether it was there for that.
    Discard(oneshot::Sender<Result<bool, Error>>),
    Lifetime(LifetimeChange, oneshot::Sender<Result<(), Error>>),
    /// Resume, for somebody who wants to talk to the guest.
    Wake(oneshot::Sender<Result<(), Error>>),
    /// Of the engine itself: the guest must not write to this head, for this reason. Answered when that is so.
    Hold(HeadId, String, oneshot::Sender<()>),
}

/// Whether a verb had anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It had, and has done it.
    Changed,
    /// The sandbox rested there already.
    AlreadyThere,
}

/// An instant of a guest that new sandboxes can begin with.
pub(crate) struct Origin {
    /// The object whose directory holds the device state.
    pub(crate) object: Object,
    pub(crate) capture: Capture,
    /// Keeps the object, and what the capture refers to, until new sandboxes have copied the one and refer to the other.
    pub(crate) _pin: Pin,
}

/// A disk state that will not change any more.
pub(crate) struct Frozen {
    pub(crate) chain: PinnedChain,
}

/// Whether there is a VMM.
pub(crate) enum Life {
    AtRest,
    Running(Arc<dyn Machine>),
}

pub(crate) struct Sandbox {
    pub(crate) shared: Arc<Shared>,
    pub(crate) ledger: Ledger,
    pub(crate) life: Life,
    pub(crate) gate: Gate,
    /// Of the verb under way, or of the one before.
    pub(crate) steps: Steps,
    /// What is due between verbs.
    pub(crate) chores: Chores,
    /// Set while the guest stands still for want of room, and after it did.
    stall: Option<Stall>,
    pub(crate) timer: Timer,
    pub(crate) undone: Undone,
    /// A name that its manifest may say it has, while nobody knows.
    pub(crate) reserved: Option<NameReservation>,
}

/// Whether the sandbox still exists after a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It does.
    Lives,
    /// It does not.
    Gone,
}

impl Sandbox {
    pub(crate) fn new(shared: Arc<Shared>, ledger: Ledger, gate: Gate) -> Self {
        Self {
            shared,
            ledger,
            life: Life::AtRest,
            gate,
            steps: Steps::default(),
            chores: Chores::new(),
            stall: None,
            timer: Timer::default(),
            undone: Undone::default(),
            reserved: None,
        }
    }

    /// The task: runs until the sandbox is destroyed or the engine is dropped.
    pub(crate) async fn run(mut self, mut mailbox: mpsc::Receiver<Request>) {
        loop {
            let machine = match &self.life {
                Life::Running(machine) => Some(Arc::clone(machine)),
                Life::AtRest => None,
            };
            let look_at = self.stall.as_ref().and_then(Stall::look_at);
            let watched = machine.clone().filter(|_| look_at.is_none());
            let ended = async move {
                match machine {
                    Some(machine) => machine.exited().await,
                    None => std::future::pending().await,
                }
            };
            let stalled = async move {
                match watched {
                    Some(machine) => machine.stalled().await,
                    None => std::future::pending().await,
                }
            };
            let look = async move {
                match look_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let undone = self.undone_is_due();
            let welcomed = self.welcomed();
            let chores = self.chores.due();
            let due = self.due();
            let fate = tokio::select! {
                biased;
                reason = ended => {
                    self.alone("noticing the end of the VMM", async |it| {
                        it.vmm_ended(&reason).await;
                        Fate::Lives
                    })
                    .await
                }
                () = stalled => {
                    self.alone("noticing that the guest stands still", async |it| {
                        it.guest_stalled("a write to its disk found no room: the guest stands still until there is some");
                        Fate::Lives
                    })
                    .await
                }
                () = look => {
                    self.alone("looking for room", async |it| {
                        it.go_on().await;
                        Fate::Lives
                    })
                    .await
                }
                due = due => {
                    self.alone("ending what has its time behind it", async |it| it.act_on(due).await)
                        .await
                }
                () = welcomed => {
                    self.alone("noticing that the guest answers", async |it| {
                        it.answers().await;
                        Fate::Lives
                    })
                    .await
                }
                () = undone => {
                    self.alone("finishing what was left undone", Self::finish_undone).await
                }
                () = chores => {
                    self.alone("doing what is due", Self::do_chores).await
                }
                request = mailbox.recv() => {
                    let Some(request) = request else { return };
                    self.serve(request).await
                }
            };
            if fate == Fate::Gone {
                return;
            }
        }
    }

    /// Does what nobody asked for, and outlives it.
    async fn alone(
        &mut self,
        doing: &'static str,
        work: impl AsyncFnOnce(&mut Self) -> Fate,
    ) -> Fate {
        let id = self.id().clone();
        let done = caught(doing, async { Ok(work(self).await) }).await;
        match done {
            Ok(fate) => fate,
            Err(error) => {
                tracing::error!(sandbox = %self.id(), error = %Chained(&error), "a bug");
                let fate = self.bring_back().await;
                // It may have been at a verb of its own.
                self.shared.catalog.set_busy(&id, None);
                fate
            }
        }
    }

    async fn serve(&mut self, request: Request) -> Fate {
        if !matches!(request, Request::Hold(..)) {
            self.gate.touch();
        }
        match request {
            Request::Start(reply) => {
                self.answer(Verb::Start, reply, async |it| it.start().await)
                    .await
            }
            Request::Pause(reply) => {
                self.answer(Verb::Pause, reply, async |it| it.pause().await)
                    .await
            }
            Request::Resume(None, reply) => {
                self.answer(Verb::Resume, reply, async |it| it.resume().await)
                    .await
            }
            Request::Resume(Some(number), reply) => {
                self.answer(Verb::ResumeGeneration, reply, async |it| {
                    it.resume_generation(number).await
                })
                .await
            }
            Request::Rollback(to, run, reply) => {
                self.answer(Verb::Rollback, reply, async |it| {
                    it.rollback(&to, run).await
                })
                .await
            }
            Request::Checkpoint(reply) => {
                self.answer(Verb::Checkpoint, reply, async |it| it.checkpoint().await)
                    .await
            }
            Request::Forget(point, reply) => {
                self.answer(Verb::Forget, reply, async |it| it.forget(&point).await)
                    .await
            }
            Request::Stop(reply) => {
                self.answer(Verb::Stop, reply, async |it| it.stop().await)
                    .await
            }
            Request::Snapshot(name, defaults, reply) => {
                self.answer(Verb::Snapshot, reply, async |it| {
                    it.snapshot(name, defaults).await
                })
                .await
            }
            Request::Fork(reply) => {
                self.answer(Verb::Fork, reply, async |it| it.fork_origin().await)
                    .await
            }
            Request::Freeze(reply) => {
                self.answer(Verb::Flatten, reply, async |it| it.freeze_disk().await)
                    .await
            }
            Request::Take(taking, reply) => self.give(*taking, reply).await,
            Request::Discard(reply) => self.discard_if_it_waits(reply).await,
            Request::Wake(reply) => {
                self.answer(Verb::Resume, reply, async |it| it.wake().await)
                    .await
            }
            Request::Lifetime(change, reply) => {
                let mut changed = Ok(());
                let fate = self.alone("changing the lifetime", async |it| {
                    changed = it.change_lifetime(change).await;
                    Fate::Lives
                });
                let fate = fate.await;
                drop(reply.send(changed));
                fate
            }
            Request::Hold(head, why, done) => {
                let held = self.alone("holding the guest", async |it| {
                    it.hold(&head, why).await;
                    Fate::Lives
                });
                let fate = held.await;
                drop(done);
                fate
            }
            Request::Destroy(reply) => {
                let mut destroyed = Fate::Lives;
                let after = self.answer(Verb::Destroy, reply, async |it| {
                    it.destroy().await?;
                    destroyed = Fate::Gone;
                    Ok(())
                });
                if after.await == Fate::Gone {
                    return Fate::Gone;
                }
                destroyed
            }
        }
    }

    pub(crate) async fn answer<T>(
        &mut self,
        verb: Verb,
        reply: oneshot::Sender<Result<T, Error>>,
        work: impl AsyncFnOnce(&mut Self) -> Result<T, Error>,
    ) -> Fate {
        let id = self.id().clone();
        let mut fate = Fate::Lives;
        self.shared.catalog.set_busy(&id, Some(busy_word(verb)));
        let timed = self.begin_timing(verb.name());
        let result = caught(busy_word(verb), work(self)).await;
        self.end_timing(timed, &result);
        if matches!(result, Err(Error::Internal { .. })) {
            fate = self.bring_back().await;
        }
        self.shared.catalog.set_busy(&id, None);
        // The client may have gone: the outcome is the same.
        drop(reply.send(result));
        fate
    }

    /// From here on steps are those of a new verb.
    pub(crate) fn begin_timing(&mut self, verb: &str) -> Timed {
        self.steps = Steps::default();
        Timed::begin(verb, self.steps.clone(), self.shared.now())
    }

    /// Writes down how a verb went.
    pub(crate) fn end_timing<T>(&self, verb: Timed, result: &Result<T, Error>) {
        if let Some(last) = verb.end(self.id(), result) {
            self.shared.catalog.set_last_verb(self.id(), last);
        }
    }

    /// Brings the sandbox to where its record says it rests, after a start or a panic. Whatever happens: if even that
    /// panics, the sandbox is broken.
    pub(crate) async fn bring_back(&mut self) -> Fate {
        let recovered = caught("recovering", async { Ok(self.recover().await) }).await;
        let Err(error) = recovered else {
            return recovered.unwrap_or(Fate::Lives);
        };
        let broken = self.break_down(Chained(&error).to_string());
        let broken = caught("recording that it is broken", async {
            broken.await;
            Ok(())
        });
        if let Err(error) = broken.await {
            tracing::error!(sandbox = %self.id(), error = %Chained(&error), "a bug");
        }
        Fate::Lives
    }

    // What the verbs are made of.

    pub(crate) fn record(&self) -> &v1::Sandbox {
        self.ledger.record()
    }

    pub(crate) fn id(&self) -> &SandboxId {
        &self.ledger.record().id
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.record().rests {
            Rest::Running => Phase::Running,
            Rest::Paused { .. } => Phase::Paused,
            Rest::Stopped | Rest::Nowhere => Phase::Stopped,
        }
    }

    /// Admits a verb by the transition table, and finishes what an earlier verb had to leave undone.
    pub(crate) async fn admit(&mut self, verb: Verb) -> Result<Step, Error> {
        // Before anything else: whatever follows believes the record.
        self.tend().await?;
        let broken = self.record().broken.clone();
        let refuse = |why: String| Err(Refusal::Broken { verb, why }.into());
        if self.rests_nowhere() {
            // Its holds are given back: there is nothing left that a verb could work on.
            return refuse(broken.unwrap_or_else(|| "its removal has not ended".into()));
        }
        match broken {
            // Of a sandbox at rest only a hold was stuck, and it may go by now.
            Some(_) if self.record().rests != Rest::Running => {
                self.settle().await?;
                if let Err(error) = self.unwind().await {
                    let why = self.record().broken.clone();
                    return refuse(why.unwrap_or_else(|| Chained(&error).to_string()));
                }
            }
            Some(why) => return refuse(why),
            None => {}
        }
        let step = self.step(verb)?;
        if step == Step::AlreadyThere {
            return Ok(step);
        }
        if matches!(step, Step::To(Phase::Running)) || verb == Verb::Fork {
            self.shared.require_open()?;
        }
        self.settle().await?;
        self.unwind().await?;
        // What was finished may have moved it: a disk that is set aside leaves it paused.
        let step = self.step(verb)?;
        self.require_disk(verb)?;
        let needs_guest = matches!(
            verb,
            Verb::Pause | Verb::Checkpoint | Verb::Snapshot | Verb::Fork | Verb::Flatten
        );
        if needs_guest && self.stands_still() && !self.go_on().await {
            return Err(no_room());
        }
        Ok(step)
    }

    fn step(&self, verb: Verb) -> Result<Step, Refusal> {
        let record = self.record();
        match (verb, self.phase(), record.last_generation()) {
            (Verb::Resume, Phase::Stopped, Some(last)) => Err(Refusal::NotPaused {
                crashed: record.last_exit.as_ref().map(|exit| exit.detail.clone()),
                last,
            }),
            (_, phase, _) => verb.from(phase),
        }
    }

    /// Refuses what would read the newest disk if that is lost.
    fn require_disk(&self, verb: Verb) -> Result<(), Error> {
        let reads = match verb {
            Verb::Start
            | Verb::Pause
            | Verb::Checkpoint
            | Verb::Snapshot
            | Verb::Fork
            | Verb::Flatten => true,
            Verb::Resume
            | Verb::ResumeGeneration
            | Verb::Rollback
            | Verb::Stop
            | Verb::Forget
            | Verb::Destroy => false,
        };
        let entry = self.shared.catalog.sandbox_of_id(self.id())?;
        match entry.disk_lost() {
            Some(why) if reads => Err(Error::DiskLost {
                why: why.to_owned(),
                last: self.record().last_generation(),
            }),
            _ => Ok(()),
        }
    }

    /// Commits a change of the record, and shows it to everybody.
    pub(crate) async fn update(
        &mut self,
        change: impl FnOnce(&mut v1::Sandbox),
    ) -> Result<(), Error> {
        self.ledger.update(change).await?;
        self.shared.catalog.set_record(self.ledger.record());
        Ok(())
    }

    /// Takes in what has happened, shows it to everybody, and writes it down now or [later](Self::undone).
    pub(crate) async fn happened(&mut self, change: impl FnOnce(&mut v1::Sandbox)) {
        self.ledger.assume(change);
        self.shared.catalog.set_record(self.ledger.record());
        if let Err(error) = self.ledger.confirm().await {
            tracing::error!(sandbox = %self.id(), error = %Chained(&error), "what happened is not written down yet");
        }
    }

    /// Of a sandbox that nobody has asked for, only what somebody has to do something about.
    pub(crate) fn emit(&self, kind: &str, detail: impl Into<String>, steps: &Steps) {
        if self.record().waits && !matches!(kind, "sandbox.broken" | "sandbox.recovery-failed") {
            return;
        }
        self.shared.events.emit(
            Some(&self.record().spec.team),
            Some(self.id()),
            kind,
            detail,
            steps,
        );
    }

    pub(crate) fn machine(&self, verb: Verb) -> Result<Arc<dyn Machine>, Error> {
        match &self.life {
            Life::Running(machine) => Ok(Arc::clone(machine)),
            Life::AtRest => Err(Refusal::WrongPhase {
                verb,
                phase: Phase::Stopped,
            }
            .into()),
        }
    }

    pub(crate) fn vmm(&self) -> Result<Arc<dyn Vmm>, Error> {
        let wanted = &self.record().spec.vmm;
        find_vmm(&self.shared.host, wanted)
    }

    pub(crate) fn volumes(&self) -> Result<Arc<dyn VolumeDriver>, Error> {
        let wanted = &self.record().spec.volume_driver;
        find_volume_driver(&self.shared.host, wanted)
    }

    /// The head that the sandbox holds, and what it sits on.
    pub(crate) fn head(&self) -> Result<(HeadId, Under), Error> {
        let held = self.record().holds.iter().find_map(|hold| match hold {
            Hold::Head { number, over } => Some((self.head_id(*number), over.clone())),
            _ => None,
        });
        held.ok_or_else(|| Error::Invalid {
            message: "the sandbox holds no disk head".into(),
            hint: "`icebox inspect` shows what it holds".into(),
        })
    }

    pub(crate) fn head_id(&self, number: u32) -> HeadId {
        HeadId {
            sandbox: self.id().clone(),
            number,
        }
    }

    pub(crate) fn chain(&self, under: &Under) -> Result<PinnedChain, Error> {
        self.shared
            .catalog
            .chain(under, self.record().spec.disk_size)
    }

    pub(crate) fn address(&self) -> GuestAddress {
        GuestAddress {
            ip: self.shared.host.network.host_address(self.record().slot),
        }
    }

    /// Waits for `work`, but not longer than the VMM lives.
    pub(crate) async fn while_alive<T>(
        machine: &Arc<dyn Machine>,
        limit: Duration,
        step: &'static str,
        work: impl Future<Output = Result<T, HostError>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            result = within(limit, step, work) => result,
            reason = machine.exited() => Err(Error::VmmEnded { step, detail: reason.detail }),
            () = machine.stalled() => Err(no_room()),
        }
    }

    // A guest without room.

    /// Whether the guest is known to stand still for want of room.
    pub(crate) fn stands_still(&self) -> bool {
        self.stall
            .as_ref()
            .is_some_and(|stall| stall.look_at().is_some())
    }

    /// Stops a guest whose next write could cost it its disk. It goes on as one does whose write found no room.
    async fn hold(&mut self, head: &HeadId, why: String) {
        let is_head = self.head().is_ok_and(|(held, _)| held == *head);
        let Life::Running(machine) = &self.life else {
            return;
        };
        if !is_head || self.stands_still() {
            return;
        }
        let machine = Arc::clone(machine);
        let paused = machine.pause_vcpus();
        match within(deadline::VCPUS, "pausing the vCPUs", paused).await {
            Ok(()) => self.guest_stalled(why),
            Err(error) => {
                tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "its guest still runs, and may lose its disk");
            }
        }
    }

    /// Whether the guest's next write could cost it its disk.
    async fn is_starved(&self) -> Result<bool, Error> {
        let (volumes, (head, _)) = (self.volumes()?, self.head()?);
        let Some(watch) = volumes.watch() else {
            return Ok(false);
        };
        let seen = watch.look(std::slice::from_ref(&head));
        let seen = within(deadline::PROBE, "looking at the disk", seen).await?;
        let starved = |(_, trouble): &(_, Trouble)| matches!(trouble, Trouble::Starved { .. });
        Ok(seen.troubled.iter().any(starved))
    }

    fn guest_stalled(&mut self, why: impl Into<String>) {
        self.stall = Some(Stall::again(self.stall.as_ref()));
        self.shared.catalog.set_stalled(self.id(), true);
        self.emit("sandbox.stalled", why, &Steps::default());
    }

    /// Lets a guest that stands still run if it would get somewhere. Whether it runs.
    async fn go_on(&mut self) -> bool {
        let (Life::Running(machine), Some(_)) = (&self.life, &self.stall) else {
            return false;
        };
        let machine = Arc::clone(machine);
        let went_on = async {
            let driver = &self.record().spec.volume_driver;
            if !self.shared.has_room_to_go_on(driver).await? || self.is_starved().await? {
                return Ok(false);
            }
            let resumed = within(
                deadline::VCPUS,
                "letting the vCPUs run",
                machine.resume_vcpus(),
            );
            resumed.await.map(|()| true)
        };
        let went_on = went_on.await.unwrap_or_else(|error: Error| {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "its guest still stands for want of room");
            false
        });
        let Some(stall) = &mut self.stall else {
            return went_on;
        };
        if went_on {
            stall.over();
            self.shared.catalog.set_stalled(self.id(), false);
            self.tell_time_soon();
            let detail = "there is room again: the guest goes on";
            self.emit("sandbox.continued", detail, &Steps::default());
        } else {
            stall.lasts();
        }
        went_on
    }

    // Giving back.

    /// Releases everything above where the sandbox rests, newest first, and stops at the first hold that will not go
    /// (it may be in use by the ones above it). The sandbox is broken then, and names that hold.
    ///
    /// While the ledger is in doubt, the disk and the directory stay: the manifest may rest on them. That is an error
    /// and no break, and the next verb goes on with it.
    pub(crate) async fn unwind(&mut self) -> Result<(), Error> {
        let keep = watermark(&self.record().rests, &self.record().holds);
        let mut left = self.record().holds.len();
        let (mut stuck, mut uncertain) = (None, None);
        while left > keep {
            let hold = self.record().holds[left - 1].clone();
            if matches!(hold, Hold::Head { .. } | Hold::Directory)
                && let Err(error) = self.ledger.confirm().await
            {
                uncertain = Some(error);
                break;
            }
            match within(deadline::RELEASE, "releasing a hold", self.release(&hold)).await {
                Ok(()) => left -= 1,
                Err(error) => {
                    stuck = Some((hold, error));
                    break;
                }
            }
        }
        let broken = stuck
            .as_ref()
            .map(|(hold, error)| format!("{}: {}", hold_name(hold), Chained(error)));
        if left < self.record().holds.len() || self.record().broken != broken {
            let recorded = self
                .update(|record| {
                    record.holds.truncate(left);
                    record.broken = broken;
                    if !record
                        .holds
                        .iter()
                        .any(|hold| matches!(hold, Hold::Vmm { .. }))
                    {
                        record.restored_from = None;
                    }
                    if !record.holds.contains(&Hold::Disk) {
                        record.opened.clear();
                    }
                })
                .await;
            // What is released stays released: a record that still lists it is unwound again, to no effect.
            if let Err(error) = recorded {
                tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "released holds are still recorded");
            }
        }
        match (stuck, uncertain) {
            (None, None) => Ok(()),
            (None, Some(error)) => Err(error),
            (Some((hold, error)), _) => Err(stuck_error(&hold, error)),
        }
    }

    async fn release(&self, hold: &Hold) -> Result<(), HostError> {
        let host = &self.shared.host;
        let driver_gone = |error: Error| HostError::new(ErrorKind::Unsupported, error.to_string());
        match hold {
            Hold::Directory => host
                .store
                .trash(&Object::Sandbox(self.id().clone()))
                .await
                .map(drop),
            Hold::Slot => Ok(()),
            Hold::Head { number, .. } => self
                .volumes()
                .map_err(driver_gone)?
                .remove_head(&self.head_id(*number))
                .await
                .map(drop),
            Hold::Disk => match self.head() {
                Ok((head, _)) => self
                    .volumes()
                    .map_err(driver_gone)?
                    .detach(&head)
                    .await
                    .map(drop),
                // Only a head can have been attached.
                Err(_no_head) => Ok(()),
            },
            Hold::Network => host.network.release(self.record().slot).await.map(drop),
            Hold::Box => host.boxes.release(self.id()).await.map(drop),
            Hold::Vmm { process } => self
                .vmm()
                .map_err(driver_gone)?
                .kill(self.id(), process.as_ref())
                .await
                .map(drop),
        }
    }

    /// What a failed verb ends with: everything it took is given back. If that fails too, that is the error.
    pub(crate) async fn give_back(&mut self, error: Error) -> Error {
        match self.unwind().await {
            Ok(()) => error,
            Err(stuck) => {
                tracing::error!(sandbox = %self.id(), cause = %Chained(&error), stuck = %Chained(&stuck), "a failed verb could not be undone");
                stuck
            }
        }
    }

    /// The guest answers, and is the sandbox's from here on.
    pub(crate) fn enter_guest(&mut self, machine: Arc<dyn Machine>) {
        self.life = Life::Running(Arc::clone(&machine));
        if !self.record().waits {
            self.open_guest(&*machine);
        }
    }

    /// From here on others see it, and may talk to it.
    pub(crate) fn open_guest(&mut self, machine: &dyn Machine) {
        self.timer = Timer::begun();
        match machine.meter() {
            Ok(meter) => self.shared.metrics.begin(self.id(), meter),
            Err(error) => {
                tracing::warn!(sandbox = %self.id(), %error, "what it uses is not measured");
            }
        }
        self.gate.open();
    }

    /// The record says that the sandbox does not run any more: what its VMM does from here on is no news.
    pub(crate) fn leave_guest(&mut self) {
        self.gate.shut();
        self.shared.metrics.end(self.id());
        self.life = Life::AtRest;
        self.cancel_checkpoint();
        if self.stall.take().is_some() {
            self.shared.catalog.set_stalled(self.id(), false);
        }
    }

    /// The VMM ended without being asked to: its holds are given back, the newest disk stays (INV-31).
    pub(crate) async fn vmm_ended(&mut self, reason: &ExitReason) {
        self.leave_guest();
        let exit = Exit {
            at: self.shared.now(),
            by_guest: reason.by_guest,
            detail: reason.detail.clone(),
        };
        let last = self.record().last_generation();
        self.happened(|record| {
            record.rests = Rest::Stopped;
            record.last_exit = Some(exit);
        })
        .await;
        if let Err(error) = self.settle().await {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "an unfinished freeze stays pending");
        }
        let result = self.unwind().await;
        // If it waited, another has to.
        self.shared.warmth.send_replace(());
        let kind = if reason.by_guest {
            "sandbox.stopped"
        } else {
            "sandbox.crashed"
        };
        let offer = last.map_or_else(String::new, |number| {
            format!("; its newest disk is there (`start`), and so is its last pause (`resume --generation {number}`)")
        });
        self.emit(kind, format!("{}{offer}", reason.detail), &Steps::default());
        if let Err(error) = result {
            self.emit(
                "sandbox.broken",
                Chained(&error).to_string(),
                &Steps::default(),
            );
        }
    }

    /// Marks the sandbox as one that only inspect and destroy work on.
    pub(crate) async fn break_down(&mut self, why: String) {
        self.gate.shut();
        self.emit("sandbox.broken", why.clone(), &Steps::default());
        self.happened(|record| record.broken = Some(why)).await;
    }
}

/// How many holds a sandbox keeps where it rests.
fn watermark(rests: &Rest, holds: &[Hold]) -> usize {
    let stays = |hold: &Hold| match rests {
        // The directory goes last, with the record in it.
        Rest::Nowhere => matches!(hold, Hold::Directory),
        Rest::Paused { .. } => matches!(hold, Hold::Directory | Hold::Slot),
        Rest::Stopped => matches!(hold, Hold::Directory | Hold::Slot | Hold::Head { .. }),
        Rest::Running => true,
    };
    holds.iter().take_while(|hold| stays(hold)).count()
}

pub(crate) fn hold_name(hold: &Hold) -> &'static str {
    match hold {
        Hold::Directory => "its directory",
        Hold::Slot => "its slot",
        Hold::Head { .. } => "its disk head",
        Hold::Disk => "its disk device",
        Hold::Network => "its network",
        Hold::Box => "its box",
        Hold::Vmm { .. } => "its VMM",
    }
}

fn stuck_error(hold: &Hold, error: Error) -> Error {
    match error {
        Error::Step { source, .. } => Error::Stuck {
            stuck: hold_name(hold).to_owned(),
            source,
        },
        other => Error::Stuck {
            stuck: hold_name(hold).to_owned(),
            source: HostError::new(ErrorKind::Timeout, other.to_string()),
        },
    }
}

/// What is asked for needs a guest that runs.
pub(crate) fn no_room() -> Error {
    Error::Exhausted {
        message: "the guest stands still: a write to its disk found no room".into(),
        hint: "free some space on the host: the guest goes on by itself then; or `stop` it, which keeps its disk".into(),
    }
}

fn busy_word(verb: Verb) -> &'static str {
    match verb {
        Verb::Start => "starting",
        Verb::Pause => "pausing",
        Verb::Resume | Verb::ResumeGeneration => "resuming",
        Verb::Rollback => "rolling back",
        Verb::Stop => "stopping",
        Verb::Checkpoint => "checkpointing",
        Verb::Snapshot => "snapshotting",
        Verb::Fork => "forking",
        Verb::Flatten => "flattening",
        Verb::Forget => "forgetting",
        Verb::Destroy => "destroying",
    }
}

pub(crate) fn find_vmm(host: &Host, wanted: &str) -> Result<Arc<dyn Vmm>, Error> {
    let have: Vec<&str> = host
        .vmms
        .iter()
        .map(|vmm| vmm.identity().name.as_str())
        .collect();
    let found = host.vmms.iter().find(|vmm| vmm.identity().name == wanted);
    found
        .cloned()
        .ok_or_else(|| crate::catalog::no_driver("VMM", wanted, &have))
}

pub(crate) fn find_volume_driver(
    host: &Host,
    wanted: &str,
) -> Result<Arc<dyn VolumeDriver>, Error> {
    let have: Vec<&str> = host.volumes.iter().map(|driver| driver.name()).collect();
    let found = host.volumes.iter().find(|driver| driver.name() == wanted);
    found
        .cloned()
        .ok_or_else(|| crate::catalog::no_driver("volume driver", wanted, &have))
}

/// An error with its causes, on one line.
pub(crate) struct Chained<'a>(pub(crate) &'a Error);

impl std::fmt::Display for Chained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut next: Option<&dyn std::error::Error> = Some(self.0);
        let mut first = true;
        while let Some(error) = next {
            if !first {
                f.write_str(": ")?;
            }
            write!(f, "{error}")?;
            first = false;
            next = error.source();
        }
        Ok(())
    }
}
