//! One verb on one sandbox in one phase: what comes before it, the verb, and where it may end.

use icebox_engine::id::GenerationNo;
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::Point;
use icebox_engine::{Engine, Error, Phase, SandboxView};
use icebox_sim::World;

use crate::support::{IMAGE, create, import_image, named};

/// The snapshot template of the scenes that have one.
const SNAPSHOT: &str = "warm";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scene {
    CreateFromImage,
    CreateFromSnapshot,
    PauseFirst,
    PauseSecond,
    Resume,
    ResumeGeneration,
    RollbackRunning,
    RollbackAndResume,
    RollbackPaused,
    RollbackStopped,
    RollbackToBranch,
    RollbackPausedToBranch,
    StopRunning,
    StopPaused,
    Start,
    Checkpoint,
    ForgetGeneration,
    ForgetBranch,
    SnapshotRunning,
    SnapshotPaused,
    ForkRunning,
    ForkPaused,
    FlattenRunning,
    FlattenPaused,
    FlattenStopped,
    DestroyRunning,
    DestroyPaused,
    DestroyStopped,
    RemoveTemplate,
}

use Scene::*;

impl Scene {
    /// Where the sandbox `subject` rests before the verb; `None` if it does not exist.
    pub(crate) fn before(self) -> Option<Phase> {
        match self {
            CreateFromImage | CreateFromSnapshot => None,
            PauseFirst | PauseSecond | RollbackRunning | RollbackAndResume | RollbackToBranch
            | StopRunning | Checkpoint | ForgetGeneration | SnapshotRunning | ForkRunning
            | FlattenRunning | DestroyRunning | RemoveTemplate => Some(Phase::Running),
            Resume
            | RollbackPaused
            | RollbackPausedToBranch
            | StopPaused
            | SnapshotPaused
            | ForkPaused
            | FlattenPaused
            | DestroyPaused => Some(Phase::Paused),
            Start | ResumeGeneration | RollbackStopped | ForgetBranch | FlattenStopped
            | DestroyStopped => Some(Phase::Stopped),
        }
    }

    /// Where it rests after it.
    pub(crate) fn after(self) -> Option<Phase> {
        match self {
            CreateFromImage | CreateFromSnapshot | Resume | ResumeGeneration | Start => {
                Some(Phase::Running)
            }
            PauseFirst | PauseSecond | RollbackRunning | RollbackStopped => Some(Phase::Paused),
            RollbackToBranch | RollbackPausedToBranch | StopRunning | StopPaused => {
                Some(Phase::Stopped)
            }
            DestroyRunning | DestroyPaused | DestroyStopped => None,
            _ => self.before(),
        }
    }

    /// Where it may rest after a crash on the way, besides these two. A resume of a sandbox's earlier generation
    /// passes through `Paused`, with the newest disk kept as a branch.
    pub(crate) fn between(self) -> Option<Phase> {
        matches!(self, ResumeGeneration | RollbackAndResume).then_some(Phase::Paused)
    }

    /// Whether the newest disk is set aside: once that is written down, it is, and the phase with it.
    pub(crate) fn sets_aside(self) -> bool {
        matches!(
            self,
            ResumeGeneration
                | RollbackRunning
                | RollbackAndResume
                | RollbackStopped
                | RollbackToBranch
        )
    }

    pub(crate) fn creates(self) -> bool {
        matches!(self, CreateFromImage | CreateFromSnapshot)
    }

    pub(crate) fn destroys(self) -> bool {
        matches!(self, DestroyRunning | DestroyPaused | DestroyStopped)
    }

    pub(crate) async fn set(self, world: &World, engine: &Engine) {
        import_image(world, engine).await;
        if matches!(self, CreateFromSnapshot) {
            create(engine, "origin").await;
            write(world, engine);
            engine
                .snapshot("origin", SNAPSHOT.parse().unwrap())
                .await
                .unwrap();
            engine.destroy("origin").await.unwrap();
        }
        if self.before().is_none() {
            return;
        }
        create(engine, "subject").await;
        write(world, engine);
        if matches!(
            self,
            PauseSecond
                | ResumeGeneration
                | RollbackRunning
                | RollbackAndResume
                | RollbackPaused
                | RollbackStopped
                | RollbackToBranch
                | RollbackPausedToBranch
                | ForgetGeneration
                | ForgetBranch
        ) {
            engine.pause("subject").await.unwrap();
            engine.resume("subject", None).await.unwrap();
            // What a generation has not.
            if self != PauseSecond {
                write(world, engine);
            }
        }
        if matches!(
            self,
            RollbackToBranch | RollbackPausedToBranch | ForgetBranch
        ) {
            let to = Point::Generation(GenerationNo(1));
            engine.rollback("subject", to, true).await.unwrap();
            write(world, engine);
        }
        if matches!(self, ForgetGeneration) {
            engine.checkpoint("subject").await.unwrap();
        }
        match self.before() {
            Some(Phase::Paused) => drop(engine.pause("subject").await.unwrap()),
            Some(Phase::Stopped) => drop(engine.stop("subject").await.unwrap()),
            _ => {}
        }
        if matches!(self, RemoveTemplate) {
            engine
                .snapshot("subject", SNAPSHOT.parse().unwrap())
                .await
                .unwrap();
        }
    }

