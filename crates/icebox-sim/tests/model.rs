//! Random verbs under random faults, against a model of what users were told.
//!
//! Every guest is told to keep a mark, on its disk and in its memory, and the model remembers it: that is what a user knows
//! to be safe. Whatever happens then (a step that fails, on a full disk too; a bug; a VMM that dies; a daemon that is
//! killed; a client that leaves; a clock that is set), each sandbox rests where its last verb could have left it, and
//! runs with exactly the mark that the model expects: not an older one, nor another's. In the end the host holds nothing.
//!
//! A run follows from its seed, which is printed. To do one again, or a longer one:
//!
//! ```text
//!   ICEBOX_MODEL_SEED=7 ICEBOX_MODEL_STEPS=20000 ICEBOX_MODEL_TELL=1 cargo test -p icebox-sim --test model
//! ```

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use icebox_engine::host::Host;
use icebox_engine::id::{GenerationNo, Name, SandboxId, seeded};
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::Rest;
use icebox_engine::{Config, Engine, Error, Phase, SandboxView, Step, Verb};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};
use jiff::SignedDuration;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use support::{IMAGE, import_image, leave_nothing, life, named, open_with, run};

/// Which run to do instead of the usual ones.
const SEED: &str = "ICEBOX_MODEL_SEED";
/// How many verbs a run has.
const STEPS: &str = "ICEBOX_MODEL_STEPS";
/// Says each of them, with how it ended.
const TELL: &str = "ICEBOX_MODEL_TELL";
/// How many they are unless somebody says.
const USUAL_STEPS: usize = 2_000;
/// How many sandboxes there are, but for forks that go beyond.
const SANDBOXES: usize = 20;
/// How many generations, and branches, a sandbox keeps.
const KEPT: usize = 4;
/// Most verbs have as many steps. A fault that lies beyond them strikes in what follows, or not at all.
const FAULTS_WITHIN: usize = 22;

/// What a user knows of a sandbox.
struct Known {
    id: SandboxId,
    rests: Phase,
    /// What its newest state holds.
    mark: u64,
    /// What its generations hold.
    generations: BTreeMap<GenerationNo, u64>,
    /// What the disks hold that were set aside.
    branches: BTreeMap<Name, u64>,
    /// It has been asked to go, and was not gone.
    going: bool,
}

/// What a user knows of all.
#[derive(Default)]
struct Model {
    sandboxes: Vec<Known>,
    /// Templates, and what they hold.
    templates: BTreeMap<Name, u64>,
    /// Those that have been asked to go, and may have.
    going: BTreeSet<Name>,
    /// For new names.
    made: u32,
}

/// What is done next.
#[derive(Clone, Debug)]
enum Act {
    Verb(Verb, SandboxId),
    ResumeGeneration(SandboxId, GenerationNo),
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
enum Trouble {
    Nothing,
    Fault(Fault),
    /// The VMM of the sandbox that something is done to is killed before this step.
    VmmEnds(usize),
}

/// How an act ended.
#[derive(Debug)]
enum Ended {
    /// It was answered, and so many sandboxes were made by it.
    Well(usize),
    Refused(Error),
    /// Nobody waited for the answer.
    Unheard,
    /// The daemon was killed.
    Killed,
}

impl Act {
    fn subject(&self) -> Option<&SandboxId> {
        match self {
            Self::Verb(_, id)
            | Self::ResumeGeneration(id, _)
            | Self::Snapshot(id, _)
            | Self::Flatten(id, _)
            | Self::Fork(id, _)
            | Self::Crash(id)
            | Self::PowerOff(id) => Some(id),
            _ => None,
        }
    }

    fn verb(&self) -> Option<Verb> {
        Some(match self {
            Self::Verb(verb, _) => *verb,
            Self::ResumeGeneration(..) => Verb::ResumeGeneration,
            Self::Snapshot(..) => Verb::Snapshot,
            Self::Flatten(..) => Verb::Flatten,
            Self::Fork(..) => Verb::Fork,
            _ => return None,
        })
    }

    /// The template that it makes.
    fn makes(&self) -> Option<&Name> {
        match self {
            Self::Snapshot(_, name) | Self::Flatten(_, name) => Some(name),
            _ => None,
        }
    }

