//! The daemon as one caller changes it: whatever they ask for is in the audit log before it begins, and how it ended after.
//!
//! This is a [`Daemon`] around the daemon, so that nothing that can be asked for is forgotten here: a new method does not
//! compile until it is said whether it changes anything.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use icebox_api::access::Caller;
use icebox_api::types::{
    AssignTags, AssignedTags, AuditEntry, AuditRange, BuildEvent, BuildStatus, ChangeLifetime,
    ChangeTeam, DrainReport, Event, Forked, GcReport, GcRequest, History, HostVmm, Kernel,
    KernelEvent, Key, MadeKey, MetricsRange, NewBuild, NewFork, NewKernel, NewKey, NewRecipe,
    NewSandbox, NewSnapshot, NewTeam, RemoveTags, Report, RequestedBuild, ResumeRequest,
    RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, StartBuild, Stats, Team, Template,
    TemplateAlias, TemplateTag, VerbResult,
};
use icebox_api::{ApiError, BoxStream, Daemon, ErrorBody, Route};
use jiff::Timestamp;

use super::super::daemon::Icebox;
use super::Access;

/// How it is said that a change was made.
const DONE: &str = "done";

pub(super) struct Audited {
    daemon: Icebox,
    access: Arc<Access>,
    actor: String,
    team: Option<String>,
}

/// An entry that was begun. Without a number it could not be.
#[derive(Clone, Copy)]
struct Begun(Option<i64>);

impl Audited {
    pub(super) fn new(daemon: Icebox, caller: &Caller) -> Self {
        Self {
            access: Arc::clone(&daemon.access),
            actor: caller.actor(),
            team: caller.team().map(ToOwned::to_owned),
            daemon,
        }
    }

    /// Does what was asked for, between the two halves of its entry.
    async fn change<T>(
        &self,
        verb: &'static str,
        target: impl Into<Cow<'_, str>>,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        self.make(verb, target, |_| None, work).await
    }

    /// As [`change`](Self::change), of something whose id is known when it is made.
    async fn make<T>(
        &self,
        verb: &'static str,
        target: impl Into<Cow<'_, str>>,
        made: impl FnOnce(&T) -> Option<String>,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let target = target.into();
        let begun = begin(
            &self.access,
            &self.actor,
            self.team.as_deref(),
            verb,
            &target,
        )
        .await;
        let result = work.await;
        let (outcome, made) = match &result {
            Ok(done) => (DONE.to_owned(), made(done)),
            Err(error) => (refusal(error.body()), None),
        };
        end(&self.access, begun, outcome, made).await;
        result
    }

    /// The id of a sandbox, since a name is another's one day.
    fn sandbox<'a>(&self, wanted: &'a str) -> Cow<'a, str> {
        match self.daemon.engine.inspect(wanted) {
            Ok(found) => Cow::Owned(found.record.id.to_string()),
            Err(_) => Cow::Borrowed(wanted),
        }
    }

    /// The id of a template, likewise.
    fn template_id<'a>(&self, wanted: &'a str) -> Cow<'a, str> {
        match self.daemon.engine.inspect_template(wanted) {
            Ok((found, _)) => Cow::Owned(found.id.to_string()),
            Err(_) => Cow::Borrowed(wanted),
        }
    }
}

/// Writes an entry's first half. A log that cannot be written stops nobody: a full disk must not keep its owner from
/// removing things.
async fn begin(
    access: &Access,
    actor: &str,
    team: Option<&str>,
    verb: &'static str,
    target: &str,
) -> Begun {
    /// What an entry repeats of what somebody typed.
    const TARGET_MAX: usize = 80;
    let target: String = target.chars().take(TARGET_MAX).collect();
    let (actor, team) = (actor.to_owned(), team.map(ToOwned::to_owned));
    let written = access.stored(move |store| {
        store.begin_audit(Timestamp::now(), &actor, team.as_deref(), verb, &target)
    });
    match written.await {
        Ok(number) => Begun(Some(number)),
        Err(error) => {
            tracing::error!(%error, causes = ?error.body().causes, verb, "a change is not in the audit log");
            Begun(None)
        }
    }
}

