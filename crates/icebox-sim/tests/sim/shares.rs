//! The engine's share of promises that hosts and guests keep: what it asks of them, in which order, and what it tells.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{IMAGE, create, from, import_image, leave_nothing, life, named, open, run};
use icebox_engine::host::GuestOrigin;
use icebox_engine::id::{GenerationNo, Name, SandboxId};
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::{Point, TemplateContent};
use icebox_engine::unit::Bytes;
use icebox_engine::{Error, Verb};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};
use tokio::time::Instant;

fn n(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn inv_27_sizes_are_what_is_allocated() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        let template = engine.template(IMAGE).unwrap();
        let TemplateContent::Image { base } = template.content else {
            panic!("an image");
        };
        let store = &engine.host().store;
        let base = Object::Base(base);
        let allocated = store.allocated(&base).await.unwrap();
        assert!(allocated < template.disk_size, "it is sparse");
        engine.pause("a").await.unwrap();
        let view = engine.inspect("a").unwrap();
        let capture = &view.generations[0].capture;
        assert!(capture.saved.allocated < Bytes::mib(view.record.spec.geometry.mem_mib.into()));

        engine.snapshot("a", n("warm")).await.unwrap();
        let objects = [
            Object::Layer(capture.layer.clone()),
            Object::Memory(capture.memory.clone()),
        ];
        let mut sizes = Vec::new();
        for object in objects {
            let size = store.allocated(&object).await.unwrap();
            sizes.push((object, size));
        }
        // The engine's own look at what there is comes first.
        tokio::time::sleep(Duration::from_secs(10)).await;
        engine.destroy("a").await.unwrap();
        // The template goes; what it needed waits for the collection that is looked at here.
        let waits = std::iter::repeat(Some(When::Before));
        injector.script("store.trash", std::iter::once(None).chain(waits));
        engine.remove_template("warm").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        injector.break_step(None);
        assert_eq!(engine.collect(true).await.unwrap().objects, sizes);
    });
}

#[test]
fn inv_29_a_page_that_was_zeroed_is_zero_after_any_later_resume() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.write_page(&id, 5);
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        assert_eq!(world.page(&id), Some(5));
        world.write_page(&id, 0);
        for _ in 0..3 {
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
            assert_eq!(world.page(&id), Some(0));
        }
        for fork in engine.fork("a", 1).await.unwrap() {
            assert_eq!(world.page(&fork.unwrap().record.id), Some(0));
        }
        // Each generation is against the full memory, whatever came between.
        engine.stop("a").await.unwrap();
        engine.resume("a", Some(GenerationNo(1))).await.unwrap();
        assert_eq!(world.page(&id), Some(5));
        engine.pause("a").await.unwrap();
        engine.resume("a", Some(GenerationNo(3))).await.unwrap();
        assert_eq!(world.page(&id), Some(0));
    });
}

#[test]
fn inv_37_every_guest_is_told_who_it_is_and_what_it_was() {
    story(async |world, engine| {
        let a = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        engine.snapshot("a", n("warm")).await.unwrap();
        let mut copies: Vec<SandboxId> = Vec::new();
        for fork in engine.fork("a", 2).await.unwrap() {
            copies.push(fork.unwrap().record.id.clone());
        }
        let created = engine.create(named("warm", "b")).await.unwrap();
        copies.push(created.record.id.clone());
        for copy in &copies {
            engine.pause(copy.as_str()).await.unwrap();
            engine.resume(copy.as_str(), None).await.unwrap();
        }

        let origins = |id: &SandboxId| -> Vec<GuestOrigin> {
            world.welcomes(id).iter().map(|it| it.origin).collect()
        };
        assert_eq!(origins(&a), [GuestOrigin::Boot, GuestOrigin::Resume]);
        for copy in &copies {
            assert_eq!(origins(copy), [GuestOrigin::Fork, GuestOrigin::Resume]);
        }
        let everybody = || copies.iter().chain([&a]);
        let mut names = BTreeSet::new();
        let mut tokens = BTreeSet::new();
        for id in everybody() {
            let told = world.welcomes(id);
            let record = engine.inspect(id.as_str()).unwrap().record;
            for welcome in &told {
                assert_eq!(welcome.sandbox, *id);
                assert_eq!(welcome.token, record.token, "its own, for its life");
                assert_eq!(welcome.hostname, told[0].hostname);
            }
            names.insert(told[0].hostname.clone());
            tokens.insert(record.token.expose().to_owned());
        }
        assert_eq!((names.len(), tokens.len()), (4, 4));
        let parents = &world.welcomes(&a)[0].token;
        for copy in &copies {
            let first = &world.welcomes(copy)[0];
            assert_eq!(first.current_token, *parents, "until it is told another");
        }
    });
}

