//! The engine as its callers see it: create, find, and tell sandboxes what to do.
//!
//! Every verb runs in a task of its own and ends by itself; a caller that stops waiting changes nothing (INV-20).

mod drain;
mod history;
mod open;
mod spec;
mod templates;
mod usage;
mod warm;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::catalog::{Entry, Seen, display_name};
use crate::collect::{self, Plan};
use crate::error::Error;
use crate::event::Events;
use crate::gate::{Gate, Pass};
use crate::host::{Egress, Host, Secret, Space};
use crate::id::{GenerationNo, Name, SandboxId, Slot, Team};
use crate::layout::Object;
use crate::ledger::Ledger;
use crate::lifecycle::Beginning;
use crate::lifetime::LifetimeChange;
use crate::manifest::v1::{
    self, Doors, Generation, HistoryPolicy, Lifetime, Login, Point, Rest, Spec, Template,
    TemplateContent, Under,
};
use crate::merge;
use crate::metrics::{Resolution, Sample};
use crate::panics::{caught, internal};
use crate::phase::Phase;
use crate::sandbox::{Fate, Origin, Outcome, QUEUE, Request, Sandbox, Shared};
use crate::steps::LastVerb;
use crate::team::{Holdings, Quota, Scope};
use crate::unit::Bytes;

pub use drain::Drained;
pub use history::{History, PastBranch, PastGeneration};
pub use templates::ImageRequest;
pub use usage::{Part, Usage, Usages};

/// How many slots the network is asked to keep ready.
const SLOTS_READY: usize = 4;
/// How many sandboxes are recovered, or forks made, at once.
const AT_ONCE: usize = 8;

/// What an operator can set.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many generations a sandbox keeps that says nothing else, and how many branches: the newest ones. At least 1.
    pub keep: usize,
    /// For how long it keeps them. For ever, unless it is said.
    pub keep_for: Option<Duration>,
    /// The most memory that one sandbox may ask for, in MiB. Usually the host's.
    pub max_mem_mib: u32,
    /// How many layers may lie under a disk before some are merged into one, in the background. At least 4.
    pub max_layers: usize,
    /// How much must be free for new work to be admitted. Unless it is said: 1 GiB, or a twentieth of what there is if that
    /// is less.
    pub keep_free: Option<Bytes>,
    /// Whether to measure, once a second, what running sandboxes use.
    pub measures: bool,
    /// What sandboxes may reach that are made before anybody asks for them: what those may that are asked for as a rule.
    pub warm_egress: Egress,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            keep: 8,
            keep_for: None,
            max_mem_mib: u32::MAX,
            max_layers: merge::MAX_LAYERS,
            keep_free: None,
            measures: true,
            warm_egress: Egress::default(),
        }
    }
}

/// What a new sandbox should be. What is not asked for comes from the template, or is the default.
#[derive(Clone, Debug, Default)]
pub struct CreateRequest {
    /// Name, id or unique prefix.
    pub template: String,
    /// The new sandbox's name.
    pub name: Option<Name>,
    /// Virtual CPUs.
    pub vcpus: Option<u8>,
    /// Memory in MiB.
    pub mem_mib: Option<u32>,
    /// Size of the disk. At least the template's.
    pub disk_size: Option<Bytes>,
    /// Volume driver. The default is the first that works here.
    pub volume_driver: Option<String>,
    /// VMM. The default is the first that works here.
    pub vmm: Option<String>,
    /// Boot its disk, also of a snapshot: without what the guest had in memory, on any VMM.
    pub cold: bool,
    /// What it may reach.
    pub egress: Egress,
    /// Variables for every command, on top of the template's.
    pub env: BTreeMap<String, String>,
    /// Who may talk to it.
    pub doors: Doors,
    /// The user's own words.
    pub metadata: BTreeMap<String, String>,
    /// What becomes of its past.
    pub history: HistoryPolicy,
    /// When it ends by itself, and when it begins to.
    pub lifetime: LifetimeChange,
}

