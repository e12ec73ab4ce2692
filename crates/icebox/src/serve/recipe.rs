//! Templates that are built by steps in a sandbox, as E2B's SDKs build them.
//!
//! ```text
//!   request ─► waiting ── start ─► building ─► ready
//!                 │                   sandbox of what it begins with ─► steps ─► start command ─► snapshot
//!              archives                     └─────────── failed: ─► error, and nothing is left
//! ```
//! A build belongs to nobody's connection: it goes on when its client goes, and its log is there to be asked for. What is
//! built is a snapshot template of ours like any other. What it is called by its users, a name and tags that move from one
//! build to the next, is in [`family`].

mod family;
mod files;
mod log;
mod run;
mod step;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::StatusCode;
use icebox_api::types::{
    AssignTags, AssignedTags, BuildState, BuildStatus, NewRecipe, RemoveTags, RequestedBuild,
    StartBuild, TemplateTag,
};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::host::Egress;
use icebox_engine::id::{Name, Team, TemplateId};
use icebox_engine::manifest::v1::Template;
use icebox_engine::{Engine, Scope, unit::Geometry};
use serde::{Deserialize, Serialize};

use super::translate;
use family::{Families, Reference};
use files::Files;
use log::Log;
use run::Run;

/// How many builds of a team are remembered after their end.
const REMEMBERED: usize = 100;
/// How many names a team's builds may have, and each of them tags: all of them are in one file.
const NAMES_MAX: usize = 1000;
const TAGS_MAX: usize = 100;
/// Where they are, in the data directory.
const BUILDS: &str = "builds";
/// The format of their files.
const FORMAT: u32 = 1;

/// All builds, and what is known of their names.
pub(super) struct Recipes {
    egress: Egress,
    families: Families,
    files: Files,
    directory: PathBuf,
    builds: Mutex<BTreeMap<String, Arc<Build>>>,
}

/// One build.
#[derive(Serialize, Deserialize)]
struct Build {
    format: u32,
    id: String,
    /// When it was asked for, to forget the oldest.
    number: usize,
    template: String,
    team: Team,
    name: String,
    tags: Vec<String>,
    vcpus: Option<u8>,
    mem_mib: Option<u32>,
    #[serde(skip)]
    log: Log,
}

impl Recipes {
    /// Reads what is known of names and builds in `data`.
    ///
    /// # Errors
    /// What is known of names is damaged.
    pub(super) fn open(data: &Path, egress: Egress) -> std::io::Result<Self> {
        Ok(Self {
            egress,
            families: Families::open(data)?,
            files: Files::new(data),
            builds: Mutex::new(remembered(&data.join(BUILDS))),
            directory: data.join(BUILDS),
        })
    }

    /// Where archives are put.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// `None` if a team has sent the archive of this hash; else where it is to be put.
    pub(super) fn admit_files(
        &self,
        engine: &Engine,
        hash: &str,
    ) -> Result<Option<String>, ApiError> {
        self.files.admit(&team(engine), hash)
    }

    /// The template that a user's words lead to, if they are about one that was built by steps.
    pub(super) fn resolve(&self, engine: &Engine, wanted: &str) -> Option<String> {
        if names_a_team(engine, wanted) {
            return None;
        }
        self.families.resolve(&team(engine), &read(engine, wanted))
    }

    /// The id of what has this name, whether or not it is built yet, if it is one that is built by steps.
    pub(super) fn find(&self, engine: &Engine, wanted: &str) -> Option<String> {
        if names_a_team(engine, wanted) {
            return None;
        }
        let reference = read(engine, wanted);
        self.families.find(&team(engine), reference.name)
    }

    /// The name that a template was built under, without tags.
    pub(super) fn name_of(&self, template: &TemplateId) -> Option<String> {
        self.families.name_of(template.as_str())
    }

    /// What a template is called, with tags.
    pub(super) fn names_of(&self, template: &str) -> Vec<String> {
        self.families.names_of(template)
    }

