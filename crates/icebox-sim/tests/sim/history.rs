//! What a sandbox remembers: its generations, its branches, how its last verb went. One test, one promise.

use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{
    IMAGE, create, import_image, leave_nothing, life, named, open, open_with, run,
};
use icebox_engine::id::GenerationNo;
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::{HistoryPolicy, MadeBy, Point};
use icebox_engine::unit::Bytes;
use icebox_engine::{Config, CreateRequest, Engine, Error, LastVerb, Outcome, Phase};
use icebox_sim::fault::When;
use icebox_sim::{FreezeBy, World};
use jiff::SignedDuration;

fn last_verb(engine: &Engine, wanted: &str) -> LastVerb {
    let last = engine.inspect(wanted).unwrap().last_verb;
    LastVerb::clone(&last.unwrap())
}

fn steps(verb: &LastVerb) -> Vec<&str> {
    verb.steps.iter().map(|(step, _)| step.as_str()).collect()
}

#[test]
fn every_verb_says_how_long_its_steps_took() {
    story(async |_, engine| {
        let id = create(engine, "a").await;
        let created = last_verb(engine, "a");
        assert_eq!(created.verb, "create");
        assert_eq!(
            steps(&created),
            ["write-down", "prepare", "launch", "welcome", "commit"]
        );
        engine.pause("a").await.unwrap();
        let paused = last_verb(engine, "a");
        let expected = [
            "drain",
            "probe",
            "begin-freeze",
            "prepare-guest",
            "stage",
            "pause-vcpus",
            "save",
            "flush",
            "freeze",
            "copy",
            "publish",
            "commit",
            "release",
        ];
        assert_eq!(
            (paused.verb.as_str(), steps(&paused)),
            ("pause", expected.to_vec())
        );
        assert!(paused.began_at > created.began_at && paused.error.is_none());
        let told = engine.events().kept(1).events;
        let event = told.iter().find(|event| event.kind == "sandbox.paused");
        assert_eq!(event.unwrap().steps, paused.steps);

        // What finds nothing to do is no verb that anybody asks about.
        engine.pause("a").await.unwrap();
        assert_eq!(last_verb(engine, "a"), paused);
        engine.stop("a").await.unwrap();
        assert_eq!(steps(&last_verb(engine, "a")), ["unpack-disk"]);
        run(engine, &id).await.unwrap();
        assert_eq!(last_verb(engine, "a").verb, "start");
    });
}

#[test]
fn a_verb_that_fails_says_how_far_it_came() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        injector.script("machine.save", [Some(When::Before)]);
        let error = engine.pause("a").await.unwrap_err();
        let last = last_verb(engine, "a");
        assert_eq!(
            (last.verb.as_str(), last.steps.last().unwrap().0.as_str()),
            ("pause", "save")
        );
        assert!(last.error.unwrap().starts_with(&error.to_string()));
    });
}

fn generation(number: u32) -> Point {
    Point::Generation(GenerationNo(number))
}

fn branch(name: &str) -> Point {
    Point::Branch(name.parse().unwrap())
}

fn numbers(engine: &Engine, wanted: &str) -> Vec<u32> {
    let generations = engine.inspect(wanted).unwrap().record.generations.clone();
    generations.into_iter().map(|number| number.0).collect()
}

fn branches(engine: &Engine, wanted: &str) -> Vec<String> {
    let branches = engine.inspect(wanted).unwrap().record.branches.clone();
    branches.into_iter().map(|it| it.name.to_string()).collect()
}

/// Waits until what a sandbox does by itself has been done.
async fn moment() {
    tokio::time::sleep(Duration::from_secs(5)).await;
}

