//! Disks that something happens to from outside: seen, said, and not made worse.

use std::time::Duration;

use crate::support::{IMAGE, create, import_image, leave_nothing, life, named, open, run};
use icebox_engine::id::{GenerationNo, SandboxId};
use icebox_engine::layout::Object;
use icebox_engine::{Engine, Error, Phase};
use icebox_sim::{FreezeBy, World};

/// Tells a story on both kinds of volume driver, whose heads can be lost, and ends it with nothing left.
fn story(tell: impl AsyncFn(&World, &Engine)) {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        life(async || {
            let world = World::new();
            world.with_heads_to_lose();
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            tell(&world, &engine).await;
            leave_nothing(&world, &engine).await;
        });
    }
}

/// Loses the disk that a guest writes to, and gives the engine the second that it has to notice.
async fn lose(world: &World, id: &SandboxId) {
    world.lose_disk(id);
    tokio::time::sleep(Duration::from_secs(1)).await;
}

fn lost(engine: &Engine, wanted: &str) -> Option<String> {
    engine.inspect(wanted).unwrap().disk_lost
}

#[test]
fn inv_28_a_lost_disk_is_an_event_and_a_state_within_a_second_and_pauses_before_it_are_whole() {
    story(async |world, engine| {
        let (id, other) = (create(engine, "a").await, create(engine, "b").await);
        engine.pause("a").await.unwrap();
        let paused = world.content(&Object::Generation(id.clone(), GenerationNo(1)));
        run(engine, &id).await.unwrap();
        let from_here = engine.events().next_seq();
        lose(world, &id).await;
        assert!(lost(engine, "a").unwrap().contains("the world lost it"));
        assert_eq!(lost(engine, "b"), None);
        let events = || engine.events().kept(from_here).events;
        let said = || {
            let of_it = |event: &&icebox_engine::Event| event.kind == "sandbox.disk-lost";
            events().iter().filter(of_it).count()
        };
        assert_eq!(said(), 1, "{:?}", events());
        assert_eq!(events()[0].sandbox.as_ref(), Some(&id));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(said(), 1, "news are told once");

        // Its guest is left alone; nothing is made of its disk.
        assert!(engine.route("a").unwrap().is_some());
        let refusals = [
            engine.pause("a").await.err(),
            engine.snapshot("a", "s".parse().unwrap()).await.err(),
            engine.fork("a", 1).await.err(),
            engine.flatten("a", "f".parse().unwrap()).await.err(),
        ];
        for refusal in refusals {
            let error = refusal.unwrap();
            assert!(matches!(error, Error::DiskLost { .. }), "{error:?}");
            assert!(
                error.hint().unwrap().contains("--generation 1"),
                "{error:?}"
            );
        }
        assert!(
            engine
                .templates()
                .iter()
                .all(|it| it.name.to_string() == "image")
        );
        engine.stop("a").await.unwrap();
        let error = engine.start("a").await.unwrap_err();
        assert!(matches!(error, Error::DiskLost { .. }), "{error:?}");
        assert!(
            lost(engine, "a").is_some(),
            "stopping it does not bring it back"
        );

        engine.resume("a", Some(GenerationNo(1))).await.unwrap();
        assert_eq!(lost(engine, "a"), None, "a new head");
        assert_eq!(
            engine.inspect("a").unwrap().record.branches.len(),
            1,
            "INV-51"
        );
        assert_eq!(
            world.content(&Object::Generation(id, GenerationNo(1))),
            paused
        );
        engine.pause("a").await.unwrap();
        world.guest_value(&other).unwrap();
    });
}

#[test]
fn inv_28_inv_30_a_restarted_daemon_sees_a_lost_disk_again_and_it_can_be_destroyed() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        world.with_heads_to_lose();
        life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            let id = create(&engine, "a").await;
            lose(&world, &id).await;
            assert!(lost(&engine, "a").is_some());
        });
        life(async || {
            let engine = open(world.host(freeze)).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(lost(&engine, "a").is_some());
            assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Running);
            let error = engine.pause("a").await.unwrap_err();
            assert!(error.hint().unwrap().contains("`rm`"), "{error:?}");
            engine.destroy("a").await.unwrap();
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_28_a_guest_whose_next_write_could_cost_it_its_disk_stands_still_until_there_is_room() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        let from_here = engine.events().next_seq();
        let said = |kind: &str| {
            let events = engine.events().kept(from_here).events;
            events.iter().filter(|event| event.kind == kind).count()
        };
        world.starve_disks(true);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(engine.inspect("a").unwrap().stalled);
        assert!(world.guest_value(&id).unwrap_err().contains("stand still"));
        assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Running);
        let error = engine.pause("a").await.unwrap_err();
        assert!(matches!(error, Error::Exhausted { .. }), "{error:?}");
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(world.guest_value(&id).is_err(), "it stays so");
        assert_eq!(said("sandbox.stalled"), 1);

        world.starve_disks(false);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!engine.inspect("a").unwrap().stalled);
        world.guest_value(&id).unwrap();
        assert_eq!(said("sandbox.continued"), 1);
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        world.guest_value(&id).unwrap();

        // It can be ended at any time.
        world.starve_disks(true);
        tokio::time::sleep(Duration::from_secs(1)).await;
        engine.stop("a").await.unwrap();
        engine.start("a").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(world.guest_value(&id).is_err());
        engine.destroy("a").await.unwrap();
    });
}

#[test]
fn inv_28_inv_30_a_guest_that_was_held_is_held_again_by_a_restarted_daemon() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        world.with_heads_to_lose();
        let id = life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            let id = create(&engine, "a").await;
            world.starve_disks(true);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(world.guest_value(&id).is_err());
            id
        });
        life(async || {
            let engine = open(world.host(freeze)).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(engine.inspect("a").unwrap().stalled);
            assert!(world.guest_value(&id).is_err());
            world.starve_disks(false);
            tokio::time::sleep(Duration::from_secs(2)).await;
            world.guest_value(&id).unwrap();
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_25_a_base_that_was_cut_short_is_refused_and_costs_nothing() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.stop("a").await.unwrap();
        world.cut_bases();
        for error in [
            engine.create(named(IMAGE, "b")).await.unwrap_err(),
            engine.start("a").await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Unusable { .. }), "{error:?}");
            assert!(error.to_string().contains("instead of 67108864"), "{error}");
        }
        assert_eq!(engine.list().len(), 1);
        assert_eq!(engine.inspect(id.as_str()).unwrap().phase(), Phase::Stopped);
    });
}