    /// Begins a build, which waits for its steps.
    pub(super) fn request(
        &self,
        engine: &Engine,
        new: &NewRecipe,
    ) -> Result<RequestedBuild, ApiError> {
        let wanted = read(engine, &new.name);
        let name = translate::name(wanted.name)?;
        let team = team(engine);
        self.require_own_name(engine, &name)?;
        let mut tags = vec![wanted.tag_or_default().to_owned()];
        for tag in new.tags.iter().flatten() {
            if !tags.contains(tag) {
                tags.push(tag.clone());
            }
        }
        for tag in &tags {
            translate::name(tag)?;
        }
        self.require_room_for(&team, name.as_str(), &tags)?;
        let template = self
            .families
            .id_of(&team, name.as_str())
            .map_err(not_kept)?;
        let mut builds = lock(&self.builds);
        let mut build = Build {
            format: FORMAT,
            id: family::uuid(),
            number: builds.values().map(|it| it.number + 1).max().unwrap_or(0),
            template,
            team,
            name: name.to_string(),
            tags,
            vcpus: translate::vcpus(new.cpu_count)?,
            mem_mib: translate::mem_mib(new.memory_mb)?,
            log: Log::default(),
        };
        let requested = RequestedBuild {
            template_id: build.template.clone(),
            build_id: build.id.clone(),
            public: false,
            names: vec![build.name.clone()],
            tags: build.tags.clone(),
            aliases: vec![build.name.clone()],
        };
        build.log = self.new_log(&build).map_err(not_kept)?;
        let team = build.team.clone();
        builds.insert(build.id.clone(), Arc::new(build));
        self.forget_oldest(&team, &mut builds);
        Ok(requested)
    }

