//! The client of a daemon's Unix socket: what the command line is built on.
//!
//! Every call opens its own connection: over a local socket that costs less than keeping track of one.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, BodyStream, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncBufReadExt as _;
use tokio::net::UnixStream;
use tokio_stream::wrappers::LinesStream;
use tokio_util::io::StreamReader;

use crate::types::{
    AuditEntry, AuditRange, BuildEvent, ChangeLifetime, ChangeTeam, ChangeTemplate, DrainReport,
    Event, Forked, GcReport, GcRequest, History, HostVmm, Kernel, KernelEvent, Key, MadeKey,
    MetricsRange, NewBuild, NewFork, NewKernel, NewKey, NewSandbox, NewSnapshot, NewTeam, Report,
    Resolution, ResumeRequest, RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, Stats,
    Team, Template, VerbResult, Version, Warm,
};
use crate::{ErrorBody, ErrorCode, TEAM_HEADER};

/// What a user typed stays one segment of a path, whatever it contains.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~');

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("cannot reach the daemon at {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon refused or failed.
    #[error("{}", .0.message)]
    Refused(Box<ErrorBody>),
    /// The connection broke in the middle.
    #[error("the connection to the daemon broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The daemon answered something else than this client understands.
    #[error("the daemon's answer makes no sense to this client (HTTP {status})")]
    NotUnderstood {
        /// The answer's status.
        status: StatusCode,
        /// Why.
        source: serde_json::Error,
    },
}

impl ClientError {
    /// What went wrong, as far as the daemon classified it.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(body) => body.error_code,
            _ => None,
        }
    }
}

/// A daemon, reached by its Unix socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    team: Option<String>,
}

