//! What is there before a verb, and the verb.

use std::collections::BTreeMap;

use icebox_engine::id::{GenerationNo, SandboxId};
use icebox_engine::manifest::v1::Point;
use icebox_engine::unit::Geometry;
use icebox_engine::{CreateRequest, Engine, Error, ImageRequest, Phase};

use crate::place::Place;

const IMAGE: &str = "image";
const SNAPSHOT: &str = "warm";
/// What the first pause wrote.
const FIRST: Point = Point::Generation(GenerationNo(1));

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scene {
    Create,
    CreateFromSnapshot,
    PauseFirst,
    PauseSecond,
    Resume,
    Rollback,
    RollbackToBranch,
    Stop,
    Start,
    Checkpoint,
    SnapshotRunning,
    SnapshotPaused,
    Fork,
    FlattenRunning,
    FlattenStopped,
    DestroyRunning,
    DestroyPaused,
}

use Scene::*;

impl Scene {
    pub(crate) const ALL: [Self; 17] = [
        Create,
        CreateFromSnapshot,
        PauseFirst,
        PauseSecond,
        Resume,
        Rollback,
        RollbackToBranch,
        Stop,
        Start,
        Checkpoint,
        SnapshotRunning,
        SnapshotPaused,
        Fork,
        FlattenRunning,
        FlattenStopped,
        DestroyRunning,
        DestroyPaused,
    ];

    /// Where the sandbox `subject` rests before the verb; `None` if it does not exist.
    pub(crate) fn before(self) -> Option<Phase> {
        match self {
            Create | CreateFromSnapshot => None,
            PauseFirst | PauseSecond | Rollback | RollbackToBranch | Stop | Checkpoint
            | SnapshotRunning | Fork | FlattenRunning | DestroyRunning => Some(Phase::Running),
            Resume | SnapshotPaused | DestroyPaused => Some(Phase::Paused),
            Start | FlattenStopped => Some(Phase::Stopped),
        }
    }

    /// Where it rests after it.
    pub(crate) fn after(self) -> Option<Phase> {
        match self {
            Create | CreateFromSnapshot | Resume | Start => Some(Phase::Running),
            PauseFirst | PauseSecond | Rollback => Some(Phase::Paused),
            RollbackToBranch | Stop => Some(Phase::Stopped),
            DestroyRunning | DestroyPaused => None,
            Checkpoint | SnapshotRunning | SnapshotPaused | Fork | FlattenRunning
            | FlattenStopped => self.before(),
        }
    }

    /// Where it rests now.
    pub(crate) fn rests(self, engine: &Engine) -> Option<Phase> {
        engine.inspect("subject").ok().map(|view| view.phase())
    }

    pub(crate) async fn set(self, place: &Place, engine: &Engine) {
        let request = ImageRequest {
            name: IMAGE.parse().unwrap(),
            geometry: Geometry {
                vcpus: 1,
                mem_mib: 128,
            },
            kernel: engine.host().kernels.default_kernel().await.unwrap(),
            env: BTreeMap::new(),
            login: icebox_engine::manifest::v1::Login::default(),
            source: "a test".into(),
        };
        engine.import_image(&place.image(), request).await.unwrap();
        if self == CreateFromSnapshot {
            engine.create(named(IMAGE, "origin")).await.unwrap();
            let name = SNAPSHOT.parse().unwrap();
            engine.snapshot("origin", name).await.unwrap();
            engine.destroy("origin").await.unwrap();
        }
        if self.before().is_none() {
            return;
        }
        engine.create(named(IMAGE, "subject")).await.unwrap();
        if matches!(self, PauseSecond | Rollback | RollbackToBranch) {
            engine.pause("subject").await.unwrap();
            engine.resume("subject", None).await.unwrap();
        }
        if self == RollbackToBranch {
            engine.rollback("subject", FIRST, true).await.unwrap();
        }
        match self.before() {
            Some(Phase::Paused) => drop(engine.pause("subject").await.unwrap()),
            Some(Phase::Stopped) => drop(engine.stop("subject").await.unwrap()),
            _ => {}
        }
    }

    pub(crate) async fn act(self, engine: &Engine) -> Result<(), Error> {
        let new = || "made".parse().unwrap();
        match self {
            Create => engine.create(named(IMAGE, "subject")).await.map(drop),
            CreateFromSnapshot => engine.create(named(SNAPSHOT, "subject")).await.map(drop),
            PauseFirst | PauseSecond => engine.pause("subject").await.map(drop),
            Resume => engine
                .resume("subject", None::<GenerationNo>)
                .await
                .map(drop),
            Rollback => engine.rollback("subject", FIRST, false).await.map(drop),
            RollbackToBranch => {
                let subject = engine.inspect("subject").unwrap();
                let branch = Point::Branch(subject.record.branches[0].name.clone());
                engine.rollback("subject", branch, false).await.map(drop)
            }
            Stop => engine.stop("subject").await.map(drop),
            Start => engine.start("subject").await.map(drop),
            Checkpoint => engine.checkpoint("subject").await.map(drop),
            SnapshotRunning | SnapshotPaused => engine.snapshot("subject", new()).await.map(drop),
            Fork => {
                let forks = engine.fork("subject", 2).await?;
                forks.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
            }
            FlattenRunning | FlattenStopped => engine.flatten("subject", new()).await.map(drop),
            DestroyRunning | DestroyPaused => engine.destroy("subject").await,
        }
    }
}

fn named(template: &str, name: &str) -> CreateRequest {
    CreateRequest {
        template: template.into(),
        name: Some(name.parse().unwrap()),
        ..CreateRequest::default()
    }
}

/// Every point that a sandbox can go back to.
pub(crate) fn points(engine: &Engine, id: &SandboxId) -> Vec<Point> {
    let record = engine.inspect(id.as_str()).unwrap().record;
    let generations = record.generations.iter().copied().map(Point::Generation);
    let branches = record.branches.iter().map(|branch| branch.name.clone());
    generations.chain(branches.map(Point::Branch)).collect()
}

/// Brings a sandbox to where its guest runs.
pub(crate) async fn run(engine: &Engine, id: &SandboxId) -> Result<(), Error> {
    match engine.inspect(id.as_str())?.phase() {
        Phase::Running => Ok(()),
        Phase::Paused => engine.resume(id.as_str(), None).await.map(drop),
        Phase::Stopped => engine.start(id.as_str()).await.map(drop),
    }
}
