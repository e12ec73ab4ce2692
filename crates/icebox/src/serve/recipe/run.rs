//! A build that goes on: a sandbox, the steps in it, and a snapshot of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use icebox_agent_api::client::{AgentClient, AgentError, Command, Event, Upload};
use icebox_agent_api::{AGENT_PORT, START_TAG, Token};
use icebox_api::types::{BuildReason, StartBuild};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::manifest::v1::{Login, OnTimeout};
use icebox_engine::{CreateRequest, Defaults, Engine, LifetimeChange, Limit, SandboxView};

use super::step::{COPY, Step, absolute};
use super::{Build, Recipes, geometry};
use crate::serve::translate;

/// How often the ready command is run, and how long it may take to succeed: E2B's times.
const READY_INTERVAL: Duration = Duration::from_secs(2);
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a start command runs before it counts as ready if nothing says when it is: E2B's default.
const SETTLE: Duration = Duration::from_secs(20);
/// A build's sandbox that nobody looks after any more goes after so long.
const LONGEST: Duration = Duration::from_secs(4 * 3600);
/// What is read of a short answer. A shell's profile may say anything.
const ANSWER_MAX: usize = 4 << 10;
/// Where archives are put in the sandbox.
const ARCHIVE: &str = "/tmp/.icebox-archive";
/// What parts of a build that are no steps are called.
const BASE: &str = "base";
const FINALIZE: &str = "finalize";

/// A build, with what it is to do.
pub(super) struct Run {
    /// As who asked for the build sees it.
    engine: Engine,
    recipes: Arc<Recipes>,
    build: Arc<Build>,
    base: String,
    steps: Vec<Step>,
    start: Option<String>,
    ready: Option<String>,
}

/// Why a build failed, and at what.
struct Failed {
    step: String,
    message: String,
}

/// How commands run at a point of a build.
struct Shell {
    agent: AgentClient,
    env: BTreeMap<String, String>,
    user: Option<String>,
    workdir: Option<String>,
}

impl Run {
    /// Checks what a build is to do.
    ///
    /// # Errors
    /// A step makes no sense, its files are not there, or what it begins with is not.
    pub(super) fn new(
        engine: Engine,
        recipes: Arc<Recipes>,
        build: Arc<Build>,
        what: StartBuild,
    ) -> Result<Self, ApiError> {
        let from = match (&what.from_template, &what.from_image) {
            (Some(template), _) => template.as_str(),
            (None, Some(image)) => super::image_name(image),
            (None, None) => {
                let message = "a build begins with a template, `fromTemplate`, or an image";
                return Err(ApiError::new(ErrorCode::Invalid, message));
            }
        };
        let base = recipes.base(&engine, from)?;
        let steps = what.steps.iter();
        let steps =
            steps.map(|step| Step::read(step, |hash| recipes.files.find(&build.team, hash)));
        let words = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        Ok(Self {
            base,
            steps: steps.collect::<Result<_, _>>()?,
            start: words(what.start_cmd),
            ready: words(what.ready_cmd),
            recipes,
            build,
            engine,
        })
    }

    /// Builds. What was made on the way is removed, whether or not it succeeds.
    pub(super) async fn carry_out(self) {
        let failed = self.through_sandbox().await.err();
        if let Some(failed) = &failed {
            self.build.log.say(&failed.step, "error", &failed.message);
        }
        self.build.log.end(failed.map(|failed| BuildReason {
            message: failed.message,
            step: Some(failed.step),
        }));
    }

    async fn through_sandbox(&self) -> Result<(), Failed> {
        self.say(BASE, format!("FROM {}", self.base));
        let sandbox = self.sandbox().await.map_err(at(BASE))?;
        let id = sandbox.record.id.clone();
        let built = self.in_sandbox(&sandbox).await;
        if let Err(error) = self.engine.destroy(id.as_str()).await {
            tracing::warn!(%error, sandbox = %id, "a build's sandbox stays until its time is over");
        }
        built
    }