#[test]
fn inv_51_rollback_goes_anywhere_and_back_and_loses_nothing() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        for page in 1..=3 {
            world.write_page(&id, page);
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
        }
        world.tick();
        let newest = world.guest_value(&id).unwrap();

        // Of a running guest, the disk is kept.
        let (outcome, view) = engine.rollback("a", generation(2), false).await.unwrap();
        assert_eq!((outcome, view.phase()), (Outcome::Changed, Phase::Paused));
        assert_eq!(numbers(engine, "a"), [1, 2, 3], "later ones stay listed");
        let aside = branches(engine, "a");
        assert_eq!(aside.len(), 1);
        engine.collect(false).await.unwrap();
        let again = engine.rollback("a", generation(2), false).await.unwrap();
        assert_eq!(again.0, Outcome::AlreadyThere);
        engine.resume("a", None).await.unwrap();
        world.guest_value(&id).unwrap();
        assert_eq!(world.page(&id), Some(2), "its memory is that of then");

        // From a paused one there is nothing to keep, and the future is still there.
        engine.pause("a").await.unwrap();
        engine.rollback("a", generation(3), false).await.unwrap();
        assert_eq!(branches(engine, "a"), aside);
        let other = engine.rollback("a", generation(1), true).await.unwrap();
        assert_eq!(other.1.phase(), Phase::Running);
        assert_eq!(world.page(&id), Some(1));
        assert_eq!(numbers(engine, "a"), [1, 2, 3, 4]);

        // Back to what was set aside: its disk is booted.
        engine.rollback("a", branch(&aside[0]), true).await.unwrap();
        assert!(world.guest_value(&id).unwrap() >= newest);
        assert_eq!(
            branches(engine, "a").len(),
            2,
            "what was left for it is kept too"
        );
        let kept = engine.inspect("a").unwrap().record.branches.clone();
        assert_eq!(kept[0].after, Some(GenerationNo(3)));
        assert_eq!(kept[1].after, Some(GenerationNo(1)));

        // Also from paused and stopped.
        engine.stop("a").await.unwrap();
        engine.rollback("a", generation(4), false).await.unwrap();
        engine
            .rollback("a", branch(&aside[0]), false)
            .await
            .unwrap();
        assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Stopped);
        run(engine, &id).await.unwrap();
        assert!(world.guest_value(&id).unwrap() >= newest);
    });
}

#[test]
fn inv_51_a_point_that_is_not_there_changes_nothing() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        let before = (world.in_use(), world.objects());
        for run in [false, true] {
            let error = engine.rollback("a", generation(7), run).await;
            assert!(matches!(error, Err(Error::NoGeneration { .. })));
            let error = engine.rollback("a", branch("nothing"), run).await;
            assert!(matches!(error, Err(Error::Unknown { kind: "branch", .. })));
        }
        assert_eq!((world.in_use(), world.objects()), before);
        world.guest_value(&id).unwrap();
    });
}

#[test]
fn inv_44_a_generation_that_cannot_be_resumed_here_still_gives_its_disk() {
    let world = World::new();
    let value = life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        let id = create(&engine, "a").await;
        let value = world.guest_value(&id).unwrap();
        engine.pause("a").await.unwrap();
        engine.stop("a").await.unwrap();
        value
    });
    world.upgrade_vmm("2.0");
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        run(&engine, &engine.inspect("a").unwrap().record.id.clone())
            .await
            .unwrap();
        let refused = engine.rollback("a", generation(1), true).await;
        assert!(matches!(refused, Err(Error::Incompatible { .. })));
        assert_eq!(
            engine.inspect("a").unwrap().phase(),
            Phase::Running,
            "nothing was left for it"
        );
        engine.rollback("a", generation(1), false).await.unwrap();
        engine.stop("a").await.unwrap();
        engine.start("a").await.unwrap();
        let id = engine.inspect("a").unwrap().record.id.clone();
        assert!(world.guest_value(&id).unwrap() >= value);
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_31_a_sandbox_that_crashed_says_what_there_is() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        let refused = engine.stop("a").await.map(drop);
        refused.unwrap();
        let never = engine.resume("a", None).await.unwrap_err();
        assert!(never.hint().unwrap().contains("never been paused"));
        engine.start("a").await.unwrap();
        for _ in 0..2 {
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
        }
        engine.rollback("a", generation(1), true).await.unwrap();
        world.crash_vmm(&id);
        moment().await;
        let crashed = engine.resume("a", None).await.unwrap_err();
        assert!(
            crashed.to_string().contains("killed by signal 9"),
            "{crashed}"
        );
        let hint = crashed.hint().unwrap();
        // The pause that its disk goes on from, not one of a future that was left.
        assert!(
            hint.contains("`start`") && hint.contains("`resume --generation 1`"),
            "{hint}"
        );
    });
}

#[test]
fn inv_24_what_is_forgotten_goes_and_what_is_in_use_does_not() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        engine.checkpoint("a").await.unwrap();
        engine.rollback("a", generation(1), false).await.unwrap();
        let refused = engine.forget("a", generation(1)).await.unwrap_err();
        assert!(
            matches!(refused, Error::InUse { .. }) && refused.to_string().contains("sandbox a"),
            "{refused}"
        );
        engine.resume("a", None).await.unwrap();
        let capture = |at: usize| engine.inspect("a").unwrap().generations[at].capture.clone();
        let (mapped, unused) = (capture(0), capture(1));
        let aside = branches(engine, "a");
        for point in [generation(1), generation(2), branch(&aside[0])] {
            engine.forget("a", point.clone()).await.unwrap();
            let again = engine.forget("a", point).await;
            assert!(matches!(
                again,
                Err(Error::NoGeneration { .. } | Error::Unknown { .. })
            ));
        }
        moment().await;
        assert_eq!(numbers(engine, "a"), [0; 0]);
        assert_eq!(branches(engine, "a"), [""; 0]);
        let there = |object| world.content(&object).is_some();
        assert!(there(Object::Memory(mapped.memory)) && there(Object::Layer(mapped.layer)));
        assert!(
            !there(Object::Memory(unused.memory)),
            "only its generation needed it"
        );
        world.tick();
        world.guest_value(&id).unwrap();
        engine.pause("a").await.unwrap();
        assert_eq!(numbers(engine, "a"), [3], "numbers are not used again");
    });
}