    fn new_log(&self, build: &Build) -> std::io::Result<Log> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)?;
        Log::create(&self.directory.join(&build.id), build)
    }

    /// Refuses a new name to a team that has as many as it may, and new tags to a name.
    fn require_room_for(&self, team: &Team, name: &str, tags: &[String]) -> Result<(), ApiError> {
        let full = |message: String| {
            Err(ApiError::new(ErrorCode::LimitReached, message)
                .hint("remove what nobody needs any more, or take a name and tags that are there"))
        };
        let known = self.families.tags(team, &Reference::read(name));
        if known.is_none() && self.families.count(team) >= NAMES_MAX {
            return full(format!(
                "team {} has {NAMES_MAX} names of templates",
                team.as_str()
            ));
        }
        let known = known.unwrap_or_default();
        let is_new = |tag: &&String| !known.iter().any(|it| it.tag == **tag);
        if known.len() + tags.iter().filter(is_new).count() > TAGS_MAX {
            return full(format!("template {name} may have {TAGS_MAX} tags"));
        }
        Ok(())
    }

    fn forget_oldest(&self, team: &Team, builds: &mut BTreeMap<String, Arc<Build>>) {
        while builds.values().filter(|it| it.team == *team).count() > REMEMBERED {
            let idle = builds
                .values()
                .filter(|it| it.team == *team && it.log.state() != BuildState::Building);
            let Some(oldest) = idle.min_by_key(|it| it.number).map(|it| it.id.clone()) else {
                return;
            };
            builds.remove(&oldest);
            if let Err(error) = std::fs::remove_file(self.directory.join(&oldest)) {
                tracing::warn!(%error, build = oldest, "a build's log stays");
            }
        }
    }

    /// Refuses a name that a template has which has no tags.
    fn require_own_name(&self, engine: &Engine, name: &Name) -> Result<(), ApiError> {
        let team = team(engine);
        let is_ours = self.families.find(&team, name.as_str()).is_some();
        let has = |it: &Template| it.team == team && it.name == *name;
        if is_ours || !engine.templates().iter().any(has) {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::AlreadyExists,
            format!("a template called {name} exists, and was not built by steps"),
        )
        .hint("choose another name, or remove the template first"))
    }

    /// What a snapshot is called that is to be had by a name with a tag; `None` if that is no name with a tag.
    ///
    /// # Errors
    /// It can be nothing's name, or is another template's.
    pub(super) fn name_for_tag(
        &self,
        engine: &Engine,
        wanted: &str,
    ) -> Result<Option<Name>, ApiError> {
        let reference = read(engine, wanted);
        let Some(tag) = reference.other_tag() else {
            return Ok(None);
        };
        translate::name(tag)?;
        self.require_own_name(engine, &translate::name(reference.name)?)?;
        own_name(reference.name, &family::uuid()).map(Some)
    }

    /// Has a name with a tag lead to a snapshot, whatever it led to before.
    pub(super) async fn tag_snapshot(
        &self,
        engine: &Engine,
        wanted: &str,
        template: &TemplateId,
    ) -> Result<(), ApiError> {
        let (team, reference) = (team(engine), read(engine, wanted));
        let tags = [reference.tag_or_default().to_owned()];
        let families = &self.families;
        self.require_room_for(&team, reference.name, &tags)?;
        families.id_of(&team, reference.name).map_err(not_kept)?;
        let build = family::uuid();
        let before = families.built(&team, reference.name, &tags, template.as_str(), &build);
        remove_unless_used(engine, before.map_err(not_kept)?).await;
        Ok(())
    }

    /// Tells a build what to do, and lets it begin.
    pub(super) fn start(
        self: &Arc<Self>,
        engine: &Engine,
        id: &str,
        what: StartBuild,
    ) -> Result<(), ApiError> {
        let build = self.build(engine, id)?;
        self.require_no_registry(engine, &what)?;
        let run = Run::new(engine.clone(), Arc::clone(self), Arc::clone(&build), what)?;
        if !build.log.begin() {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                format!("build {id} does not wait: it has begun before"),
            ));
        }
        tokio::spawn(run.carry_out());
        Ok(())
    }

    /// Refuses to begin with an image from elsewhere: those that there are here are templates.
    fn require_no_registry(&self, engine: &Engine, what: &StartBuild) -> Result<(), ApiError> {
        let (Some(image), None) = (&what.from_image, &what.from_template) else {
            return Ok(());
        };
        let is_unknown = |error: &ApiError| error.body().error_code == Some(ErrorCode::NotFound);
        let found = self.base(engine, image_name(image));
        if what.from_image_registry.is_none() && !found.as_ref().is_err_and(is_unknown) {
            return found.map(drop);
        }
        let message =
            format!("images are not taken from registries here, so there is no {image:?}");
        Err(ApiError::new(ErrorCode::Unsupported, message)
            .status(StatusCode::NOT_IMPLEMENTED)
            .hint(
                "begin with a template, or build one of the image's name: `icebox template build`",
            ))
    }

    /// How a build goes, with at most `limit` lines of its log.
    pub(super) fn status(
        &self,
        engine: &Engine,
        id: &str,
        offset: usize,
        limit: usize,
    ) -> Result<BuildStatus, ApiError> {
        let build = self.build(engine, id)?;
        let (status, log_entries, reason) = build.log.read(offset, limit);
        Ok(BuildStatus {
            logs: Vec::new(),
            log_entries,
            template_id: build.template.clone(),
            build_id: build.id.clone(),
            status,
            reason,
        })
    }

    fn build(&self, engine: &Engine, id: &str) -> Result<Arc<Build>, ApiError> {
        let found = lock(&self.builds).get(id).cloned();
        let found = found.filter(|it| engine.scope().owns(&it.team));
        found.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("build {id:?} does not exist"))
                .hint(format!("the newest {REMEMBERED} builds are remembered"))
        })
    }

    /// The tags of a template. One that was not built by steps has the one that is meant where none is named.
    pub(super) fn tags(
        &self,
        engine: &Engine,
        template: &str,
    ) -> Result<Vec<TemplateTag>, ApiError> {
        let reference = read(engine, template);
        let own = self.families.tags(&team(engine), &reference);
        if let Some(tags) = own.filter(|_| !names_a_team(engine, template)) {
            return Ok(tags);
        }
        let found = engine.template(translate::template_reference(template));
        let found = found.map_err(|error| translate::error(&error))?;
        Ok(vec![TemplateTag {
            tag: family::DEFAULT.to_owned(),
            build_id: family::uuid_of(found.id.as_str()),
            created_at: found.created_at,
        }])
    }

    /// Gives tags to what another leads to.
    pub(super) fn assign(
        &self,
        engine: &Engine,
        asked: &AssignTags,
    ) -> Result<AssignedTags, ApiError> {
        if asked.tags.is_empty() {
            return Err(ApiError::new(ErrorCode::Invalid, "no tag is given"));
        }
        for tag in &asked.tags {
            translate::name(tag)?;
        }
        let target = read(engine, &asked.target);
        if self.families.find(&team(engine), target.name).is_some() {
            self.require_room_for(&team(engine), target.name, &asked.tags)?;
        }
        let assigned = self.families.assign(&team(engine), &target, &asked.tags);
        let build_id = assigned
            .map_err(not_kept)?
            .ok_or_else(|| unknown(&asked.target))?;
        Ok(AssignedTags {
            tags: asked.tags.clone(),
            build_id,
        })
    }

    /// Takes tags away. What nothing leads to any more goes, unless it is in use.
    pub(super) async fn untag(&self, engine: &Engine, asked: &RemoveTags) -> Result<(), ApiError> {
        if asked.tags.iter().any(|tag| tag == family::DEFAULT) {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                format!(
                    "the tag {:?} stays as long as its template",
                    family::DEFAULT
                ),
            ));
        }
        let orphans = self
            .families
            .untag(&team(engine), read(engine, &asked.name).name, &asked.tags)
            .map_err(not_kept)?
            .ok_or_else(|| unknown(&asked.name))?;
        remove_unless_used(engine, orphans).await;
        Ok(())
    }

    /// Removes a template with everything that was built under its name, or only what a tag of it leads to; `None` if it
    /// was not built by steps.
    pub(super) async fn remove(
        &self,
        engine: &Engine,
        wanted: &str,
    ) -> Option<Result<String, ApiError>> {
        if names_a_team(engine, wanted) {
            return None;
        }
        let reference = read(engine, wanted);
        let id = self.families.find(&team(engine), reference.name)?;
        if let Some(tag) = reference.other_tag() {
            let removed = self.remove_tagged(engine, &reference, tag).await;
            return Some(removed);
        }
        for template in self.families.templates(&id) {
            if let Err(error) = engine.remove_template(&template).await {
                let error = translate::error(&error);
                if error.body().error_code != Some(ErrorCode::NotFound) {
                    return Some(Err(error));
                }
            }
        }
        Some(self.families.remove(&id).map(|()| id).map_err(not_kept))
    }
}