    async fn sandbox(&self) -> Result<SandboxView, ApiError> {
        let engine = &self.engine;
        let template = engine.template(&self.base);
        let template = template.map_err(|error| translate::error(&error))?;
        let geometry = geometry(&self.build, template.geometry);
        let request = CreateRequest {
            template: template.id.to_string(),
            vcpus: Some(geometry.vcpus),
            mem_mib: Some(geometry.mem_mib),
            egress: self.recipes.egress,
            metadata: [("icebox.build".to_owned(), self.build.id.clone())].into(),
            lifetime: LifetimeChange {
                run: Some(Limit::After(LONGEST)),
                then: Some(OnTimeout::Destroy),
                ..LifetimeChange::default()
            },
            ..CreateRequest::default()
        };
        let created = engine.create(request).await;
        created.map_err(|error| translate::error(&error))
    }

    async fn in_sandbox(&self, sandbox: &SandboxView) -> Result<(), Failed> {
        let spec = &sandbox.record.spec;
        let mut shell = Shell {
            agent: self.agent(sandbox).map_err(at(BASE))?,
            env: BTreeMap::new(),
            user: spec.login.user.clone(),
            workdir: spec.login.workdir.clone(),
        };
        for (number, step) in self.steps.iter().enumerate() {
            let number = number.to_string();
            self.say(&number, step.title());
            let done = self.step(step, &mut shell, &number).await;
            done.map_err(|message| Failed {
                step: number,
                message,
            })?;
        }
        self.begin_start_command(&shell)
            .await
            .map_err(|message| Failed {
                step: FINALIZE.to_owned(),
                message,
            })?;
        self.say(FINALIZE, "taking the snapshot".to_owned());
        let mut env = spec.env.clone();
        env.extend(shell.env.clone());
        let login = Login {
            user: shell.user.clone(),
            workdir: shell.workdir.clone(),
        };
        self.finish(sandbox, Defaults { env, login })
            .await
            .map_err(at(FINALIZE))
    }

    fn agent(&self, sandbox: &SandboxView) -> Result<AgentClient, ApiError> {
        let route = self.engine.route(sandbox.record.id.as_str());
        let route = route.map_err(|error| translate::error(&error))?;
        // A capture waits for whoever is inside: that must not be this build, so it keeps no pass.
        let route = route
            .ok_or_else(|| ApiError::new(ErrorCode::Internal, "the build's sandbox went away"))?;
        let agent = AgentClient::tcp((route.ip, AGENT_PORT).into());
        Ok(agent.with_token(&Token::new(route.token.expose())))
    }

    async fn step(&self, step: &Step, shell: &mut Shell, number: &str) -> Result<(), String> {
        match step {
            Step::Run { command, user } => {
                let user = user.as_ref().or(shell.user.as_ref());
                let ran = self.command(shell, command, user, number).await;
                ran.map_err(|why| format!("failed to run command '{command}': {why}"))
            }
            Step::Env(pairs) => {
                shell.env.extend(pairs.iter().cloned());
                Ok(())
            }
            Step::User(user) => {
                shell.user = Some(user.clone());
                Ok(())
            }
            Step::Workdir(path) => {
                let path = absolute(path, &shell.here().await?);
                let owner = match &shell.user {
                    Some(user) => user.clone(),
                    None => shell.who().await?,
                };
                let script = r#"[ -d "$1" ] || { mkdir -p -- "$1" && chown -- "$2" "$1"; }"#;
                self.script(shell, script, &[&path, &owner], number).await?;
                shell.workdir = Some(path);
                Ok(())
            }
            Step::Copy {
                source,
                target,
                user,
                mode,
                archive,
            } => {
                let sent = shell.send(archive).await;
                sent.map_err(|error| format!("failed to copy {source}: {error}"))?;
                let target = absolute(target, &shell.here().await?);
                let user = match user.as_ref().or(shell.user.as_ref()) {
                    Some(user) => user.clone(),
                    None => shell.who().await?,
                };
                let mode = mode.clone().unwrap_or_default();
                let arguments = [ARCHIVE, source, &target, &user, &mode];
                let copied = self.script(shell, COPY, &arguments, number).await;
                copied.map_err(|why| format!("failed to copy {source} to {target}: {why}"))
            }
        }
    }

