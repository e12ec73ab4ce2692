//! The daemon behind the routes: the engine, and what the engine does not know (builds, kernels, this host).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use icebox_api::types::{
    AssignTags, AssignedTags, AuditEntry, AuditRange, BuildEvent, BuildStatus, ChangeLifetime,
    ChangeTeam, DrainReport, Event, Forked, GcReport, GcRequest, History, HostVmm, Kernel,
    KernelEvent, Key, Limit, MadeKey, MetricsRange, NewBuild, NewFork, NewKernel, NewKey,
    NewRecipe, NewSandbox, NewSnapshot, NewTeam, Outcome, RemoveTags, Report, RequestedBuild,
    ResumeRequest, RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, StartBuild, Stats,
    Team, TeamLimits, Template, TemplateAlias, TemplateTag, VerbResult,
};
use icebox_api::{ApiError, BoxStream, Daemon, ErrorCode, Pass, Route};
use icebox_engine::id::{GenerationNo, SandboxId};
use icebox_engine::layout::{Layout, Object};
use icebox_engine::manifest::v1;
use icebox_engine::unit::Geometry;
use icebox_engine::{Engine, Error, SandboxView, Scope, Usage};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::access::{Access, KeptTeam};
use super::build::Build;
use super::recipe::Recipes;
use super::workshop::Workshop;
use super::{doctor, lifetime, metrics, translate};

/// E2B's bound on one call's forks.
const FORKS_MAX: i64 = 100;

/// What `icebox serve` serves. Its engine is a handle of whoever asks.
#[derive(Clone)]
pub(super) struct Icebox {
    pub(super) engine: Engine,
    pub(super) access: Arc<Access>,
    pub(super) layout: Layout,
    pub(super) workshop: Arc<dyn Workshop>,
    pub(super) recipes: Arc<Recipes>,
    pub(super) domain: Option<String>,
    /// CPUs and memory of templates that name none.
    pub(super) geometry: Geometry,
    /// Whether sandboxes that say nothing reach public addresses.
    pub(super) internet: bool,
    /// Has the daemon leave.
    pub(super) leave: CancellationToken,
}

/// What the gate of a sandbox has admitted.
struct Admitted(icebox_engine::Pass);

#[async_trait]
impl Pass for Admitted {
    async fn revoked(&self) {
        self.0.revoked().await;
    }

    fn becomes_stream(&self) {
        self.0.becomes_stream();
    }
}

impl Icebox {
    fn detail(&self, view: &SandboxView, usage: Option<&Usage>) -> SandboxDetail {
        self.detail_within(&self.limits(), view, usage)
    }

    /// Which limits the host enforces, or why none: the same for all sandboxes.
    fn limits(&self) -> String {
        let limits = self.engine.host().boxes.limits_in_force();
        format!("{}: {}", limits.mechanism, limits.detail)
    }

    fn detail_within(
        &self,
        limits: &str,
        view: &SandboxView,
        usage: Option<&Usage>,
    ) -> SandboxDetail {
        translate::sandbox(
            view,
            translate::Beside {
                domain: self.domain.as_deref(),
                limits,
                built_as: self.recipes.name_of(&view.record.spec.template),
                usage,
            },
        )
    }

    /// Refuses work of the workshop while there is little room for it.
    async fn require_room(&self) -> Result<(), ApiError> {
        let room = self.engine.require_room().await;
        room.map_err(|error| translate::error(&error))
    }

    fn result(
        &self,
        verb: Result<(icebox_engine::Outcome, SandboxView), Error>,
    ) -> Result<VerbResult, ApiError> {
        let (outcome, view) = verb.map_err(|error| translate::error(&error))?;
        Ok(VerbResult {
            outcome: translate::outcome(outcome),
            sandbox: self.detail(&view, None),
            hint: None,
        })
    }

    /// The team that asks, if one does.
    fn team(&self) -> Option<&str> {
        match self.engine.scope() {
            Scope::Everything => None,
            Scope::Team(team) => Some(team.as_str()),
        }
    }

