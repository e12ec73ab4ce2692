//! What verbs leave undone, and who finishes it without being asked: a disk that had no room, a guest that did not answer.

use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{create, import_image, leave_nothing, life, open, run};
use icebox_engine::host::GuestOrigin;
use icebox_engine::id::GenerationNo;
use icebox_engine::manifest::v1::Point;
use icebox_engine::{Engine, Error, Outcome, Phase};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};
use tokio::time::Instant;

fn events(engine: &Engine, kind: &str) -> usize {
    let all = engine.events().kept(1).events;
    all.iter().filter(|event| event.kind == kind).count()
}

/// Lets the sandbox's task do by itself what it has to.
async fn a_while() {
    tokio::time::sleep(Duration::from_secs(120)).await;
}

#[test]
fn inv_28_what_a_full_disk_left_unfinished_is_finished_when_there_is_room() {
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        let mark = world.mark(&id).unwrap();
        let (mut left, mut at) = (0, 0);
        loop {
            injector.arm(Some(Fault {
                at,
                when: When::Before,
                kind: Kind::StaysFull,
            }));
            let paused = engine.pause("a").await;
            let steps = injector.trace().len();
            a_while().await;
            let record = engine.inspect("a").unwrap().record;
            left += usize::from(record.intent.is_some());
            injector.arm(None);
            // Nobody asks for anything, and no daemon starts.
            a_while().await;
            let record = engine.inspect("a").unwrap().record;
            assert_eq!(
                (&record.intent, &record.broken),
                (&None, &None),
                "from {at} on"
            );
            if paused.is_err() {
                assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Running);
            }
            run(engine, &id).await.unwrap();
            assert_eq!(World::mark_in(world.guest_value(&id).unwrap()), mark);
            at += 1;
            if at >= steps {
                break;
            }
        }
        assert!(left > 0, "a freeze was never left unfinished");
    });
}

#[test]
fn inv_51_a_setting_aside_that_stays_pending_is_finished_without_being_asked_for() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.stop("a").await.unwrap();
        injector.break_step(Some("volume.seal"));
        engine.resume("a", Some(GenerationNo(1))).await.unwrap_err();
        a_while().await;
        assert!(engine.inspect("a").unwrap().record.intent.is_some());
        injector.break_step(None);
        a_while().await;
        let view = engine.inspect("a").unwrap();
        assert_eq!(
            (view.record.intent.clone(), view.phase()),
            (None, Phase::Paused)
        );
        assert_eq!(view.record.branches.len(), 1);
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn what_is_refused_is_not_the_last_verb() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        engine.pause("a").await.unwrap();
        let last = engine.inspect("a").unwrap().last_verb;
        assert_eq!(last.as_ref().unwrap().verb, "pause");
        engine.start("a").await.unwrap_err();
        let nowhere = Point::Branch("nowhere".parse().unwrap());
        engine.rollback("a", nowhere, false).await.unwrap_err();
        engine.resume("a", Some(GenerationNo(7))).await.unwrap_err();
        assert_eq!(engine.inspect("a").unwrap().last_verb, last);
        // One that began and failed is.
        injector.break_step(Some("vmm.launch"));
        engine.resume("a", None).await.unwrap_err();
        let failed = engine.inspect("a").unwrap().last_verb.unwrap();
        assert!(
            failed.verb == "resume" && failed.error.is_some(),
            "{failed:?}"
        );
        injector.break_step(None);
    });
}