async fn end(access: &Access, Begun(number): Begun, outcome: String, made: Option<String>) {
    let Some(number) = number else { return };
    let written = access.stored(move |store| store.end_audit(number, &outcome, made.as_deref()));
    if let Err(error) = written.await {
        tracing::error!(%error, causes = ?error.body().causes, number, "how a change ended is not in the audit log");
    }
}

/// An error's code, as clients see it.
fn refusal(error: &ErrorBody) -> String {
    let code = error
        .error_code
        .and_then(|code| serde_json::to_value(code).ok());
    let code = code.and_then(|code| code.as_str().map(ToOwned::to_owned));
    code.unwrap_or_else(|| error.code.to_string())
}

fn sandbox_id(made: &SandboxDetail) -> Option<String> {
    Some(made.listed.sandbox_id.clone())
}

#[async_trait]
impl Daemon for Audited {
    async fn create(&self, new: NewSandbox) -> Result<SandboxDetail, ApiError> {
        let asked = new.name.clone().unwrap_or_default();
        let work = self.daemon.create(new);
        self.make("sandbox.create", asked, sandbox_id, work).await
    }

    async fn list(&self, space: bool) -> Result<Vec<SandboxDetail>, ApiError> {
        self.daemon.list(space).await
    }

    async fn inspect(&self, sandbox: &str, space: bool) -> Result<SandboxDetail, ApiError> {
        self.daemon.inspect(sandbox, space).await
    }

    async fn pause(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        let work = self.daemon.pause(sandbox);
        self.change("sandbox.pause", self.sandbox(sandbox), work)
            .await
    }

    async fn resume(&self, sandbox: &str, how: ResumeRequest) -> Result<VerbResult, ApiError> {
        let work = self.daemon.resume(sandbox, how);
        self.change("sandbox.resume", self.sandbox(sandbox), work)
            .await
    }

    async fn stop(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        let work = self.daemon.stop(sandbox);
        self.change("sandbox.stop", self.sandbox(sandbox), work)
            .await
    }

    async fn start(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        let work = self.daemon.start(sandbox);
        self.change("sandbox.start", self.sandbox(sandbox), work)
            .await
    }

    async fn checkpoint(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        let work = self.daemon.checkpoint(sandbox);
        self.change("sandbox.checkpoint", self.sandbox(sandbox), work)
            .await
    }

    async fn rollback(&self, sandbox: &str, how: RollbackRequest) -> Result<VerbResult, ApiError> {
        let work = self.daemon.rollback(sandbox, how);
        self.change("sandbox.rollback", self.sandbox(sandbox), work)
            .await
    }

    async fn history(&self, sandbox: &str) -> Result<History, ApiError> {
        self.daemon.history(sandbox).await
    }

    async fn forget(&self, sandbox: &str, point: &str) -> Result<(), ApiError> {
        let work = self.daemon.forget(sandbox, point);
        self.change("sandbox.forget", self.sandbox(sandbox), work)
            .await
    }

    async fn snapshot(&self, sandbox: &str, new: NewSnapshot) -> Result<Snapshot, ApiError> {
        let work = self.daemon.snapshot(sandbox, new);
        self.change("sandbox.snapshot", self.sandbox(sandbox), work)
            .await
    }

    async fn fork(&self, sandbox: &str, new: NewFork) -> Result<Vec<Forked>, ApiError> {
        let work = self.daemon.fork(sandbox, new);
        self.change("sandbox.fork", self.sandbox(sandbox), work)
            .await
    }

    async fn flatten(&self, sandbox: &str, new: NewSnapshot) -> Result<Template, ApiError> {
        let work = self.daemon.flatten(sandbox, new);
        self.change("sandbox.flatten", self.sandbox(sandbox), work)
            .await
    }

    async fn destroy(&self, sandbox: &str) -> Result<String, ApiError> {
        let work = self.daemon.destroy(sandbox);
        self.change("sandbox.destroy", self.sandbox(sandbox), work)
            .await
    }