    fn shown_team(&self, team: &KeptTeam, keys: u64) -> Team {
        let used = self.engine.holdings(&team.name);
        translate::team(team, used, keys)
    }

    /// Bounds a team by what was written down.
    fn limit(&self, team: &KeptTeam) {
        let quota = translate::quota(&team.limits);
        self.engine.set_quota(team.name.clone(), quota);
    }

    /// Bounds every team by what was written down, and writes those down that only their sandboxes and templates know of.
    ///
    /// # Errors
    /// A team could not be written down.
    pub(super) async fn limit_teams(&self) -> Result<(), ApiError> {
        for team in self.engine.teams() {
            if self.access.team(team.as_str()).is_err() {
                tracing::warn!(%team, "it has sandboxes or templates, and was not known");
                let none = TeamLimits::default();
                self.access.create_team(team.as_str(), none).await?;
            }
        }
        for (team, _) in self.access.teams() {
            self.limit(&team);
        }
        Ok(())
    }

    async fn snapshotted(&self, taken: Result<v1::Template, Error>) -> Result<Snapshot, ApiError> {
        let template = taken.map_err(|error| translate::error(&error))?;
        let template = self.measured(&template, None).await;
        Ok(Snapshot {
            snapshot_id: template.template_id.clone(),
            names: template.names.clone(),
            template,
        })
    }

    /// A template with what else is known of it: the names that it has beside its own, which nobody gave it then and comes
    /// last, and how many sandboxes wait.
    fn seen(
        &self,
        template: &v1::Template,
        unusable: Option<String>,
        usage: Option<&Usage>,
    ) -> Template {
        let waiting = self.engine.waiting(&template.id);
        let mut template = translate::template(template, unusable, usage);
        let mut names = self.recipes.names_of(&template.template_id);
        names.append(&mut template.names);
        Template {
            names,
            waiting,
            ..template
        }
    }

    /// A template with what it occupies. A size that cannot be had is left out.
    async fn measured(&self, template: &v1::Template, unusable: Option<String>) -> Template {
        let object = Object::Template(template.id.clone());
        let usage = self.engine.usage(&object).await.ok();
        self.seen(template, unusable, usage.as_ref())
    }
}

#[async_trait]
impl Daemon for Icebox {
    async fn create(&self, new: NewSandbox) -> Result<SandboxDetail, ApiError> {
        let built = self.recipes.resolve(&self.engine, &new.template_id);
        let mut request = translate::create_request(new, self.internet)?;
        request.template =
            built.unwrap_or_else(|| translate::template_reference(&request.template).to_owned());
        let created = self.engine.create(request).await;
        created
            .map(|view| self.detail(&view, None))
            .map_err(|error| translate::error(&error))
    }

    async fn list(&self, space: bool) -> Result<Vec<SandboxDetail>, ApiError> {
        let mut views = self.engine.list();
        views.sort_by(|a, b| {
            let (a, b) = (&a.record, &b.record);
            (b.created_at, &b.id).cmp(&(a.created_at, &a.id))
        });
        let usages = match space {
            true => self.engine.usages().await.owners,
            false => BTreeMap::new(),
        };
        let usage = |view: &SandboxView| usages.get(&Object::Sandbox(view.record.id.clone()));
        let limits = self.limits();
        let details = views.iter().map(|view| SandboxDetail {
            last_verb: None,
            ..self.detail_within(&limits, view, usage(view))
        });
        Ok(details.collect())
    }

    async fn inspect(&self, sandbox: &str, space: bool) -> Result<SandboxDetail, ApiError> {
        let view = self
            .engine
            .inspect(sandbox)
            .map_err(|error| translate::error(&error))?;
        let usage = match space {
            // It may be on its way out: the rest is still worth showing.
            true => {
                let object = Object::Sandbox(view.record.id.clone());
                self.engine.usage(&object).await.ok()
            }
            false => None,
        };
        Ok(self.detail(&view, usage.as_ref()))
    }

    async fn pause(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        self.result(self.engine.pause(sandbox).await)
    }

