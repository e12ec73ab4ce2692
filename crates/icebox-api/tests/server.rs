//! The routes, the proxy and the client against a daemon that is only a test's script.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use icebox_api::access::{Caller, Premises};
use icebox_api::client::{Client, ClientError};
use icebox_api::server::{Edge, Limits, Server};
use icebox_api::types::*;
use icebox_api::{ApiError, BoxStream, Daemon, ErrorCode, Pass, Route};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, watch};

const ID: &str = "iaaaaaaaaaaaaaaaaaaaa";
const KEY: &str = "e2b_0123456789";
/// For what must happen, and soon.
const PATIENCE: Duration = Duration::from_secs(10);
/// For what must not happen, and would at once.
const DOUBT: Duration = Duration::from_millis(100);

/// One running sandbox named `web`, whose ports are the test's own listeners.
struct Script {
    pausing: Notify,
    /// Pause waits for this, so that a test can look in between.
    may_pause: Notify,
    pauses_done: Mutex<u32>,
    paused: Notify,
    running: watch::Sender<bool>,
    /// Where the sandbox's ports are.
    address: Ipv4Addr,
    /// Passes that are held.
    held: watch::Sender<u32>,
    /// Who it was shown to last.
    caller: Mutex<String>,
}

/// Counts a pass for as long as it is held.
struct Held(watch::Sender<u32>);

impl Held {
    fn new(count: &watch::Sender<u32>) -> Self {
        count.send_modify(|held| *held += 1);
        Self(count.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

impl Script {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pausing: Notify::new(),
            may_pause: Notify::new(),
            pauses_done: Mutex::new(0),
            paused: Notify::new(),
            running: watch::channel(true).0,
            address: Ipv4Addr::LOCALHOST,
            held: watch::channel(0).0,
            caller: Mutex::default(),
        })
    }

    /// Waits until this many passes are held.
    async fn holds(&self, passes: u32) {
        let mut held = self.held.subscribe();
        let held = held.wait_for(|held| *held == passes);
        let held = tokio::time::timeout(PATIENCE, held).await;
        held.expect("in time").expect("the script lives");
    }

    /// With ports at an address of their own, so that the agent's well-known one is free.
    fn at(address: Ipv4Addr) -> Arc<Self> {
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
    async fn route(&self, sandbox: &str, exact: bool) -> Result<Route, ApiError> {
        self.known(sandbox, exact)?;
        let mut running = self.running.subscribe();
        Ok(Route {
            sandbox_id: ID.to_owned(),
            address: self.address,
            token: "the-token".to_owned(),
            agent_is_open: false,
            traffic_token: None,
            pass: Pass::new(
                async move {
                    running.wait_for(|running| !running).await.ok();
                },
                Held::new(&self.held),
            ),
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
struct House(Arc<Script>);

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

/// A daemon on a Unix socket and on TCP.
struct Served {
    directory: tempfile::TempDir,
    public: std::net::SocketAddr,
    inside: Server,
    outside: Server,
}

impl Served {
    async fn new(script: &Arc<Script>) -> Self {
        Self::within(Limits::default(), script).await
    }

    async fn within(limits: Limits, script: &Arc<Script>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let unix = UnixListener::bind(directory.path().join("socket")).expect("bind");
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let public = tcp.local_addr().expect("an address");
        let house = Arc::new(House(script.clone()));
        let inside = Server::new(house.clone(), Edge::Admin).with_limits(limits);
        let outside = Server::new(house, Edge::Public { tls: false }).with_limits(limits);
        inside.listen_unix(unix);
        outside.listen(tcp);
        Self {
            directory,
            public,
            inside,
            outside,
        }
    }

    /// A connection from outside that stays.
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.public).await.expect("connect")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Sends `request` with plain line ends to the public edge and returns everything that comes back.
    async fn ask(&self, request: &str) -> String {
        let stream = TcpStream::connect(self.public).await.expect("connect");
        exchange(stream, request).await
    }

    async fn ask_admin(&self, request: &str) -> String {
        let stream = UnixStream::connect(self.socket()).await.expect("connect");
        exchange(stream, request).await
    }
}

async fn exchange(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    request: &str,
) -> String {
    let request = format!(
        "{}\r\nconnection: close\r\n\r\n",
        request.replace('\n', "\r\n")
    );
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    answer
}

/// Sends a request on a connection that stays.
async fn send(stream: &mut (impl tokio::io::AsyncWrite + Unpin), request: &str) {
    let request = format!("{}\r\n\r\n", request.replace('\n', "\r\n"));
    stream.write_all(request.as_bytes()).await.expect("write");
}

/// Reads up to `end`.
async fn read_until(stream: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !read.ends_with(end.as_bytes()) {
            read.push(stream.read_u8().await.expect("more"));
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("in time");
    String::from_utf8(read).expect("text")
}

/// What still comes before the other side ends, however it does.
async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut rest = Vec::new();
    let reading = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest));
    reading.await.expect("in time").ok();
    String::from_utf8(rest).expect("text")
}

fn status(answer: &str) -> &str {
    answer.get(9..12).unwrap_or("no status")
}

/// A port inside the sandbox: answers every connection's first request head with `answer`, and reports the head.
async fn guest_port(answer: &'static str) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    guest_port_at("127.0.0.1:0", answer).await
}

async fn guest_port_at(
    address: &str,
    answer: &'static str,
) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind(address).await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    let (heads, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let heads = heads.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.expect("a request head"));
                }
                heads.send(String::from_utf8_lossy(&head).into_owned()).ok();
                stream.write_all(answer.as_bytes()).await.expect("answer");
                // Echo what follows, until the other side has had enough.
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
        }
    });
    (port, seen)
}