#[test]
fn inv_51_a_branch_that_a_disk_goes_on_from_can_be_forgotten() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        let value = world.guest_value(&id).unwrap();
        engine.rollback("a", generation(1), false).await.unwrap();
        let aside = branch(&branches(engine, "a")[0]);
        engine.rollback("a", aside.clone(), false).await.unwrap();
        engine.forget("a", aside).await.unwrap();
        engine.collect(false).await.unwrap();
        run(engine, &id).await.unwrap();
        assert!(world.guest_value(&id).unwrap() >= value);
    });
}

#[test]
fn a_history_says_what_came_after_what() {
    story(async |_, engine| {
        create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        engine.checkpoint("a").await.unwrap();
        drop(engine.fork("a", 1).await.unwrap());
        engine.rollback("a", generation(1), true).await.unwrap();
        engine.pause("a").await.unwrap();
        let history = engine.history("a").await.unwrap();
        let told: Vec<_> = history
            .generations
            .iter()
            .map(|it| {
                let generation = it.generation.as_ref().unwrap();
                assert!(it.disk.is_some() && it.unusable.is_none());
                let after = generation.after.map(|number| number.0);
                (it.number.0, generation.made_by.to_string(), after)
            })
            .collect();
        let expected = [
            (1, "pause", None),
            (2, "checkpoint", Some(1)),
            (3, "fork", Some(2)),
            (4, "pause", Some(1)),
        ];
        assert_eq!(
            told,
            expected.map(|(number, by, after)| (number, by.to_owned(), after))
        );
        assert_eq!(history.branches[0].branch.after, Some(GenerationNo(3)));
        assert_eq!(history.record.after, Some(GenerationNo(4)));
        assert_eq!(history.newest_disk, None, "its generation is all there is");
        let fork = engine
            .list()
            .into_iter()
            .find(|view| view.record.name.is_none());
        let fork = engine
            .history(fork.unwrap().record.id.as_str())
            .await
            .unwrap();
        let first = fork.generations[0].generation.as_ref().unwrap();
        assert_eq!(first.made_by, MadeBy::Create);
        assert!(fork.newest_disk.is_some());
    });
}

#[test]
fn inv_52_retention_goes_by_count_and_keeps_what_is_in_use() {
    story(async |_, engine| {
        let policy = HistoryPolicy {
            keep: Some(2),
            ..HistoryPolicy::default()
        };
        let request = CreateRequest {
            history: policy,
            ..named(IMAGE, "a")
        };
        engine.create(request).await.unwrap();
        for _ in 0..3 {
            engine.checkpoint("a").await.unwrap();
        }
        moment().await;
        assert_eq!(numbers(engine, "a"), [2, 3]);
        engine.rollback("a", generation(2), true).await.unwrap();
        engine.checkpoint("a").await.unwrap();
        moment().await;
        assert_eq!(numbers(engine, "a"), [3, 4]);
        let told = engine.events().kept(1).events;
        let retired = told.iter().filter(|event| event.kind == "sandbox.retired");
        let retired: Vec<_> = retired.map(|event| event.detail.as_str()).collect();
        assert_eq!(retired, ["generation 1", "generation 2"]);

        // A sandbox that is at an old one keeps it.
        engine.rollback("a", generation(3), false).await.unwrap();
        engine.resume("a", None).await.unwrap();
        for _ in 0..2 {
            engine.rollback("a", generation(4), true).await.unwrap();
        }
        moment().await;
        assert_eq!(
            branches(engine, "a").len(),
            2,
            "the newest branches are kept"
        );
        assert_eq!(numbers(engine, "a"), [3, 4]);
    });
}