    async fn resume(&self, sandbox: &str, how: ResumeRequest) -> Result<VerbResult, ApiError> {
        let generation = how.generation.map(GenerationNo);
        self.result(self.engine.resume(sandbox, generation).await)
    }

    async fn stop(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        self.result(self.engine.stop(sandbox).await)
    }

    async fn start(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        let before = self.engine.inspect(sandbox).ok();
        let result = self.result(self.engine.start(sandbox).await)?;
        let hint = before.filter(|_| result.outcome == Outcome::Changed);
        let hint = hint.and_then(|before| after_crash(sandbox, &before.record));
        Ok(VerbResult { hint, ..result })
    }

    async fn checkpoint(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        self.result(self.engine.checkpoint(sandbox).await)
    }

    async fn rollback(&self, sandbox: &str, how: RollbackRequest) -> Result<VerbResult, ApiError> {
        let to = translate::point(&how.to)?;
        self.result(self.engine.rollback(sandbox, to, how.resume).await)
    }

    async fn history(&self, sandbox: &str) -> Result<History, ApiError> {
        let history = self.engine.history(sandbox).await;
        history
            .map(|history| translate::history(&history))
            .map_err(|error| translate::error(&error))
    }

    async fn forget(&self, sandbox: &str, point: &str) -> Result<(), ApiError> {
        let point = translate::point(point)?;
        let forgotten = self.engine.forget(sandbox, point).await;
        forgotten.map_err(|error| translate::error(&error))
    }

    async fn snapshot(&self, sandbox: &str, new: NewSnapshot) -> Result<Snapshot, ApiError> {
        let wanted = new.name.as_deref();
        // A tag is a team's own. Administrators do not say whose they mean, and have names alone.
        let tagged = match (wanted, self.engine.scope()) {
            (Some(wanted), Scope::Team(_)) => self.recipes.name_for_tag(&self.engine, wanted)?,
            _ => None,
        };
        let tag = wanted.filter(|_| tagged.is_some());
        let name = match (tagged, wanted) {
            (Some(name), _) => name,
            (None, Some(name)) => {
                let name = translate::of_own(self.engine.scope(), name);
                translate::name(translate::template_reference(name))?
            }
            (None, None) => translate::name(&format!("snapshot-{}", SandboxId::random()))?,
        };
        let template = match new.memory {
            Some(false) => self.engine.flatten(sandbox, name).await,
            _ => self.engine.snapshot(sandbox, name).await,
        };
        if let (Some(tag), Ok(template)) = (tag, &template) {
            let tagged = self.recipes.tag_snapshot(&self.engine, tag, &template.id);
            tagged.await?;
        }
        self.snapshotted(template).await
    }

    async fn fork(&self, sandbox: &str, new: NewFork) -> Result<Vec<Forked>, ApiError> {
        let count = u16::try_from(new.count)
            .ok()
            .filter(|_| (1..=FORKS_MAX).contains(&new.count))
            .ok_or_else(|| {
                let message = format!("cannot make {} forks at once", new.count);
                ApiError::new(ErrorCode::Invalid, message).hint(format!("ask for 1 to {FORKS_MAX}"))
            })?;
        let timeout = new.timeout.map(|timeout| {
            lifetime::change(&ChangeLifetime {
                timeout: Some(Limit::Seconds(timeout)),
                ..ChangeLifetime::default()
            })
        });
        let timeout = timeout.transpose()?;
        let forks = self
            .engine
            .fork(sandbox, count)
            .await
            .map_err(|error| translate::error(&error))?;
        // A limit that leaves no room for any of them is the answer to the request.
        if let Some(Err(over @ Error::OverQuota { .. })) = forks.first()
            && forks.iter().all(Result::is_err)
        {
            return Err(translate::error(over));
        }
        let forks = forks.into_iter().map(async |fork| {
            let fork = match (fork, timeout) {
                (Ok(fork), Some(timeout)) => {
                    self.engine
                        .set_lifetime(fork.record.id.as_str(), timeout)
                        .await
                }
                (fork, _) => fork,
            };
            match fork {
                Ok(view) => Forked::Sandbox(Box::new(self.detail(&view, None))),
                Err(error) => Forked::Error(translate::error(&error).into_body()),
            }
        });
        Ok(futures_util::future::join_all(forks).await)
    }