#[tokio::test]
async fn statuses_are_the_ones_sdks_need() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let key = format!("x-api-key: {KEY}");
    for (request, wanted) in [
        ("GET /health HTTP/1.1\nhost: h", "204"),
        ("GET /v2/sandboxes HTTP/1.1\nhost: h", "200"),
        ("POST /v2/sandboxes HTTP/1.1\nhost: h", "201"),
        ("POST /sandboxes HTTP/1.1\nhost: h", "201"),
        ("GET /sandboxes/nonexistingsandbox HTTP/1.1\nhost: h", "404"),
        ("DELETE /sandboxes/web HTTP/1.1\nhost: h", "204"),
        ("DELETE /sandboxes/nothing HTTP/1.1\nhost: h", "404"),
        ("POST /sandboxes/web/stop HTTP/1.1\nhost: h", "500"),
        ("GET /templates/team%2Fsnap%3Av1 HTTP/1.1\nhost: h", "404"),
        ("GET /nothing HTTP/1.1\nhost: h", "404"),
        ("PATCH /sandboxes HTTP/1.1\nhost: h", "405"),
    ] {
        let answer = served.ask(&format!("{request}\n{key}")).await;
        assert_eq!(status(&answer), wanted, "{request}\n{answer}");
        if !wanted.starts_with('2') {
            let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
            let body: icebox_api::ErrorBody = serde_json::from_str(body).expect("our form");
            assert_eq!(body.code.to_string(), wanted, "the body repeats the status");
        }
    }
}

#[tokio::test]
async fn a_second_pause_is_a_conflict_for_sdks_and_a_success_for_us() {
    let script = Script::new();
    script.running.send_replace(false);
    let served = Served::new(&script).await;
    let request = format!("POST /sandboxes/{ID}/pause HTTP/1.1\nhost: h\nx-api-key: {KEY}");
    assert_eq!(status(&served.ask(&request).await), "409");
    let result = served.client().pause("web").await.expect("no error");
    assert_eq!(result.outcome, Outcome::AlreadyThere);
}

#[tokio::test]
async fn tcp_needs_the_key_and_the_socket_none() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for headers in [
        "",
        "\nx-api-key: e2b_00",
        "\nx-api-key:",
        "\nauthorization: x",
    ] {
        let answer = served
            .ask(&format!("GET /sandboxes HTTP/1.1\nhost: h{headers}"))
            .await;
        assert_eq!(status(&answer), "401", "{headers:?}");
        assert!(answer.contains("hint"));
    }
    let answer = served.ask_admin("GET /sandboxes HTTP/1.1\nhost: h").await;
    assert_eq!(status(&answer), "200");
}

