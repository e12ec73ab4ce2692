//! What is done to sandboxes, what goes wrong meanwhile, and how it ends.

use std::time::Duration;

use icebox_engine::id::{GenerationNo, Name, SandboxId};
use icebox_engine::manifest::v1::Point;
use icebox_engine::{Engine, Error, LifetimeChange, Limit, Phase, Step, Verb};
use icebox_sim::World;
use icebox_sim::fault::{Fault, Kind, When};
use jiff::SignedDuration;
use rand::RngExt as _;

use super::{FAULTS_WITHIN, IDLE, Play, SANDBOXES};
use crate::support::{IMAGE, named};

/// What is done next.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Verb(Verb, SandboxId),
    ResumeGeneration(SandboxId, GenerationNo),
    Rollback(SandboxId, Point, bool),
    Forget(SandboxId, Point),
    /// It has this idle time from now on, or none.
    Idle(SandboxId, Option<Duration>),
    /// Somebody wants to talk to its guest.
    Wake(SandboxId),
    Snapshot(SandboxId, Name),
    Flatten(SandboxId, Name),
    Fork(SandboxId, u16),
    Create(Name, Name),
    RemoveTemplate(Name),
    Collect,
    /// The VMM is killed, and nothing is asked for.
    Crash(SandboxId),
    PowerOff(SandboxId),
    /// The daemon is killed while it does nothing.
    Restart,
    SetClock(i64),
}

/// What goes wrong meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    Nothing,
    Fault(Fault),
    /// The VMM of the sandbox that something is done to is killed before this step.
    VmmEnds(usize),
}

/// How an act ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was answered, and so many sandboxes were made by it.
    Well(usize),
    Refused(Error),
    /// Nobody waited for the answer.
    Unheard,
    /// The daemon was killed.
    Killed,
}

impl Act {
    pub(crate) fn subject(&self) -> Option<&SandboxId> {
        match self {
            Self::Verb(_, id)
            | Self::ResumeGeneration(id, _)
            | Self::Rollback(id, ..)
            | Self::Forget(id, _)
            | Self::Idle(id, _)
            | Self::Wake(id)
            | Self::Snapshot(id, _)
            | Self::Flatten(id, _)
            | Self::Fork(id, _)
            | Self::Crash(id)
            | Self::PowerOff(id) => Some(id),
            _ => None,
        }
    }

    pub(crate) fn verb(&self) -> Option<Verb> {
        Some(match self {
            Self::Verb(verb, _) => *verb,
            Self::ResumeGeneration(..) => Verb::ResumeGeneration,
            Self::Rollback(..) => Verb::Rollback,
            Self::Forget(..) => Verb::Forget,
            Self::Snapshot(..) => Verb::Snapshot,
            Self::Flatten(..) => Verb::Flatten,
            Self::Fork(..) => Verb::Fork,
            _ => return None,
        })
    }

    /// The point of its sandbox's history that it goes to.
    pub(crate) fn goes_to(&self) -> Option<Point> {
        match self {
            Self::ResumeGeneration(_, number) => Some(Point::Generation(*number)),
            Self::Rollback(_, to, _) => Some(to.clone()),
            _ => None,
        }
    }

    /// Where it leads from here, if it does anything.
    pub(crate) fn leads(&self, from: Phase) -> Phase {
        match (self, self.verb().map(|verb| verb.from(from))) {
            (Self::Wake(_), _) if from == Phase::Paused => Phase::Running,
            (Self::Rollback(_, _, true), _) => Phase::Running,
            (Self::Rollback(_, Point::Branch(_), false), _) => Phase::Stopped,
            (_, Some(Ok(Step::To(phase)))) => phase,
            _ => from,
        }
    }

    /// The template that it makes.
    pub(crate) fn makes(&self) -> Option<&Name> {
        match self {
            Self::Snapshot(_, name) | Self::Flatten(_, name) => Some(name),
            _ => None,
        }
    }

    pub(crate) async fn run(self, world: &World, engine: &Engine) -> Result<usize, Error> {
        match self {
            Self::Verb(verb, id) => {
                let id = id.as_str();
                match verb {
                    Verb::Start => engine.start(id).await.map(drop),
                    Verb::Pause => engine.pause(id).await.map(drop),
                    Verb::Resume => engine.resume(id, None).await.map(drop),
                    Verb::Stop => engine.stop(id).await.map(drop),
                    Verb::Checkpoint => engine.checkpoint(id).await.map(drop),
                    _ => engine.destroy(id).await,
                }?;
            }
            Self::ResumeGeneration(id, number) => {
                engine.resume(id.as_str(), Some(number)).await?;
            }
            Self::Rollback(id, to, run) => {
                engine.rollback(id.as_str(), to, run).await?;
            }
            Self::Forget(id, point) => engine.forget(id.as_str(), point).await?,
            Self::Idle(id, time) => {
                let change = LifetimeChange {
                    idle: Some(time.map_or(Limit::Never, Limit::After)),
                    auto_resume: Some(time.is_some()),
                    ..LifetimeChange::default()
                };
                engine.set_lifetime(id.as_str(), change).await?;
            }
            Self::Wake(id) => drop(engine.route_awake(id.as_str()).await?),
            Self::Snapshot(id, name) => drop(engine.snapshot(id.as_str(), name).await?),
            Self::Flatten(id, name) => drop(engine.flatten(id.as_str(), name).await?),
            Self::Fork(id, count) => {
                let forks = engine.fork(id.as_str(), count).await?;
                return Ok(forks.into_iter().filter(Result::is_ok).count());
            }
            Self::Create(template, name) => {
                engine
                    .create(named(template.as_str(), name.as_str()))
                    .await?;
                return Ok(1);
            }
            Self::RemoveTemplate(name) => drop(engine.remove_template(name.as_str()).await?),
            Self::Collect => drop(engine.collect(false).await?),
            Self::Crash(id) => world.crash_vmm(&id),
            Self::PowerOff(id) => world.power_off(&id),
            Self::Restart => {}
            Self::SetClock(seconds) => world.step_clock(SignedDuration::from_secs(seconds)),
        }
        Ok(0)
    }
}