#[test]
fn inv_51_a_setting_aside_that_stays_pending_is_finished_by_the_next_verb() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.stop("a").await.unwrap();
        injector.break_step(Some("volume.seal"));
        engine.resume("a", Some(GenerationNo(1))).await.unwrap_err();
        assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Stopped);
        injector.break_step(None);
        let error = engine.start("a").await.unwrap_err();
        assert!(
            matches!(error, Error::Refused(_)),
            "there is no newest disk to boot any more: {error:?}"
        );
        let view = engine.inspect("a").unwrap();
        assert_eq!(view.record.broken, None);
        assert_eq!(view.phase(), Phase::Paused);
        assert_eq!(view.record.branches.len(), 1);
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn inv_05_inv_16_a_guest_whose_agent_stays_wedged_is_resumed_and_told_of() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        let mark = world.mark(&id).unwrap();
        world.wedge_agents(true);
        engine.pause("a").await.unwrap();
        let begun = Instant::now();
        let (outcome, view) = engine.resume("a", None).await.unwrap();
        let took = begun.elapsed();
        assert_eq!(outcome, Outcome::Changed);
        assert!(took <= Duration::from_secs(31), "{took:?}");
        // It runs, everybody is told, and its pause is there.
        assert_eq!(view.phase(), Phase::Running);
        assert!(view.record.unwelcomed);
        assert_eq!(World::mark_in(world.guest_value(&id).unwrap()), mark);
        assert_eq!(events(engine, "sandbox.unanswering"), 1);
        assert_eq!(view.record.generations.len(), 1);
        // There and back again, as often as anybody likes.
        engine.pause("a").await.unwrap();
        assert!(engine.resume("a", None).await.unwrap().1.record.unwelcomed);
        let told = world.welcomes(&id).len();
        // What it has to be told it is told when it answers.
        world.wedge_agents(false);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!engine.inspect("a").unwrap().record.unwelcomed);
        assert_eq!(events(engine, "sandbox.answering"), 1);
        let welcomes = world.welcomes(&id);
        assert_eq!(welcomes.len(), told + 1);
        assert_eq!(welcomes.last().unwrap().origin, GuestOrigin::Resume);
        // A fork must be told who it is before anything else: without that there is none.
        engine.pause("a").await.unwrap();
        world.wedge_agents(true);
        let forks = engine.fork("a", 1).await.unwrap();
        assert!(forks[0].is_err());
        world.wedge_agents(false);
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn inv_05_inv_30_a_daemon_that_finds_a_guest_unwelcomed_goes_on_asking() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            create(&engine, "a").await;
            world.wedge_agents(true);
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
        });
        life(async || {
            let engine = open(world.host(freeze)).await;
            assert!(engine.inspect("a").unwrap().record.unwelcomed);
            world.wedge_agents(false);
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(!engine.inspect("a").unwrap().record.unwelcomed);
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn a_guest_that_stood_still_has_the_hosts_time_again() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        assert!(world.knows_time(&id), "it was told when it was welcomed");
        engine.snapshot("a", "copy".parse().unwrap()).await.unwrap();
        assert!(world.knows_time(&id), "as soon as its snapshot is there");
        world.fail_next_save();
        engine.pause("a").await.unwrap_err();
        a_while().await;
        assert!(world.knows_time(&id), "after a pause that failed");
        world.stall(&id);
        a_while().await;
        assert!(!world.knows_time(&id));
        world.set_left(None);
        a_while().await;
        assert!(world.knows_time(&id), "when there is room again");
    });
}

#[test]
fn a_guest_that_a_killed_daemon_left_standing_has_the_hosts_time_again() {
    let (world, injector) = (World::new(), Injector::new());
    let host = || inject(world.host(FreezeBy::Vmm), &injector);
    let id = life(async || {
        let engine = open(host()).await;
        import_image(&world, &engine).await;
        let id = create(&engine, "a").await;
        injector.arm(None);
        engine.snapshot("a", "one".parse().unwrap()).await.unwrap();
        let at = injector.trace().iter().position(|it| *it == "machine.save");
        injector.arm(Some(Fault {
            at: at.unwrap(),
            when: When::After,
            kind: Kind::Crash,
        }));
        tokio::select! {
            biased;
            () = injector.reached() => {}
            done = engine.snapshot("a", "two".parse().unwrap()) => panic!("{done:?}"),
        }
        id
    });
    assert!(!world.knows_time(&id));
    injector.arm(None);
    life(async || {
        let engine = open(host()).await;
        a_while().await;
        assert!(world.knows_time(&id));
        leave_nothing(&world, &engine).await;
    });
}
