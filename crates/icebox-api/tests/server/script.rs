//! A daemon that is only a script: one sandbox, whose ports are the test's own listeners.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use icebox_api::access::{Caller, Premises};
use icebox_api::types::*;
use icebox_api::{ApiError, BoxStream, Daemon, ErrorCode, Pass, Route};
use tokio::sync::{Notify, watch};

use crate::served::PATIENCE;

pub(crate) const ID: &str = "iaaaaaaaaaaaaaaaaaaaa";
pub(crate) const KEY: &str = "e2b_0123456789";

/// One running sandbox named `web`, whose ports are the test's own listeners.
pub(crate) struct Script {
    pub(crate) pausing: Notify,
    /// Pause waits for this, so that a test can look in between.
    pub(crate) may_pause: Notify,
    pub(crate) pauses_done: Mutex<u32>,
    pub(crate) paused: Notify,
    pub(crate) running: watch::Sender<bool>,
    /// Where the sandbox's ports are.
    address: Ipv4Addr,
    /// Passes that are held.
    pub(crate) held: watch::Sender<u32>,
    /// How often one was said to be of a stream.
    pub(crate) streams: watch::Sender<u32>,
    /// How often somebody came who would have woken it.
    pub(crate) woken: watch::Sender<u32>,
    /// Who it was shown to last.
    pub(crate) caller: Mutex<String>,
}

/// Counted for as long as it is held.
struct Held {
    running: watch::Sender<bool>,
    held: watch::Sender<u32>,
    streams: watch::Sender<u32>,
}

#[async_trait]
impl Pass for Held {
    async fn revoked(&self) {
        let mut running = self.running.subscribe();
        running.wait_for(|running| !running).await.ok();
    }

    fn becomes_stream(&self) {
        self.streams.send_modify(|streams| *streams += 1);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held.send_modify(|held| *held -= 1);
    }
}

impl Script {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            pausing: Notify::new(),
            may_pause: Notify::new(),
            pauses_done: Mutex::new(0),
            paused: Notify::new(),
            running: watch::channel(true).0,
            address: Ipv4Addr::LOCALHOST,
            held: watch::channel(0).0,
            streams: watch::channel(0).0,
            woken: watch::channel(0).0,
            caller: Mutex::default(),
        })
    }

    /// Waits until this many passes are held.
    pub(crate) async fn holds(&self, passes: u32) {
        let mut held = self.held.subscribe();
        let held = held.wait_for(|held| *held == passes);
        let held = tokio::time::timeout(PATIENCE, held).await;
        held.expect("in time").expect("the script lives");
    }

    /// With ports at an address of their own, so that the agent's well-known one is free.
    pub(crate) fn at(address: Ipv4Addr) -> Arc<Self> {
        let mut script = Self::new();
        Arc::get_mut(&mut script)
            .expect("nobody else has it")
            .address = address;
        script
    }

    fn sandbox(&self) -> SandboxDetail {
        SandboxDetail {
            listed: ListedSandbox {
                sandbox_id: ID.to_owned(),
                template_id: "taaaaaaaaaaaaaaaaaaaa".to_owned(),
                client_id: "icebox".to_owned(),
                alias: None,
                name: Some("web".to_owned()),
                team: "default".to_owned(),
                started_at: "2026-01-01T00:00:00Z".parse().expect("a time"),
                end_at: None,
                cpu_count: 1,
                memory_mb: 512,
                disk_size_mb: 1024,
                state: if *self.running.borrow() {
                    State::Running
                } else {
                    State::Paused
                },
                verb: None,
                stalled: None,
                unanswering: None,
                metadata: BTreeMap::new(),
                envd_version: icebox_api::ENVD_VERSION.to_owned(),
                address: Some(Ipv4Addr::LOCALHOST),
            },
            envd_access_token: Some("the-token".to_owned()),
            traffic_access_token: None,
            pause_mode: None,
            domain: None,
            allow_internet_access: false,
            volume_driver: "qcow2".to_owned(),
            vmm: None,
            kernel: None,
            pid: None,
            limits: None,
            allocated_bytes: None,
            shared_bytes: None,
            parts: Vec::new(),
            generations: Vec::new(),
            unusable: Vec::new(),
            branches: Vec::new(),
            holds: Vec::new(),
            lifecycle: None,
            last_exit: None,
            last_verb: None,
            history: None,
            disk_lost: None,
            broken: None,
        }
    }

    fn measured(&self, space: bool) -> SandboxDetail {
        SandboxDetail {
            allocated_bytes: space.then_some(4096),
            ..self.sandbox()
        }
    }

    fn known(&self, reference: &str, exact: bool) -> Result<(), ApiError> {
        if reference == ID || (!exact && (reference == "web" || ID.starts_with(reference))) {
            Ok(())
        } else {
            Err(ApiError::new(
                ErrorCode::NotFound,
                format!("sandbox {reference:?} does not exist"),
            ))
        }
    }
}