#[tokio::test]
async fn the_key_does_not_read_files_of_the_host() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for (path, body) in [
        ("/builds", r#"{"name":"x","source":{"directory":"/root"}}"#),
        ("/builds", r#"{"name":"x","source":{"image":"/dev/sda"}}"#),
        ("/kernels", r#"{"source":{"file":{"path":"/etc/shadow"}}}"#),
    ] {
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\nhost: h\nx-api-key: {KEY}\nconnection: close\ncontent-type: application/json\ncontent-length: {length}\n\n{body}"
        );
        let answer = served.ask(&request).await;
        assert_eq!(status(&answer), "403", "{path} {body}: {answer}");
    }
}

#[tokio::test]
async fn what_teams_share_is_the_administrators() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for request in [
        "GET /teams",
        "POST /teams",
        "DELETE /teams/acme",
        "GET /api-keys",
        "POST /api-keys",
        "DELETE /api-keys/k1",
        "GET /audit",
        "GET /stats",
        "GET /doctor",
        "POST /gc",
        "POST /drain",
        "POST /kernels",
    ] {
        let answer = served
            .ask(&format!("{request} HTTP/1.1\nhost: h\nx-api-key: {KEY}"))
            .await;
        assert!(
            matches!(status(&answer), "403" | "400"),
            "{request}: {answer}"
        );
        assert_ne!(
            status(
                &served
                    .ask_admin(&format!("{request} HTTP/1.1\nhost: h"))
                    .await
            ),
            "403"
        );
    }
}

#[tokio::test]
async fn the_kernel_says_who_has_the_socket_and_they_say_for_whom_they_act() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let uid = std::fs::metadata(served.socket()).expect("it is there");
    let uid = std::os::unix::fs::MetadataExt::uid(&uid);
    let seen_by = async |client: Client| {
        let entries = client.audit(AuditRange::default()).await.expect("entries");
        entries[0].actor.clone()
    };
    assert_eq!(seen_by(served.client()).await, format!("local:{uid} for -"));
    let for_team = |team: &str| served.client().for_team(Some(team.to_owned()));
    assert_eq!(
        seen_by(for_team("acme")).await,
        format!("local:{uid} for acme")
    );
    let refused = for_team("nobody").list(false).await.expect_err("no team");
    assert_eq!(refused.code(), Some(ErrorCode::NotFound));
    // From outside nobody chooses.
    let request = format!("GET /sandboxes HTTP/1.1\nhost: h\nx-api-key: {KEY}\nicebox-team: other");
    assert_eq!(status(&served.ask(&request).await), "200");
    assert_eq!(
        *script.caller.lock().expect("not poisoned"),
        "key:k1 for acme"
    );
}

#[tokio::test]
async fn a_teams_limit_is_429_and_not_to_be_tried_again() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let answer = served
        .ask_admin("PATCH /teams/acme HTTP/1.1\nhost: h")
        .await;
    assert_eq!(status(&answer), "429", "{answer}");
    assert!(answer.contains("should-retry: false\r\n"), "{answer}");
    assert!(!answer.contains("retry-after"), "{answer}");
}

#[tokio::test]
async fn inv_20_a_verb_goes_on_when_its_client_has_gone() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let mut stream = UnixStream::connect(served.socket()).await.expect("connect");
    let head = format!("POST /sandboxes/{ID}/pause HTTP/1.1\r\nhost: h\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("write");
    script.pausing.notified().await;
    drop(stream);
    // A round trip on another connection: the server has seen the first one end.
    served.client().version().await.expect("an answer");
    script.may_pause.notify_one();
    script.paused.notified().await;
    assert_eq!(*script.pauses_done.lock().expect("not poisoned"), 1);
}