/// What commands in sandboxes of a template begin with.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// Variables.
    pub env: BTreeMap<String, String>,
    /// Who runs them, and where.
    pub login: Login,
}

/// A sandbox as it is at this moment.
#[derive(Clone, Debug)]
pub struct SandboxView {
    /// Its record, as committed.
    pub record: Arc<v1::Sandbox>,
    /// How many layers lie under its disk.
    pub layers: usize,
    /// Its generations that can be used, oldest first.
    pub generations: Vec<Generation>,
    /// Its generations of which something is missing or cannot be read, and what.
    pub unusable: BTreeMap<GenerationNo, String>,
    /// What is being done to it.
    pub busy: Option<&'static str>,
    /// The last verb that had something to do with it, since the daemon started.
    pub last_verb: Option<Arc<LastVerb>>,
    /// Why its newest disk is lost, if it is.
    pub disk_lost: Option<String>,
    /// Whether its guest stands still because a write to its disk found no room.
    pub stalled: bool,
    /// Reaches its guest from the host, on any port.
    pub host_address: Ipv4Addr,
}

impl SandboxView {
    /// Where it rests. One that is being made or destroyed shows as stopped, and as busy.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.record.rests {
            Rest::Running => Phase::Running,
            Rest::Paused { .. } => Phase::Paused,
            Rest::Stopped | Rest::Nowhere => Phase::Stopped,
        }
    }
}

/// The right to talk to a running guest.
pub struct Route {
    /// Reaches the guest, on any port.
    pub ip: Ipv4Addr,
    /// What its agent accepts.
    pub token: Secret,
    /// Held as long as the connection is.
    pub pass: Pass,
}

/// The engine. Cheap to clone; all clones are the same engine.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    scope: Scope,
}

