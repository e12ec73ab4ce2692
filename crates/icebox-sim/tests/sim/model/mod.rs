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
//!   ICEBOX_MODEL_SEED=7 ICEBOX_MODEL_STEPS=20000 ICEBOX_MODEL_TELL=1 cargo test -p icebox-sim --test sim model::
//! ```

mod act;
mod known;

use std::cell::RefCell;
use std::time::Duration;

use crate::support::{IMAGE, import_image, leave_nothing, life, named, open_with, run};
use act::{Act, Ended, Trouble};
use icebox_engine::host::Host;
use icebox_engine::id::{Name, seeded};
use icebox_engine::manifest::v1::Rest;
use icebox_engine::{Config, Engine, Error, Phase, SandboxView};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};
use known::Model;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

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
/// After this time without anything happening in it a sandbox is paused, if it has been asked for.
const IDLE: Duration = Duration::from_secs(120);
/// Most verbs have as many steps. A fault that lies beyond them strikes in what follows, or not at all.
const FAULTS_WITHIN: usize = 22;

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
