//! From the engine's words to those on the wire, and back where a request has values to check.
//!
//! Whatever a request says is checked here, at the edge: what goes on to the engine is typed (INV-41).

use std::net::Ipv4Addr;

use icebox_api::types::{
    Branch, Event, Garbage, GcReport, History, HistoryPolicy, HostVmm, Kind, LastVerb,
    ListedSandbox, NewSandbox, Now, Outcome, Owner, Part, PastBranch, PastGeneration, Place,
    SandboxDetail, State, Stats, StepTime, Team, TeamLimits, TeamUse, Template, TemplateKind,
    Unusable, Vmm, VmmAbilities,
};
use icebox_api::{ApiError, ENVD_VERSION, ErrorCode};
use icebox_engine::host::{self, Egress, ErrorKind, HostError, Space, VmmIdentity};
use icebox_engine::id::{Digest, Name};
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1;
use icebox_engine::unit::{Bytes, Geometry};
use icebox_engine::{
    CreateRequest, Error, Holdings, Plan, Quota, Refusal, SandboxView, Scope, Usage, Usages,
};
use sha2::{Digest as _, Sha256};

use super::access::KeptTeam;

/// E2B's clients need the name of a node; there is only this one.
const CLIENT_ID: &str = "icebox";

/// What the engine says, as an answer.
pub(super) fn error(error: &Error) -> ApiError {
    let answer = ApiError::from_error(code(error), error);
    match error.hint() {
        Some(hint) => answer.hint(hint),
        None => answer,
    }
}

fn code(error: &Error) -> ErrorCode {
    match error {
        Error::NotWoken { source } => code(source),
        Error::Unknown { .. } | Error::NoGeneration { .. } | Error::Destroyed => {
            ErrorCode::NotFound
        }
        Error::Ambiguous { .. } => ErrorCode::Ambiguous,
        Error::NameTaken { .. } => ErrorCode::AlreadyExists,
        Error::Refused(Refusal::Broken { .. }) => ErrorCode::Broken,
        Error::Refused(_) => ErrorCode::WrongPhase,
        Error::Invalid { .. } => ErrorCode::Invalid,
        Error::InUse { .. } | Error::Busy { .. } => ErrorCode::InUse,
        Error::Exhausted { .. } => ErrorCode::Exhausted,
        Error::OverQuota { .. } => ErrorCode::LimitReached,
        Error::Draining => ErrorCode::Draining,
        Error::Incompatible { .. } => ErrorCode::Unsupported,
        Error::Step { source, .. } => kind(source.kind()),
        Error::Deadline { .. } => ErrorCode::Timeout,
        Error::Stuck { .. } | Error::Unusable { .. } | Error::DiskLost { .. } => ErrorCode::Broken,
        _ => ErrorCode::Internal,
    }
}

/// What a part of the host says, as an answer.
pub(crate) fn host_error(error: &HostError) -> ApiError {
    let answer = ApiError::from_error(kind(error.kind()), error);
    match error.hint_text() {
        Some(hint) => answer.hint(hint),
        None => answer,
    }
}

fn kind(kind: ErrorKind) -> ErrorCode {
    match kind {
        ErrorKind::Invalid => ErrorCode::Invalid,
        ErrorKind::Unsupported => ErrorCode::Unsupported,
        ErrorKind::Exhausted => ErrorCode::Exhausted,
        ErrorKind::Timeout => ErrorCode::Timeout,
        // Of a thing that the user did not name: not their mistake.
        ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::Busy
        | ErrorKind::Gone
        | ErrorKind::Other => ErrorCode::Internal,
    }
}

/// A name as the user gave it.
pub(super) fn name(text: &str) -> Result<Name, ApiError> {
    text.parse()
        .map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))
}

/// A name that must be there.
pub(super) fn required_name(text: Option<&str>) -> Result<Name, ApiError> {
    text.map_or_else(
        || Err(ApiError::new(ErrorCode::Invalid, "a name is needed")),
        name,
    )
}

/// CPUs and memory as the user gave them.
pub(super) fn vcpus(asked: Option<i64>) -> Result<Option<u8>, ApiError> {
    in_range(asked, "CPUs", "ask for a whole number from 1 on")
}

pub(super) fn mem_mib(asked: Option<i64>) -> Result<Option<u32>, ApiError> {
    in_range(
        asked,
        "MiB of memory",
        "ask for a whole number of MiB, from 64 on: `--memory 512` or `--memory 2G`",
    )
}