impl Engine {
    /// The same engine, as one team sees it: what another team has does not exist, except for its public templates, which
    /// cannot be changed. What is made is the team's.
    #[must_use]
    pub fn of_team(&self, team: Team) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            scope: Scope::Team(team),
        }
    }

    /// Whose sandboxes and templates this handle finds.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The teams that have a sandbox or a template.
    #[must_use]
    pub fn teams(&self) -> BTreeSet<Team> {
        self.shared.catalog.teams()
    }

    /// Bounds what a team may have at once, until the engine ends. What it has already is not affected.
    pub fn set_quota(&self, team: Team, quota: Quota) {
        self.shared.catalog.set_quota(team, quota);
    }

    /// What a team has.
    #[must_use]
    pub fn holdings(&self, team: &Team) -> Holdings {
        self.shared.catalog.holdings(team)
    }

    /// Creates a sandbox, running, its guest answering.
    ///
    /// # Errors
    /// Nothing of it is left.
    pub async fn create(&self, request: CreateRequest) -> Result<SandboxView, Error> {
        self.shared.require_open()?;
        request.lifetime.check()?;
        let (spec, beginning) = self.plan(&request).await?;
        let lifetime = request
            .lifetime
            .applied(&Lifetime::default(), self.shared.now());
        let name = request.name;
        if !request.cold
            && let Some(taken) = self.take_warm(&spec, &lifetime, name.as_ref()).await?
        {
            return Ok(taken);
        }
        self.begin(spec, lifetime, name, beginning).await
    }

    /// What is asked for, put together, and what it begins with.
    async fn plan(&self, request: &CreateRequest) -> Result<(Spec, Beginning), Error> {
        let (template, pin) = self
            .shared
            .catalog
            .template(&self.scope, &request.template)?;
        let spec = self.spec(&template, request)?;
        self.shared.require_room(Some(&spec.volume_driver)).await?;
        let beginning = match template.content {
            TemplateContent::Image { base } => Beginning::Disk {
                over: Under::Base(base),
                _pin: pin,
            },
            TemplateContent::Snapshot { capture } if request.cold => Beginning::Disk {
                over: Under::Layer(capture.layer),
                _pin: pin,
            },
            TemplateContent::Snapshot { capture } => {
                let object = Object::Template(template.id.clone());
                let origin = Origin {
                    object,
                    capture: *capture,
                    _pin: pin,
                };
                Beginning::Instant(Arc::new(origin))
            }
        };
        Ok((spec, beginning))
    }

    /// Creates `count` sandboxes from this instant of one. Each is created or fails by itself.
    ///
    /// # Errors
    /// The instant could not be had; there is no fork then.
    pub async fn fork(
        &self,
        wanted: &str,
        count: u16,
    ) -> Result<Vec<Result<SandboxView, Error>>, Error> {
        if count == 0 {
            return Err(Error::Invalid {
                message: "cannot make 0 forks".into(),
                hint: "ask for at least one: `-n 1`".into(),
            });
        }
        let entry = self.with_room(wanted).await?;
        self.detached("forking", |engine| async move {
            let origin = Arc::new(ask(&entry, Request::Fork).await?);
            let mut spec = entry.record.spec.clone();
            let lifetime = entry.record.lifetime.clone();
            spec.metadata
                .insert("icebox.forked-from".into(), entry.record.id.to_string());
            // Each lets go of it as soon as it can, so nobody else may keep it.
            let origins = vec![origin; count.into()];
            let forks = origins.into_iter().map(|origin| {
                let beginning = Beginning::Instant(origin);
                engine.begin(spec.clone(), lifetime.clone(), None, beginning)
            });
            Ok(futures_util::stream::iter(forks)
                .buffered(AT_ONCE)
                .collect()
                .await)
        })
        .await
    }

    /// Runs work of several steps to its end, whether or not its caller waits for it.
    async fn detached<T, F>(
        &self,
        doing: &'static str,
        work: impl FnOnce(Self) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let work = tokio::spawn(work(self.clone()));
        work.await.map_err(|error| match error.try_into_panic() {
            Ok(panic) => internal(doing, &*panic),
            Err(_) => Error::Stopping,
        })?
    }

    async fn begin(
        &self,
        spec: Spec,
        lifetime: Lifetime,
        name: Option<Name>,
        beginning: Beginning,
    ) -> Result<SandboxView, Error> {
        let made = self.make(spec, lifetime, name, false, beginning);
        self.inspect(made.await?.as_str())
    }

    /// Makes a sandbox, or one that waits.
    async fn make(
        &self,
        spec: Spec,
        lifetime: Lifetime,
        name: Option<Name>,
        waits: bool,
        beginning: Beginning,
    ) -> Result<SandboxId, Error> {
        self.shared.require_open()?;
        let (gate, (mailbox, requests)) = (Gate::default(), mpsc::channel(QUEUE));
        let record = v1::Sandbox {
            waits,
            ..new_record(spec, lifetime, name, self.shared.now())
        };
        let (record, turn) = self.shared.catalog.admit(record, gate.clone(), mailbox)?;
        let id = record.id.clone();
        let ledger = Ledger::new(Arc::clone(&self.shared.host.store), record);
        let mut sandbox = Sandbox::new(Arc::clone(&self.shared), ledger, gate);
        let (reply, created) = oneshot::channel();
        let engine = self.clone();
        tokio::spawn(async move {
            sandbox
                .shared
                .catalog
                .set_busy(sandbox.id(), Some("creating"));
            let timed = sandbox.begin_timing("create");
            let result = caught("creating the sandbox", sandbox.create(beginning)).await;
            sandbox.end_timing(timed, &result);
            let lives = match &result {
                Ok(()) => true,
                Err(Error::Internal { .. }) => sandbox.bring_back().await == Fate::Lives,
                Err(_) => sandbox.record().broken.is_some() || sandbox.ledger.in_doubt(),
            };
            sandbox.shared.catalog.set_busy(sandbox.id(), None);
            drop(turn);
            if !lives {
                sandbox.shared.catalog.forget_sandbox(sandbox.id());
            }
            // The client may have gone: the sandbox is there all the same (INV-20).
            drop(reply.send(result));
            engine.make_slots_ready();
            if lives {
                sandbox.run(requests).await;
            }
        });
        created.await.map_err(|_| Error::Stopping)??;
        Ok(id)
    }

    /// Boots a stopped sandbox's newest disk.
    pub async fn start(&self, wanted: &str) -> Result<(Outcome, SandboxView), Error> {
        self.with_room(wanted).await?;
        self.verb(wanted, Request::Start).await
    }

    /// Freezes a running sandbox to disk.
    pub async fn pause(&self, wanted: &str) -> Result<(Outcome, SandboxView), Error> {
        self.verb(wanted, Request::Pause).await
    }

    /// Continues a paused sandbox: from its last pause, or from a named one of a sandbox that is paused or stopped.
    pub async fn resume(
        &self,
        wanted: &str,
        generation: Option<GenerationNo>,
    ) -> Result<(Outcome, SandboxView), Error> {
        self.with_room(wanted).await?;
        self.verb(wanted, |reply| Request::Resume(generation, reply))
            .await
    }

    /// Ends a sandbox's VMM, and keeps its disk.
    pub async fn stop(&self, wanted: &str) -> Result<(Outcome, SandboxView), Error> {
        self.verb(wanted, Request::Stop).await
    }

    /// Goes to another point of a sandbox's history, and with `run` on from there. A newest disk that is left for it is
    /// kept as a branch.
    pub async fn rollback(
        &self,
        wanted: &str,
        to: Point,
        run: bool,
    ) -> Result<(Outcome, SandboxView), Error> {
        if run {
            self.with_room(wanted).await?;
        }
        self.verb(wanted, |reply| Request::Rollback(to, run, reply))
            .await
    }

    /// Makes a generation of a running sandbox, which runs on.
    pub async fn checkpoint(&self, wanted: &str) -> Result<(Outcome, SandboxView), Error> {
        self.with_room(wanted).await?;
        self.verb(wanted, Request::Checkpoint).await
    }

    /// Removes a generation or a branch. What only it needed goes with it.
    ///
    /// # Errors
    /// It is in use: users are named.
    pub async fn forget(&self, wanted: &str, point: Point) -> Result<(), Error> {
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        ask(&entry, |reply| Request::Forget(point, reply)).await
    }

    /// Makes a snapshot template of a running or paused sandbox.
    pub async fn snapshot(&self, wanted: &str, name: Name) -> Result<Template, Error> {
        let entry = self.with_room(wanted).await?;
        ask(&entry, |reply| Request::Snapshot(name, None, reply)).await
    }

    /// As [`snapshot`](Self::snapshot), of a template whose sandboxes begin with other defaults than this one did.
    pub async fn snapshot_with(
        &self,
        wanted: &str,
        name: Name,
        defaults: Defaults,
    ) -> Result<Template, Error> {
        let entry = self.with_room(wanted).await?;
        ask(&entry, |reply| {
            Request::Snapshot(name, Some(defaults), reply)
        })
        .await
    }

    /// Removes a sandbox and everything it holds.
    pub async fn destroy(&self, wanted: &str) -> Result<(), Error> {
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        let (reply, answer) = oneshot::channel();
        // A queue that is full keeps nobody from removing a sandbox: this waits for a place in it.
        let asked = entry.mailbox.send(Request::Destroy(reply)).await;
        asked.map_err(|_| Error::Destroyed)?;
        let destroyed = answer.await.map_err(|_| Error::Destroyed)?;
        self.collect_soon();
        destroyed
    }

    async fn verb(
        &self,
        wanted: &str,
        request: impl FnOnce(oneshot::Sender<Result<Outcome, Error>>) -> Request,
    ) -> Result<(Outcome, SandboxView), Error> {
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        let outcome = ask(&entry, request).await?;
        Ok((outcome, self.inspect(entry.record.id.as_str())?))
    }

    /// All sandboxes that this handle finds.
    #[must_use]
    pub fn list(&self) -> Vec<SandboxView> {
        let seen = self.shared.catalog.look(&self.scope).into_iter();
        seen.map(|seen| self.view(seen)).collect()
    }

    /// One sandbox, by name, id or unique prefix of an id.
    pub fn inspect(&self, wanted: &str) -> Result<SandboxView, Error> {
        let seen = self.shared.catalog.look_at(&self.scope, wanted);
        seen.map(|seen| self.view(seen))
    }

    fn view(&self, seen: Seen) -> SandboxView {
        let Seen {
            entry,
            layers,
            unusable,
        } = seen;
        let host_address = self.shared.host.network.host_address(entry.record.slot);
        let usable = |generation: &Generation| !unusable.contains_key(&generation.number);
        let disk_lost = entry.disk_lost().map(ToOwned::to_owned);
        let generations = entry.generations.into_values().filter(usable).collect();
        SandboxView {
            layers,
            record: entry.record,
            generations,
            unusable,
            busy: entry.busy,
            last_verb: entry.last_verb,
            disk_lost,
            stalled: entry.stalled,
            host_address,
        }
    }

    /// Admits a connection to a running guest. `None` while it does not run, or stands still for a capture.
    pub fn route(&self, wanted: &str) -> Result<Option<Route>, Error> {
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        let ip = self.shared.host.network.host_address(entry.record.slot);
        let token = entry.record.token.clone();
        Ok(entry.gate.enter().map(|pass| Route { ip, token, pass }))
    }

    /// As [`route`](Self::route); a paused sandbox that is to be resumed for whoever asks for it is. However many ask
    /// at once, it is resumed once.
    ///
    /// # Errors
    /// There is no such sandbox, or it could not be resumed.
    pub async fn route_awake(&self, wanted: &str) -> Result<Option<Route>, Error> {
        if let Some(route) = self.route(wanted)? {
            return Ok(Some(route));
        }
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        let (record, id) = (&entry.record, entry.record.id.clone());
        let may_be_paused = match record.rests {
            Rest::Paused { .. } => true,
            // A pause may be under way.
            Rest::Running => entry.busy.is_some(),
            Rest::Stopped | Rest::Nowhere => false,
        };
        if !record.lifetime.auto_resume || !may_be_paused || record.broken.is_some() {
            return Ok(None);
        }
        self.shared.require_open()?;
        let driver = &record.spec.volume_driver;
        self.shared.require_room(Some(driver)).await?;
        let woken = self.shared.wakes.wake(&id, || {
            let entry = entry.clone();
            async move { ask(&entry, Request::Wake).await }
        });
        woken.await.map_err(|source| Error::NotWoken { source })?;
        self.route(id.as_str())
    }

    /// Changes when a sandbox ends by itself, and when it begins to. Its times begin anew.
    ///
    /// # Errors
    /// A time that cannot be; or the change could not be written down, and has not happened.
    pub async fn set_lifetime(
        &self,
        wanted: &str,
        change: LifetimeChange,
    ) -> Result<SandboxView, Error> {
        change.check()?;
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        ask(&entry, |reply| Request::Lifetime(change, reply)).await?;
        self.inspect(entry.record.id.as_str())
    }

    /// What a sandbox used from `since` on, oldest first: as fine as it is known, or of one resolution.
    ///
    /// # Errors
    /// There is no such sandbox.
    pub async fn samples(
        &self,
        wanted: &str,
        since: Option<Timestamp>,
        resolution: Option<Resolution>,
    ) -> Result<Vec<Sample>, Error> {
        let id = self
            .shared
            .catalog
            .sandbox(&self.scope, wanted)?
            .record
            .id
            .clone();
        let since = since.map_or(0, Timestamp::as_second);
        let since = u32::try_from(since.max(0)).unwrap_or(u32::MAX);
        Ok(self.shared.history(&id, since, resolution).await)
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// The host, as the engine was opened with it.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.shared.host
    }

    /// Removes what nothing reaches, or with `dry_run` says what that would be.
    ///
    /// # Errors
    /// Something would not go; the rest went.
    pub async fn collect(&self, dry_run: bool) -> Result<Plan, Error> {
        self.detached("collecting", |engine| async move {
            collect::collect(&engine.shared, dry_run).await
        })
        .await
    }

    fn collect_soon(&self) {
        collect::soon(&self.shared);
    }

    fn make_slots_ready(&self) {
        let next: Vec<Slot> = self.shared.catalog.next_slots(SLOTS_READY);
        self.shared.host.network.prepare(&next);
    }

    /// The places where data are kept, each with its low-water mark: the store's first, then those of drivers that keep
    /// disks elsewhere.
    ///
    /// # Errors
    /// One of them does not answer.
    pub async fn room(&self) -> Result<Vec<(Space, Bytes)>, Error> {
        self.shared.room().await
    }

    /// Refuses work that would begin to fill the data directory's file system while little of it is free: for what the
    /// engine does not do itself. What it does, it checks.
    ///
    /// # Errors
    /// Says how much is free, and how much should be.
    pub async fn require_room(&self) -> Result<(), Error> {
        self.shared.require_room(None).await
    }

    /// Finds a sandbox for a verb that makes something new of it.
    async fn with_room(&self, wanted: &str) -> Result<Entry, Error> {
        let entry = self.shared.catalog.sandbox(&self.scope, wanted)?;
        let driver = &entry.record.spec.volume_driver;
        self.shared.require_room(Some(driver)).await?;
        Ok(entry)
    }
}

