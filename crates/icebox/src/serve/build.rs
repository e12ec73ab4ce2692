//! Building a template: a root image, and with a start command a snapshot of it running.
//!
//! ```text
//!   root image -> image template ---------------------------------------------------------> done
//!                     with a start command: under a passing name
//!                   -> sandbox -> start command -> ready? -> snapshot -> sandbox, image gone -> done
//! ```
//! A build is cancelled when nobody reads its events any more. What it has made by then is removed on every way out;
//! steps of the engine are not left half-way but waited for first.

use std::sync::Arc;
use std::time::Duration;

use icebox_agent_api::client::{AgentClient, Command, Event};
use icebox_agent_api::{AGENT_PORT, START_TAG, Token};
use icebox_api::types::{BuildEvent, BuildSource, NewBuild};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::id::{Digest, Name, SandboxId};
use icebox_engine::manifest::v1;
use icebox_engine::unit::{Bytes, Geometry};
use icebox_engine::{CreateRequest, Engine, ImageRequest};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::translate;
use super::workshop::Workshop;

type Events = mpsc::Sender<BuildEvent>;

/// How often the ready command is run.
const READY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a start command may take to become ready: E2B's bound.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a start command runs before it counts as ready if there is no ready command: E2B's default.
const SETTLE: Duration = Duration::from_secs(20);
/// How much of a failed start command's output an error repeats.
const TAIL: usize = 2000;

/// A build that has been checked as far as can be without doing it.
pub(super) struct Build {
    engine: Engine,
    workshop: Arc<dyn Workshop>,
    name: Name,
    source: BuildSource,
    size: Option<Bytes>,
    geometry: Geometry,
    start: Option<Start>,
}

struct Start {
    command: String,
    ready: Option<String>,
    vmm: Option<String>,
}

/// What a build with a start command made on its way, and does not leave.
struct Passing {
    image: v1::Template,
    sandbox: Name,
}

impl Build {
    /// Checks `new`.
    ///
    /// # Errors
    /// The name is taken or not a name, or the sizes are none: all before the long work begins.
    pub(super) fn new(
        engine: Engine,
        workshop: Arc<dyn Workshop>,
        new: NewBuild,
        default: Geometry,
    ) -> Result<Self, ApiError> {
        let name = translate::name(&new.name)?;
        if engine.templates().iter().any(|there| there.name == name) {
            return Err(ApiError::new(
                ErrorCode::AlreadyExists,
                format!("a template called {name} exists already"),
            )
            .hint("choose another name, or remove the template first"));
        }
        if let Some(vmm) = &new.vmm {
            let there = engine.require_vmm(vmm);
            there.map_err(|error| translate::error(&error))?;
        }
        Ok(Self {
            engine,
            workshop,
            name,
            source: new.source,
            size: translate::disk_size(new.disk_size_mb)?,
            geometry: translate::geometry(new.cpu_count, new.memory_mb, default)?,
            start: new.start_cmd.map(|command| Start {
                command,
                ready: new.ready_cmd,
                vmm: new.vmm,
            }),
        })
    }

    /// Builds, and ends `events` with how it went.
    pub(super) async fn run(self, events: Events) {
        let last = match self.build(&events).await {
            Ok(template) => BuildEvent::Done {
                template: Box::new(translate::template(&template, None, None)),
            },
            Err(error) => BuildEvent::Error {
                error: error.into_body(),
            },
        };
        // Nobody may be left to hear it.
        events.send(last).await.ok();
    }

    async fn build(&self, events: &Events) -> Result<v1::Template, ApiError> {
        let image = unless_gone(
            events,
            self.workshop.image(self.source.clone(), self.size, events),
        )
        .await?;
        let kernel = unless_gone(events, self.workshop.kernel(events)).await?;
        stage(events, "storing the image").await;
        let Some(start) = &self.start else {
            return self.import(image.path(), self.name.clone(), kernel).await;
        };
        let passing = passing_name()?;
        let image = self.import(image.path(), passing.clone(), kernel).await?;
        let passing = Passing {
            image,
            sandbox: passing,
        };
        let template = self.run_and_snapshot(&passing, start, events).await;
        self.clean_up(&passing).await;
        template
    }

    async fn import(
        &self,
        image: &std::path::Path,
        name: Name,
        kernel: Digest,
    ) -> Result<v1::Template, ApiError> {
        let request = ImageRequest {
            name,
            geometry: self.geometry,
            kernel,
            env: std::collections::BTreeMap::new(),
            login: v1::Login::default(),
            source: describe(&self.source),
        };
        self.engine
            .import_image(image, request)
            .await
            .map_err(|error| translate::error(&error))
    }