    async fn flatten(&self, sandbox: &str, new: NewSnapshot) -> Result<Template, ApiError> {
        let name = translate::required_name(new.name.as_deref())?;
        let template = self
            .engine
            .flatten(sandbox, name)
            .await
            .map_err(|error| translate::error(&error))?;
        Ok(self.measured(&template, None).await)
    }

    async fn destroy(&self, sandbox: &str) -> Result<String, ApiError> {
        let found = self
            .engine
            .inspect(sandbox)
            .map_err(|error| translate::error(&error))?;
        // By its id from here on: the name may be another sandbox's by then.
        let id = found.record.id.to_string();
        self.engine
            .destroy(&id)
            .await
            .map_err(|error| translate::error(&error))?;
        Ok(id)
    }

    async fn set_lifetime(
        &self,
        sandbox: &str,
        change: ChangeLifetime,
    ) -> Result<SandboxDetail, ApiError> {
        let change = lifetime::change(&change)?;
        let changed = self.engine.set_lifetime(sandbox, change).await;
        changed
            .map(|view| self.detail(&view, None))
            .map_err(|error| translate::error(&error))
    }

    async fn metrics(
        &self,
        sandbox: &str,
        range: MetricsRange,
    ) -> Result<Vec<SandboxMetric>, ApiError> {
        let view = self
            .engine
            .inspect(sandbox)
            .map_err(|error| translate::error(&error))?;
        let id = view.record.id.as_str();
        let since = metrics::start(range)?;
        let resolution = range.resolution.map(metrics::resolution);
        let samples = self.engine.samples(id, since, resolution).await;
        let samples = samples.map_err(|error| translate::error(&error))?;
        let object = Object::Sandbox(view.record.id.clone());
        let usage = self.engine.usage(&object).await.ok();
        let end = range.end.unwrap_or(i64::MAX);
        Ok(samples
            .iter()
            .filter(|sample| i64::from(sample.at) <= end)
            .map(|sample| metrics::sample(sample, &view.record.spec, usage.as_ref()))
            .collect())
    }

    async fn console(&self, sandbox: &str) -> Result<BoxStream<io::Result<Bytes>>, ApiError> {
        let found = self
            .engine
            .inspect(sandbox)
            .map_err(|error| translate::error(&error))?;
        let path = self.layout.console_log(&found.record.id);
        match tokio::fs::File::open(&path).await {
            Ok(log) => Ok(tokio_util::io::ReaderStream::new(log).boxed()),
            // It has not run yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(stream::empty().boxed()),
            Err(error) => Err(ApiError::from_error(ErrorCode::Internal, &error)),
        }
    }

    async fn route(&self, sandbox: &str, exact: bool, wake: bool) -> Result<Route, ApiError> {
        let found = self
            .engine
            .inspect(sandbox)
            .map_err(|error| translate::error(&error))?;
        let id = found.record.id.to_string();
        if exact && id != sandbox {
            return Err(ApiError::new(ErrorCode::NotFound, "no such sandbox"));
        }
        let route = if wake {
            self.engine.route_awake(&id).await
        } else {
            self.engine.route(&id)
        };
        let route = route
            .map_err(|error| translate::error(&error))?
            .ok_or_else(|| {
                ApiError::new(
                    ErrorCode::WrongPhase,
                    format!("sandbox {id} admits no connections now: it is not running, or being captured"),
                )
            })?;
        Ok(Route {
            sandbox_id: id,
            address: route.ip,
            token: route.token.expose().to_owned(),
            agent_is_open: found.record.spec.doors.agent_open,
            traffic_token: translate::traffic_token(&found.record),
            pass: Arc::new(Admitted(route.pass)),
        })
    }