#[tokio::test]
async fn the_client_understands_every_form_of_answer() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let client = served.client();
    let sizes = |list: Vec<SandboxDetail>| {
        let sizes = list.into_iter().map(|one| one.allocated_bytes);
        sizes.collect::<Vec<_>>()
    };
    let list = client.list(false).await.expect("a list");
    assert_eq!(sizes(list), [None], "nobody asked for sizes");
    let list = client.list(true).await.expect("a list");
    assert_eq!(sizes(list), [Some(4096)]);
    let one = client.inspect("web", true).await.expect("it is there");
    assert_eq!(one.allocated_bytes, Some(4096));
    assert_eq!(client.stats().await.expect("sums").unneeded_bytes, 7);
    let refused = client
        .template("../x/?#")
        .await
        .expect_err("does not exist");
    assert_eq!(refused.code(), Some(ErrorCode::NotFound));
    assert_eq!(
        refused.to_string(),
        r#"template "../x/?#" does not exist"#,
        "what was typed stays one path segment"
    );
    let forks = client
        .fork(
            "web",
            &NewFork {
                count: 2,
                timeout: None,
            },
        )
        .await
        .expect("forks");
    assert!(matches!(forks[..], [Forked::Sandbox(_), Forked::Error(_)]));
    let events: Vec<_> = client
        .events(Some(7), false)
        .await
        .expect("events")
        .map(|event| event.expect("an event").sequence)
        .collect()
        .await;
    assert_eq!(events, [8, 9, 10]);
    let console: Vec<_> = client
        .console("web")
        .await
        .expect("a console")
        .map(|piece| piece.expect("a piece"))
        .collect()
        .await;
    assert_eq!(console.concat(), b"boot done");
    assert!(matches!(
        Client::new("/nonexistent/socket").list(false).await,
        Err(ClientError::Connect { .. })
    ));
}

#[tokio::test]
async fn a_panicking_verb_is_an_error_and_not_a_hung_client() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let error = served.client().stop("web").await.expect_err("it panics");
    assert_eq!(error.code(), Some(ErrorCode::Internal));
}

#[tokio::test]
async fn the_proxy_carries_requests_to_a_port_by_header_and_by_host() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, mut heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    for routing in [
        format!("host: localhost\ne2b-sandbox-id: {ID}\ne2b-sandbox-port: {port}"),
        format!("host: localhost\ne2b-sandbox-id: {ID}-6532622b\ne2b-sandbox-port: {port}"),
        format!("host: {port}-{ID}.example.org:8443"),
    ] {
        let answer = served
            .ask(&format!(
                "GET /a%2Fb?c=d HTTP/1.1\n{routing}\nx-api-key: {KEY}"
            ))
            .await;
        assert_eq!(status(&answer), "200", "{routing}\n{answer}");
        assert!(answer.ends_with("hi"), "{answer}");
        let head = heads.recv().await.expect("the guest was asked");
        assert!(head.starts_with("GET /a%2Fb?c=d HTTP/1.1\r\n"), "{head}");
        assert!(!head.contains(KEY), "the key is not the guest's business");
        assert!(
            !head.contains("the-token"),
            "from outside no token is added"
        );
    }
}

#[tokio::test]
async fn the_agents_token_is_added_for_who_has_the_socket_and_for_nobody_else() {
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 99, high, low);
    let script = Script::at(address);
    let served = Served::new(&script).await;
    let (_, mut heads) = guest_port_at(
        &format!("{address}:49983"),
        "HTTP/1.1 204 No Content\r\n\r\n",
    )
    .await;
    let request =
        format!("GET /metrics HTTP/1.1\nhost: h\ne2b-sandbox-id: {ID}\ne2b-sandbox-port: 49983");
    served.ask_admin(&request).await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(head.contains("x-access-token: the-token\r\n"), "{head}");
    served.ask(&request).await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(!head.contains("the-token"), "{head}");
    served
        .ask(&format!("{request}\nx-access-token: mine"))
        .await;
    let head = heads.recv().await.expect("the agent was asked");
    assert!(head.contains("x-access-token: mine\r\n"), "{head}");
}

