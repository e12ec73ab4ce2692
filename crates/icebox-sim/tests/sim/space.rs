//! What holds when room runs out: before it has, and for guests that find none.

use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{IMAGE, create, import_image, leave_nothing, life, named, open, run};
use icebox_engine::id::Name;
use icebox_engine::layout::Object;
use icebox_engine::unit::Bytes;
use icebox_engine::{Engine, Error, ImageRequest, Part, Phase};
use icebox_sim::fault::When;
use icebox_sim::{FreezeBy, Vcpus, World};

fn n(text: &str) -> Name {
    text.parse().unwrap()
}

#[track_caller]
fn assert_no_room<T: std::fmt::Debug>(result: Result<T, Error>, word: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Exhausted { .. }), "{error:?}");
    assert!(error.to_string().contains(word), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains('`')));
}

/// What was told of guests without room since event `from`.
fn told(engine: &Engine, from: u64) -> Vec<String> {
    let events = engine.events().kept(from).events;
    let kinds = events.into_iter().map(|event| event.kind);
    kinds
        .filter(|kind| kind == "sandbox.stalled" || kind == "sandbox.continued")
        .collect()
}

#[test]
fn inv_28_low_space_refuses_new_work_and_lets_the_old_go() {
    story(async |world, engine| {
        create(engine, "paused").await;
        create(engine, "stopped").await;
        create(engine, "runs").await;
        engine.pause("paused").await.unwrap();
        engine.stop("stopped").await.unwrap();
        // Of 64 GiB one is kept.
        world.set_left(Some(Bytes::mib(1023)));
        let word = "less than the 1.0 GiB";
        assert_no_room(engine.create(named(IMAGE, "new")).await, word);
        assert_no_room(engine.resume("paused", None).await, word);
        assert_no_room(engine.start("stopped").await, word);
        assert_no_room(engine.fork("runs", 1).await.map(drop), word);
        assert_no_room(engine.snapshot("runs", n("new")).await, word);
        assert_no_room(engine.flatten("stopped", n("new")).await, word);
        world.add_image("/input/another", 2, Bytes::mib(64));
        let request = ImageRequest {
            name: n("new"),
            geometry: engine.template(IMAGE).unwrap().geometry,
            kernel: engine.host().kernels.default_kernel().await.unwrap(),
            env: std::collections::BTreeMap::new(),
            login: icebox_engine::manifest::v1::Login::default(),
            source: "a test".into(),
        };
        let imported = engine.import_image("/input/another".as_ref(), request);
        assert_no_room(imported.await, word);
        assert_no_room(engine.require_room().await, word);
        assert_eq!(engine.list().len(), 3);

        // What gives room back is not refused, nor what is there already.
        engine.pause("runs").await.unwrap();
        engine.stop("runs").await.unwrap();
        engine.destroy("stopped").await.unwrap();
        world.set_left(Some(Bytes::mib(1024)));
        engine.resume("paused", None).await.unwrap();
        world.set_left(None);
    });
}

#[test]
fn inv_28_a_guest_without_room_is_told_of_and_goes_on_by_itself() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        let from = engine.events().next_seq();
        world.stall(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(told(engine, from), ["sandbox.stalled"]);
        let view = engine.inspect("a").unwrap();
        assert!(view.stalled, "it is shown");
        assert_eq!(view.phase(), Phase::Running, "it is not at rest");

        // Nothing that needs its guest can be done, and nothing of an attempt is left.
        let before = (world.in_use(), world.objects());
        let word = "stands still";
        assert_no_room(engine.pause("a").await, word);
        assert_eq!((world.in_use(), world.objects()), before);
        assert!(
            engine.route("a").unwrap().is_some(),
            "whoever talks to it waits"
        );

        // Still too little for it to get anywhere: less than a sixteenth of the mark.
        world.set_left(Some(Bytes::mib(63)));
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(engine.inspect("a").unwrap().stalled);
        assert_eq!(told(engine, from), ["sandbox.stalled"]);
        world.set_left(Some(Bytes::mib(64)));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!engine.inspect("a").unwrap().stalled);
        assert_eq!(told(engine, from), ["sandbox.stalled", "sandbox.continued"]);
        assert_eq!(world.vcpus(&id), Some(Vcpus::Running));
        world.set_left(None);
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn inv_28_a_guest_that_stalls_again_and_again_is_tried_ever_more_rarely() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        let from = engine.events().next_seq();
        for _ in 0..1800 {
            world.stall(&id);
            // There seems to be room, and there is none.
            world.set_left(None);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let times = told(engine, from).len() / 2;
        assert!((30..60).contains(&times), "{times} in half an hour");
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert!(!engine.inspect("a").unwrap().stalled);
        // It has run for a while: the next time is a first one again.
        world.stall(&id);
        world.set_left(None);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!engine.inspect("a").unwrap().stalled);
    });
}