#[test]
fn inv_52_retention_goes_by_age_while_nobody_asks_for_anything() {
    story(async |world, engine| {
        let day = Duration::from_hours(24);
        let request = CreateRequest {
            history: HistoryPolicy {
                keep_for_secs: Some(3 * day.as_secs()),
                ..HistoryPolicy::default()
            },
            ..named(IMAGE, "a")
        };
        engine.create(request).await.unwrap();
        engine.checkpoint("a").await.unwrap();
        engine.rollback("a", generation(1), true).await.unwrap();
        tokio::time::sleep(day).await;
        engine.checkpoint("a").await.unwrap();
        engine.checkpoint("a").await.unwrap();
        let objects = world.objects().len();
        tokio::time::sleep(day + day / 2).await;
        assert_eq!(
            (numbers(engine, "a"), branches(engine, "a").len()),
            (vec![1, 2, 3], 1)
        );
        tokio::time::sleep(day).await;
        assert_eq!(
            (numbers(engine, "a"), branches(engine, "a").len()),
            (vec![2, 3], 0)
        );
        assert!(
            world.objects().len() < objects,
            "what only they needed is collected"
        );
        // The newest is the pause to go back to, however old.
        tokio::time::sleep(30 * day).await;
        assert_eq!(numbers(engine, "a"), [3]);
    });
}

#[test]
fn what_is_kept_is_said_anew_by_every_start() {
    let world = World::new();
    let keeping = |keep| Config {
        keep,
        ..Config::default()
    };
    life(async || {
        let engine = open_with(world.host(FreezeBy::Vmm), keeping(8)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        for _ in 0..4 {
            engine.checkpoint("a").await.unwrap();
        }
    });
    life(async || {
        let engine = open_with(world.host(FreezeBy::Vmm), keeping(1)).await;
        moment().await;
        assert_eq!(numbers(&engine, "a"), [4]);
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn checkpoints_are_made_by_themselves_while_a_guest_runs() {
    story(async |world, engine| {
        let request = CreateRequest {
            history: HistoryPolicy {
                checkpoint_every_secs: Some(600),
                ..HistoryPolicy::default()
            },
            ..named(IMAGE, "a")
        };
        let id = engine.create(request).await.unwrap().record.id.clone();
        let minutes = |n: u64| tokio::time::sleep(Duration::from_mins(n));
        minutes(9).await;
        assert_eq!(numbers(engine, "a"), [0; 0]);
        minutes(2).await;
        assert_eq!(numbers(engine, "a"), [1]);
        assert_eq!(last_verb(engine, "a").verb, "checkpoint");
        minutes(10).await;
        assert_eq!(numbers(engine, "a"), [1, 2]);

        // One that fails changes nothing, is told once, and is tried again.
        world.set_left(Some(Bytes::mib(1)));
        minutes(25).await;
        world.set_left(None);
        let told = engine.events().kept(1).events;
        let failed = told
            .iter()
            .filter(|it| it.kind == "sandbox.checkpoint-failed");
        assert_eq!(failed.count(), 1);
        world.tick();
        world.guest_value(&id).unwrap();
        minutes(10).await;
        assert_eq!(numbers(engine, "a"), [1, 2, 3]);

        engine.pause("a").await.unwrap();
        minutes(60).await;
        assert_eq!(
            numbers(engine, "a"),
            [1, 2, 3, 4],
            "a paused guest is as it was"
        );
        let nothing = engine.checkpoint("a").await.unwrap().0;
        assert_eq!(nothing, Outcome::AlreadyThere);
        engine.resume("a", None).await.unwrap();
        minutes(9).await;
        assert_eq!(
            numbers(engine, "a").len(),
            4,
            "a whole interval after it resumed"
        );
        minutes(2).await;
        assert_eq!(numbers(engine, "a").len(), 5);
    });
}

#[test]
fn checkpoints_go_on_under_the_next_daemon() {
    let world = World::new();
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        let request = CreateRequest {
            history: HistoryPolicy {
                checkpoint_every_secs: Some(600),
                ..HistoryPolicy::default()
            },
            ..named(IMAGE, "a")
        };
        engine.create(request).await.unwrap();
        tokio::time::sleep(Duration::from_mins(11)).await;
        assert_eq!(numbers(&engine, "a"), [1]);
    });
    world.step_clock(SignedDuration::from_mins(5));
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        tokio::time::sleep(Duration::from_mins(6)).await;
        assert_eq!(numbers(&engine, "a"), [1, 2]);
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn a_policy_that_makes_no_sense_is_refused() {
    story(async |_, engine| {
        let policies = [
            HistoryPolicy {
                keep: Some(0),
                ..HistoryPolicy::default()
            },
            HistoryPolicy {
                checkpoint_every_secs: Some(1),
                ..HistoryPolicy::default()
            },
        ];
        for history in policies {
            let request = CreateRequest {
                history,
                ..named(IMAGE, "a")
            };
            let error = engine.create(request).await.unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }) && error.hint().is_some());
        }
    });
}