pub(super) fn disk_size(asked: Option<i64>) -> Result<Option<Bytes>, ApiError> {
    const HINT: &str =
        "leave it out for the template's size, or ask for at least that: `--disk 10G`";
    let mib: Option<u32> = in_range(asked, "MiB of disk", HINT)?;
    if mib == Some(0) {
        return Err(out_of_range(0, "MiB of disk", HINT));
    }
    Ok(mib.map(|mib| Bytes::mib(mib.into())))
}

/// The engine says which sizes make sense; here a number only has to be one.
fn in_range<T: TryFrom<i64>>(
    asked: Option<i64>,
    unit: &str,
    hint: &str,
) -> Result<Option<T>, ApiError> {
    asked
        .map(|asked| T::try_from(asked).map_err(|_| out_of_range(asked, unit, hint)))
        .transpose()
}

fn out_of_range(asked: i64, unit: &str, hint: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Invalid,
        format!("a sandbox cannot have {asked} {unit}"),
    )
    .hint(hint)
}

/// A template as E2B's clients name it, `team/name:tag`, in our words.
pub(super) fn template_reference(text: &str) -> &str {
    text.strip_suffix(":default").unwrap_or(text)
}

/// What somebody calls something of their own, without the team's name, which E2B's clients may put before it.
pub(super) fn of_own<'a>(scope: &Scope, text: &'a str) -> &'a str {
    match text.split_once('/') {
        Some((team, name)) if team == scope.team().as_str() => name,
        _ => text,
    }
}

/// What to create. `internet` is what those who say nothing get.
pub(super) fn create_request(new: NewSandbox, internet: bool) -> Result<CreateRequest, ApiError> {
    if let Some(key) = new
        .env_vars
        .keys()
        .find(|key| key.is_empty() || key.contains(['=', '\0']))
    {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            format!("{key:?} cannot be the name of a variable"),
        ));
    }
    let lifetime = super::lifetime::of_new(&new)?;
    let egress = if new.internet().unwrap_or(internet) {
        Egress::Internet
    } else {
        Egress::Deny
    };
    Ok(CreateRequest {
        name: new.name.as_deref().map(name).transpose()?,
        vcpus: vcpus(new.cpu_count)?,
        mem_mib: mem_mib(new.memory_mb)?,
        disk_size: disk_size(new.disk_size_mb)?,
        template: new.template_id,
        volume_driver: new.volume_driver,
        vmm: new.vmm,
        cold: new.cold,
        egress,
        env: new.env_vars,
        doors: v1::Doors {
            agent_open: new.secure == Some(false),
            ports_closed: new
                .network
                .is_some_and(|it| it.allow_public_traffic == Some(false)),
        },
        metadata: new.metadata,
        lifetime,
        history: history_policy(&new.history.unwrap_or_default())?,
    })
}

fn history_policy(asked: &HistoryPolicy) -> Result<v1::HistoryPolicy, ApiError> {
    const TIME: &str = "ask for a number of seconds; on the command line also 10m, 12h, 30d";
    Ok(v1::HistoryPolicy {
        keep: in_range(asked.keep, "generations kept", "ask for at least 1")?,
        keep_for_secs: in_range(asked.keep_seconds, "seconds of history", TIME)?,
        checkpoint_every_secs: in_range(
            asked.checkpoint_every_seconds,
            "seconds between checkpoints",
            TIME,
        )?,
    })
}

/// A point of a sandbox's history as the user named it.
pub(super) fn point(text: &str) -> Result<v1::Point, ApiError> {
    text.parse().map_err(|error| {
        ApiError::from_error(ErrorCode::Invalid, &error).hint(
            "a point is a generation's number or a branch's name: `icebox history` lists them",
        )
    })
}

/// CPUs and memory of a template that may leave them out.
pub(super) fn geometry(
    cpus: Option<i64>,
    memory: Option<i64>,
    default: Geometry,
) -> Result<Geometry, ApiError> {
    Ok(Geometry {
        vcpus: vcpus(cpus)?.unwrap_or(default.vcpus),
        mem_mib: mem_mib(memory)?.unwrap_or(default.mem_mib),
    })
}

/// What is not in a sandbox's record.
pub(super) struct Beside<'a> {
    pub(super) domain: Option<&'a str>,
    pub(super) limits: &'a str,
    /// The name that its template was built under by steps, if it was.
    pub(super) built_as: Option<String>,
    pub(super) usage: Option<&'a Usage>,
}