async fn ask<T>(
    entry: &Entry,
    request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
) -> Result<T, Error> {
    let (reply, answer) = oneshot::channel();
    entry
        .mailbox
        .try_send(request(reply))
        .map_err(|refused| match refused {
            TrySendError::Full(_) => Error::Busy {
                sandbox: display_name(&entry.record),
                doing: entry.busy.unwrap_or("working"),
                waiting: QUEUE,
            },
            TrySendError::Closed(_) => Error::Destroyed,
        })?;
    answer.await.map_err(|_| Error::Destroyed)?
}

fn check_history(policy: &HistoryPolicy) -> Result<(), Error> {
    /// A guest that is captured more often does little else.
    const MIN_CHECKPOINT_SECS: u64 = 10;
    if policy.keep == Some(0) {
        return Err(Error::Invalid {
            message: "a sandbox cannot keep no generation at all".into(),
            hint: "ask for at least 1: the last pause is what a crash is survived with".into(),
        });
    }
    if policy
        .checkpoint_every_secs
        .is_some_and(|it| it < MIN_CHECKPOINT_SECS)
    {
        return Err(Error::Invalid {
            message: "checkpoints cannot be made that often".into(),
            hint: format!("ask for at least {MIN_CHECKPOINT_SECS} seconds from one to the next"),
        });
    }
    Ok(())
}

fn new_record(spec: Spec, lifetime: Lifetime, name: Option<Name>, now: Timestamp) -> v1::Sandbox {
    v1::Sandbox {
        id: SandboxId::random(),
        name,
        created_at: now,
        spec,
        token: Secret::random(),
        slot: Slot(0),
        rests: Rest::Nowhere,
        holds: Vec::new(),
        intent: None,
        machine: None,
        restored_from: None,
        opened: Vec::new(),
        generations: Vec::new(),
        after: None,
        next_generation: GenerationNo(1),
        next_head: 0,
        branches: Vec::new(),
        lifetime,
        unwelcomed: false,
        waits: false,
        last_exit: None,
        broken: None,
    }
}