    async fn run(self, world: &World, engine: &Engine) -> Result<usize, Error> {
        match self {
            Self::Verb(verb, id) => {
                let id = id.as_str();
                match verb {
                    Verb::Start => engine.start(id).await.map(drop),
                    Verb::Pause => engine.pause(id).await.map(drop),
                    Verb::Resume => engine.resume(id, None).await.map(drop),
                    Verb::Stop => engine.stop(id).await.map(drop),
                    _ => engine.destroy(id).await,
                }?;
            }
            Self::ResumeGeneration(id, number) => {
                engine.resume(id.as_str(), Some(number)).await?;
            }
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

/// One run.
struct Play {
    world: World,
    injector: Injector,
    freeze: FreezeBy,
    random: StdRng,
    model: Model,
    left: usize,
    faults: usize,
    deaths: usize,
    /// Whether each act is told.
    telling: bool,
}

impl Play {
    fn host(&self) -> Host {
        inject(self.world.host(self.freeze), &self.injector)
    }

    async fn open(&self) -> Engine {
        let config = Config {
            max_layers: 6,
            keep: KEPT,
            ..Config::default()
        };
        open_with(self.host(), config).await
    }

    /// One in `n`.
    fn chance(&mut self, n: u32) -> bool {
        self.random.random_range(0..n) == 0
    }

    fn name(&mut self, kind: &str) -> Name {
        self.model.made += 1;
        format!("{kind}-{}", self.model.made).parse().unwrap()
    }

    fn pick(&mut self) -> Option<usize> {
        let count = self.model.sandboxes.len();
        (count > 0).then(|| self.random.random_range(0..count))
    }

    fn next_act(&mut self) -> Act {
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
        let generations: Vec<_> = self.model.sandboxes[at]
            .generations
            .keys()
            .copied()
            .collect();
        if !few && self.chance(4) {
            return Act::Verb(Verb::Destroy, id);
        }
        if self.chance(20) {
            // Whatever it makes of it.
            let verbs = [Verb::Start, Verb::Pause, Verb::Resume, Verb::Stop];
            return Act::Verb(verbs[self.random.random_range(0..verbs.len())], id);
        }
        match self.random.random_range(0..24) {
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
            _ => match rests {
                Phase::Running => Act::Verb(Verb::Pause, id),
                Phase::Paused => Act::Verb(Verb::Resume, id),
                Phase::Stopped => Act::Verb(Verb::Start, id),
            },
        }
    }

    fn next_trouble(&mut self, act: &Act) -> Trouble {
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

    /// Has some guests write something that must not be lost.
    fn write_marks(&mut self) {
        for at in 0..self.model.sandboxes.len() {
            let known = &self.model.sandboxes[at];
            if known.rests == Phase::Running && self.chance(2) {
                let mark = self.world.mark(&self.model.sandboxes[at].id);
                self.model.sandboxes[at].mark = mark.expect("its vCPUs run");
            }
        }
    }

    /// Does one thing, and lets everything end that follows from it.
    async fn act(&mut self, engine: &Engine, act: Act, trouble: Trouble) -> Ended {
        let fault = match trouble {
            Trouble::Nothing => None,
            Trouble::Fault(fault) => Some(fault),
            Trouble::VmmEnds(at) => Some(Fault {
                at,
                when: When::Before,
                kind: Kind::Hold,
            }),
        };
        self.injector.arm(fault);
        let subject = act.subject().cloned();
        let ended = RefCell::new(None);
        let acting = async {
            let (world, engine) = (self.world.clone(), engine.clone());
            // Some steps are taken in the caller's own task, which is the daemon's concern.
            let acting = tokio::spawn(async move { act.run(&world, &engine).await });
            let result = acting.await.unwrap_or(Err(Error::Stopping));
            *ended.borrow_mut() = Some(match result {
                Ok(made) => Ended::Well(made),
                Err(error) => Ended::Refused(error),
            });
            settle_down().await;
        };
        let mut acting = std::pin::pin!(acting);
        let reached = tokio::select! {
            biased;
            () = self.injector.reached() => true,
            () = &mut acting => false,
        };
        self.faults += usize::from(reached);
        match (reached, fault.map(|fault| fault.kind)) {
            (true, Some(Kind::Crash)) => return Ended::Killed,
            (true, Some(Kind::Hold)) => {
                self.deaths += 1;
                subject.iter().for_each(|id| self.world.crash_vmm(id));
                self.injector.go_on();
                acting.await;
            }
            (true, _) => settle_down().await,
            (false, _) => {}
        }
        self.injector.arm(None);
        ended.take().unwrap_or(Ended::Unheard)
    }

    /// Compares what there is with what a user was told, and takes in what nobody could know.
    fn compare(&mut self, engine: &Engine, act: &Act, trouble: Trouble, ended: &Ended) {
        let told = format!("{act:?} with {trouble:?} ended {ended:?}");
        let mut fresh: BTreeMap<_, _> = engine
            .list()
            .into_iter()
            .map(|view| (view.record.id.clone(), view))
            .collect();
        let mut known = std::mem::take(&mut self.model.sandboxes);
        let source = act
            .subject()
            .and_then(|id| known.iter().find(|known| known.id == *id));
        let source_mark = source.map(|known| known.mark);
        known.retain_mut(|known| {
            let is_subject = act.subject() == Some(&known.id);
            let removing = matches!(act, Act::Verb(Verb::Destroy, _)) && is_subject;
            match fresh.remove(&known.id) {
                None => {
                    assert!(removing || known.going, "{told}: {} has gone", known.id);
                    false
                }
                Some(view) => {
                    let gone = removing && matches!(ended, Ended::Well(_));
                    assert!(!gone, "{told}: {} is still there", known.id);
                    known.going |= removing;
                    let act = is_subject.then_some(act);
                    self.compare_one(known, &view, act, trouble, ended, &told);
                    true
                }
            }
        });
        let made = match ended {
            Ended::Well(made) => fresh.len() == *made,
            Ended::Refused(_) => fresh.is_empty(),
            Ended::Unheard | Ended::Killed => fresh.len() <= 3,
        };
        let makes = matches!(act, Act::Create(..) | Act::Fork(..));
        assert!(
            made && (makes || fresh.is_empty()),
            "{told}: there are also {:?}",
            fresh.keys()
        );
        for (id, view) in fresh {
            let mark = match act {
                Act::Create(template, _) => self.model.templates[template],
                _ => source_mark.unwrap(),
            };
            let first = view.record.generations.iter().map(|number| (*number, mark));
            let new = Known {
                rests: view.phase(),
                mark,
                generations: first.collect(),
                branches: BTreeMap::new(),
                going: false,
                id,
            };
            assert_eq!(new.rests, Phase::Running, "{told}");
            self.look(&new, &told);
            known.push(new);
        }
        self.model.sandboxes = known;
        self.compare_templates(engine, act, ended, source_mark, &told);
    }

    fn compare_one(
        &self,
        known: &mut Known,
        view: &SandboxView,
        act: Option<&Act>,
        trouble: Trouble,
        ended: &Ended,
        told: &str,
    ) {
        let (before, now) = (known.rests, view.phase());
        assert_eq!(view.busy, None, "{told}");
        assert_eq!(view.record.broken, None, "{told}");
        assert_eq!(view.record.intent, None, "{told}");
        assert_ne!(view.record.rests, Rest::Nowhere, "{told}");
        assert!(view.unusable.is_empty(), "{told}: {:?}", view.unusable);
        let after = act.and_then(Act::verb).map(|verb| verb.from(before));
        let after = match after {
            Some(Ok(Step::To(phase))) => phase,
            _ => before,
        };
        let ends = matches!(act, Some(Act::Crash(_) | Act::PowerOff(_)));
        let expected = match (act, ended) {
            _ if ends => now == Phase::Stopped,
            (None, _) => now == before,
            (Some(_), Ended::Well(_)) => now == after,
            (Some(Act::ResumeGeneration(..)), _) => true,
            (Some(_), _) => now == before || now == after,
        };
        let ended_under_it = act.is_some() && matches!(trouble, Trouble::VmmEnds(_));
        let stopped = ended_under_it && now == Phase::Stopped;
        assert!(
            expected || stopped,
            "{told}: {} is {now}, and was {before}",
            known.id
        );
        // What was listed is kept, but for the oldest; what is new was captured just now.
        let listed = &view.record.generations;
        let newest = known.generations.keys().next_back().copied();
        assert!(
            newest.is_none_or(|newest| listed.contains(&newest)),
            "{told}: {listed:?}"
        );
        known
            .generations
            .retain(|number, _| listed.contains(number));
        for number in listed {
            known.generations.entry(*number).or_insert(known.mark);
        }
        let branches = view.record.branches.iter();
        let mut set_aside = false;
        for branch in branches.clone() {
            set_aside |= !known.branches.contains_key(&branch.name);
            let kept = *known
                .branches
                .entry(branch.name.clone())
                .or_insert(known.mark);
            let layer = Object::Layer(branch.layer.clone());
            let value = self
                .world
                .read(&layer)
                .unwrap_or_else(|error| panic!("{told}: {error}"));
            assert_eq!(
                World::mark_in(value),
                kept,
                "{told}: branch {}",
                branch.name
            );
        }
        let had = known.branches.len();
        known
            .branches
            .retain(|name, _| branches.clone().any(|branch| branch.name == *name));
        let kept = known.branches.len();
        assert!(kept == had || kept >= KEPT, "{told}: a branch has gone");
        if let Some(Act::ResumeGeneration(_, number)) = act
            && (now == Phase::Running || set_aside || before == Phase::Paused)
            && now != Phase::Paused
        {
            known.mark = known.generations[number];
        }
        if let Rest::Paused { generation } = view.record.rests {
            known.mark = known.generations[&generation];
        }
        known.rests = now;
        self.look(known, told);
    }

    /// A guest that runs holds what it should.
    fn look(&self, known: &Known, told: &str) {
        if known.rests == Phase::Running {
            let value = self.world.guest_value(&known.id);
            let value = value.unwrap_or_else(|error| panic!("{told}: {}: {error}", known.id));
            assert_eq!(World::mark_in(value), known.mark, "{told}: {}", known.id);
        }
    }

    fn compare_templates(
        &mut self,
        engine: &Engine,
        act: &Act,
        ended: &Ended,
        source_mark: Option<u64>,
        told: &str,
    ) {
        let mut there: Vec<_> = engine.templates().into_iter().map(|it| it.name).collect();
        let well = matches!(ended, Ended::Well(_));
        if let Some(name) = act.makes() {
            let made = there.contains(name);
            assert!(made || !well, "{told}: {name} is not there");
            assert!(
                !made || !matches!(ended, Ended::Refused(_)),
                "{told}: {name} is there"
            );
            if made {
                self.model
                    .templates
                    .insert(name.clone(), source_mark.unwrap());
            }
        }
        if let Act::RemoveTemplate(name) = act {
            assert!(!well || !there.contains(name), "{told}: it is still there");
            if !matches!(ended, Ended::Refused(Error::InUse { .. })) {
                self.model.going.insert(name.clone());
            }
        }
        let gone = |name: &Name| self.model.going.contains(name) && !there.contains(name);
        self.model.templates.retain(|name, _| !gone(name));
        there.sort();
        let known: Vec<_> = self.model.templates.keys().cloned().collect();
        assert_eq!(there, known, "{told}");
    }

    /// Nothing went wrong: only what makes no sense may be refused.
    fn may_be_refused(&self, act: &Act, error: &Error) -> bool {
        let before = |id: &SandboxId| {
            let known = self.model.sandboxes.iter().find(|known| known.id == *id);
            known.map(|known| known.rests)
        };
        match (act, error) {
            (Act::RemoveTemplate(_), Error::InUse { .. }) => true,
            (Act::Create(template, _), _) if self.model.going.contains(template) => true,
            // It was frozen so often that it must rest first.
            (_, Error::Exhausted { message, .. }) => message.contains("layers"),
            _ => {
                let verb = act.verb().zip(act.subject().and_then(before));
                verb.is_some_and(|(verb, phase)| verb.from(phase).is_err())
            }
        }
    }

    /// Until the daemon is killed, or enough was done.
    async fn live(
        &mut self,
        mut pending: Option<(Act, Trouble, Ended)>,
    ) -> Option<(Act, Trouble, Ended)> {
        let engine = self.open().await;
        settle_down().await;
        if self.model.templates.is_empty() {
            import_image(&self.world, &engine).await;
            self.model.templates.insert(IMAGE.parse().unwrap(), 0);
        }
        loop {
            if let Some((act, trouble, ended)) = pending.take() {
                self.compare(&engine, &act, trouble, &ended);
            }
            if self.left == 0 {
                return None;
            }
            self.left -= 1;
            self.write_marks();
            let act = self.next_act();
            let trouble = self.next_trouble(&act);
            let ended = self.act(&engine, act.clone(), trouble).await;
            if let (Trouble::Nothing, Ended::Refused(error)) = (trouble, &ended) {
                assert!(
                    self.may_be_refused(&act, error),
                    "{act:?} was refused: {error:?}"
                );
            }
            // What failed on its way out is finished by the next start, if nobody asks again.
            let stuck = |view: &SandboxView| {
                view.record.broken.is_some() || view.record.rests == Rest::Nowhere
            };
            let broken = engine.list().iter().any(stuck);
            let restart = matches!(act, Act::Restart) || matches!(ended, Ended::Killed) || broken;
            assert!(
                !broken || trouble != Trouble::Nothing,
                "{act:?} breaks a sandbox"
            );
            if self.telling {
                println!("{act:?} with {trouble:?} ended {ended:?}");
            }
            pending = Some((act, trouble, ended));
            if restart {
                return pending;
            }
            if self.chance(50) {
                engine.collect(false).await.unwrap();
                let again = engine.collect(true).await.unwrap();
                assert_eq!(again.objects, [], "one collection is enough");
            }
        }
    }

    /// A daemon that is killed while it brings the sandboxes back, or soon after.
    async fn die_early(&mut self) {
        let at = self.random.random_range(0..FAULTS_WITHIN);
        self.injector.arm(Some(Fault {
            at,
            when: When::After,
            kind: Kind::Crash,
        }));
        let opened = async {
            self.open().await;
            settle_down().await;
        };
        tokio::select! {
            biased;
            () = self.injector.reached() => self.faults += 1,
            () = opened => {}
        }
    }

    /// Every sandbox runs once more, and then everything goes.
    async fn end(&mut self) {
        let engine = self.open().await;
        settle_down().await;
        for at in 0..self.model.sandboxes.len() {
            let id = self.model.sandboxes[at].id.clone();
            run(&engine, &id).await.unwrap();
            let value = self.world.guest_value(&id).unwrap();
            assert_eq!(
                World::mark_in(value),
                self.model.sandboxes[at].mark,
                "{id} at the end"
            );
        }
        for (template, mark) in self.model.templates.clone() {
            if self.model.going.contains(&template) {
                continue;
            }
            let view = engine
                .create(named(template.as_str(), "last"))
                .await
                .unwrap();
            let value = self.world.guest_value(&view.record.id).unwrap();
            assert_eq!(World::mark_in(value), mark, "template {template}");
            engine.destroy("last").await.unwrap();
        }
        leave_nothing(&self.world, &engine).await;
    }
}

/// Lets everything that is under way end. The clock jumps, so this takes no time.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(600)).await;
}

fn play(seed: u64, steps: usize) {
    println!("{SEED}={seed} {STEPS}={steps}");
    seeded::begin(seed);
    let freeze = if seed.is_multiple_of(2) {
        FreezeBy::Vmm
    } else {
        FreezeBy::Host
    };
    let mut play = Play {
        world: World::new(),
        injector: Injector::new(),
        freeze,
        random: StdRng::seed_from_u64(seed),
        model: Model::default(),
        left: steps,
        faults: 0,
        deaths: 0,
        telling: std::env::var_os(TELL).is_some(),
    };
    play.injector.take_time(seed);
    let mut lives = 0;
    let mut pending = None;
    loop {
        lives += 1;
        if lives > 1 && play.chance(3) {
            life(async || play.die_early().await);
            play.injector.arm(None);
        }
        pending = life(async || play.live(pending.take()).await);
        play.injector.arm(None);
        if pending.is_none() {
            break;
        }
    }
    life(async || play.end().await);
    println!(
        "{lives} daemons, {} faults, {} VMMs killed in a verb",
        play.faults, play.deaths
    );
    assert!(play.faults > steps / 10, "faults strike: {}", play.faults);
}

fn number(variable: &str) -> Option<u64> {
    let set = std::env::var(variable).ok()?;
    Some(
        set.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {set}")),
    )
}

/// Those of a seed that is asked for, or of a usual one.
fn run_of(usual: u64) {
    let steps = number(STEPS).map_or(USUAL_STEPS, |steps| steps.try_into().unwrap());
    play(number(SEED).unwrap_or(usual), steps);
}

#[test]
fn inv_10_inv_30_inv_51_inv_52_random_verbs_under_faults_when_the_vmm_freezes() {
    run_of(2);
}

#[test]
fn inv_10_inv_30_inv_51_inv_52_random_verbs_under_faults_when_the_host_freezes() {
    run_of(1);
}