impl Client {
    /// A client of the daemon at `socket`. Connects with the first call.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            team: None,
        }
    }

    /// The same, acting for a team: it sees what the team sees, and what it makes is the team's.
    #[must_use]
    pub fn for_team(self, team: Option<String>) -> Self {
        Self { team, ..self }
    }

    /// The team that it acts for, if for one.
    #[must_use]
    pub fn team(&self) -> Option<&str> {
        self.team.as_deref()
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Which daemon answers.
    ///
    /// # Errors
    /// See [`ClientError`]; the same for every call.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/version").await
    }

    /// Creates a sandbox.
    pub async fn create(&self, new: &NewSandbox) -> Result<SandboxDetail, ClientError> {
        self.post("/sandboxes", new).await
    }

    /// All sandboxes, newest first; with `space`, what each occupies.
    pub async fn list(&self, space: bool) -> Result<Vec<SandboxDetail>, ClientError> {
        self.get(&format!("/sandboxes?space={space}")).await
    }

    /// One sandbox; with `space`, what it occupies and who shares that.
    pub async fn inspect(&self, sandbox: &str, space: bool) -> Result<SandboxDetail, ClientError> {
        self.get(&format!("/sandboxes/{}?space={space}", segment(sandbox)))
            .await
    }

    /// Destroys a sandbox.
    pub async fn destroy(&self, sandbox: &str) -> Result<(), ClientError> {
        let path = format!("/sandboxes/{}", segment(sandbox));
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.read_out(answer).await
    }

    /// Pauses a sandbox.
    pub async fn pause(&self, sandbox: &str) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "pause", &()).await
    }

    /// Resumes a sandbox.
    pub async fn resume(
        &self,
        sandbox: &str,
        how: &ResumeRequest,
    ) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "resume", how).await
    }

    /// Stops a sandbox.
    pub async fn stop(&self, sandbox: &str) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "stop", &()).await
    }

    /// Starts a stopped sandbox.
    pub async fn start(&self, sandbox: &str) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "start", &()).await
    }

    /// Makes a generation of a running sandbox.
    pub async fn checkpoint(&self, sandbox: &str) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "checkpoints", &()).await
    }

    /// Brings a sandbox to a point of its history.
    pub async fn rollback(
        &self,
        sandbox: &str,
        how: &RollbackRequest,
    ) -> Result<VerbResult, ClientError> {
        self.verb(sandbox, "rollback", how).await
    }

    /// Every point that a sandbox can go back to.
    pub async fn history(&self, sandbox: &str) -> Result<History, ClientError> {
        self.get(&format!("/sandboxes/{}/history", segment(sandbox)))
            .await
    }

    /// Removes a generation or a branch.
    pub async fn forget(&self, sandbox: &str, point: &str) -> Result<(), ClientError> {
        let path = format!("/sandboxes/{}/history/{}", segment(sandbox), segment(point));
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.read_out(answer).await
    }

    /// Snapshots a sandbox.
    pub async fn snapshot(
        &self,
        sandbox: &str,
        new: &NewSnapshot,
    ) -> Result<Snapshot, ClientError> {
        self.verb(sandbox, "snapshots", new).await
    }

    /// Forks a sandbox.
    pub async fn fork(&self, sandbox: &str, new: &NewFork) -> Result<Vec<Forked>, ClientError> {
        self.verb(sandbox, "fork", new).await
    }

    /// Flattens a sandbox's disk into an image template.
    pub async fn flatten(&self, sandbox: &str, new: &NewSnapshot) -> Result<Template, ClientError> {
        self.verb(sandbox, "flatten", new).await
    }

    /// Changes when a sandbox ends by itself, and when it begins to.
    pub async fn set_lifetime(
        &self,
        sandbox: &str,
        change: &ChangeLifetime,
    ) -> Result<SandboxDetail, ClientError> {
        self.verb(sandbox, "timeout", change).await
    }

    /// What a sandbox used, oldest first.
    pub async fn metrics(
        &self,
        sandbox: &str,
        range: &MetricsRange,
    ) -> Result<Vec<SandboxMetric>, ClientError> {
        let mut path = format!("/sandboxes/{}/metrics?", segment(sandbox));
        for (name, value) in [("start", range.start), ("end", range.end)] {
            if let Some(value) = value {
                path.push_str(&format!("{name}={value}&"));
            }
        }
        if let Some(resolution) = range.resolution {
            let seconds = match resolution {
                Resolution::Second => "1s",
                Resolution::TenSeconds => "10s",
                Resolution::Minute => "60s",
            };
            path.push_str(&format!("resolution={seconds}"));
        }
        self.get(&path).await
    }

    /// Pauses everything that runs, and has the daemon leave.
    pub async fn drain(&self) -> Result<DrainReport, ClientError> {
        self.post("/drain", &()).await
    }

    /// What the guest wrote to its console.
    pub async fn console(
        &self,
        sandbox: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + use<>, ClientError> {
        let path = format!("/sandboxes/{}/console", segment(sandbox));
        let answer = self.send(Method::GET, &path, Bytes::new()).await?;
        Ok(data(self.accepted(answer).await?.into_body())
            .map_err(|error| ClientError::Broken(error.into())))
    }

    /// All templates.
    pub async fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get("/templates").await
    }

    /// One template.
    pub async fn template(&self, template: &str) -> Result<Template, ClientError> {
        self.get(&format!("/templates/{}", segment(template))).await
    }

    /// Removes a template.
    pub async fn remove_template(&self, template: &str) -> Result<(), ClientError> {
        let path = format!("/templates/{}", segment(template));
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.read_out(answer).await
    }

    /// Lets every team create sandboxes from a template, or its own alone.
    pub async fn publish_template(
        &self,
        template: &str,
        public: bool,
    ) -> Result<Template, ClientError> {
        let path = format!("/templates/{}", segment(template));
        let change = ChangeTemplate { public };
        self.call(Method::PATCH, &path, to_json(&change)).await
    }

    /// Has so many sandboxes made from a template wait for somebody to create one.
    pub async fn warm_template(&self, template: &str, count: u16) -> Result<Template, ClientError> {
        let path = format!("/templates/{}/warm", segment(template));
        self.call(Method::PUT, &path, to_json(&Warm { count }))
            .await
    }

    /// All teams.
    pub async fn teams(&self) -> Result<Vec<Team>, ClientError> {
        self.get("/teams").await
    }

    /// Makes a team.
    pub async fn create_team(&self, new: &NewTeam) -> Result<Team, ClientError> {
        self.post("/teams", new).await
    }

    /// Changes what a team may have.
    pub async fn change_team(&self, team: &str, change: &ChangeTeam) -> Result<Team, ClientError> {
        let path = format!("/teams/{}", segment(team));
        self.call(Method::PATCH, &path, to_json(change)).await
    }

    /// Removes a team that has nothing any more.
    pub async fn remove_team(&self, team: &str) -> Result<(), ClientError> {
        let path = format!("/teams/{}", segment(team));
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.read_out(answer).await
    }

    /// The keys of the team that this client acts for, or of all.
    pub async fn keys(&self) -> Result<Vec<Key>, ClientError> {
        self.get("/api-keys").await
    }

    /// Makes a key.
    pub async fn create_key(&self, new: &NewKey) -> Result<MadeKey, ClientError> {
        self.post("/api-keys", new).await
    }

    /// Removes a key.
    pub async fn remove_key(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/api-keys/{}", segment(id));
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.read_out(answer).await
    }

    /// What was changed and who asked for it.
    pub async fn audit(&self, range: AuditRange) -> Result<Vec<AuditEntry>, ClientError> {
        let mut path = format!("/audit?since={}", range.since);
        if let Some(from) = range.from {
            path.push_str(&format!("&from={from}"));
        }
        if let Some(limit) = range.limit {
            path.push_str(&format!("&limit={limit}"));
        }
        self.get(&path).await
    }

    /// Builds a template. Dropping the stream cancels the build.
    pub async fn build(
        &self,
        new: &NewBuild,
    ) -> Result<impl Stream<Item = Result<BuildEvent, ClientError>> + use<>, ClientError> {
        self.lines(Method::POST, "/builds", to_json(new)).await
    }

    /// The VMMs that run sandboxes on the daemon's host.
    pub async fn vmms(&self) -> Result<Vec<HostVmm>, ClientError> {
        self.get("/vmms").await
    }

    /// All kernels.
    pub async fn kernels(&self) -> Result<Vec<Kernel>, ClientError> {
        self.get("/kernels").await
    }

    /// Imports a kernel. Dropping the stream cancels the import.
    pub async fn import_kernel(
        &self,
        new: &NewKernel,
    ) -> Result<impl Stream<Item = Result<KernelEvent, ClientError>> + use<>, ClientError> {
        self.lines(Method::POST, "/kernels", to_json(new)).await
    }

    /// Events after number `since`, or from now on.
    pub async fn events(
        &self,
        since: Option<u64>,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Event, ClientError>> + use<>, ClientError> {
        let mut path = format!("/events?follow={follow}");
        if let Some(since) = since {
            path.push_str(&format!("&since={since}"));
        }
        self.lines(Method::GET, &path, Bytes::new()).await
    }

    /// What everything occupies, and how much room there is.
    pub async fn stats(&self) -> Result<Stats, ClientError> {
        self.get("/stats").await
    }

    /// What works on the daemon's host.
    pub async fn doctor(&self) -> Result<Report, ClientError> {
        self.get("/doctor").await
    }

    /// Removes what nothing reaches, or tells what it would.
    pub async fn gc(&self, request: GcRequest) -> Result<GcReport, ClientError> {
        self.post("/gc", &request).await
    }

    async fn verb<T: DeserializeOwned>(
        &self,
        sandbox: &str,
        verb: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let path = format!("/sandboxes/{}/{verb}", segment(sandbox));
        self.post(&path, body).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let answer = self.send(method, path, body).await?;
        self.parse(answer).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, to_json(body)).await
    }

    async fn lines<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<impl Stream<Item = Result<T, ClientError>> + use<T>, ClientError> {
        let answer = self.send(method, path, body).await?;
        let answer = self.accepted(answer).await?;
        let status = answer.status();
        let reader = StreamReader::new(data(answer.into_body()).map_err(io::Error::other));
        Ok(LinesStream::new(Box::pin(reader).lines()).map(move |line| {
            let line = line.map_err(|error| ClientError::Broken(error.into()))?;
            serde_json::from_str(&line)
                .map_err(|source| ClientError::NotUnderstood { status, source })
        }))
    }

    async fn parse<T: DeserializeOwned>(
        &self,
        answer: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let answer = self.accepted(answer).await?;
        let status = answer.status();
        let body = collect(answer).await?;
        serde_json::from_slice(&body)
            .map_err(|source| ClientError::NotUnderstood { status, source })
    }

    async fn read_out(&self, answer: Response<Incoming>) -> Result<(), ClientError> {
        collect(self.accepted(answer).await?).await.map(drop)
    }

    /// Turns an answer that is an error into one.
    async fn accepted(
        &self,
        answer: Response<Incoming>,
    ) -> Result<Response<Incoming>, ClientError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = collect(answer).await?;
        Err(match serde_json::from_slice(&body) {
            Ok(body) => ClientError::Refused(Box::new(body)),
            Err(source) => ClientError::NotUnderstood { status, source },
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(
            HeaderName::from_static("prefer"),
            HeaderValue::from_static("return=representation"),
        );
        if let Some(team) = &self.team {
            let team = HeaderValue::from_str(team).map_err(
                |error: http::header::InvalidHeaderValue| ClientError::Broken(error.into()),
            )?;
            headers.insert(TEAM_HEADER, team);
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path
            .parse()
            .map_err(|error: http::uri::InvalidUri| ClientError::Broken(error.into()))?;
        *request.headers_mut() = headers;
        request
            .headers_mut()
            .insert(http::header::HOST, HeaderValue::from_static("icebox"));

        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Connect {
                    socket: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ClientError::Broken(error.into()))?;
        // Ends with the response's body; its errors reach the caller through that.
        tokio::spawn(connection);
        sender
            .send_request(request)
            .await
            .map_err(|error| ClientError::Broken(error.into()))
    }
}

fn to_json(body: &impl Serialize) -> Bytes {
    // Wire types have string keys and no fallible `Serialize`.
    serde_json::to_vec(body)
        .map(Bytes::from)
        .unwrap_or_default()
}

fn segment(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

async fn collect(answer: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = answer.into_body().collect().await;
    body.map(http_body_util::Collected::to_bytes)
        .map_err(|error| ClientError::Broken(error.into()))
}

fn data(body: Incoming) -> impl Stream<Item = Result<Bytes, hyper::Error>> {
    BodyStream::new(body).try_filter_map(|frame| async { Ok(frame.into_data().ok()) })
}
