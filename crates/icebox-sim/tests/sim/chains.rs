//! Chains of layers stay short, whatever happens while some of them are merged.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{create, from, import_image, leave_nothing, life, open, open_with, run};
use icebox_engine::id::{Name, SandboxId};
use icebox_engine::unit::Bytes;
use icebox_engine::{Config, Engine, Error, Phase};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};

/// As short as chains can be kept.
const MAX_LAYERS: usize = 4;
const KEPT: usize = 2;

fn config() -> Config {
    Config {
        keep: KEPT,
        max_layers: MAX_LAYERS,
        ..Config::default()
    }
}

/// Tells a story on disks whose layers need what is under them, and ends it with nothing left.
fn story(tell: impl AsyncFn(&World, &Injector, &Engine)) {
    life(async || {
        let (world, injector) = (World::new(), Injector::new());
        let engine = open_with(inject(world.host(FreezeBy::Vmm), &injector), config()).await;
        import_image(&world, &engine).await;
        tell(&world, &injector, &engine).await;
        injector.arm(None);
        injector.break_step(None);
        settle_down().await;
        leave_nothing(&world, &engine).await;
    });
}

/// Lets everything that is under way end, and what failed be tried again.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// Lets what is under way end.
async fn a_moment() {
    tokio::time::sleep(Duration::from_secs(60)).await;
}

async fn pause_and_resume(engine: &Engine, name: &str) {
    engine.pause(name).await.unwrap();
    engine.resume(name, None).await.unwrap();
}

fn depth(engine: &Engine, name: &str) -> usize {
    engine.inspect(name).unwrap().layers
}

fn layers(world: &World) -> Vec<String> {
    let mut objects = world.objects();
    objects.retain(|object| object.starts_with("layer "));
    objects
}

fn events(engine: &Engine, kind: &str) -> usize {
    let all = engine.events().kept(1).events;
    all.iter().filter(|event| event.kind == kind).count()
}

/// What a guest was told to keep.
fn mark_of(world: &World, id: &SandboxId) -> u64 {
    World::mark_in(world.guest_value(id).unwrap())
}

fn n(name: &str) -> Name {
    name.parse().unwrap()
}

#[test]
fn inv_10_inv_52_a_long_life_has_a_short_chain() {
    story(async |world, _, engine| {
        let id = create(engine, "a").await;
        let mut marks = BTreeMap::new();
        for round in 0..60 {
            let mark = world.mark(&id).unwrap();
            pause_and_resume(engine, "a").await;
            assert_eq!(mark_of(world, &id), mark, "round {round}");
            marks.insert(engine.inspect("a").unwrap().record.after.unwrap(), mark);
            // One merge is behind by at most what its verb has added.
            assert!(depth(engine, "a") <= MAX_LAYERS + 1, "round {round}");
            a_moment().await;
            assert!(depth(engine, "a") <= MAX_LAYERS, "round {round}");
            // What the guest was resumed on, and what that has become since.
            let stored = layers(world).len();
            assert!(stored <= 2 * (MAX_LAYERS + 1), "round {round}: {stored}");
        }
        assert!(events(engine, "layers.merged") >= 60 / (MAX_LAYERS + 1));
        assert_eq!(events(engine, "layers.merge-failed"), 0);
        for generation in engine.inspect("a").unwrap().record.generations.clone() {
            engine.stop("a").await.unwrap();
            engine.resume("a", Some(generation)).await.unwrap();
            assert_eq!(mark_of(world, &id), marks[&generation]);
        }
    });
}

