//! Every verb × every step × {before, after} × {fail, crash, cancel} × who freezes disks.
//!
//! Each case: set a scene, run one verb with one fault, look at the engine if it lives, kill it, start it again, look,
//! start it again and see that nothing changed, bring every sandbox to life and see that its guest lost nothing, and
//! destroy everything and see that nothing is left.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::scene::{self, Scene, Scene::*};
use crate::support::{leave_nothing, life, open, run};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::Rest;
use icebox_engine::{Engine, Error, Phase, SandboxView};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};

/// Steps whose failure leaves a hold stuck, and so may break the sandbox until the next start.
const RELEASES: [&str; 10] = [
    "vmm.kill",
    "boxes.release",
    "network.release",
    "volume.detach",
    "volume.remove_head",
    "volume.remove_layer",
    "store.trash",
    "store.discard",
    "store.empty_trash",
    "store.commit",
];

struct Case {
    scene: Scene,
    freeze: FreezeBy,
    fault: Option<Fault>,
}

impl Case {
    /// Runs the case; returns the steps of the verb.
    fn run(&self) -> Vec<&'static str> {
        let world = World::new();
        let injector = Injector::new();
        let host = || inject(world.host(self.freeze), &injector);

        let trace = life(async || {
            let engine = open(host()).await;
            self.scene.set(&world, &engine).await;
            settle_down().await;
            injector.arm(self.fault);
            let panics = self.fault.is_some_and(|fault| fault.kind == Kind::Panic);
            let acting = async {
                if !panics {
                    return self.scene.act(&engine).await;
                }
                // Some steps are taken in the caller's own task, which is the daemon's concern.
                let (scene, engine) = (self.scene, engine.clone());
                let acting = tokio::spawn(async move { scene.act(&engine).await });
                acting.await.unwrap_or(Err(Error::Stopping))
            };
            let outcome = tokio::select! {
                biased;
                () = injector.reached() => None,
                result = acting => Some(result),
            };
            let crashed = matches!(
                self.fault,
                Some(Fault {
                    kind: Kind::Crash,
                    ..
                })
            ) && outcome.is_none();
            if !crashed {
                settle_down().await;
                let trace = injector.trace();
                injector.arm(None);
                if self.disk_stayed_full() {
                    room_again(&engine).await;
                }
                self.look_at_living(&world, &engine, outcome.as_ref(), &trace);
                return trace;
            }
            injector.trace()
        });
        injector.arm(None);

        let resting = life(async || {
            let engine = open(host()).await;
            settle_down().await;
            self.look_at_recovered(&engine);
            picture(&world)
        });
        life(async || {
            let engine = open(host()).await;
            settle_down().await;
            assert_eq!(picture(&world), resting, "a second start changes nothing");
            for view in engine.list() {
                let id = view.record.id.as_str();
                run(&engine, &view.record.id).await.unwrap();
                self.scene.look(&world, &engine.inspect(id).unwrap());
            }
            leave_nothing(&world, &engine).await;
        });
        trace
    }

    fn disk_stayed_full(&self) -> bool {
        let stayed = |fault: Fault| fault.kind == Kind::StaysFull;
        self.fault.is_some_and(stayed)
    }

    fn look_at_living(
        &self,
        world: &World,
        engine: &Engine,
        outcome: Option<&Result<(), Error>>,
        trace: &[&'static str],
    ) {
        let step = self
            .fault
            .and_then(|fault| trace.get(fault.at).copied())
            .unwrap_or("no step");
        let panicked = self.fault.is_some_and(|fault| fault.kind == Kind::Panic);
        let view = engine.inspect("subject").ok();
        let broken = view.as_ref().and_then(|view| view.record.broken.clone());
        if let Some(why) = broken {
            assert!(
                RELEASES.contains(&step) && !panicked,
                "broken by a failure at {step}: {why}"
            );
            return;
        }
        let rests = view.as_ref().map(SandboxView::phase);
        match outcome {
            // Cancelled: as if the client had waited.
            None | Some(Ok(())) => assert_eq!(rests, self.scene.after()),
            Some(Err(_)) => {
                let allowed = rests == self.scene.before()
                    || self.scene.between().is_some_and(|between| rests == Some(between))
                    // A destroy that has begun never goes back.
                    || self.scene.destroys()
                    // What happens after a commit does not take it back.
                    || (panicked && rests == self.scene.after());
                assert!(allowed, "after a failure at {step} it rests at {rests:?}");
            }
        }
        for view in engine.list() {
            // Without room it stays pending, for the next verb.
            assert!(
                view.record.intent.is_none() || self.disk_stayed_full(),
                "a freeze is left unfinished by a failure at {step}"
            );
            assert_eq!(view.busy, None);
            if view.phase() == Phase::Running {
                world.guest_value(&view.record.id).unwrap();
                assert!(
                    engine.route(view.record.id.as_str()).unwrap().is_some(),
                    "the gate is open"
                );
            }
        }
        let staged = world
            .in_use()
            .into_iter()
            .filter(|what| what.starts_with("staged"))
            .count();
        // What is staged for something that stays pending is not left behind.
        let pending = engine.list().iter().any(|it| it.record.intent.is_some());
        assert!(
            staged == 0 || pending || RELEASES.contains(&step),
            "staging is left by a failure at {step}"
        );
    }

    fn look_at_recovered(&self, engine: &Engine) {
        let rests = engine.inspect("subject").ok().map(|view| view.phase());
        let allowed = rests == self.scene.before()
            || rests == self.scene.after()
            || self
                .scene
                .between()
                .is_some_and(|between| rests == Some(between));
        assert!(allowed, "after the start it rests at {rests:?}");
        for view in engine.list() {
            assert_eq!(view.record.broken, None, "nothing is broken after a start");
            assert_eq!(
                view.record.intent, None,
                "nothing is unfinished after a start"
            );
        }
    }
}