impl Play {
    pub(super) fn pick(&mut self) -> Option<usize> {
        let count = self.model.sandboxes.len();
        (count > 0).then(|| self.random.random_range(0..count))
    }

    pub(super) fn next_act(&mut self) -> Act {
        let few = self.model.sandboxes.len() < SANDBOXES;
        let Some(at) = self
            .pick()
            .filter(|_| !(few && self.random.random_range(0..3) == 0))
        else {
            let templates: Vec<_> = self.model.templates.keys().cloned().collect();
            let template = templates[self.random.random_range(0..templates.len())].clone();
            return Act::Create(template, self.name("s"));
        };
        let (id, rests) = (
            self.model.sandboxes[at].id.clone(),
            self.model.sandboxes[at].rests,
        );
        let known = &self.model.sandboxes[at];
        let idles = known.idles;
        let generations: Vec<_> = known.generations.keys().copied().collect();
        let branches = known.branches.keys().cloned().map(Point::Branch);
        let points = generations.iter().copied().map(Point::Generation);
        let points: Vec<_> = points.chain(branches).collect();
        if !few && self.chance(4) {
            return Act::Verb(Verb::Destroy, id);
        }
        if self.chance(20) {
            // Whatever it makes of it.
            let verbs = [
                Verb::Start,
                Verb::Pause,
                Verb::Resume,
                Verb::Stop,
                Verb::Checkpoint,
            ];
            return Act::Verb(verbs[self.random.random_range(0..verbs.len())], id);
        }
        match self.random.random_range(0..32) {
            0 => Act::Collect,
            1 => Act::Restart,
            2 => Act::SetClock(self.random.random_range(-100_000..100_000)),
            3 | 4 if self.model.templates.len() > 1 => {
                let made: Vec<_> = self.model.templates.keys().cloned().collect();
                let name = made[self.random.random_range(0..made.len())].clone();
                if name.as_str() == IMAGE {
                    Act::Collect
                } else {
                    Act::RemoveTemplate(name)
                }
            }
            5 if rests == Phase::Running => Act::Crash(id),
            6 if rests == Phase::Running => Act::PowerOff(id),
            7 | 8 if rests != Phase::Stopped && few => {
                Act::Fork(id, self.random.random_range(1..4))
            }
            9 | 10 if rests != Phase::Stopped => Act::Snapshot(id, self.name("t")),
            11 => Act::Flatten(id, self.name("t")),
            12..15 if rests != Phase::Running && !generations.is_empty() => {
                let number = generations[self.random.random_range(0..generations.len())];
                Act::ResumeGeneration(id, number)
            }
            15 => Act::Verb(Verb::Destroy, id),
            16 => Act::Verb(Verb::Stop, id),
            17 | 18 if rests == Phase::Running => Act::Verb(Verb::Checkpoint, id),
            19..22 if !points.is_empty() => {
                let to = points[self.random.random_range(0..points.len())].clone();
                Act::Rollback(id, to, self.chance(2))
            }
            22 if !points.is_empty() => {
                let point = points[self.random.random_range(0..points.len())].clone();
                Act::Forget(id, point)
            }
            23 => Act::Idle(id, (!idles).then_some(IDLE)),
            24 | 25 if idles => Act::Wake(id),
            _ => match rests {
                Phase::Running => Act::Verb(Verb::Pause, id),
                Phase::Paused => Act::Verb(Verb::Resume, id),
                Phase::Stopped => Act::Verb(Verb::Start, id),
            },
        }
    }

    pub(super) fn next_trouble(&mut self, act: &Act) -> Trouble {
        if self.chance(2) || matches!(act, Act::Restart | Act::SetClock(_)) {
            return Trouble::Nothing;
        }
        let at = self.random.random_range(0..FAULTS_WITHIN);
        let kinds = [
            Kind::Fail,
            Kind::Full,
            Kind::Crash,
            Kind::Crash,
            Kind::Panic,
            Kind::Cancel,
        ];
        match self.random.random_range(0..7) {
            6 => Trouble::VmmEnds(at),
            kind => Trouble::Fault(Fault {
                at,
                when: if self.chance(2) {
                    When::Before
                } else {
                    When::After
                },
                kind: kinds[kind],
            }),
        }
    }
}