    async fn signer(&self, has: &(dyn for<'a> Fn(&'a str) -> bool + Sync)) -> Option<String> {
        let sandboxes = self.engine.list();
        let signer = sandboxes
            .iter()
            .find(|view| has(view.record.token.expose()));
        signer.map(|view| view.record.id.to_string())
    }

    async fn templates(&self) -> Result<Vec<Template>, ApiError> {
        let usable = self.engine.templates().into_iter().map(|it| (it, None));
        let unusable = self.engine.unusable_templates().into_iter();
        let unusable = unusable.map(|(it, why)| (it, Some(why)));
        let mut templates: Vec<_> = usable.chain(unusable).collect();
        templates
            .sort_by(|(a, _), (b, _)| (&a.name, &a.team, &a.id).cmp(&(&b.name, &b.team, &b.id)));
        let usages = self.engine.usages().await.owners;
        let usage = |template: &v1::Template| usages.get(&Object::Template(template.id.clone()));
        Ok(templates
            .into_iter()
            .map(|(it, unusable)| self.seen(&it, unusable, usage(&it)))
            .collect())
    }

    async fn template(&self, template: &str) -> Result<Template, ApiError> {
        let built = self.recipes.resolve(&self.engine, template);
        let template = built
            .as_deref()
            .unwrap_or_else(|| translate::template_reference(template));
        let (template, unusable) = self
            .engine
            .inspect_template(template)
            .map_err(|error| translate::error(&error))?;
        Ok(self.measured(&template, unusable).await)
    }

    async fn template_alias(&self, name: &str) -> Result<TemplateAlias, ApiError> {
        if let Some(template_id) = self.recipes.find(&self.engine, name) {
            return Ok(TemplateAlias {
                template_id,
                public: false,
            });
        }
        let found = self
            .engine
            .inspect_template(translate::template_reference(name));
        let (template, _flaw) = found.map_err(|error| translate::error(&error))?;
        Ok(TemplateAlias {
            template_id: template.id.to_string(),
            public: template.public,
        })
    }

    async fn remove_template(&self, template: &str) -> Result<String, ApiError> {
        if let Some(removed) = self.recipes.remove(&self.engine, template).await {
            return removed;
        }
        let template = translate::template_reference(template);
        let removed = self.engine.remove_template(template).await;
        removed
            .map(|template| template.id.to_string())
            .map_err(|error| translate::error(&error))
    }

    async fn publish_template(&self, template: &str, public: bool) -> Result<Template, ApiError> {
        let published = self.engine.publish_template(template, public).await;
        let template = published.map_err(|error| translate::error(&error))?;
        Ok(self.measured(&template, None).await)
    }

    async fn warm_template(&self, template: &str, count: u16) -> Result<Template, ApiError> {
        let built = self.recipes.resolve(&self.engine, template);
        let template = built
            .as_deref()
            .unwrap_or_else(|| translate::template_reference(template));
        let warm = self.engine.set_warm(template, count).await;
        let template = warm.map_err(|error| translate::error(&error))?;
        Ok(self.measured(&template, None).await)
    }

    async fn build(&self, new: NewBuild) -> Result<BoxStream<BuildEvent>, ApiError> {
        let build = Build::new(
            self.engine.clone(),
            Arc::clone(&self.workshop),
            new,
            self.geometry,
        )?;
        self.require_room().await?;
        let (events, stream) = tokio::sync::mpsc::channel(16);
        tokio::spawn(build.run(events));
        Ok(ReceiverStream::new(stream).boxed())
    }

    async fn request_build(&self, new: NewRecipe) -> Result<RequestedBuild, ApiError> {
        self.require_room().await?;
        self.recipes.request(&self.engine, &new)
    }

    async fn start_build(&self, build: &str, what: StartBuild) -> Result<(), ApiError> {
        self.require_room().await?;
        self.recipes.start(&self.engine, build, what)
    }

    async fn build_status(
        &self,
        build: &str,
        offset: usize,
        limit: usize,
    ) -> Result<BuildStatus, ApiError> {
        self.recipes.status(&self.engine, build, offset, limit)
    }

    async fn admit_files(&self, hash: &str) -> Result<Option<String>, ApiError> {
        self.recipes.admit_files(&self.engine, hash)
    }

    async fn put_files(
        &self,
        way: &str,
        content: BoxStream<io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        self.require_room().await?;
        self.recipes.files().put(way, content).await
    }

    async fn template_tags(&self, template: &str) -> Result<Vec<TemplateTag>, ApiError> {
        self.recipes.tags(&self.engine, template)
    }

    async fn assign_tags(&self, asked: AssignTags) -> Result<AssignedTags, ApiError> {
        self.recipes.assign(&self.engine, &asked)
    }

    async fn remove_tags(&self, asked: RemoveTags) -> Result<(), ApiError> {
        self.recipes.untag(&self.engine, &asked).await
    }

    async fn vmms(&self) -> Result<Vec<HostVmm>, ApiError> {
        let vmms = self.engine.host().vmms.iter().enumerate();
        Ok(vmms
            .map(|(number, vmm)| translate::host_vmm(vmm.as_ref(), number == 0))
            .collect())
    }

    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        self.workshop.kernels().await
    }

    async fn import_kernel(&self, new: NewKernel) -> Result<BoxStream<KernelEvent>, ApiError> {
        self.require_room().await?;
        let workshop = Arc::clone(&self.workshop);
        let (events, stream) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            // The import is dropped, and so ended, when nobody reads its events any more.
            let imported = tokio::select! {
                imported = workshop.import_kernel(new.source, &events) => imported,
                () = events.closed() => return,
            };
            let last = match imported {
                Ok(kernel) => KernelEvent::Done { kernel },
                Err(error) => KernelEvent::Error {
                    error: error.into_body(),
                },
            };
            // Nobody may be left to hear it.
            events.send(last).await.ok();
        });
        Ok(ReceiverStream::new(stream).boxed())
    }

    async fn events(&self, since: Option<u64>, follow: bool) -> Result<BoxStream<Event>, ApiError> {
        let events = self.engine.events();
        let from = since.map_or_else(|| events.next_seq(), |since| since.saturating_add(1));
        if !follow {
            let end = events.next_seq();
            let engine = self.engine.clone();
            let batches = stream::unfold((engine, from), move |(engine, from)| async move {
                if from >= end {
                    return None;
                }
                let mut batch = engine.events().past(from).await;
                batch.events.retain(|event| event.seq < end);
                // What is asked for and not there any more ends it, too.
                let next = batch.events.last().map_or(end, |event| event.seq + 1);
                let told = in_order(batch, engine.scope());
                Some((stream::iter(told), (engine, next)))
            });
            return Ok(batches.flatten().boxed());
        }
        let engine = self.engine.clone();
        let batches = stream::unfold((engine, from), |(engine, from)| async move {
            let batch = engine.events().since(from).await;
            let next = batch.events.last().map_or(from, |event| event.seq + 1);
            let told = in_order(batch, engine.scope());
            Some((stream::iter(told), (engine, next)))
        });
        Ok(batches.flatten().boxed())
    }

    async fn drain(&self) -> Result<DrainReport, ApiError> {
        let drained = self.engine.drain().await;
        let drained = drained.map_err(|error| translate::error(&error))?;
        self.leave.cancel();
        Ok(lifetime::drained(drained))
    }

    async fn stats(&self) -> Result<Stats, ApiError> {
        let places = self.engine.room().await;
        let places = places.map_err(|error| translate::error(&error))?;
        Ok(translate::stats(&self.engine.usages().await, places))
    }

    async fn doctor(&self) -> Result<Report, ApiError> {
        let mut report = self.workshop.doctor().await;
        let places = self.engine.room().await;
        let places = places.map_err(|error| translate::error(&error))?;
        report.checks.extend(
            places
                .iter()
                .map(|(space, mark)| doctor::space(space, *mark)),
        );
        Ok(report)
    }

    async fn gc(&self, request: GcRequest) -> Result<GcReport, ApiError> {
        let plan = self
            .engine
            .collect(request.dry_run)
            .await
            .map_err(|error| translate::error(&error))?;
        Ok(translate::garbage(&plan, request.dry_run))
    }

    async fn teams(&self) -> Result<Vec<Team>, ApiError> {
        let teams = self.access.teams().into_iter();
        let is_seen = |team: &KeptTeam| self.engine.scope().owns(&team.name);
        Ok(teams
            .filter(|(team, _)| is_seen(team))
            .map(|(team, keys)| self.shown_team(&team, keys))
            .collect())
    }

    async fn create_team(&self, new: NewTeam) -> Result<Team, ApiError> {
        let team = self.access.create_team(&new.name, new.limits).await?;
        self.limit(&team);
        Ok(self.shown_team(&team, 0))
    }

    async fn change_team(&self, team: &str, change: ChangeTeam) -> Result<Team, ApiError> {
        let team = self
            .access
            .change_team(team, |before| change.applied(before));
        let team = team.await?;
        self.limit(&team);
        let keys = self.access.teams();
        let keys = keys.iter().find(|(it, _)| it.name == team.name);
        Ok(self.shown_team(&team, keys.map_or(0, |(_, keys)| *keys)))
    }

    async fn remove_team(&self, team: &str) -> Result<(), ApiError> {
        let has = |team: &icebox_engine::id::Team| {
            let still = self.engine.teams().contains(team);
            still.then(|| "sandboxes or templates".to_owned())
        };
        self.access.remove_team(team, has).await
    }

    async fn keys(&self) -> Result<Vec<Key>, ApiError> {
        self.access.keys(self.team()).await
    }

    async fn create_key(&self, new: NewKey) -> Result<MadeKey, ApiError> {
        let team = self.engine.scope().team();
        self.access.create_key(team.as_str(), &new.name).await
    }

    async fn remove_key(&self, id: &str) -> Result<(), ApiError> {
        self.access.remove_key(self.team(), id).await
    }

    async fn audit(&self, range: AuditRange) -> Result<Vec<AuditEntry>, ApiError> {
        self.access.audit(self.team(), range).await
    }
}