#[test]
fn inv_28_a_verb_that_needs_the_guest_lets_it_go_on_first() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.stall(&id);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(engine.inspect("a").unwrap().stalled);
        world.set_left(None);
        engine.pause("a").await.unwrap();
        assert!(!engine.inspect("a").unwrap().stalled);
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn inv_28_a_guest_without_room_can_be_stopped_destroyed_and_found_again() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        let id = life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            let id = create(&engine, "a").await;
            create(&engine, "b").await;
            world.stall(&id);
            tokio::time::sleep(Duration::from_millis(1)).await;
            id
        });
        // Another daemon finds it standing: that is no capture that died.
        life(async || {
            let engine = open(world.host(freeze)).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            let view = engine.inspect("a").unwrap();
            assert!(view.stalled && view.record.broken.is_none());
            assert_eq!(world.vcpus(&id), Some(Vcpus::Stalled));
            world.set_left(None);
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_eq!(world.vcpus(&id), Some(Vcpus::Running));

            world.stall(&id);
            tokio::time::sleep(Duration::from_millis(1)).await;
            engine.stop("a").await.unwrap();
            assert!(!engine.inspect("a").unwrap().stalled);
            world.set_left(None);
            engine.start("a").await.unwrap();
            assert!(!engine.inspect("a").unwrap().stalled);
            world.stall(&id);
            tokio::time::sleep(Duration::from_millis(1)).await;
            engine.destroy("a").await.unwrap();
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_28_a_guest_that_stalls_as_it_is_captured_runs_again_and_nothing_is_left() {
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        let objects = world.objects();
        // The save finds no room, and neither does the guest while it stands.
        injector.script("machine.save", [Some(When::Before)]);
        engine.pause("a").await.unwrap_err();
        assert_eq!(world.vcpus(&id), Some(Vcpus::Running));
        assert_eq!(world.objects(), objects);
        world.stall(&id);
        // Before its task has noticed.
        let error = engine.pause("a").await.unwrap_err();
        assert!(matches!(error, Error::Exhausted { .. }), "{error:?}");
        assert_eq!(world.objects(), objects);
        world.set_left(None);
        tokio::time::sleep(Duration::from_secs(2)).await;
        engine.pause("a").await.unwrap();
        run(engine, &id).await.unwrap();
    });
}

/// What everything occupies together.
async fn occupied(engine: &Engine) -> u64 {
    let kinds = engine.usages().await.kinds;
    kinds.values().map(|(_, sum)| sum.0).sum()
}

fn of(engine: &Engine, sandbox: &str) -> Object {
    Object::Sandbox(engine.inspect(sandbox).unwrap().record.id.clone())
}

#[test]
fn inv_27_what_something_occupies_alone_is_what_its_removal_gives_back() {
    story(async |_, engine| {
        create(engine, "a").await;
        create(engine, "b").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        engine.snapshot("a", n("warm")).await.unwrap();
        engine.create(named("warm", "c")).await.unwrap();
        engine.pause("c").await.unwrap();
        engine.stop("b").await.unwrap();
        engine.flatten("b", n("flat")).await.unwrap();
        engine.create(named("flat", "d")).await.unwrap();
        engine.collect(false).await.unwrap();

        for name in ["c", "a", "d", "b"] {
            let object = of(engine, name);
            let usage = engine.usage(&object).await.unwrap();
            assert_eq!(
                engine.usages().await.owners[&object],
                usage,
                "one by one and together"
            );
            assert!(!usage.incomplete && usage.own > Bytes(0), "{usage:?}");
            let parts = |shared: bool| {
                let parts = usage.parts.iter();
                let parts = parts.filter(move |part| part.shared_with.is_empty() != shared);
                parts.map(|part| part.allocated.0).sum::<u64>()
            };
            assert_eq!((parts(false), parts(true)), (usage.own.0, usage.shared.0));
            let before = occupied(engine).await;
            engine.destroy(name).await.unwrap();
            engine.collect(false).await.unwrap();
            assert_eq!(
                occupied(engine).await,
                before - usage.own.0,
                "{name}: {usage:?}"
            );
        }
        for name in ["warm", "flat", IMAGE] {
            let object = Object::Template(engine.template(name).unwrap().id);
            let usage = engine.usage(&object).await.unwrap();
            let before = occupied(engine).await;
            engine.remove_template(name).await.unwrap();
            engine.collect(false).await.unwrap();
            assert_eq!(
                occupied(engine).await,
                before - usage.own.0,
                "{name}: {usage:?}"
            );
        }
        assert_eq!(occupied(engine).await, 0);
    });
}

#[test]
fn inv_27_who_shares_what_is_said() {
    story(async |_, engine| {
        create(engine, "a").await;
        let shared_with = async |sandbox: &str, kind: &str| {
            let usage = engine.usage(&of(engine, sandbox)).await.unwrap();
            let of_kind = |part: &Part| part.object.to_string().starts_with(kind);
            let part = usage.parts.into_iter().find(of_kind);
            part.map(|part| part.shared_with)
        };
        let base = shared_with("a", "base").await;
        assert_eq!(base.unwrap(), ["template image"]);
        engine.pause("a").await.unwrap();
        assert_eq!(shared_with("a", "memory").await.unwrap(), [""; 0]);
        engine.snapshot("a", n("warm")).await.unwrap();
        assert_eq!(shared_with("a", "memory").await.unwrap(), ["template warm"]);
        engine.create(named("warm", "b")).await.unwrap();
        assert_eq!(
            shared_with("b", "layer").await.unwrap(),
            ["template warm", "sandbox a"]
        );
        let unneeded = engine.usages().await.unneeded;
        assert_eq!(unneeded, Bytes(0));
    });
}