/// What was left undone for want of room is finished, by itself or by the next verb.
async fn room_again(engine: &Engine) {
    settle_down().await;
    for view in engine.list() {
        let id = view.record.id.as_str();
        if view.phase() == Phase::Running && view.record.broken.is_none() {
            engine.pause(id).await.unwrap();
            engine.resume(id, None).await.unwrap();
            assert_eq!(engine.inspect(id).unwrap().record.intent, None);
        }
    }
}

/// Lets everything that is under way end. The clock jumps, so this takes no time.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// Everything that a start must not change again.
fn picture(world: &World) -> Vec<String> {
    let mut picture = world.in_use();
    picture.extend(world.objects());
    picture.extend(world.manifests());
    picture
}

fn matrix(scenes: &[Scene], kind: Kind) {
    let mut cases = 0;
    for &scene in scenes {
        for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
            let steps = Case {
                scene,
                freeze,
                fault: None,
            }
            .run();
            assert!(!steps.is_empty(), "{scene:?} has steps");
            for (at, step) in steps.into_iter().enumerate() {
                for when in [When::Before, When::After] {
                    let fault = Some(Fault { at, when, kind });
                    let case = Case {
                        scene,
                        freeze,
                        fault,
                    };
                    let what = format!(
                        "{scene:?}, {freeze:?} freezes, {kind:?} {when:?} step {at} ({step})"
                    );
                    let run = std::panic::AssertUnwindSafe(|| case.run());
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        eprintln!("in the case: {what}");
                        std::panic::resume_unwind(panic);
                    }
                    cases += 1;
                }
            }
        }
    }
    println!("{cases} cases");
}

const CREATE: [Scene; 2] = [CreateFromImage, CreateFromSnapshot];
const PAUSE: [Scene; 2] = [PauseFirst, PauseSecond];
const BACK: [Scene; 3] = [Resume, ResumeGeneration, Start];
const STOP: [Scene; 2] = [StopRunning, StopPaused];
const AROUND: [Scene; 6] = [
    RollbackRunning,
    RollbackAndResume,
    RollbackPaused,
    RollbackStopped,
    RollbackToBranch,
    RollbackPausedToBranch,
];
const PAST: [Scene; 3] = [Checkpoint, ForgetGeneration, ForgetBranch];
const COPY: [Scene; 7] = [
    SnapshotRunning,
    SnapshotPaused,
    ForkRunning,
    ForkPaused,
    FlattenRunning,
    FlattenPaused,
    FlattenStopped,
];
const REMOVE: [Scene; 4] = [
    DestroyRunning,
    DestroyPaused,
    DestroyStopped,
    RemoveTemplate,
];