#[tokio::test]
async fn inv_43_tokens_are_told_where_the_contract_has_them_and_not_on_the_socket() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for (request, told) in [
        (format!("GET /sandboxes/{ID} HTTP/1.1\nhost: h"), true),
        ("POST /sandboxes HTTP/1.1\nhost: h".to_owned(), true),
        ("GET /v2/sandboxes HTTP/1.1\nhost: h".to_owned(), false),
    ] {
        let answer = served.ask(&format!("{request}\nx-api-key: {KEY}")).await;
        assert_eq!(answer.contains("the-token"), told, "{answer}");
        let answer = served.ask_admin(&request).await;
        assert!(!answer.contains("the-token"), "{answer}");
    }
}

#[tokio::test]
async fn inv_42_only_a_full_id_opens_ports_from_outside() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port("HTTP/1.1 204 No Content\r\n\r\n").await;
    for name in ["web", "iaaaa", "inothing"] {
        let answer = served
            .ask(&format!(
                "GET / HTTP/1.1\nhost: h\ne2b-sandbox-id: {name}\ne2b-sandbox-port: {port}"
            ))
            .await;
        assert_eq!(status(&answer), "502");
        let expected =
            format!(r#"{{"sandboxId":"{name}","message":"The sandbox was not found","code":502}}"#);
        assert!(answer.ends_with(&expected), "{answer}");
    }
    let answer = served
        .ask_admin(&format!(
            "GET / HTTP/1.1\nhost: h\ne2b-sandbox-id: web\ne2b-sandbox-port: {port}"
        ))
        .await;
    assert_eq!(status(&answer), "204", "who has the socket may use names");
}

#[tokio::test]
async fn a_closed_port_is_told_in_e2bs_words() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let unused = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = unused.local_addr().expect("an address").port();
    drop(unused);
    let answer = served
        .ask(&format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"))
        .await;
    assert_eq!(status(&answer), "502");
    let expected = format!(
        r#"{{"sandboxId":"{ID}","message":"The sandbox is running but port is not open","port":{port},"code":502}}"#
    );
    assert!(answer.ends_with(&expected), "{answer}");
}

#[tokio::test]
async fn inv_42_host_only_paths_of_the_agent_are_not_there() {
    let script = Script::new();
    let served = Served::new(&script).await;
    for path in ["/init", "/prepare", "/%69nit", "//init/"] {
        let request = format!("POST {path} HTTP/1.1\nhost: 49983-{ID}.example.org");
        assert_eq!(status(&served.ask(&request).await), "404", "{path}");
        assert_eq!(status(&served.ask_admin(&request).await), "404", "{path}");
    }
}

#[tokio::test]
async fn a_stream_is_cut_without_an_end_when_its_sandbox_goes() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) =
        guest_port("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
    let mut stream = TcpStream::connect(served.public).await.expect("connect");
    let head = format!("GET / HTTP/1.1\r\nhost: {port}-{ID}.example.org\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello\r\n") {
        answer.push(stream.read_u8().await.expect("the stream lives"));
    }
    script.running.send_replace(false);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
    assert_eq!(
        rest, b"",
        "no last chunk: the client must see a broken stream"
    );
}

#[tokio::test]
async fn an_upgraded_connection_is_carried_both_ways_and_cut() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, mut heads) = guest_port(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    )
    .await;
    let mut stream = TcpStream::connect(served.public).await.expect("connect");
    let head = format!(
        "GET / HTTP/1.1\r\nhost: {port}-{ID}.example.org\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("write");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("an answer"));
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert_eq!(status(&answer), "101", "{answer}");
    assert!(answer.contains("upgrade: echo"), "{answer}");
    let head = heads.recv().await.expect("the guest was asked");
    assert!(head.contains("upgrade: echo"), "{head}");
    stream.write_all(b"ping").await.expect("write");
    let mut echoed = [0; 4];
    stream.read_exact(&mut echoed).await.expect("the echo");
    assert_eq!(&echoed, b"ping");
    script.running.send_replace(false);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.ok();
    assert_eq!(rest, b"");
}

const SILENT_STREAM: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";