/// What something occupies, unless part of it could not be measured.
fn sizes(usage: Option<&Usage>) -> (Option<u64>, Option<u64>) {
    let complete = usage.filter(|usage| !usage.incomplete);
    (
        complete.map(|usage| usage.own.0),
        complete.map(|usage| usage.shared.0),
    )
}

fn parts(usage: Option<&Usage>) -> Vec<Part> {
    let parts = usage.into_iter().flat_map(|usage| &usage.parts);
    parts
        .map(|part| Part {
            object: part.object.to_string(),
            allocated_bytes: part.allocated.0,
            shared_with: part.shared_with.clone(),
        })
        .collect()
}

/// What everything occupies.
pub(super) fn stats(usages: &Usages, places: Vec<(Space, Bytes)>) -> Stats {
    Stats {
        places: places
            .into_iter()
            .map(|(space, mark)| Place {
                place: space.place,
                total_bytes: space.total.0,
                free_bytes: space.available.0,
                keep_free_bytes: mark.0,
            })
            .collect(),
        kinds: usages
            .kinds
            .iter()
            .map(|(kind, (count, sum))| Kind {
                kind: (*kind).to_owned(),
                count: *count,
                allocated_bytes: sum.0,
            })
            .collect(),
        owners: usages
            .owners
            .iter()
            .map(|(object, usage)| Owner {
                id: match object {
                    Object::Sandbox(id) => id.to_string(),
                    Object::Template(id) => id.to_string(),
                    other => other.to_string(),
                },
                name: usage.name.clone(),
                allocated_bytes: usage.own.0,
                shared_bytes: usage.shared.0,
            })
            .collect(),
        unneeded_bytes: usages.unneeded.0,
    }
}

/// A sandbox, whole.
pub(super) fn sandbox(view: &SandboxView, beside: Beside<'_>) -> SandboxDetail {
    let record = &view.record;
    let running = matches!(record.rests, v1::Rest::Running);
    let (allocated_bytes, shared_bytes) = sizes(beside.usage);
    SandboxDetail {
        listed: listed(view, beside.built_as),
        envd_access_token: (!record.spec.doors.agent_open)
            .then(|| record.token.expose().to_owned()),
        traffic_access_token: traffic_token(record),
        pause_mode: None,
        domain: beside.domain.map(ToOwned::to_owned),
        allow_internet_access: record.spec.egress == Egress::Internet,
        volume_driver: record.spec.volume_driver.clone(),
        vmm: record.machine.as_ref().map(|machine| vmm(&machine.vmm)),
        kernel: Some(record.spec.kernel.to_string()),
        pid: record.holds.iter().find_map(|hold| match hold {
            v1::Hold::Vmm { process } => process.as_ref().map(|process| process.pid),
            _ => None,
        }),
        limits: running.then(|| beside.limits.to_owned()),
        allocated_bytes,
        shared_bytes,
        parts: parts(beside.usage),
        generations: view
            .generations
            .iter()
            .map(|generation| icebox_api::types::Generation {
                number: generation.number.0,
                created_at: generation.capture.captured_at,
                allocated_bytes: generation.capture.saved.allocated.0,
                changed_pages: generation.capture.saved.changed_pages,
            })
            .collect(),
        unusable: view
            .unusable
            .iter()
            .map(|(number, why)| Unusable {
                number: number.0,
                why: why.clone(),
                current: record.rests
                    == v1::Rest::Paused {
                        generation: *number,
                    },
            })
            .collect(),
        branches: record
            .branches
            .iter()
            .map(|branch| Branch {
                name: branch.name.to_string(),
                created_at: branch.created_at,
            })
            .collect(),
        history: said_of_history(&record.spec.history),
        holds: record.holds.iter().map(hold).collect(),
        lifecycle: super::lifetime::shown(&record.lifetime),
        last_exit: record.last_exit.as_ref().map(|exit| exit.detail.clone()),
        last_verb: view.last_verb.as_deref().map(last_verb),
        disk_lost: view.disk_lost.clone(),
        broken: record.broken.clone(),
    }
}

/// What a sandbox's ports ask for, if they do: made of its own token, so that it is another one in every fork, and what
/// knows it does not know that.
pub(super) fn traffic_token(record: &v1::Sandbox) -> Option<String> {
    let made = || Sha256::digest(format!("icebox traffic:{}", record.token.expose()));
    record
        .spec
        .doors
        .ports_closed
        .then(|| Digest::from_bytes(made().into()).into())
}