    /// Runs a user's command to its end, as commands run in sandboxes.
    async fn command(
        &self,
        shell: &Shell,
        command: &str,
        user: Option<&String>,
        number: &str,
    ) -> Result<(), String> {
        let command = shell.command(command);
        let agent = user.map_or_else(
            || shell.agent.clone(),
            |it| shell.agent.clone().with_user(it),
        );
        self.follow(&agent, command, number).await
    }

    /// Runs a script of ours, as root.
    async fn script(
        &self,
        shell: &Shell,
        script: &str,
        arguments: &[&str],
        number: &str,
    ) -> Result<(), String> {
        let command =
            Command::new("/bin/bash").args([&["-c", script, "build"], arguments].concat());
        let agent = shell.agent.clone().with_user("root");
        self.follow(&agent, command, number).await
    }

    async fn follow(
        &self,
        agent: &AgentClient,
        command: Command,
        number: &str,
    ) -> Result<(), String> {
        let refused = |error: AgentError| match &error {
            AgentError::Rpc { answer, .. } => {
                let message = answer.message.as_deref().unwrap_or_default();
                format!("command failed: {}: {message}", answer.code.as_str())
            }
            _ => format!("command failed: {error}"),
        };
        let mut process = agent.start(command).await.map_err(refused)?;
        let (mut out, mut err) = (Lines::default(), Lines::default());
        loop {
            match process.next().await.map_err(refused)? {
                Event::Stdout(bytes) | Event::Terminal(bytes) => {
                    out.add(&bytes, |line| self.build.log.say(number, "info", line));
                }
                Event::Stderr(bytes) => {
                    err.add(&bytes, |line| self.build.log.say(number, "error", line));
                }
                Event::Exited(exit) => {
                    out.end(|line| self.build.log.say(number, "info", line));
                    err.end(|line| self.build.log.say(number, "error", line));
                    return match exit.shell_code() {
                        0 => Ok(()),
                        code => Err(format!("exit status {code}")),
                    };
                }
            }
        }
    }

    /// Starts what runs in every sandbox of the template, and waits until it is ready.
    async fn begin_start_command(&self, shell: &Shell) -> Result<(), String> {
        let agent = shell.agent_of_user();
        if let Some(start) = &self.start {
            self.say(FINALIZE, format!("starting {start}"));
            let mut command = shell.command(start);
            command.tag = Some(START_TAG.to_owned());
            let started = agent.start(command).await;
            started.map_err(|error| format!("failed to run command '{start}': {error}"))?;
        }
        let Some(ready) = &self.ready else {
            if self.start.is_some() {
                tokio::time::sleep(SETTLE).await;
            }
            return Ok(());
        };
        self.say(FINALIZE, format!("waiting for {ready}"));
        let becoming = async {
            loop {
                let ran = agent.run_keeping(shell.command(ready), 0).await;
                let ran =
                    ran.map_err(|error| format!("failed to run command '{ready}': {error}"))?;
                if ran.exit.shell_code() == 0 {
                    return Ok(());
                }
                tokio::time::sleep(READY_INTERVAL).await;
            }
        };
        let seconds = READY_TIMEOUT.as_secs();
        let late = |_| Err(format!("'{ready}' did not succeed within {seconds} s"));
        let ready = tokio::time::timeout(READY_TIMEOUT, becoming).await;
        ready.unwrap_or_else(late)
    }