#[tokio::test]
async fn a_silent_stream_holds_its_pass_until_its_client_goes() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    read_until(&mut stream, "hello\r\n").await;
    script.holds(1).await;
    // Beside it, an exchange that ends gives its pass back although its connection stays.
    let (quick, _heads) = guest_port("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
    let mut other = served.connect().await;
    for _ in 0..2 {
        send(
            &mut other,
            &format!("GET / HTTP/1.1\nhost: {quick}-{ID}.example.org"),
        )
        .await;
        read_until(&mut other, "hi").await;
        script.holds(1).await;
    }
    drop(stream);
    script.holds(0).await;
}

#[tokio::test]
async fn an_upload_holds_its_pass_when_the_answer_has_come_already() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let guest = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = guest.local_addr().expect("an address").port();
    let reading = tokio::spawn(async move {
        let (mut stream, _) = guest.accept().await.expect("a connection");
        read_until(&mut stream, "\r\n\r\n").await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
        stream.write_all(answer).await.expect("answer");
        read_until(&mut stream, "the end").await;
    });
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("POST / HTTP/1.1\nhost: {port}-{ID}.example.org\ncontent-length: 14"),
    )
    .await;
    read_until(&mut stream, "hi").await;
    script.holds(1).await;
    stream.write_all(b"not yet").await.expect("write");
    script.holds(1).await;
    stream.write_all(b"the end").await.expect("write");
    reading.await.expect("the guest got everything");
    script.holds(0).await;
}

#[tokio::test]
async fn an_upgraded_connection_holds_its_pass_until_both_sides_have_gone() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
    )
    .await;
    let request = format!(
        "GET / HTTP/1.1\nhost: {port}-{ID}.example.org\nconnection: upgrade\nupgrade: echo"
    );
    let mut stream = served.connect().await;
    send(&mut stream, &request).await;
    read_until(&mut stream, "\r\n\r\n").await;
    script.holds(1).await;
    stream.write_all(b"ping").await.expect("write");
    read_until(&mut stream, "ping").await;
    script.holds(1).await;
    // Half of it: the guest still has something to say.
    stream.write_all(b"last").await.expect("write");
    stream.shutdown().await.expect("end the half");
    assert_eq!(rest(&mut stream).await, "last");
    script.holds(0).await;

    let mut stream = served.connect().await;
    send(&mut stream, &request).await;
    read_until(&mut stream, "\r\n\r\n").await;
    drop(stream);
    script.holds(0).await;
}

#[tokio::test]
async fn inv_07_a_client_that_takes_nothing_does_not_keep_a_connection_that_is_cut() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let guest = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = guest.local_addr().expect("an address").port();
    let (full, mut is_full) = tokio::sync::mpsc::unbounded_channel();
    let writing = tokio::spawn(async move {
        let (mut stream, _) = guest.accept().await.expect("a connection");
        read_until(&mut stream, "\r\n\r\n").await;
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
        stream.write_all(head).await.expect("write");
        let piece = vec![b'x'; 1 << 16];
        loop {
            match tokio::time::timeout(DOUBT, stream.write_all(&piece)).await {
                Ok(Ok(())) => {}
                Ok(Err(_cut)) => return,
                Err(_no_room) => full.send(()).expect("the test waits"),
            }
        }
    });
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    is_full.recv().await.expect("nobody reads");
    script.holds(1).await;
    script.running.send_replace(false);
    script.holds(0).await;
    let cut = tokio::time::timeout(PATIENCE, writing).await;
    cut.expect("in time").expect("no panic");
}

#[tokio::test]
async fn connect_leads_nowhere() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port("HTTP/1.1 200 OK\r\n\r\n").await;
    let answer = served
        .ask(&format!(
            "CONNECT {port}-{ID}.example.org:80 HTTP/1.1\nhost: {port}-{ID}.example.org"
        ))
        .await;
    assert_eq!(status(&answer), "405", "{answer}");
    script.holds(0).await;
}