    /// Looks at a guest that runs: it has what its user was told is safe, or that is kept for it.
    pub(crate) fn look(self, world: &World, view: &SandboxView) {
        let value = world.guest_value(&view.record.id).unwrap();
        let mark = World::mark_in(value);
        let (newest, older) = match self {
            // The image.
            CreateFromImage => (0, None),
            RollbackToBranch | RollbackPausedToBranch => (3, Some(2)),
            ForgetBranch => (3, None),
            ForgetGeneration => (2, None),
            RollbackPaused => (2, Some(1)),
            _ if self.sets_aside() => (2, Some(1)),
            _ => (1, None),
        };
        let went_back = || Some(mark) == older && kept(world, view).contains(&newest);
        assert!(mark == newest || went_back(), "it has {mark}: {view:?}");
    }

    pub(crate) async fn act(self, engine: &Engine) -> Result<(), Error> {
        let new = || "made".parse().unwrap();
        match self {
            CreateFromImage => engine.create(named(IMAGE, "subject")).await.map(drop),
            CreateFromSnapshot => engine.create(named(SNAPSHOT, "subject")).await.map(drop),
            PauseFirst | PauseSecond => engine.pause("subject").await.map(drop),
            Resume => engine.resume("subject", None).await.map(drop),
            ResumeGeneration => engine
                .resume("subject", Some(GenerationNo(1)))
                .await
                .map(drop),
            RollbackRunning | RollbackAndResume | RollbackPaused | RollbackStopped => {
                let (to, run) = (
                    Point::Generation(GenerationNo(1)),
                    matches!(self, RollbackAndResume),
                );
                engine.rollback("subject", to, run).await.map(drop)
            }
            RollbackToBranch | RollbackPausedToBranch => {
                let to = branch(engine);
                engine.rollback("subject", to, false).await.map(drop)
            }
            StopRunning | StopPaused => engine.stop("subject").await.map(drop),
            Checkpoint => engine.checkpoint("subject").await.map(drop),
            ForgetGeneration => {
                let point = Point::Generation(GenerationNo(1));
                engine.forget("subject", point).await
            }
            ForgetBranch => engine.forget("subject", branch(engine)).await,
            Start => engine.start("subject").await.map(drop),
            SnapshotRunning | SnapshotPaused => engine.snapshot("subject", new()).await.map(drop),
            ForkRunning | ForkPaused => {
                let forks = engine.fork("subject", 2).await?;
                forks.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
            }
            FlattenRunning | FlattenPaused | FlattenStopped => {
                engine.flatten("subject", new()).await.map(drop)
            }
            DestroyRunning | DestroyPaused | DestroyStopped => engine.destroy("subject").await,
            RemoveTemplate => engine.remove_template(SNAPSHOT).await.map(drop),
        }
    }
}

/// Has every guest that runs write something that must not be lost.
fn write(world: &World, engine: &Engine) {
    for view in engine.list() {
        if view.phase() == Phase::Running {
            world.mark(&view.record.id).unwrap();
        }
    }
}

/// The marks on the disks that a sandbox can go back to.
pub(crate) fn kept(world: &World, view: &SandboxView) -> Vec<u64> {
    let branches = view.record.branches.iter().map(|branch| &branch.layer);
    let generations = view.generations.iter().map(|it| &it.capture.layer);
    let disks = branches.chain(generations).cloned().map(Object::Layer);
    disks
        .map(|disk| World::mark_in(world.read(&disk).unwrap()))
        .collect()
}

/// The first branch of the subject.
fn branch(engine: &Engine) -> Point {
    let subject = engine.inspect("subject").unwrap();
    Point::Branch(subject.record.branches[0].name.clone())
}