    async fn set_lifetime(
        &self,
        sandbox: &str,
        change: ChangeLifetime,
    ) -> Result<SandboxDetail, ApiError> {
        let work = self.daemon.set_lifetime(sandbox, change);
        self.change("sandbox.timeout", self.sandbox(sandbox), work)
            .await
    }

    async fn metrics(
        &self,
        sandbox: &str,
        range: MetricsRange,
    ) -> Result<Vec<SandboxMetric>, ApiError> {
        self.daemon.metrics(sandbox, range).await
    }

    async fn console(&self, sandbox: &str) -> Result<BoxStream<io::Result<Bytes>>, ApiError> {
        self.daemon.console(sandbox).await
    }

    /// Not a change, though it may resume the sandbox: who asked is nobody that we know, and the event says that.
    async fn route(&self, sandbox: &str, exact: bool, wake: bool) -> Result<Route, ApiError> {
        self.daemon.route(sandbox, exact, wake).await
    }

    async fn signer(&self, has: &(dyn for<'a> Fn(&'a str) -> bool + Sync)) -> Option<String> {
        self.daemon.signer(has).await
    }

    async fn request_build(&self, new: NewRecipe) -> Result<RequestedBuild, ApiError> {
        let asked = new.name.clone();
        let work = self.daemon.request_build(new);
        self.change("template.request", asked, work).await
    }

    /// Its entry is of the beginning. How the build ended is in the build's log.
    async fn start_build(&self, build: &str, what: StartBuild) -> Result<(), ApiError> {
        let work = self.daemon.start_build(build, what);
        self.change("template.build", build, work).await
    }

    async fn build_status(
        &self,
        build: &str,
        offset: usize,
        limit: usize,
    ) -> Result<BuildStatus, ApiError> {
        self.daemon.build_status(build, offset, limit).await
    }

    async fn admit_files(&self, hash: &str) -> Result<Option<String>, ApiError> {
        self.daemon.admit_files(hash).await
    }

    /// Not a change of anything that somebody has: a build that is asked for is.
    async fn put_files(
        &self,
        way: &str,
        content: BoxStream<io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        self.daemon.put_files(way, content).await
    }

    async fn template_tags(&self, template: &str) -> Result<Vec<TemplateTag>, ApiError> {
        self.daemon.template_tags(template).await
    }

    async fn assign_tags(&self, asked: AssignTags) -> Result<AssignedTags, ApiError> {
        let target = asked.target.clone();
        let work = self.daemon.assign_tags(asked);
        self.change("template.tag", target, work).await
    }

    async fn remove_tags(&self, asked: RemoveTags) -> Result<(), ApiError> {
        let target = asked.name.clone();
        let work = self.daemon.remove_tags(asked);
        self.change("template.untag", target, work).await
    }

    async fn templates(&self) -> Result<Vec<Template>, ApiError> {
        self.daemon.templates().await
    }

    async fn template(&self, template: &str) -> Result<Template, ApiError> {
        self.daemon.template(template).await
    }

    async fn template_alias(&self, name: &str) -> Result<TemplateAlias, ApiError> {
        self.daemon.template_alias(name).await
    }

    async fn remove_template(&self, template: &str) -> Result<String, ApiError> {
        let work = self.daemon.remove_template(template);
        self.change("template.remove", self.template_id(template), work)
            .await
    }

    async fn publish_template(&self, template: &str, public: bool) -> Result<Template, ApiError> {
        let verb = match public {
            true => "template.publish",
            false => "template.unpublish",
        };
        let work = self.daemon.publish_template(template, public);
        self.change(verb, self.template_id(template), work).await
    }

    async fn warm_template(&self, template: &str, count: u16) -> Result<Template, ApiError> {
        let work = self.daemon.warm_template(template, count);
        self.change("template.warm", self.template_id(template), work)
            .await
    }

    /// Its entry ends with the build, and has no end if the build is given up.
    async fn build(&self, new: NewBuild) -> Result<BoxStream<BuildEvent>, ApiError> {
        let (verb, actor, team) = ("template.build", &self.actor, self.team.as_deref());
        let begun = begin(&self.access, actor, team, verb, &new.name).await;
        let access = Arc::clone(&self.access);
        match self.daemon.build(new).await {
            Ok(events) => Ok(events
                .then(move |event| {
                    let access = Arc::clone(&access);
                    async move {
                        match &event {
                            BuildEvent::Done { template } => {
                                let made = Some(template.template_id.clone());
                                end(&access, begun, DONE.to_owned(), made).await;
                            }
                            BuildEvent::Error { error } => {
                                end(&access, begun, refusal(error), None).await;
                            }
                            _ => {}
                        }
                        event
                    }
                })
                .boxed()),
            Err(error) => {
                end(&access, begun, refusal(error.body()), None).await;
                Err(error)
            }
        }
    }

    async fn vmms(&self) -> Result<Vec<HostVmm>, ApiError> {
        self.daemon.vmms().await
    }

    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        self.daemon.kernels().await
    }

    /// Its entry ends with the import, and has no end if the import is given up.
    async fn import_kernel(&self, new: NewKernel) -> Result<BoxStream<KernelEvent>, ApiError> {
        let (verb, actor, team) = ("kernel.import", &self.actor, self.team.as_deref());
        let begun = begin(&self.access, actor, team, verb, "").await;
        let access = Arc::clone(&self.access);
        match self.daemon.import_kernel(new).await {
            Ok(events) => Ok(events
                .then(move |event| {
                    let access = Arc::clone(&access);
                    async move {
                        match &event {
                            KernelEvent::Done { kernel } => {
                                let made = Some(kernel.digest.clone());
                                end(&access, begun, DONE.to_owned(), made).await;
                            }
                            KernelEvent::Error { error } => {
                                end(&access, begun, refusal(error), None).await;
                            }
                            _ => {}
                        }
                        event
                    }
                })
                .boxed()),
            Err(error) => {
                end(&access, begun, refusal(error.body()), None).await;
                Err(error)
            }
        }
    }

    async fn events(&self, since: Option<u64>, follow: bool) -> Result<BoxStream<Event>, ApiError> {
        self.daemon.events(since, follow).await
    }

    async fn drain(&self) -> Result<DrainReport, ApiError> {
        self.change("daemon.drain", "", self.daemon.drain()).await
    }

    async fn stats(&self) -> Result<Stats, ApiError> {
        self.daemon.stats().await
    }

    async fn doctor(&self) -> Result<Report, ApiError> {
        self.daemon.doctor().await
    }

    async fn gc(&self, request: GcRequest) -> Result<GcReport, ApiError> {
        let work = self.daemon.gc(request);
        if request.dry_run {
            return work.await;
        }
        self.change("daemon.collect", "", work).await
    }

    async fn teams(&self) -> Result<Vec<Team>, ApiError> {
        self.daemon.teams().await
    }

    async fn create_team(&self, new: NewTeam) -> Result<Team, ApiError> {
        let name = new.name.clone();
        self.change("team.create", name, self.daemon.create_team(new))
            .await
    }

    async fn change_team(&self, team: &str, change: ChangeTeam) -> Result<Team, ApiError> {
        self.change("team.set", team, self.daemon.change_team(team, change))
            .await
    }

    async fn remove_team(&self, team: &str) -> Result<(), ApiError> {
        self.change("team.remove", team, self.daemon.remove_team(team))
            .await
    }

    async fn keys(&self) -> Result<Vec<Key>, ApiError> {
        self.daemon.keys().await
    }

    async fn create_key(&self, new: NewKey) -> Result<MadeKey, ApiError> {
        let (asked, work) = (new.name.clone(), self.daemon.create_key(new));
        let made = |made: &MadeKey| Some(made.kept.id.clone());
        self.make("key.create", asked, made, work).await
    }

    async fn remove_key(&self, id: &str) -> Result<(), ApiError> {
        self.change("key.remove", id, self.daemon.remove_key(id))
            .await
    }

    async fn audit(&self, range: AuditRange) -> Result<Vec<AuditEntry>, ApiError> {
        self.daemon.audit(range).await
    }
}