#[tokio::test]
async fn a_connection_that_does_not_ask_is_closed() {
    let script = Script::new();
    let limits = Limits {
        first_request: DOUBT,
        idle: 3 * DOUBT,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    for begun in [
        "",
        "GET /health HT",
        "GET /health HTTP/1.1\r\nhost: h\r\nx-slow: ",
    ] {
        let mut stream = served.connect().await;
        stream.write_all(begun.as_bytes()).await.expect("write");
        assert_eq!(rest(&mut stream).await, "", "{begun:?}");
    }
    let mut idle = UnixStream::connect(served.socket()).await.expect("connect");
    for _ in 0..2 {
        send(&mut idle, "GET /health HTTP/1.1\nhost: h").await;
        read_until(&mut idle, "\r\n\r\n").await;
        // Longer than a first request may take.
        tokio::time::sleep(2 * DOUBT).await;
    }
    assert_eq!(rest(&mut idle).await, "");
    // What is being answered may take as long as it takes.
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;
    tokio::time::sleep(5 * DOUBT).await;
    script.may_pause.notify_one();
    pausing.await.expect("no panic").expect("it is answered");
}

#[tokio::test]
async fn connections_beyond_the_most_wait_for_others_to_go() {
    let script = Script::new();
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let served = Served::within(limits, &script).await;
    let request = format!("GET /health HTTP/1.1\nhost: h\nx-api-key: {KEY}");
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = served.connect().await;
        send(&mut stream, &request).await;
        streams.push(stream);
    }
    let mut waiting = streams.pop().expect("three");
    for stream in &mut streams {
        read_until(stream, "\r\n\r\n").await;
    }
    let too_early = tokio::time::timeout(DOUBT, waiting.read_u8()).await;
    assert!(too_early.is_err(), "it has no place yet");
    // The socket has places of its own.
    served.client().version().await.expect("an answer");
    drop(streams);
    let answer = read_until(&mut waiting, "\r\n\r\n").await;
    assert_eq!(status(&answer), "204");
}

#[tokio::test]
async fn leaving_refuses_what_is_new_and_finishes_what_is_under_way() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let mut idle = served.connect().await;
    send(
        &mut idle,
        &format!("GET /health HTTP/1.1\nhost: h\nx-api-key: {KEY}"),
    )
    .await;
    read_until(&mut idle, "\r\n\r\n").await;
    let mut silent = served.connect().await;
    let mut following = UnixStream::connect(served.socket()).await.expect("connect");
    send(&mut following, "GET /events?follow=true HTTP/1.1\nhost: h").await;
    read_until(&mut following, "}\n\r\n").await;
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;

    let (public, socket) = (served.public, served.socket());
    let leaving = tokio::spawn(async move {
        let left = tokio::join!(
            served.outside.leave(PATIENCE, PATIENCE),
            served.inside.leave(PATIENCE, PATIENCE),
        );
        // Its directory goes with it.
        (left, served)
    });
    assert_eq!(rest(&mut idle).await, "");
    assert_eq!(rest(&mut silent).await, "");
    let cut = rest(&mut following).await;
    assert!(!cut.ends_with("0\r\n\r\n"), "that would be an end: {cut}");
    let refused = TcpStream::connect(public).await.map(drop);
    assert!(refused.is_err(), "nobody listens any more");
    assert!(UnixStream::connect(&socket).await.is_err());
    assert!(!leaving.is_finished(), "a verb is under way");
    script.may_pause.notify_one();
    let paused = pausing.await.expect("no panic").expect("an answer");
    assert_eq!(paused.outcome, Outcome::Changed);
    let (left, _served) = leaving.await.expect("no panic");
    assert_eq!(left, (true, true));
}

#[tokio::test]
async fn leaving_is_bounded() {
    let script = Script::new();
    let served = Served::new(&script).await;
    let (port, _heads) = guest_port(SILENT_STREAM).await;
    let mut stream = served.connect().await;
    send(
        &mut stream,
        &format!("GET / HTTP/1.1\nhost: {port}-{ID}.example.org"),
    )
    .await;
    read_until(&mut stream, "hello\r\n").await;
    assert!(served.outside.leave(PATIENCE, DOUBT).await, "no verb");
    let client = served.client();
    let pausing = tokio::spawn(async move { client.pause("web").await });
    script.pausing.notified().await;
    assert!(
        !served.inside.leave(DOUBT, PATIENCE).await,
        "a verb does not end"
    );
    pausing.abort();
}