fn never<T>() -> Result<T, ApiError> {
    Err(ApiError::new(ErrorCode::Unsupported, "not in this script"))
}

#[async_trait]
impl Daemon for Script {
    async fn create(&self, new: NewSandbox) -> Result<SandboxDetail, ApiError> {
        if new.template_id == "base" {
            Ok(self.sandbox())
        } else {
            let message = format!("template {:?} does not exist", new.template_id);
            Err(ApiError::new(ErrorCode::NotFound, message).hint("see `icebox template ls`"))
        }
    }
    async fn list(&self, space: bool) -> Result<Vec<SandboxDetail>, ApiError> {
        Ok(vec![self.measured(space)])
    }
    async fn inspect(&self, sandbox: &str, space: bool) -> Result<SandboxDetail, ApiError> {
        self.known(sandbox, false)?;
        Ok(self.measured(space))
    }
    async fn pause(&self, sandbox: &str) -> Result<VerbResult, ApiError> {
        self.known(sandbox, false)?;
        let outcome = if *self.running.borrow() {
            self.pausing.notify_one();
            self.may_pause.notified().await;
            self.running.send_replace(false);
            Outcome::Changed
        } else {
            Outcome::AlreadyThere
        };
        *self.pauses_done.lock().expect("not poisoned") += 1;
        self.paused.notify_one();
        Ok(VerbResult {
            outcome,
            sandbox: self.sandbox(),
            hint: None,
        })
    }
    async fn resume(&self, _: &str, _: ResumeRequest) -> Result<VerbResult, ApiError> {
        never()
    }
    async fn stop(&self, _: &str) -> Result<VerbResult, ApiError> {
        panic!("a bug")
    }
    async fn start(&self, _: &str) -> Result<VerbResult, ApiError> {
        never()
    }
    async fn checkpoint(&self, _: &str) -> Result<VerbResult, ApiError> {
        never()
    }
    async fn rollback(&self, _: &str, _: RollbackRequest) -> Result<VerbResult, ApiError> {
        never()
    }
    async fn history(&self, _: &str) -> Result<History, ApiError> {
        never()
    }
    async fn forget(&self, sandbox: &str, point: &str) -> Result<(), ApiError> {
        self.known(sandbox, false)?;
        match point {
            "disk-7" => Ok(()),
            _ => Err(ApiError::new(ErrorCode::InUse, "it is in use")),
        }
    }
    async fn snapshot(&self, _: &str, _: NewSnapshot) -> Result<Snapshot, ApiError> {
        never()
    }
    async fn fork(&self, _: &str, new: NewFork) -> Result<Vec<Forked>, ApiError> {
        let refusal = ApiError::new(ErrorCode::Exhausted, "no slot is left");
        Ok((0..new.count)
            .map(|n| match n {
                0 => Forked::Sandbox(Box::new(self.sandbox())),
                _ => Forked::Error(refusal.body().clone()),
            })
            .collect())
    }
    async fn flatten(&self, _: &str, _: NewSnapshot) -> Result<Template, ApiError> {
        never()
    }
    async fn destroy(&self, sandbox: &str) -> Result<String, ApiError> {
        self.known(sandbox, false)?;
        Ok(ID.to_owned())
    }
    async fn set_lifetime(
        &self,
        sandbox: &str,
        change: ChangeLifetime,
    ) -> Result<SandboxDetail, ApiError> {
        self.known(sandbox, false)?;
        let lifecycle = Lifecycle {
            auto_resume: change.auto_resume.unwrap_or_default().enabled,
            on_timeout: change.on_timeout.unwrap_or(OnTimeout::Kill),
            timeout: None,
            idle_timeout: match change.idle_timeout {
                Some(Limit::Seconds(seconds)) => u64::try_from(seconds).ok(),
                _ => None,
            },
        };
        Ok(SandboxDetail {
            lifecycle: Some(lifecycle),
            ..self.sandbox()
        })
    }
    async fn metrics(&self, _: &str, range: MetricsRange) -> Result<Vec<SandboxMetric>, ApiError> {
        let at = range.start.unwrap_or_default();
        Ok(vec![SandboxMetric {
            timestamp: jiff::Timestamp::from_second(at).expect("a time"),
            timestamp_unix: at,
            seconds: if range.resolution == Some(Resolution::Minute) {
                60
            } else {
                1
            },
            cpu_count: 1,
            cpu_used_pct: 12.5,
            mem_used: 1,
            mem_total: 2,
            mem_cache: 0,
            disk_used: 3,
            disk_total: 4,
            disk_read_rate: 5,
            disk_write_rate: 6,
            network_in_rate: 7,
            network_out_rate: 8,
        }])
    }
    async fn drain(&self) -> Result<DrainReport, ApiError> {
        Ok(DrainReport {
            paused: vec!["web".to_owned()],
            failed: Vec::new(),
        })
    }
    async fn console(&self, _: &str) -> Result<BoxStream<std::io::Result<Bytes>>, ApiError> {
        Ok(stream::iter(["boot ", "done"].map(|text| Ok(Bytes::from(text)))).boxed())
    }
    async fn route(&self, sandbox: &str, exact: bool, wake: bool) -> Result<Route, ApiError> {
        self.known(sandbox, exact)?;
        self.woken.send_modify(|woken| *woken += u32::from(wake));
        self.held.send_modify(|held| *held += 1);
        Ok(Route {
            sandbox_id: ID.to_owned(),
            address: self.address,
            token: "the-token".to_owned(),
            agent_is_open: false,
            traffic_token: None,
            pass: Arc::new(Held {
                running: self.running.clone(),
                held: self.held.clone(),
                streams: self.streams.clone(),
            }),
        })
    }
    async fn signer(&self, has: &(dyn for<'a> Fn(&'a str) -> bool + Sync)) -> Option<String> {
        has("the-token").then(|| ID.to_owned())
    }
    async fn templates(&self) -> Result<Vec<Template>, ApiError> {
        Ok(Vec::new())
    }
    async fn template(&self, template: &str) -> Result<Template, ApiError> {
        let message = format!("template {template:?} does not exist");
        Err(ApiError::new(ErrorCode::NotFound, message))
    }
    async fn template_alias(&self, name: &str) -> Result<TemplateAlias, ApiError> {
        let template_id = self.template(name).await?.template_id;
        Ok(TemplateAlias {
            template_id,
            public: false,
        })
    }
    async fn publish_template(&self, _: &str, _: bool) -> Result<Template, ApiError> {
        never()
    }
    async fn warm_template(&self, _: &str, _: u16) -> Result<Template, ApiError> {
        never()
    }
    async fn remove_template(&self, _: &str) -> Result<String, ApiError> {
        never()
    }
    async fn build(&self, _: NewBuild) -> Result<BoxStream<BuildEvent>, ApiError> {
        never()
    }
    async fn request_build(&self, _: NewRecipe) -> Result<RequestedBuild, ApiError> {
        never()
    }
    async fn start_build(&self, _: &str, _: StartBuild) -> Result<(), ApiError> {
        Ok(())
    }
    async fn build_status(&self, build: &str, _: usize, _: usize) -> Result<BuildStatus, ApiError> {
        Ok(BuildStatus {
            logs: Vec::new(),
            log_entries: Vec::new(),
            template_id: "t1".to_owned(),
            build_id: build.to_owned(),
            status: BuildState::Waiting,
            reason: None,
        })
    }
    async fn admit_files(&self, _: &str) -> Result<Option<String>, ApiError> {
        Ok(Some("the-way".to_owned()))
    }
    async fn put_files(
        &self,
        way: &str,
        content: BoxStream<std::io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        let content: Vec<_> = content.collect().await;
        match way {
            "the-way" if !content.is_empty() => Ok(()),
            _ => Err(ApiError::new(
                ErrorCode::NotFound,
                "nothing is to be put here",
            )),
        }
    }
    async fn template_tags(&self, _: &str) -> Result<Vec<TemplateTag>, ApiError> {
        never()
    }
    async fn assign_tags(&self, _: AssignTags) -> Result<AssignedTags, ApiError> {
        never()
    }
    async fn remove_tags(&self, _: RemoveTags) -> Result<(), ApiError> {
        never()
    }
    async fn vmms(&self) -> Result<Vec<HostVmm>, ApiError> {
        Ok(Vec::new())
    }
    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        Ok(Vec::new())
    }
    async fn import_kernel(&self, _: NewKernel) -> Result<BoxStream<KernelEvent>, ApiError> {
        never()
    }
    async fn events(&self, since: Option<u64>, follow: bool) -> Result<BoxStream<Event>, ApiError> {
        let first = since.unwrap_or(0) + 1;
        let events = stream::iter((first..first + 3).map(|sequence| Event {
            sequence,
            time: "2026-01-01T00:00:00Z".parse().expect("a time"),
            event: "created".to_owned(),
            sandbox_id: Some(ID.to_owned()),
            detail: String::new(),
            steps: Vec::new(),
        }));
        Ok(match follow {
            true => events.chain(stream::pending()).boxed(),
            false => events.boxed(),
        })
    }
    async fn stats(&self) -> Result<Stats, ApiError> {
        Ok(Stats {
            unneeded_bytes: 7,
            ..Stats::default()
        })
    }
    async fn doctor(&self) -> Result<Report, ApiError> {
        Ok(Report::default())
    }
    async fn gc(&self, request: GcRequest) -> Result<GcReport, ApiError> {
        Ok(GcReport {
            dry_run: request.dry_run,
            garbage: Vec::new(),
        })
    }
    async fn teams(&self) -> Result<Vec<Team>, ApiError> {
        Ok(Vec::new())
    }
    async fn create_team(&self, _: NewTeam) -> Result<Team, ApiError> {
        never()
    }
    async fn change_team(&self, _: &str, _: ChangeTeam) -> Result<Team, ApiError> {
        let message = "team acme may have 2 sandboxes";
        Err(ApiError::new(ErrorCode::LimitReached, message))
    }
    async fn remove_team(&self, _: &str) -> Result<(), ApiError> {
        never()
    }
    async fn keys(&self) -> Result<Vec<Key>, ApiError> {
        Ok(Vec::new())
    }
    async fn create_key(&self, _: NewKey) -> Result<MadeKey, ApiError> {
        never()
    }
    async fn remove_key(&self, _: &str) -> Result<(), ApiError> {
        never()
    }
    /// Who the script was shown to last.
    async fn audit(&self, _: AuditRange) -> Result<Vec<AuditEntry>, ApiError> {
        Ok(vec![AuditEntry {
            sequence: 1,
            time: "2026-01-01T00:00:00Z".parse().expect("a time"),
            actor: self.caller.lock().expect("not poisoned").clone(),
            team: None,
            verb: "test".to_owned(),
            target: String::new(),
            outcome: None,
        }])
    }
}

/// Everybody sees the same script.
pub(crate) struct House(pub(crate) Arc<Script>);

impl Premises for House {
    fn caller_of_key(&self, presented: &[u8]) -> Option<Caller> {
        (presented == KEY.as_bytes()).then(|| Caller::Key {
            id: "k1".to_owned(),
            team: "acme".to_owned(),
        })
    }

    fn require_team(&self, team: &str) -> Result<(), ApiError> {
        match team {
            "acme" => Ok(()),
            _ => Err(ApiError::new(ErrorCode::NotFound, "no such team")),
        }
    }

    fn seen_by(&self, caller: &Caller) -> Arc<dyn Daemon> {
        let said = format!("{} for {}", caller.actor(), caller.team().unwrap_or("-"));
        *self.0.caller.lock().expect("not poisoned") = said;
        self.0.clone()
    }
}