/// Loses the reply of one commit of the verb, and fails every commit after it: nobody knows which manifest the disk
/// has. `then_killed`: the engine ends before it can find out. Otherwise commits work again, and it goes on.
///
/// A commit that failed did not happen, unless the engine is killed before it can take it back: then the next start goes
/// by what the disk has. Of a verb that sets a disk aside the first commit says so, and whoever knows of it finishes that.
fn doubt(scene: Scene, freeze: FreezeBy, nth: usize, then_killed: bool) {
    let world = World::new();
    let injector = Injector::new();
    let host = || inject(world.host(freeze), &injector);
    let goes_aside = scene.sets_aside() && (nth > 0 || then_killed);
    // What the user was told is safe, by sandbox, when it was told later than [`Scene::look`] knows.
    let later = life(async || {
        let engine = open(host()).await;
        scene.set(&world, &engine).await;
        settle_down().await;
        let fails = std::iter::repeat(Some(When::Before));
        let lost = std::iter::repeat_n(None, nth).chain([Some(When::After)]);
        injector.script("store.commit", lost.chain(fails));
        let outcome = scene.act(&engine).await;
        // A guest that runs on writes on.
        let mut later: BTreeMap<_, _> = engine
            .list()
            .into_iter()
            .filter_map(|view| {
                let mark = world.mark(&view.record.id)?;
                Some((view.record.id.clone(), mark))
            })
            .collect();
        if then_killed {
            // What somebody else's removal would collect meanwhile.
            engine.collect(false).await.unwrap();
            return later;
        }
        let seen = engine.inspect("subject").ok().map(|view| view.phase());
        injector.break_step(None);
        settle_down().await;
        let still = engine.inspect("subject").ok();
        if outcome.is_err() && !scene.destroys() && !scene.creates() {
            let still = still.expect("it is there");
            let now = Some(still.phase());
            if goes_aside {
                // Without being asked for.
                let ends = [scene.after(), scene.between()];
                assert!(ends.contains(&now), "it is {now:?}, and was {seen:?}");
            } else {
                assert_eq!(now, seen);
            }
            assert_eq!(still.record.broken, None);
        }
        for view in engine.list() {
            let id = view.record.id.clone();
            if view.record.rests != Rest::Nowhere {
                run(&engine, &id).await.unwrap();
                let view = engine.inspect(id.as_str()).unwrap();
                look_at_later(&world, scene, &view, &later, goes_aside);
                later.insert(id.clone(), world.mark(&id).unwrap());
            }
        }
        settle_down().await;
        let unfinished = world.in_use().into_iter();
        assert_eq!(
            unfinished
                .filter(|what| what.starts_with("staged"))
                .collect::<Vec<_>>(),
            Vec::<String>::new()
        );
        later
    });
    injector.break_step(None);
    let resting = life(async || {
        let engine = open(host()).await;
        settle_down().await;
        for view in engine.list() {
            assert_eq!(view.record.broken, None, "nothing is broken after a start");
            assert_eq!(view.record.intent, None, "nor unfinished");
        }
        assert!(scene.creates() || scene.destroys() || !engine.list().is_empty());
        picture(&world)
    });
    life(async || {
        let engine = open(host()).await;
        settle_down().await;
        assert_eq!(picture(&world), resting, "a second start changes nothing");
        for view in engine.list() {
            let id = view.record.id.clone();
            for generation in &view.generations {
                let capture = &generation.capture;
                for object in [
                    Object::Layer(capture.layer.clone()),
                    Object::Memory(capture.memory.clone()),
                    Object::Generation(id.clone(), generation.number),
                ] {
                    assert!(world.content(&object).is_some(), "{object} is listed");
                }
            }
            run(&engine, &id).await.unwrap();
            let view = engine.inspect(id.as_str()).unwrap();
            look_at_later(&world, scene, &view, &later, goes_aside);
        }
        leave_nothing(&world, &engine).await;
    });
}

/// Looks at a guest that may have written since the scene was set: it has what it wrote, or that is kept as a branch if its
/// disk was to go aside.
fn look_at_later(
    world: &World,
    scene: Scene,
    view: &SandboxView,
    later: &BTreeMap<SandboxId, u64>,
    goes_aside: bool,
) {
    let Some(later) = later.get(&view.record.id) else {
        return scene.look(world, view);
    };
    let value = world.guest_value(&view.record.id).unwrap();
    let mark = World::mark_in(value);
    let is_kept = || goes_aside && scene::kept(world, view).contains(later);
    assert!(mark == *later || is_kept(), "it has {mark}: {view:?}");
}

