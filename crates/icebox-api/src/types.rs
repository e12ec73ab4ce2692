//! What requests and responses contain, one file per resource.
//!
//! Unknown fields of requests are ignored, as E2B's SDKs need; absent ones have the documented default. Sizes named
//! `…Bytes` are allocated bytes (INV-27); `…MB` are mebibytes, as in E2B.

mod access;
mod build;
mod doctor;
mod e2b;
mod event;
mod gc;
mod history;
mod kernel;
mod lifetime;
mod metric;
mod recipe;
mod sandbox;
mod space;
mod template;
mod vmm;

pub use access::{
    AuditEntry, AuditRange, ChangeTeam, ChangeTemplate, Key, MadeKey, NewKey, NewTeam, Team,
    TeamLimits, TeamUse,
};
pub use build::{BuildEvent, BuildSource, NewBuild};
pub use doctor::{Check, CheckResult, Report};
pub use e2b::{
    ConnectRequest, LogEntry, Logs, NetworkConfig, PauseMode, PauseRequest, RefreshRequest,
    SandboxQuery, SnapshotInfo, TemplateAlias,
};
pub use event::{Event, StepTime};
pub use gc::{Garbage, GcReport, GcRequest};
pub use history::{History, HistoryPolicy, Now, PastBranch, PastGeneration, RollbackRequest};
pub use kernel::{Kernel, KernelEvent, KernelSource, NewKernel};
pub use lifetime::{
    AutoResume, ChangeLifetime, DrainReport, Lifecycle, Limit, Never, NotDrained, OnTimeout,
};
pub use metric::{MetricsRange, Resolution, SandboxMetric};
pub use recipe::{
    AssignTags, AssignedTags, BuildLogEntry, BuildReason, BuildState, BuildStatus, BuildStep,
    FilesUpload, NewRecipe, RemoveTags, RequestedBuild, StartBuild, TemplateTag,
};
pub use sandbox::{
    Branch, Forked, Generation, LastVerb, ListedSandbox, NewFork, NewSandbox, NewSnapshot, Outcome,
    ResumeRequest, SandboxDetail, Snapshot, State, Unusable, VerbResult, Vmm,
};
pub use space::{Kind, Owner, Part, Place, Stats};
pub use template::{Template, TemplateKind, Warm};
pub use vmm::{HostVmm, VmmAbilities};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// `null` is as good as nothing: clients in some languages write what was not given so.
fn nullable<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Which daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
}