#[test]
fn inv_07_inv_39_what_is_carried_lives_through_copies_and_requests_have_five_seconds_before_a_pause()
 {
    story(async |_, engine| {
        create(engine, "a").await;
        let is_cut = async |pass: &icebox_engine::Pass| {
            tokio::time::timeout(Duration::from_millis(1), pass.revoked())
                .await
                .is_ok()
        };
        let pass = engine.route("a").unwrap().unwrap().pass;
        engine.snapshot("a", n("warm")).await.unwrap();
        for fork in engine.fork("a", 2).await.unwrap() {
            fork.unwrap();
        }
        engine.flatten("a", n("flat")).await.unwrap();
        assert!(!is_cut(&pass).await, "its output goes on");

        let pausing = tokio::spawn({
            let engine = engine.clone();
            async move { engine.pause("a").await.map(drop) }
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(engine.route("a").unwrap().is_none(), "no new command");
        assert!(!is_cut(&pass).await, "nothing of its output is lost");
        drop(pass);
        pausing.await.unwrap().unwrap();

        engine.resume("a", None).await.unwrap();
        let endless = engine.route("a").unwrap().unwrap().pass;
        let begun = Instant::now();
        let (paused, cut) = tokio::join!(engine.pause("a"), async {
            endless.revoked().await;
            begun.elapsed()
        });
        paused.unwrap();
        assert_eq!(cut, Duration::from_secs(5));
        drop(endless);

        let number = engine.inspect("a").unwrap().generations[0].number;
        for ends in [Verb::Pause, Verb::Rollback, Verb::Stop] {
            engine.resume("a", None).await.unwrap();
            let stream = engine.route("a").unwrap().unwrap().pass;
            stream.becomes_stream();
            let begun = Instant::now();
            let ending = async {
                match ends {
                    Verb::Pause => engine.pause("a").await,
                    Verb::Stop => engine.stop("a").await,
                    _ => {
                        let to = Point::Generation(number);
                        engine.rollback("a", to, false).await
                    }
                }
            };
            let (ended, cut) = tokio::join!(ending, async {
                stream.revoked().await;
                begun.elapsed()
            });
            ended.unwrap();
            assert_eq!(cut, Duration::from_millis(50), "{ends:?}");
        }
    });
}

#[test]
fn inv_41_what_is_no_name_reaches_nothing_of_the_host() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        injector.arm(None);
        let long = "x".repeat(300);
        for bad in ["", ".", "..", "../a", "a/b", "-a", "é", "a\0", "a\n", &long] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
            let answers = [
                engine.create(from(bad)).await.map(drop),
                engine.pause(bad).await.map(drop),
                engine.stop(bad).await.map(drop),
                engine.remove_template(bad).await.map(drop),
                engine.destroy(bad).await,
            ];
            for answer in answers {
                assert!(
                    matches!(answer, Err(Error::Unknown { .. })),
                    "{bad:?}: {answer:?}"
                );
            }
        }
        assert_eq!(injector.trace(), Vec::<&str>::new());
    });
}

#[test]
fn inv_46_a_vmm_outlives_the_request_and_the_daemon_that_made_it() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let (world, injector) = (World::new(), Injector::new());
        let host = || inject(world.host(freeze), &injector);
        let (id, process) = life(async || {
            let engine = open(host()).await;
            import_image(&world, &engine).await;
            injector.arm(None);
            let id = create(&engine, "first").await;
            let launch = injector.trace().iter().position(|it| *it == "vmm.launch");
            engine.destroy(id.as_str()).await.unwrap();
            injector.arm(Some(Fault {
                at: launch.unwrap(),
                when: When::After,
                kind: Kind::Cancel,
            }));
            tokio::select! {
                biased;
                () = injector.reached() => {}
                created = engine.create(named(IMAGE, "a")) => drop(created.unwrap()),
            }
            tokio::time::sleep(Duration::from_secs(10)).await;
            let id = engine.inspect("a").unwrap().record.id.clone();
            world.guest_value(&id).unwrap();
            let process = world.process(&id).unwrap();
            (id, process)
        });
        injector.arm(None);
        let mut last = 0;
        for _ in 0..3 {
            world.tick();
            let now = world.guest_value(&id).unwrap();
            assert!(now > last, "it runs while no daemon does");
            last = now;
            life(async || {
                let engine = open(host()).await;
                run(&engine, &id).await.unwrap();
                assert!(engine.route("a").unwrap().is_some());
                assert_eq!(world.process(&id), Some(process.clone()));
            });
        }
        life(async || {
            let engine = open(host()).await;
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_48_what_was_taken_is_given_back_in_reverse_and_nothing_of_others() {
    let releases = [
        "vmm.kill",
        "boxes.release",
        "network.release",
        "volume.detach",
        "volume.remove_head",
    ];
    let released = |injector: &Injector| -> Vec<&'static str> {
        let trace = injector.trace().into_iter();
        trace.filter(|step| releases.contains(step)).collect()
    };
    story_of_faults(async |world, injector, engine| {
        let other = create(engine, "other").await;
        let others = world.in_use();
        injector.arm(None);
        injector.script("guest.welcome", [Some(When::Before)]);
        engine.create(named(IMAGE, "a")).await.unwrap_err();
        assert_eq!(released(injector), releases);
        let left = world.in_use().into_iter();
        let left: Vec<String> = left.filter(|what| !what.starts_with("trash")).collect();
        assert_eq!(left, others);

        // What is below a hold that will not go may be in use by it.
        create(engine, "b").await;
        injector.arm(None);
        injector.script("network.release", std::iter::repeat(Some(When::Before)));
        let error = engine.destroy("b").await.unwrap_err();
        assert!(error.to_string().contains("its network"), "{error}");
        assert_eq!(released(injector), releases[..3]);
        injector.break_step(None);
        engine.destroy("b").await.unwrap();
        world.guest_value(&other).unwrap();
    });
}