fn said_of_history(policy: &v1::HistoryPolicy) -> Option<HistoryPolicy> {
    let number = |secs: u64| i64::try_from(secs).unwrap_or(i64::MAX);
    let said = HistoryPolicy {
        keep: policy.keep.map(Into::into),
        keep_seconds: policy.keep_for_secs.map(number),
        checkpoint_every_seconds: policy.checkpoint_every_secs.map(number),
    };
    (said != HistoryPolicy::default()).then_some(said)
}

/// Every point that a sandbox can go back to.
pub(super) fn history(history: &icebox_engine::History) -> History {
    let record = &history.record;
    let rests_at = match record.rests {
        v1::Rest::Paused { generation } => Some(generation),
        _ => None,
    };
    let generations = history.generations.iter().map(|past| {
        let generation = past.generation.as_ref();
        let capture = generation.map(|it| &it.capture);
        PastGeneration {
            number: past.number.0,
            current: rests_at == Some(past.number),
            unusable: past.unusable.clone(),
            made_by: generation.map(|it| it.made_by.to_string()),
            created_at: capture.map(|it| it.captured_at),
            after: generation.and_then(|it| it.after).map(|it| it.0),
            memory_bytes: capture.map(|it| it.saved.allocated.0),
            changed_pages: capture.map(|it| it.saved.changed_pages),
            disk_bytes: past.disk.map(|it| it.0),
            vmm: capture.map(|it| vmm(&it.machine.vmm)),
        }
    });
    let branches = history.branches.iter().map(|past| PastBranch {
        name: past.branch.name.to_string(),
        created_at: past.branch.created_at,
        after: past.branch.after.map(|it| it.0),
        disk_bytes: past.disk.map(|it| it.0),
    });
    History {
        sandbox_id: record.id.to_string(),
        generations: generations.collect(),
        branches: branches.collect(),
        now: Now {
            state: state(record),
            after: record.after.map(|it| it.0),
            disk_bytes: history.newest_disk.map(|it| it.0),
        },
    }
}

fn state(record: &v1::Sandbox) -> State {
    match (&record.broken, &record.rests) {
        (Some(_), _) => State::Broken,
        (None, v1::Rest::Running) => State::Running,
        (None, v1::Rest::Paused { .. }) => State::Paused,
        (None, v1::Rest::Stopped | v1::Rest::Nowhere) => State::Stopped,
    }
}

fn listed(view: &SandboxView, built_as: Option<String>) -> ListedSandbox {
    let record = &view.record;
    ListedSandbox {
        sandbox_id: record.id.to_string(),
        template_id: record.spec.template.to_string(),
        client_id: CLIENT_ID.to_owned(),
        alias: Some(built_as.unwrap_or_else(|| record.spec.template_name.clone())),
        name: record.name.as_ref().map(ToString::to_string),
        team: record.spec.team.to_string(),
        started_at: record.created_at,
        end_at: record.lifetime.end_at,
        cpu_count: record.spec.geometry.vcpus,
        memory_mb: record.spec.geometry.mem_mib,
        disk_size_mb: record.spec.disk_size.0 >> 20,
        state: state(record),
        verb: view.busy.map(ToOwned::to_owned),
        stalled: view.stalled.then(|| {
            "a write to its disk found no room: it stands still until there is some".to_owned()
        }),
        unanswering: (record.rests == v1::Rest::Running && record.unwelcomed).then(|| {
            "its agent has not answered since it was resumed: no command can be run in it"
                .to_owned()
        }),
        metadata: record.spec.metadata.clone(),
        envd_version: ENVD_VERSION.to_owned(),
        address: reachable(view.host_address),
    }
}

fn reachable(address: Ipv4Addr) -> Option<Ipv4Addr> {
    (!address.is_unspecified()).then_some(address)
}

fn hold(hold: &v1::Hold) -> String {
    match hold {
        v1::Hold::Directory => "directory".to_owned(),
        v1::Hold::Slot => "slot".to_owned(),
        v1::Hold::Head { number, over } => match over {
            v1::Under::Base(digest) => format!("head {number} over base {}", digest.short()),
            v1::Under::Layer(layer) => format!("head {number} over layer {layer}"),
        },
        v1::Hold::Disk => "disk device".to_owned(),
        v1::Hold::Network => "network".to_owned(),
        v1::Hold::Box => "box".to_owned(),
        v1::Hold::Vmm { .. } => "vmm".to_owned(),
    }
}