#[test]
fn inv_52_layers_that_stand_alone_are_left_alone() {
    life(async || {
        let world = World::new();
        let engine = open(world.host(FreezeBy::Host)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        for _ in 0..3 * MAX_LAYERS {
            pause_and_resume(&engine, "a").await;
            a_moment().await;
            assert_eq!(depth(&engine, "a"), 1);
            assert_eq!(engine.inspect("a").unwrap().record.opened, []);
        }
        assert_eq!(events(&engine, "layers.merged"), 0);
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_30_inv_52_what_a_running_guest_has_open_stays_until_it_is_detached() {
    const FREEZES: usize = 3 * MAX_LAYERS;
    let world = World::new();
    let host = || world.host(FreezeBy::Vmm);
    let freeze = async |engine: &Engine| {
        engine.snapshot("a", n("passing")).await.unwrap();
        engine.remove_template("passing").await.unwrap();
        a_moment().await;
    };
    let id = life(async || {
        let engine = open_with(host(), config()).await;
        import_image(&world, &engine).await;
        let id = create(&engine, "a").await;
        for round in 1..=FREEZES {
            freeze(&engine).await;
            assert!(depth(&engine, "a") <= MAX_LAYERS, "round {round}");
            assert_eq!(engine.inspect("a").unwrap().record.opened.len(), round);
            world.guest_value(&id).unwrap();
        }
        assert!(layers(&world).len() >= FREEZES, "{:?}", layers(&world));
        id
    });
    // The daemon was killed; the next one finds the guest, and knows as much about what it has open.
    life(async || {
        let engine = open_with(host(), config()).await;
        settle_down().await;
        world.guest_value(&id).unwrap();
        assert!(layers(&world).len() >= FREEZES, "{:?}", layers(&world));
        freeze(&engine).await;
        world.guest_value(&id).unwrap();
        engine.pause("a").await.unwrap();
        assert_eq!(engine.inspect("a").unwrap().record.opened, []);
        a_moment().await;
        let stored = layers(&world);
        assert!(stored.len() <= MAX_LAYERS, "{stored:?}");
        engine.resume("a", None).await.unwrap();
        world.guest_value(&id).unwrap();
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_24_inv_38_templates_and_forks_of_a_merged_chain_are_what_they_were() {
    story(async |world, _, engine| {
        const TEMPLATES: usize = 6;
        create(engine, "a").await;
        for round in 0..3 * TEMPLATES {
            pause_and_resume(engine, "a").await;
            if round % 3 == 0 {
                let name = n(&format!("t-{}", round / 3));
                engine.snapshot("a", name).await.unwrap();
            }
            a_moment().await;
        }
        assert!(events(engine, "layers.merged") > 0);
        let forks = engine.fork("a", 2).await.unwrap();
        let mut forks: Vec<_> = forks
            .into_iter()
            .map(|it| it.unwrap().record.id.clone())
            .collect();
        // A restore is refused if the disk is not of the memory's instant.
        for template in 0..TEMPLATES {
            let view = engine.create(from(&format!("t-{template}"))).await.unwrap();
            assert!(view.layers <= MAX_LAYERS + 1, "{}", view.layers);
            forks.push(view.record.id.clone());
        }
        for round in 0..2 * MAX_LAYERS {
            for fork in &forks {
                pause_and_resume(engine, fork.as_str()).await;
                world.guest_value(fork).unwrap();
            }
            a_moment().await;
            for fork in &forks {
                assert!(depth(engine, fork.as_str()) <= MAX_LAYERS, "round {round}");
            }
        }
        engine.destroy("a").await.unwrap();
        for fork in forks.iter().step_by(2) {
            engine.destroy(fork.as_str()).await.unwrap();
        }
        a_moment().await;
        for fork in forks.iter().skip(1).step_by(2) {
            pause_and_resume(engine, fork.as_str()).await;
            world.guest_value(fork).unwrap();
        }
    });
}

#[test]
fn inv_52_a_deep_template_is_merged_once_for_all_its_forks() {
    story(async |world, _, engine| {
        create(engine, "a").await;
        for _ in 0..MAX_LAYERS - 1 {
            pause_and_resume(engine, "a").await;
        }
        engine.snapshot("a", n("deep")).await.unwrap();
        engine.destroy("a").await.unwrap();
        a_moment().await;
        assert_eq!(layers(world).len(), MAX_LAYERS);
        let mut forks = Vec::new();
        for _ in 0..5 {
            let view = engine.create(from("deep")).await.unwrap();
            assert_eq!(view.layers, MAX_LAYERS);
            forks.push(view.record.id.clone());
        }
        for fork in &forks {
            engine.pause(fork.as_str()).await.unwrap();
        }
        a_moment().await;
        assert_eq!(events(engine, "layers.merged"), 1);
        for fork in &forks {
            assert!(depth(engine, fork.as_str()) <= MAX_LAYERS);
            run(engine, fork).await.unwrap();
            world.guest_value(fork).unwrap();
        }
    });
}

#[test]
fn inv_50_a_merge_that_never_ends_keeps_no_verb_waiting() {
    let at = steps_of_a_merge()
        .iter()
        .position(|step| *step == "volume.merge");
    let world = World::new();
    let injector = Injector::new();
    let host = || inject(world.host(FreezeBy::Vmm), &injector);
    life(async || {
        let engine = open_with(host(), config()).await;
        deepen(&world, &engine).await;
        let (when, kind) = (When::Before, Kind::Crash);
        let at = at.unwrap();
        injector.arm(Some(Fault { at, when, kind }));
        injector.reached().await;
        let id = engine.inspect("subject").unwrap().record.id.clone();
        for _ in 0..3 {
            engine.resume("subject", None).await.unwrap();
            world.guest_value(&id).unwrap();
            engine.snapshot("subject", n("beside")).await.unwrap();
            engine.remove_template("beside").await.unwrap();
            engine.pause("subject").await.unwrap();
        }
        engine.flatten("subject", n("flat")).await.unwrap();
        engine.destroy("subject").await.unwrap();
        engine.collect(false).await.unwrap();
        create(&engine, "next").await;
    });
    injector.arm(None);
    life(async || {
        let engine = open_with(host(), config()).await;
        settle_down().await;
        assert_eq!(layers(&world), Vec::<String>::new());
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_28_no_merge_begins_without_room() {
    story(async |world, _, engine| {
        deepen(world, engine).await;
        world.set_left(Some(Bytes::mib(1)));
        a_moment().await;
        assert_eq!(depth(engine, "subject"), MAX_LAYERS + 1);
        assert_eq!(events(engine, "layers.merge-failed"), 1);
        assert_eq!(layers(world).len(), MAX_LAYERS + 1);
        world.set_left(None);
        // By itself, without anybody asking.
        tokio::time::sleep(Duration::from_mins(11)).await;
        assert!(depth(engine, "subject") <= MAX_LAYERS);
    });
}

#[test]
fn inv_09_a_merged_layer_that_is_not_the_same_is_never_used() {
    story(async |world, _, engine| {
        world.corrupt_merges(true);
        deepen(world, engine).await;
        let before = layers(world);
        a_moment().await;
        assert_eq!(layers(world), before);
        let failed = engine.events().kept(1).events;
        let failed = failed.iter().find(|it| it.kind == "layers.merge-failed");
        let detail = &failed.unwrap().detail;
        assert!(detail.contains("instead of"), "{detail}");
        run_and_look(world, engine).await;
        world.corrupt_merges(false);
        settle_down().await;
        assert!(depth(engine, "subject") <= MAX_LAYERS);
        run_and_look(world, engine).await;
    });
}

#[test]
fn inv_11_inv_30_a_merge_of_whose_commit_nobody_knows_whether_it_happened() {
    for killed in [false, true] {
        let world = World::new();
        let injector = Injector::new();
        let host = || inject(world.host(FreezeBy::Vmm), &injector);
        life(async || {
            let engine = open_with(host(), config()).await;
            deepen(&world, &engine).await;
            let fails = std::iter::repeat(Some(When::Before));
            injector.script("store.commit", [Some(When::After)].into_iter().chain(fails));
            a_moment().await;
            // Both chains are there, also for somebody who removes what nobody needs.
            engine.collect(false).await.unwrap();
            assert_eq!(layers(&world).len(), MAX_LAYERS + 2);
            if !killed {
                injector.break_step(None);
                a_moment().await;
                assert!(depth(&engine, "subject") <= MAX_LAYERS);
                run_and_look(&world, &engine).await;
            }
        });
        injector.break_step(None);
        life(async || {
            let engine = open_with(host(), config()).await;
            settle_down().await;
            assert!(depth(&engine, "subject") <= MAX_LAYERS);
            run_and_look(&world, &engine).await;
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_26_a_disk_that_is_frozen_without_end_is_refused_with_a_way_out() {
    story(async |world, _, engine| {
        let id = create(engine, "a").await;
        let freeze = async || engine.snapshot("a", n("passing")).await;
        let mut freezes = 0;
        let refused = loop {
            match freeze().await {
                Ok(_) => engine.remove_template("passing").await.unwrap(),
                Err(error) => break error,
            };
            freezes += 1;
            assert!(freezes < 1000);
        };
        assert!(freezes >= 32, "{freezes}");
        assert!(matches!(refused, Error::Exhausted { .. }), "{refused}");
        let hint = refused.hint().unwrap();
        assert!(hint.contains("icebox pause a"), "{hint}");
        assert!(engine.fork("a", 1).await.is_err());
        assert!(engine.flatten("a", n("flat")).await.is_err());
        world.guest_value(&id).unwrap();
        engine.pause("a").await.unwrap();
        a_moment().await;
        engine.resume("a", None).await.unwrap();
        freeze().await.unwrap();
    });
}

/// A paused sandbox called `subject`, whose chain has just become too deep. Returns what its guest was told to keep.
async fn deepen(world: &World, engine: &Engine) -> u64 {
    if engine.templates().is_empty() {
        import_image(world, engine).await;
    }
    let id = create(engine, "subject").await;
    for _ in 0..MAX_LAYERS {
        pause_and_resume(engine, "subject").await;
    }
    a_moment().await;
    assert_eq!(depth(engine, "subject"), MAX_LAYERS);
    let mark = world.mark(&id).unwrap();
    engine.pause("subject").await.unwrap();
    assert_eq!(depth(engine, "subject"), MAX_LAYERS + 1);
    mark
}

/// Resumes `subject`, looks at what its guest keeps, and pauses it.
async fn run_and_look(world: &World, engine: &Engine) -> u64 {
    engine.resume("subject", None).await.unwrap();
    let id = engine.inspect("subject").unwrap().record.id.clone();
    let mark = mark_of(world, &id);
    engine.pause("subject").await.unwrap();
    mark
}

/// Everything that a start must not change again.
fn picture(world: &World) -> Vec<String> {
    let mut picture = world.in_use();
    picture.extend(world.objects());
    picture.extend(world.manifests());
    picture
}

/// Merges a chain, with one fault. Returns the steps of it.
fn case(fault: Option<Fault>) -> Vec<&'static str> {
    let world = World::new();
    let injector = Injector::new();
    let host = || inject(world.host(FreezeBy::Vmm), &injector);
    let (trace, kept) = life(async || {
        let engine = open_with(host(), config()).await;
        let kept = deepen(&world, &engine).await;
        injector.arm(fault);
        tokio::select! {
            biased;
            () = injector.reached() => return (injector.trace(), kept),
            () = a_moment() => {}
        }
        let trace = injector.trace();
        // What failed is tried again.
        settle_down().await;
        injector.arm(None);
        assert!(depth(&engine, "subject") <= MAX_LAYERS);
        let staged = world
            .in_use()
            .into_iter()
            .filter(|it| it.starts_with("staged"));
        assert_eq!(staged.collect::<Vec<_>>(), Vec::<String>::new());
        assert_eq!(run_and_look(&world, &engine).await, kept);
        (trace, kept)
    });
    injector.arm(None);
    let resting = life(async || {
        let engine = open_with(host(), config()).await;
        settle_down().await;
        assert!(depth(&engine, "subject") <= MAX_LAYERS);
        assert_eq!(engine.inspect("subject").unwrap().phase(), Phase::Paused);
        picture(&world)
    });
    life(async || {
        let engine = open_with(host(), config()).await;
        settle_down().await;
        assert_eq!(picture(&world), resting, "a second start changes nothing");
        assert_eq!(run_and_look(&world, &engine).await, kept);
        for generation in engine.inspect("subject").unwrap().generations {
            let number = Some(generation.number);
            engine.stop("subject").await.unwrap();
            engine.resume("subject", number).await.unwrap();
        }
        leave_nothing(&world, &engine).await;
    });
    trace
}

fn steps_of_a_merge() -> Vec<&'static str> {
    let steps = case(None);
    for step in [
        "volume.merge",
        "volume.verify",
        "store.publish",
        "store.commit",
    ] {
        assert_eq!(
            steps.iter().filter(|it| **it == step).count(),
            1,
            "{steps:?}"
        );
    }
    steps
}

fn matrix(kind: Kind) {
    let steps = steps_of_a_merge();
    for (at, step) in steps.iter().enumerate() {
        for when in [When::Before, When::After] {
            let run = || case(Some(Fault { at, when, kind }));
            if let Err(panic) = std::panic::catch_unwind(run) {
                eprintln!("in the case: {kind:?} {when:?} step {at} ({step})");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{} cases", 2 * steps.len());
}

#[test]
fn inv_09_inv_33_a_merge_fails_at_every_step() {
    matrix(Kind::Fail);
}

#[test]
fn inv_30_inv_52_a_merge_is_killed_at_every_step() {
    matrix(Kind::Crash);
}

#[test]
fn inv_33_a_merge_panics_at_every_step() {
    matrix(Kind::Panic);
}

/// Holds every step of a verb in turn, and lets the chain under the disk be merged before it goes on. `prepare` leads to
/// where the verb begins.
fn merged_at_every_step(prepare: impl AsyncFn(&Engine), verb: impl AsyncFn(&Engine)) {
    let begin = async |world: &World, injector: &Injector| {
        let engine = open_with(inject(world.host(FreezeBy::Vmm), injector), config()).await;
        deepen(world, &engine).await;
        prepare(&engine).await;
        engine
    };
    let steps = life(async || {
        let (world, injector) = (World::new(), Injector::new());
        let engine = begin(&world, &injector).await;
        injector.arm(None);
        verb(&engine).await;
        injector.trace()
    });
    for (at, step) in steps.iter().enumerate() {
        println!("held: step {at} ({step})");
        life(async || {
            let (world, injector) = (World::new(), Injector::new());
            let engine = begin(&world, &injector).await;
            let (when, kind) = (When::Before, Kind::Hold);
            injector.arm(Some(Fault { at, when, kind }));
            let merged = async {
                injector.reached().await;
                // Shorter than any deadline of a step.
                tokio::time::sleep(Duration::from_secs(2)).await;
                assert_eq!(events(&engine, "layers.merged"), 1);
                injector.go_on();
            };
            tokio::join!(verb(&engine), merged);
            run(&engine, &engine.inspect("subject").unwrap().record.id)
                .await
                .unwrap();
            for view in engine.list() {
                world.guest_value(&view.record.id).unwrap();
            }
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_10_a_chain_is_merged_at_every_step_of_a_resume() {
    merged_at_every_step(
        async |_| {},
        async |engine| {
            engine.resume("subject", None).await.unwrap();
        },
    );
}

#[test]
fn inv_10_a_chain_is_merged_at_every_step_of_a_pause() {
    merged_at_every_step(
        async |engine| drop(engine.resume("subject", None).await.unwrap()),
        async |engine| drop(engine.pause("subject").await.unwrap()),
    );
}

#[test]
fn inv_10_a_chain_is_merged_at_every_step_of_a_fork_and_a_flatten() {
    merged_at_every_step(
        async |_| {},
        async |engine| {
            engine.fork("subject", 2).await.unwrap();
            engine.flatten("subject", n("flat")).await.unwrap();
        },
    );
}

#[test]
fn inv_10_a_chain_is_merged_at_every_step_of_a_stop_and_a_start() {
    merged_at_every_step(
        async |_| {},
        async |engine| {
            engine.stop("subject").await.unwrap();
            engine.start("subject").await.unwrap();
        },
    );
}
