//! What the routes ask of a daemon.

use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;

use crate::ApiError;
use crate::types::{
    AssignTags, AssignedTags, AuditEntry, AuditRange, BuildEvent, BuildStatus, ChangeLifetime,
    ChangeTeam, DrainReport, Event, Forked, GcReport, GcRequest, History, HostVmm, Kernel,
    KernelEvent, Key, MadeKey, MetricsRange, NewBuild, NewFork, NewKernel, NewKey, NewRecipe,
    NewSandbox, NewSnapshot, NewTeam, RemoveTags, Report, RequestedBuild, ResumeRequest,
    RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, StartBuild, Stats, Team, Template,
    TemplateAlias, TemplateTag, VerbResult,
};

/// A stream that a response is made of.
pub type BoxStream<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// Behind the routes, as one caller sees it ([`crate::access`]): what is another team's is not there. References are what a user typed: a name, an id or a unique prefix of an id.
///
/// The routes run every method to its end when the client goes away (INV-20), except that they drop the streams: a
/// build or an import whose stream is dropped is cancelled.
#[async_trait]
pub trait Daemon: Send + Sync + 'static {
    /// Creates a sandbox and waits until its agent answers.
    async fn create(&self, new: NewSandbox) -> Result<SandboxDetail, ApiError>;
    /// All sandboxes, newest first; with `space`, what each occupies, which takes a look at its files.
    async fn list(&self, space: bool) -> Result<Vec<SandboxDetail>, ApiError>;
    /// One sandbox; with `space`, what it occupies and who shares that.
    async fn inspect(&self, sandbox: &str, space: bool) -> Result<SandboxDetail, ApiError>;
    /// To `Paused`.
    async fn pause(&self, sandbox: &str) -> Result<VerbResult, ApiError>;
    /// From `Paused` to `Running`.
    async fn resume(&self, sandbox: &str, how: ResumeRequest) -> Result<VerbResult, ApiError>;
    /// To `Stopped`.
    async fn stop(&self, sandbox: &str) -> Result<VerbResult, ApiError>;
    /// From `Stopped` to `Running`.
    async fn start(&self, sandbox: &str) -> Result<VerbResult, ApiError>;
    /// Makes a generation of a running sandbox.
    async fn checkpoint(&self, sandbox: &str) -> Result<VerbResult, ApiError>;
    /// To a point of the sandbox's history.
    async fn rollback(&self, sandbox: &str, how: RollbackRequest) -> Result<VerbResult, ApiError>;
    /// Every point that the sandbox can go back to.
    async fn history(&self, sandbox: &str) -> Result<History, ApiError>;
    /// Removes a generation, by its number, or a branch, by its name.
    async fn forget(&self, sandbox: &str, point: &str) -> Result<(), ApiError>;
    /// Makes a template of the sandbox as it is this instant.
    async fn snapshot(&self, sandbox: &str, new: NewSnapshot) -> Result<Snapshot, ApiError>;
    /// Makes running copies of the sandbox as it is this instant.
    async fn fork(&self, sandbox: &str, new: NewFork) -> Result<Vec<Forked>, ApiError>;
    /// Makes an image template of the sandbox's disk.
    async fn flatten(&self, sandbox: &str, new: NewSnapshot) -> Result<Template, ApiError>;
    /// Removes the sandbox and everything it holds; answers its id.
    async fn destroy(&self, sandbox: &str) -> Result<String, ApiError>;
    /// Changes when the sandbox ends by itself, and when it begins to.
    async fn set_lifetime(
        &self,
        sandbox: &str,
        change: ChangeLifetime,
    ) -> Result<SandboxDetail, ApiError>;
    /// What the sandbox used, oldest first.
    async fn metrics(
        &self,
        sandbox: &str,
        range: MetricsRange,
    ) -> Result<Vec<SandboxMetric>, ApiError>;
    /// What the guest wrote to its console so far.
    async fn console(&self, sandbox: &str) -> Result<BoxStream<std::io::Result<Bytes>>, ApiError>;

    /// Where a port of a running sandbox is reached. `exact`: only a full id will do, since the caller may be anybody and
    /// ids are the secret of public ports. `wake`: one that is paused and is to be resumed for who asks for it is resumed
    /// first.
    ///
    /// # Errors
    /// Not found, not running, or admitting no connections now.
    async fn route(&self, sandbox: &str, exact: bool, wake: bool) -> Result<Route, ApiError>;
    /// The id of the sandbox that has the token which `has` says yes to. For requests that carry a signature and name no
    /// sandbox.
    async fn signer(&self, has: &(dyn for<'a> Fn(&'a str) -> bool + Sync)) -> Option<String>;

    /// All templates.
    async fn templates(&self) -> Result<Vec<Template>, ApiError>;
    /// One template.
    async fn template(&self, template: &str) -> Result<Template, ApiError>;
    /// Removes a template that nothing depends on; answers its id.
    async fn remove_template(&self, template: &str) -> Result<String, ApiError>;
    /// What a name leads to, if to anything.
    async fn template_alias(&self, name: &str) -> Result<TemplateAlias, ApiError>;
    /// Lets every team create sandboxes from a template, or its own alone.
    async fn publish_template(&self, template: &str, public: bool) -> Result<Template, ApiError>;
    /// Has so many sandboxes made from a template wait for somebody to create one.
    async fn warm_template(&self, template: &str, count: u16) -> Result<Template, ApiError>;
    /// Builds a template. The stream's last item says how it ended.
    async fn build(&self, new: NewBuild) -> Result<BoxStream<BuildEvent>, ApiError>;

    /// Begins a build by steps, which waits for them.
    async fn request_build(&self, new: NewRecipe) -> Result<RequestedBuild, ApiError>;
    /// Tells such a build what to do. It goes on by itself.
    async fn start_build(&self, build: &str, what: StartBuild) -> Result<(), ApiError>;
    /// How such a build goes, with at most `limit` lines of its log.
    async fn build_status(
        &self,
        build: &str,
        offset: usize,
        limit: usize,
    ) -> Result<BuildStatus, ApiError>;
    /// Whether an archive is there that steps copy from; if not, what its way here is called for a while.
    async fn admit_files(&self, hash: &str) -> Result<Option<String>, ApiError>;
    /// Takes an archive on its way.
    async fn put_files(
        &self,
        way: &str,
        content: BoxStream<std::io::Result<Bytes>>,
    ) -> Result<(), ApiError>;
    /// The tags of a template that was built by steps.
    async fn template_tags(&self, template: &str) -> Result<Vec<TemplateTag>, ApiError>;
    /// Gives it more.
    async fn assign_tags(&self, asked: AssignTags) -> Result<AssignedTags, ApiError>;
    /// Takes some away.
    async fn remove_tags(&self, asked: RemoveTags) -> Result<(), ApiError>;

    /// The VMMs that run sandboxes here, the default first.
    async fn vmms(&self) -> Result<Vec<HostVmm>, ApiError>;

    /// All kernels.
    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError>;
    /// Imports a kernel. The stream's last item says how it ended.
    async fn import_kernel(&self, new: NewKernel) -> Result<BoxStream<KernelEvent>, ApiError>;

    /// Events after number `since` (absent: from now on); ends with what is there unless `follow`. A subscriber that
    /// asks for what is no longer kept is told so first (INV-49).
    async fn events(&self, since: Option<u64>, follow: bool) -> Result<BoxStream<Event>, ApiError>;
    /// Pauses everything that runs, lets nothing new begin, and has the daemon leave afterwards.
    async fn drain(&self) -> Result<DrainReport, ApiError>;
    /// What everything occupies, and how much room there is.
    async fn stats(&self) -> Result<Stats, ApiError>;
    /// What works here.
    async fn doctor(&self) -> Result<Report, ApiError>;
    /// Removes what nothing reaches, or tells what it would.
    async fn gc(&self, request: GcRequest) -> Result<GcReport, ApiError>;

    /// All teams, by name.
    async fn teams(&self) -> Result<Vec<Team>, ApiError>;
    /// Makes a team.
    async fn create_team(&self, new: NewTeam) -> Result<Team, ApiError>;
    /// Changes what a team may have. What it has is not affected.
    async fn change_team(&self, team: &str, change: ChangeTeam) -> Result<Team, ApiError>;
    /// Removes a team that has no sandboxes and no templates, and its keys.
    async fn remove_team(&self, team: &str) -> Result<(), ApiError>;
    /// The keys of the team, or of all teams, oldest first.
    async fn keys(&self) -> Result<Vec<Key>, ApiError>;
    /// Makes a key of the team.
    async fn create_key(&self, new: NewKey) -> Result<MadeKey, ApiError>;
    /// Removes a key: whoever has it does not come in from here on.
    async fn remove_key(&self, id: &str) -> Result<(), ApiError>;
    /// What was changed and who asked for it, oldest first.
    async fn audit(&self, range: AuditRange) -> Result<Vec<AuditEntry>, ApiError>;
}

/// Where a sandbox is reached, and the permission to.
pub struct Route {
    /// The sandbox's full id.
    pub sandbox_id: String,
    /// Its address on this host.
    pub address: Ipv4Addr,
    /// What its agent asks for. Never logged.
    pub token: String,
    /// Whether its agent serves those who have no token, too.
    pub agent_is_open: bool,
    /// What its other ports ask for, if they do. Never logged.
    pub traffic_token: Option<String>,
    /// Held for exactly as long as a connection to the sandbox lives.
    pub pass: Arc<dyn Pass>,
}

/// The permission to reach a sandbox, for as long as it is held. A sandbox that pauses or goes waits a little for passes to
/// be dropped, then revokes them.
#[async_trait]
pub trait Pass: Send + Sync {
    /// Completes when the connection must be cut.
    async fn revoked(&self);

    /// Says that the connection carries a stream from now on: it ends when one of its sides wants it to, and a sandbox
    /// that pauses hardly waits for that.
    fn becomes_stream(&self);
}