/// What else there was for a sandbox that is started after its VMM had ended by itself.
fn after_crash(sandbox: &str, record: &v1::Sandbox) -> Option<String> {
    record.last_exit.as_ref().filter(|exit| !exit.by_guest)?;
    let last = record.last_generation()?;
    Some(format!(
        "it had crashed, and this is its newest disk: `icebox rollback {sandbox} --to {last} --resume` goes back to its last pause"
    ))
}

/// A batch's events, as far as they are whoever's asks, after one that stands for those that are no longer kept (INV-49).
/// Numbers count everybody's, so a team's have holes where others' are; what the host did is its administrator's.
fn in_order(batch: icebox_engine::Batch, scope: &Scope) -> Vec<Event> {
    let missed = batch
        .events
        .first()
        .filter(|_| batch.missed > 0)
        .map(|first| Event {
            sequence: first.seq - 1,
            time: first.at,
            event: "events.missed".to_owned(),
            sandbox_id: None,
            detail: format!("{} earlier events are no longer kept", batch.missed),
            steps: Vec::new(),
        });
    missed
        .into_iter()
        .chain(
            batch
                .events
                .into_iter()
                .filter(|event| match &event.team {
                    Some(team) => scope.owns(team),
                    None => *scope == Scope::Everything,
                })
                .map(translate::event),
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_49_a_subscriber_is_told_what_it_missed() {
        let event = |seq| icebox_engine::Event {
            seq,
            at: jiff::Timestamp::UNIX_EPOCH,
            sandbox: None,
            team: None,
            kind: "sandbox.paused".to_owned(),
            detail: String::new(),
            steps: Vec::new(),
        };
        let told = |missed| {
            let events = vec![event(8), event(9)];
            let told = in_order(icebox_engine::Batch { events, missed }, &Scope::Everything);
            told.into_iter()
                .map(|event| (event.sequence, event.event))
                .collect::<Vec<_>>()
        };
        let paused = |sequence| (sequence, "sandbox.paused".to_owned());
        assert_eq!(told(0), [paused(8), paused(9)]);
        assert_eq!(
            told(3),
            [(7, "events.missed".to_owned()), paused(8), paused(9)]
        );
    }
}