    async fn finish(&self, sandbox: &SandboxView, defaults: Defaults) -> Result<(), ApiError> {
        let (engine, build) = (&self.engine, &self.build);
        let name = super::own_name(&build.name, &build.id)?;
        let id = sandbox.record.id.as_str();
        let template = engine.snapshot_with(id, name, defaults).await;
        let template = template.map_err(|error| translate::error(&error))?;
        let built = template.id.to_string();
        let families = &self.recipes.families;
        let before = families.built(&build.team, &build.name, &build.tags, &built, &build.id);
        super::remove_unless_used(engine, before.map_err(super::not_kept)?).await;
        Ok(())
    }

    fn say(&self, step: &str, message: String) {
        self.build.log.say(step, "info", message);
    }
}

impl Recipes {
    /// The template of ours that a build begins with.
    pub(super) fn base(&self, engine: &Engine, wanted: &str) -> Result<String, ApiError> {
        let resolved = self.resolve(engine, wanted);
        let wanted = resolved
            .as_deref()
            .unwrap_or_else(|| translate::template_reference(wanted));
        let template = engine.template(wanted);
        let template = template.map_err(|error| translate::error(&error))?;
        Ok(template.id.to_string())
    }
}

impl Shell {
    /// A command as SDKs run them.
    fn command(&self, command: &str) -> Command {
        let mut shell = Command::new("/bin/bash").args(["-l", "-c", command]);
        shell.env = self.env.clone();
        shell.cwd = self.workdir.clone();
        shell
    }

    fn agent_of_user(&self) -> AgentClient {
        let agent = self.agent.clone();
        match &self.user {
            Some(user) => agent.with_user(user),
            None => agent,
        }
    }

    /// Where commands run now.
    async fn here(&self) -> Result<String, String> {
        match &self.workdir {
            Some(workdir) => Ok(workdir.clone()),
            None => self.ask("pwd").await,
        }
    }

    /// Who runs commands if nobody is named.
    async fn who(&self) -> Result<String, String> {
        self.ask("id -un").await
    }

    async fn ask(&self, question: &str) -> Result<String, String> {
        let command = self.command(question);
        let answer = self.agent_of_user().run_keeping(command, ANSWER_MAX).await;
        let answer = answer.map_err(|error| error.to_string())?;
        Ok(String::from_utf8_lossy(&answer.stdout)
            .trim_end()
            .to_owned())
    }

    /// Puts an archive into the sandbox.
    async fn send(&self, archive: &Path) -> Result<(), String> {
        let file = tokio::fs::File::open(archive).await;
        let file = file.map_err(|error| format!("{}: {error}", archive.display()))?;
        let upload = Upload {
            path: ARCHIVE.to_owned(),
            ..Upload::default()
        };
        let content = tokio_util::io::ReaderStream::new(file).into_stream();
        let agent = self.agent.clone().with_user("root");
        let sent = agent.write_file(&upload, content).await;
        sent.map(drop).map_err(|error| error.to_string())
    }
}

/// Lines of a stream of bytes.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The longest line that is waited for.
    const LONGEST: usize = 16 << 10;

    fn add(&mut self, bytes: &[u8], mut say: impl FnMut(String)) {
        self.0.extend_from_slice(bytes);
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            say(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
        if self.0.len() > Self::LONGEST {
            self.end(say);
        }
    }

    fn end(&mut self, mut say: impl FnMut(String)) {
        if !self.0.is_empty() {
            say(String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned());
        }
    }
}

fn at(step: &str) -> impl Fn(ApiError) -> Failed {
    let step = step.to_owned();
    move |error| {
        let body = error.into_body();
        let mut message = body.message;
        for cause in body.causes {
            message.push_str(": ");
            message.push_str(&cause);
        }
        Failed {
            step: step.clone(),
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_their_bytes_do() {
        let mut lines = Lines::default();
        let mut said = Vec::new();
        for piece in ["a", "b\nc", "\n\nd"] {
            lines.add(piece.as_bytes(), |line| said.push(line));
        }
        lines.end(|line| said.push(line));
        assert_eq!(said, ["ab", "c", "", "d"]);
    }
}