impl Recipes {
    /// Removes what a tag leads to, unless another one does, too; and the tag; and with the last of them the name.
    async fn remove_tagged(
        &self,
        engine: &Engine,
        wanted: &Reference<'_>,
        tag: &str,
    ) -> Result<String, ApiError> {
        let (team, families) = (team(engine), &self.families);
        let template = families.resolve(&team, wanted);
        let template = template.ok_or_else(|| unknown(&format!("{}:{tag}", wanted.name)))?;
        if families.names_of(&template).len() == 1
            && let Err(error) = engine.remove_template(&template).await
        {
            let error = translate::error(&error);
            if error.body().error_code != Some(ErrorCode::NotFound) {
                return Err(error);
            }
        }
        let untagged = families.untag(&team, wanted.name, &[tag.to_owned()]);
        untagged.map_err(not_kept)?;
        if let Some(id) = families.find(&team, wanted.name)
            && families.tags(&team, wanted).is_some_and(|it| it.is_empty())
        {
            families.remove(&id).map_err(not_kept)?;
        }
        Ok(template)
    }
}

/// What a template is itself called that has its name and tag in a family: no other one's name.
fn own_name(family: &str, build: &str) -> Result<Name, ApiError> {
    let short = build.get(..8).unwrap_or(build);
    // Leaves room for the rest of a name.
    let family: String = family.chars().take(40).collect();
    translate::name(&format!("{family}.{short}"))
}

/// Whether an administrator means what a team has, which is known by what it is itself called.
fn names_a_team(engine: &Engine, wanted: &str) -> bool {
    *engine.scope() == Scope::Everything && wanted.contains('/')
}

/// Whose names are meant.
fn team(engine: &Engine) -> Team {
    engine.scope().team()
}

/// What a user's words mean among those names. Another team's are not among them.
fn read<'a>(engine: &Engine, text: &'a str) -> Reference<'a> {
    Reference::read(translate::of_own(engine.scope(), text))
}

/// An image's name says where it comes from; here that is this host: E2B's `e2bdev/base` is `base`.
fn image_name(image: &str) -> &str {
    image.rsplit('/').next().unwrap_or(image)
}

async fn remove_unless_used(engine: &Engine, templates: Vec<String>) {
    for template in templates {
        if let Err(error) = engine.remove_template(&template).await {
            tracing::info!(%error, template, "what was built before stays");
        }
    }
}

/// The builds of earlier daemons. One that cannot be read is left out: it is not worth a daemon that does not start.
fn remembered(directory: &Path) -> BTreeMap<String, Arc<Build>> {
    let mut builds = BTreeMap::new();
    for file in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match Log::open::<Build>(&file.path()) {
            Ok((build, log)) if build.format == FORMAT && file.file_name() == *build.id => {
                builds.insert(build.id.clone(), Arc::new(Build { log, ..build }));
            }
            Ok(_) => tracing::warn!(file = %file.path().display(), "the log of no build of ours"),
            Err(error) => {
                tracing::warn!(%error, file = %file.path().display(), "a build's log is unreadable");
            }
        }
    }
    builds
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown(template: &str) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("template {template:?} was not built by steps here"),
    )
}

fn not_kept(error: std::io::Error) -> ApiError {
    ApiError::from_error(ErrorCode::Internal, &error)
        .hint("the names of templates could not be kept")
}

/// Of what the geometry of a build's sandbox is made.
fn geometry(build: &Build, of: Geometry) -> Geometry {
    Geometry {
        vcpus: build.vcpus.unwrap_or(of.vcpus),
        mem_mib: build.mem_mib.unwrap_or(of.mem_mib),
    }
}