    async fn run_and_snapshot(
        &self,
        passing: &Passing,
        start: &Start,
        events: &Events,
    ) -> Result<v1::Template, ApiError> {
        stage(events, "booting it").await;
        let request = CreateRequest {
            template: passing.image.id.to_string(),
            name: Some(passing.sandbox.clone()),
            vmm: start.vmm.clone(),
            ..CreateRequest::default()
        };
        let sandbox = self
            .engine
            .create(request)
            .await
            .map_err(|error| translate::error(&error))?;
        let id = sandbox.record.id.clone();
        let route = self
            .engine
            .route(id.as_str())
            .map_err(|error| translate::error(&error))?
            .ok_or_else(|| went_away("the sandbox"))?;
        let agent = AgentClient::tcp((route.ip, AGENT_PORT).into())
            .with_token(&Token::new(route.token.expose()));
        // A capture waits for whoever is inside: that must not be this build.
        drop(route);
        stage(events, "running the start command").await;
        unless_gone(events, start.until_ready(&agent)).await?;
        stage(events, "taking the snapshot").await;
        self.engine
            .snapshot(id.as_str(), self.name.clone())
            .await
            .map_err(|error| translate::error(&error))
    }

    /// Removes what a build made on its way. What will not go is for the log and the next start: the build's own
    /// outcome stands.
    async fn clean_up(&self, passing: &Passing) {
        let sandbox = passing.sandbox.as_str();
        if self.engine.inspect(sandbox).is_ok()
            && let Err(error) = self.engine.destroy(sandbox).await
        {
            tracing::warn!(%error, sandbox, "a build's sandbox stays");
        }
        let image = passing.image.id.as_str();
        if let Err(error) = self.engine.remove_template(image).await {
            tracing::warn!(%error, template = image, "a build's image stays");
        }
    }
}

impl Start {
    /// Starts the command and waits until it is ready.
    async fn until_ready(&self, agent: &AgentClient) -> Result<(), ApiError> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let answer = ApiError::from_error(ErrorCode::Invalid, error);
            answer.hint("the start command runs with /bin/sh -c as the sandbox's default user")
        };
        let mut command = Command::new("/bin/sh").args(["-c", &self.command]);
        command.tag = Some(START_TAG.to_owned());
        let mut process = agent.start(command).await.map_err(|error| failed(&error))?;
        let begun = Instant::now();
        let mut tail = Vec::new();
        let mut ended = false;
        let mut next = begun;
        loop {
            let deadline = match &self.ready {
                Some(_) => next,
                None => begun + SETTLE,
            };
            tokio::select! {
                event = process.next(), if !ended => match event.map_err(|error| failed(&error))? {
                    Event::Stdout(bytes) | Event::Stderr(bytes) | Event::Terminal(bytes) => {
                        tail.extend_from_slice(&bytes);
                        let excess = tail.len().saturating_sub(TAIL);
                        tail.drain(..excess);
                    }
                    Event::Exited(exit) if exit.shell_code() != 0 => {
                        let said = String::from_utf8_lossy(&tail);
                        let said = match said.trim_end() {
                            "" => "it printed nothing",
                            said => said,
                        };
                        return Err(ApiError::new(ErrorCode::Invalid, format!(
                            "the start command ended with code {}: {said}",
                            exit.shell_code(),
                        )));
                    }
                    Event::Exited(_) if self.ready.is_none() => return Ok(()),
                    Event::Exited(_) => ended = true,
                },
                () = tokio::time::sleep_until(deadline) => {
                    let Some(ready) = &self.ready else {
                        return Ok(());
                    };
                    if is_ready(agent, ready).await.map_err(|error| failed(&error))? {
                        return Ok(());
                    }
                    if begun.elapsed() > READY_TIMEOUT {
                        return Err(ApiError::new(ErrorCode::Invalid, format!(
                            "the ready command did not succeed within {} s",
                            READY_TIMEOUT.as_secs()
                        )));
                    }
                    next = Instant::now() + READY_INTERVAL;
                }
            }
        }
    }
}

async fn is_ready(
    agent: &AgentClient,
    command: &str,
) -> Result<bool, icebox_agent_api::client::AgentError> {
    let output = agent
        .run_keeping(Command::new("/bin/sh").args(["-c", command]), 0)
        .await?;
    Ok(output.exit.shell_code() == 0)
}

/// Waits for `work`, unless everybody who listens goes away.
async fn unless_gone<T>(
    events: &Events,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    tokio::select! {
        result = work => result,
        () = events.closed() => Err(ApiError::new(ErrorCode::Internal, "the build was cancelled")),
    }
}

async fn stage(events: &Events, name: &str) {
    let event = BuildEvent::Stage {
        name: name.to_owned(),
    };
    // Whether anybody listens is for `unless_gone` to say.
    events.send(event).await.ok();
}

/// A name that no user would choose: it is taken only for as long as the build runs.
fn passing_name() -> Result<Name, ApiError> {
    translate::name(&format!("build-{}", SandboxId::random()))
}

fn went_away(what: &str) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("{what} went away"))
        .hint("`icebox events --since 0` shows why")
}

fn describe(source: &BuildSource) -> String {
    match source {
        BuildSource::Debian { suite, include } if include.is_empty() => format!("debian:{suite}"),
        BuildSource::Debian { suite, include } => {
            format!("debian:{suite} with {}", include.join(", "))
        }
        BuildSource::Tar(path) => format!("tar {path}"),
        BuildSource::Directory(path) => format!("directory {path}"),
        BuildSource::Image(path) => format!("image {path}"),
    }
}