fn vmm(identity: &VmmIdentity) -> Vmm {
    Vmm {
        name: identity.name.clone(),
        version: identity.version.clone(),
        accelerator: identity.accelerator.clone(),
        accelerator_reason: identity.accelerator_reason.clone(),
    }
}

/// A VMM of this host.
pub(super) fn host_vmm(vmm: &dyn host::Vmm, default: bool) -> HostVmm {
    let (identity, can) = (vmm.identity(), vmm.capabilities());
    HostVmm {
        name: identity.name.clone(),
        default,
        version: identity.version.clone(),
        machine: identity.machine.clone(),
        cpu: identity.cpu.clone(),
        cpu_features: identity
            .cpu_features
            .iter()
            .map(ToOwned::to_owned)
            .collect(),
        accelerator: identity.accelerator.clone(),
        accelerator_reason: identity.accelerator_reason.clone(),
        abilities: VmmAbilities {
            live_save: can.live_save,
            differential_save: can.differential_save,
            lazy_restore: can.lazy_restore,
            disk_switch: can.disk_switch,
            resize: can.resize,
            max_vcpus: can.max_vcpus,
        },
    }
}

/// A template. `unusable` says what it lacks, if something.
pub(super) fn template(
    template: &v1::Template,
    unusable: Option<String>,
    usage: Option<&Usage>,
) -> Template {
    let (allocated_bytes, shared_bytes) = sizes(usage);
    let (kind, base, captured) = match &template.content {
        v1::TemplateContent::Image { base } => (TemplateKind::Image, Some(base.to_string()), None),
        v1::TemplateContent::Snapshot { capture } => (TemplateKind::Snapshot, None, Some(capture)),
    };
    Template {
        template_id: template.id.to_string(),
        names: vec![template.name.to_string()],
        team: template.team.to_string(),
        public: template.public,
        kind,
        created_at: template.created_at,
        cpu_count: template.geometry.vcpus,
        memory_mb: template.geometry.mem_mib,
        disk_size_mb: template.disk_size.0 >> 20,
        base,
        kernel: Some(template.kernel.to_string()),
        vmm: captured.map(|capture| vmm(&capture.machine.vmm)),
        sandbox_id: captured.map(|capture| capture.sandbox.to_string()),
        allocated_bytes,
        shared_bytes,
        parts: parts(usage),
        warm: template.warm,
        waiting: 0,
        unusable,
        origin: Some(template.source.clone()),
    }
}

/// A team, with what it has and how many keys.
pub(super) fn team(team: &KeptTeam, used: Holdings, keys: u64) -> Team {
    Team {
        name: team.name.to_string(),
        created_at: team.created_at,
        limits: team.limits,
        used: TeamUse {
            sandboxes: used.sandboxes,
            running: used.running,
            cpu_count: used.vcpus,
            memory_mb: used.mem_mib,
            disk_size_mb: used.disk_mib,
        },
        keys,
    }
}

pub(super) fn quota(limits: &TeamLimits) -> Quota {
    Quota {
        sandboxes: limits.sandboxes,
        running: limits.running,
        vcpus: limits.cpu_count,
        mem_mib: limits.memory_mb,
        disk_mib: limits.disk_size_mb,
    }
}

pub(super) fn outcome(outcome: icebox_engine::Outcome) -> Outcome {
    match outcome {
        icebox_engine::Outcome::Changed => Outcome::Changed,
        icebox_engine::Outcome::AlreadyThere => Outcome::AlreadyThere,
    }
}

pub(super) fn event(event: icebox_engine::Event) -> Event {
    Event {
        sequence: event.seq,
        time: event.at,
        event: event.kind,
        sandbox_id: event.sandbox.map(Into::into),
        detail: event.detail,
        steps: step_times(event.steps),
    }
}

fn step_times(steps: Vec<(String, u64)>) -> Vec<StepTime> {
    let steps = steps.into_iter();
    steps
        .map(|(step, micros)| StepTime { step, micros })
        .collect()
}

fn last_verb(verb: &icebox_engine::LastVerb) -> LastVerb {
    LastVerb {
        verb: verb.verb.clone(),
        began_at: verb.began_at,
        micros: verb.micros,
        error: verb.error.clone(),
        steps: step_times(verb.steps.clone()),
    }
}

pub(super) fn garbage(plan: &Plan, dry_run: bool) -> GcReport {
    GcReport {
        dry_run,
        garbage: plan
            .objects
            .iter()
            .map(|(object, size)| Garbage {
                object: object.to_string(),
                allocated_bytes: Some(size.0),
            })
            .collect(),
    }
}