fn doubts(scenes: &[Scene]) {
    let mut cases = 0;
    for &scene in scenes {
        for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
            let steps = Case {
                scene,
                freeze,
                fault: None,
            }
            .run();
            let commits = steps.iter().filter(|step| **step == "store.commit").count();
            for nth in 0..commits {
                for then_killed in [false, true] {
                    let run = || doubt(scene, freeze, nth, then_killed);
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        eprintln!(
                            "in the case: {scene:?}, {freeze:?} freezes, commit {nth}, killed: {then_killed}"
                        );
                        std::panic::resume_unwind(panic);
                    }
                    cases += 1;
                }
            }
        }
    }
    println!("{cases} cases");
}

#[test]
fn inv_11_inv_30_a_commit_of_which_nobody_knows_whether_it_happened() {
    doubts(&CREATE);
    doubts(&PAUSE);
    doubts(&BACK);
    doubts(&AROUND);
    doubts(&PAST);
    doubts(&STOP);
    doubts(&COPY);
    doubts(&REMOVE);
}

macro_rules! tests {
    ($($name:ident: $scenes:ident, $kind:ident;)*) => {
        $(#[test]
        fn $name() {
            matrix(&$scenes, Kind::$kind);
        })*
    };
}

tests! {
    inv_33_inv_52_create_fails_at_every_step: CREATE, Fail;
    inv_30_create_is_killed_at_every_step: CREATE, Crash;
    inv_20_client_leaves_create_at_every_step: CREATE, Cancel;
    inv_01_inv_09_inv_11_pause_fails_at_every_step: PAUSE, Fail;
    inv_11_inv_28_pause_finds_the_disk_full_at_every_step: PAUSE, Full;
    inv_11_inv_28_pause_finds_the_disk_full_from_every_step_on: PAUSE, StaysFull;
    inv_11_inv_28_copies_find_the_disk_full_at_every_step: COPY, Full;
    inv_11_inv_28_copies_find_the_disk_full_from_every_step_on: COPY, StaysFull;
    inv_16_inv_28_resume_and_start_find_the_disk_full_from_every_step_on: BACK, StaysFull;
    inv_28_create_finds_the_disk_full_from_every_step_on: CREATE, StaysFull;
    inv_28_destroy_finds_the_disk_full_from_every_step_on: REMOVE, StaysFull;
    inv_30_pause_is_killed_at_every_step: PAUSE, Crash;
    inv_20_client_leaves_pause_at_every_step: PAUSE, Cancel;
    inv_16_resume_and_start_fail_at_every_step: BACK, Fail;
    inv_30_resume_and_start_are_killed_at_every_step: BACK, Crash;
    inv_20_client_leaves_resume_and_start_at_every_step: BACK, Cancel;
    inv_01_a_pause_panics_at_every_step: PAUSE, Panic;
    inv_16_resume_and_start_panic_at_every_step: BACK, Panic;
    inv_33_create_panics_at_every_step: CREATE, Panic;
    inv_33_stop_panics_at_every_step: STOP, Panic;
    inv_01_inv_33_copies_panic_at_every_step: COPY, Panic;
    inv_33_destroy_panics_at_every_step: REMOVE, Panic;
    inv_51_rollback_fails_at_every_step: AROUND, Fail;
    inv_30_inv_51_rollback_is_killed_at_every_step: AROUND, Crash;
    inv_20_client_leaves_rollback_at_every_step: AROUND, Cancel;
    inv_51_rollback_panics_at_every_step: AROUND, Panic;
    inv_01_inv_52_the_past_changes_and_fails_at_every_step: PAST, Fail;
    inv_30_inv_52_the_past_changes_and_is_killed_at_every_step: PAST, Crash;
    inv_20_client_leaves_the_past_at_every_step: PAST, Cancel;
    inv_33_the_past_changes_and_panics_at_every_step: PAST, Panic;
    inv_33_stop_fails_at_every_step: STOP, Fail;
    inv_30_stop_is_killed_at_every_step: STOP, Crash;
    inv_20_client_leaves_stop_at_every_step: STOP, Cancel;
    inv_01_inv_10_inv_22_copies_fail_at_every_step: COPY, Fail;
    inv_30_inv_52_copies_are_killed_at_every_step: COPY, Crash;
    inv_20_client_leaves_copies_at_every_step: COPY, Cancel;
    inv_33_destroy_fails_at_every_step: REMOVE, Fail;
    inv_30_inv_50_destroy_is_killed_at_every_step: REMOVE, Crash;
    inv_20_client_leaves_destroy_at_every_step: REMOVE, Cancel;
}
