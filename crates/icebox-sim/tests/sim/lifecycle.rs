//! The promises of the lifecycle that need a story rather than a fault at a step. One test, one promise.

use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{IMAGE, create, from, import_image, leave_nothing, life, named, open, run};
use icebox_engine::id::{GenerationNo, HeadId, LayerId, SandboxId, Slot};
use icebox_engine::layout::Object;
use icebox_engine::manifest;
use icebox_engine::manifest::v1::{TemplateContent, Under};
use icebox_engine::{Config, Engine, Error, Outcome, Phase};
use icebox_sim::fault::{Fault, Kind, When};
use icebox_sim::{FreezeBy, World};
use tokio::time::Instant;

/// For a step of which every call fails.
fn broken_forever() -> impl Iterator<Item = Option<When>> + Send + 'static {
    std::iter::repeat(Some(When::Before))
}

fn rests(engine: &Engine, wanted: &str) -> Phase {
    engine.inspect(wanted).unwrap().phase()
}

fn n(text: &str) -> icebox_engine::id::Name {
    text.parse().unwrap()
}

#[test]
fn inv_02_vcpus_that_cannot_be_resumed_break_the_sandbox() {
    story(async |world, engine| {
        create(engine, "a").await;
        world.stick_vcpus(true);
        // The pause fails at its last step before the commit, and the guest cannot be brought back.
        world.wedge_agents(true);
        world.fail_next_save();
        engine.pause("a").await.unwrap_err();
        let view = engine.inspect("a").unwrap();
        assert!(
            view.record.broken.as_deref().unwrap().contains("vCPUs"),
            "{:?}",
            view.record.broken
        );
        assert!(matches!(engine.pause("a").await, Err(Error::Refused(_))));
        assert!(
            engine.route("a").unwrap().is_none(),
            "nobody may talk to a guest that stands still"
        );
        world.stick_vcpus(false);
        world.wedge_agents(false);
    });
}

#[test]
fn inv_02_a_break_that_cannot_be_recorded_is_a_break_all_the_same() {
    story_of_faults(async |world, injector, engine| {
        create(engine, "a").await;
        world.stick_vcpus(true);
        world.fail_next_save();
        injector.script("store.commit", [None].into_iter().chain(broken_forever()));
        engine.pause("a").await.unwrap_err();
        let broken = || engine.inspect("a").unwrap().record.broken.clone();
        assert!(broken().unwrap().contains("vCPUs"), "{:?}", broken());
        engine.pause("a").await.unwrap_err();
        injector.break_step(None);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let written = world.manifests().into_iter();
        assert_eq!(
            written
                .filter(|m| m.contains("could not be resumed"))
                .count(),
            1
        );
        assert!(matches!(engine.pause("a").await, Err(Error::Refused(_))));
        world.stick_vcpus(false);
    });
}

#[test]
fn inv_02_a_verb_that_panics_says_so_and_leaves_a_sandbox_that_works_or_is_broken() {
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        injector.arm(None);
        engine.pause("a").await.unwrap();
        let trace = injector.trace();
        let at = trace.iter().position(|step| *step == "machine.save");
        let bug = Fault {
            at: at.unwrap(),
            when: When::Before,
            kind: Kind::Panic,
        };
        engine.resume("a", None).await.unwrap();
        injector.arm(Some(bug));
        let error = engine.pause("a").await.unwrap_err();
        assert!(matches!(error, Error::Internal { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("pausing") && text.contains("injected at machine.save"),
            "{text}"
        );
        world.guest_value(&id).unwrap();
        assert!(engine.route("a").unwrap().is_some());
        let view = engine.inspect("a").unwrap();
        assert_eq!((view.busy, &view.record.broken), (None, &None));
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();

        injector.arm(Some(bug));
        injector.script("machine.probe", [None, Some(When::Before)]);
        engine.pause("a").await.unwrap_err();
        let broken = engine.inspect("a").unwrap().record.broken.clone();
        assert!(broken.unwrap().contains("machine.probe"));
        assert!(matches!(engine.stop("a").await, Err(Error::Refused(_))));
    });
}

#[test]
fn inv_04_a_guest_runs_while_what_its_vmm_has_saved_is_copied() {
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        injector.arm(None);
        engine.snapshot("a", "zero".parse().unwrap()).await.unwrap();
        let trace = injector.trace();
        let at = trace.iter().position(|it| *it == "machine.finish_save");
        injector.arm(Some(Fault {
            at: at.unwrap(),
            when: When::Before,
            kind: Kind::Hold,
        }));
        let before = world.mark(&id).unwrap();
        let meanwhile = async {
            injector.reached().await;
            world.guest_value(&id).unwrap();
            let after = world.mark(&id).unwrap();
            injector.go_on();
            after
        };
        let (snapshot, after) =
            tokio::join!(engine.snapshot("a", "one".parse().unwrap()), meanwhile);
        snapshot.unwrap();
        let copy = engine.create(named("one", "b")).await.unwrap();
        let copied = world.guest_value(&copy.record.id).unwrap();
        let value = world.guest_value(&id).unwrap();
        assert_eq!([copied, value].map(World::mark_in), [before, after]);
    });
}

#[test]
fn inv_05_a_wedged_agent_cannot_block_a_capture() {
    story(async |world, engine| {
        create(engine, "a").await;
        world.wedge_agents(true);
        let begun = Instant::now();
        engine.pause("a").await.unwrap();
        assert!(
            begun.elapsed() <= Duration::from_secs(6),
            "{:?}",
            begun.elapsed()
        );
        world.wedge_agents(false);
        engine.resume("a", None).await.unwrap();
    });
}

#[test]
fn inv_06_a_vmm_that_does_not_answer_fails_the_pause_in_three_seconds() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.wedge_vmm(&id);
        let begun = Instant::now();
        let error = engine.pause("a").await.unwrap_err();
        assert!(
            matches!(error, Error::Deadline { seconds: 3, .. }),
            "{error:?}"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(rests(engine, "a"), Phase::Running);
    });
}

#[test]
fn inv_10_ten_rounds_of_pause_and_resume_lose_nothing() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        for _ in 0..10 {
            world.tick();
            let before = world.guest_value(&id).unwrap();
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
            assert!(world.guest_value(&id).unwrap() >= before);
        }
    });
}

#[test]
fn inv_16_whatever_step_of_a_resume_fails_the_next_resume_works() {
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        injector.arm(None);
        engine.resume("a", None).await.unwrap();
        let steps = injector.trace();
        assert!(steps.len() >= 10, "{steps:?}");
        for (at, step) in steps.into_iter().enumerate() {
            for when in [When::Before, When::After] {
                engine.pause("a").await.unwrap();
                let before = world.guest_value(&id).unwrap_err();
                assert_eq!(before, "no VMM runs");
                let kind = Kind::Fail;
                injector.arm(Some(Fault { at, when, kind }));
                let failed = engine.resume("a", None).await.is_err();
                injector.arm(None);
                let view = engine.inspect("a").unwrap();
                assert_eq!(view.record.broken, None, "after {when:?} {step}");
                if failed {
                    assert_eq!(view.phase(), Phase::Paused, "after {when:?} {step}");
                }
                engine.resume("a", None).await.unwrap();
                world.guest_value(&id).unwrap();
            }
        }
    });
}

#[test]
fn inv_16_a_hold_that_was_stuck_for_a_while_does_not_break_for_good() {
    let releases = [
        "vmm.kill",
        "boxes.release",
        "network.release",
        "volume.detach",
        "volume.remove_head",
    ];
    story_of_faults(async |world, injector, engine| {
        let id = create(engine, "a").await;
        for step in releases {
            engine.pause("a").await.unwrap();
            injector.script("guest.welcome", [Some(When::Before)]);
            injector.script(step, broken_forever());
            let error = engine.resume("a", None).await.unwrap_err();
            assert!(matches!(error, Error::Stuck { .. }), "{step}: {error:?}");
            let error = engine.resume("a", None).await.unwrap_err();
            assert!(
                matches!(&error, Error::Refused(_)) && error.to_string().contains(step),
                "{error}"
            );
            assert_eq!(rests(engine, "a"), Phase::Paused);
            injector.break_step(None);
            engine.resume("a", None).await.unwrap();
            assert_eq!(engine.inspect("a").unwrap().record.broken, None);
            world.guest_value(&id).unwrap();
        }
    });
}

#[test]
fn inv_17_a_slot_is_kept_until_destroy_and_a_new_sandbox_gets_another() {
    story(async |_, engine| {
        create(engine, "a").await;
        let (slot, address) = {
            let view = engine.inspect("a").unwrap();
            (view.record.slot, view.host_address)
        };
        engine.pause("a").await.unwrap();
        create(engine, "b").await;
        engine.resume("a", None).await.unwrap();
        let view = engine.inspect("a").unwrap();
        assert_eq!((view.record.slot, view.host_address), (slot, address));
        assert_ne!(engine.inspect("b").unwrap().record.slot, slot);
        engine.destroy("a").await.unwrap();
        create(engine, "c").await;
        assert_eq!(
            engine.inspect("c").unwrap().record.slot,
            slot,
            "given back by destroy"
        );
    });
}

#[test]
fn inv_18_a_snapshot_of_a_snapshot_of_a_snapshot_restores() {
    story(async |world, engine| {
        let mut template = IMAGE.to_owned();
        let mut value = 0;
        for depth in 0..3 {
            let id = engine
                .create(from(&template))
                .await
                .unwrap()
                .record
                .id
                .clone();
            assert!(
                world.guest_value(&id).unwrap() >= value,
                "generation {depth} has what the last one had"
            );
            world.tick();
            value = world.guest_value(&id).unwrap();
            template = format!("depth-{depth}");
            engine.snapshot(id.as_str(), n(&template)).await.unwrap();
            engine.destroy(id.as_str()).await.unwrap();
        }
        engine.create(from(&template)).await.unwrap();
    });
}

#[test]
fn inv_19_verbs_are_idempotent_and_equal_ones_coalesce() {
    story(async |_, engine| {
        create(engine, "a").await;
        let (first, second) = tokio::join!(engine.pause("a"), engine.pause("a"));
        assert_eq!(
            (first.unwrap().0, second.unwrap().0),
            (Outcome::Changed, Outcome::AlreadyThere)
        );
        assert_eq!(engine.inspect("a").unwrap().generations.len(), 1);
        let (first, second) = tokio::join!(engine.resume("a", None), engine.resume("a", None));
        assert_eq!(
            (first.unwrap().0, second.unwrap().0),
            (Outcome::Changed, Outcome::AlreadyThere)
        );
        assert_eq!(engine.start("a").await.unwrap().0, Outcome::AlreadyThere);
        engine.stop("a").await.unwrap();
        assert_eq!(engine.stop("a").await.unwrap().0, Outcome::AlreadyThere);
    });
}

#[test]
fn inv_19_sandboxes_do_not_wait_for_each_other() {
    story(async |world, engine| {
        let stuck = create(engine, "stuck").await;
        create(engine, "free").await;
        world.wedge_vmm(&stuck);
        let begun = Instant::now();
        let (stuck, free) = tokio::join!(engine.pause("stuck"), async {
            engine.pause("free").await.unwrap();
            begun.elapsed()
        });
        stuck.unwrap_err();
        assert!(free < Duration::from_secs(1), "{free:?}");
    });
}

#[test]
fn inv_19_too_many_that_wait_are_told_what_for_and_none_keeps_a_destroy_out() {
    story(async |world, engine| {
        create(engine, "a").await;
        world.wedge_agents(true);
        let pause = || {
            let engine = engine.clone();
            tokio::spawn(async move { engine.pause("a").await.map(|(outcome, _)| outcome) })
        };
        let moment = || tokio::time::sleep(Duration::from_millis(1));
        let mut pausing = vec![pause()];
        moment().await;
        pausing.extend((1..100).map(|_| pause()));
        moment().await;
        let refused = engine.stop("a").await.unwrap_err();
        assert!(matches!(refused, Error::Busy { .. }), "{refused:?}");
        assert!(refused.hint().is_some());
        let text = refused.to_string();
        assert!(text.contains("sandbox a is pausing"), "{text}");
        engine.destroy("a").await.unwrap();
        let mut outcomes = Vec::new();
        for one in pausing {
            outcomes.push(one.await.unwrap());
        }
        let count = |wanted: fn(&Result<Outcome, Error>) -> bool| {
            outcomes.iter().filter(|outcome| wanted(outcome)).count()
        };
        assert_eq!(count(|it| matches!(it, Ok(Outcome::Changed))), 1);
        let (coalesced, busy) = (
            count(|it| matches!(it, Ok(Outcome::AlreadyThere))),
            count(|it| matches!(it, Err(Error::Busy { .. }))),
        );
        assert_eq!((coalesced, busy), (64, 35));
        world.wedge_agents(false);
    });
}

#[test]
fn inv_21_a_wedged_vmm_can_be_destroyed() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.wedge_vmm(&id);
        let pausing = engine.pause("a");
        let (_, destroyed) = tokio::join!(pausing, engine.destroy("a"));
        destroyed.unwrap();
        assert!(matches!(engine.inspect("a"), Err(Error::Unknown { .. })));
    });
}

#[test]
fn inv_22_of_two_snapshots_with_one_name_exactly_one_wins() {
    story(async |_, engine| {
        create(engine, "a").await;
        create(engine, "b").await;
        let (a, b) = tokio::join!(
            engine.snapshot("a", n("twin")),
            engine.snapshot("b", n("twin"))
        );
        let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
        assert!(matches!(lost, Err(Error::NameTaken { .. })), "{lost:?}");
        assert_eq!(engine.template("twin").unwrap().id, won.unwrap().id);
        assert!(matches!(
            engine.snapshot("a", n("twin")).await,
            Err(Error::NameTaken { .. })
        ));
        assert!(matches!(
            engine.create(named(IMAGE, "a")).await,
            Err(Error::NameTaken { .. })
        ));
        assert_eq!(engine.list().len(), 2);
    });
}

#[test]
fn inv_23_a_paused_sandbox_is_snapshotted_without_being_revived() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        let capture = engine.inspect("a").unwrap().generations[0].capture.clone();
        let objects = [
            Object::Layer(capture.layer.clone()),
            Object::Memory(capture.memory.clone()),
            Object::Generation(id.clone(), GenerationNo(1)),
        ];
        let before = objects.clone().map(|object| world.content(&object));
        let in_use = world.in_use();
        let template = engine.snapshot("a", n("cold")).await.unwrap();
        assert_eq!(objects.map(|object| world.content(&object)), before);
        assert_eq!(world.in_use(), in_use, "no VMM, no head, no network");
        assert_eq!(rests(engine, "a"), Phase::Paused);
        assert!(matches!(template.content, TemplateContent::Snapshot { .. }));
        engine.resume("a", None).await.unwrap();
        engine.create(from("cold")).await.unwrap();
    });
}

#[test]
fn inv_24_templates_outlive_their_source_and_go_only_when_unused() {
    story(async |_, engine| {
        create(engine, "a").await;
        engine.snapshot("a", n("warm")).await.unwrap();
        engine.destroy("a").await.unwrap();
        engine.create(named("warm", "b")).await.unwrap();
        let error = engine.remove_template("warm").await.unwrap_err();
        assert!(error.to_string().contains("sandbox b"), "{error}");
        engine.create(named("warm", "c")).await.unwrap();
        let forks = engine.fork("b", 2).await.unwrap();
        engine.destroy("b").await.unwrap();
        engine.collect(false).await.unwrap();
        for fork in forks {
            let id = fork.unwrap().record.id.clone();
            engine.pause(id.as_str()).await.unwrap();
            engine.resume(id.as_str(), None).await.unwrap();
        }
    });
}

#[test]
fn inv_25_a_base_does_not_change_whatever_its_sandboxes_do() {
    story(async |world, engine| {
        let TemplateContent::Image { base } = engine.template(IMAGE).unwrap().content else {
            panic!("an image");
        };
        let before = world.content(&Object::Base(base.clone()));
        for round in 0..5 {
            let id = create(engine, &format!("a-{round}")).await;
            world.tick();
            engine.pause(id.as_str()).await.unwrap();
            engine.resume(id.as_str(), None).await.unwrap();
            world.crash_vmm(&id);
            tokio::time::sleep(Duration::from_secs(1)).await;
            engine.destroy(id.as_str()).await.unwrap();
        }
        assert_eq!(world.content(&Object::Base(base)), before);
    });
}

#[test]
fn inv_26_a_driver_that_is_not_here_is_an_error_and_what_was_used_is_recorded() {
    story(async |_, engine| {
        let mut request = named(IMAGE, "a");
        request.volume_driver = Some("zfs".into());
        let error = engine.create(request.clone()).await.unwrap_err();
        assert!(
            error.hint().unwrap().contains("sim-by-vmm"),
            "{:?}",
            error.hint()
        );
        request.volume_driver = None;
        request.vmm = Some("firecracker".into());
        engine.create(request.clone()).await.unwrap_err();
        assert!(engine.list().is_empty());
        request.vmm = None;
        request.volume_driver = Some("sim-by-host".into());
        let view = engine.create(request).await.unwrap();
        assert_eq!(view.record.spec.volume_driver, "sim-by-host");
        assert_eq!(view.record.machine.as_ref().unwrap().vmm.name, "sim");
    });
}

#[test]
fn inv_31_a_vmm_that_dies_leaves_the_newest_disk_and_the_last_generation() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        world.tick();
        let newest = world.guest_value(&id).unwrap();
        let from_here = engine.events().next_seq();
        world.crash_vmm(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(rests(engine, "a"), Phase::Stopped);
        let events = engine.events().kept(from_here).events;
        let crashed = events
            .iter()
            .find(|event| event.kind == "sandbox.crashed")
            .unwrap();
        assert!(
            crashed.detail.contains("signal 9") && crashed.detail.contains("--generation 1"),
            "{crashed:?}"
        );
        assert!(
            !world
                .in_use()
                .iter()
                .any(|what| what.starts_with("network") || what.starts_with("box"))
        );
        engine.start("a").await.unwrap();
        assert!(world.guest_value(&id).unwrap() >= newest, "the newest disk");
        engine.stop("a").await.unwrap();
        engine.resume("a", Some(GenerationNo(1))).await.unwrap();
        assert_eq!(rests(engine, "a"), Phase::Running);
    });
}

#[test]
fn inv_31_an_exit_that_cannot_be_recorded_is_seen_at_once_and_recorded_later() {
    story_of_faults(async |world, injector, engine| {
        let on_disk = |phase: &str| {
            let phase = format!("\"phase\": \"{phase}\"");
            let manifests = world.manifests().into_iter();
            manifests.filter(|text| text.contains(&phase)).count()
        };
        let id = create(engine, "a").await;
        injector.break_step(Some("store.commit"));
        world.crash_vmm(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let view = engine.inspect("a").unwrap();
        assert_eq!(view.phase(), Phase::Stopped, "it is told as it is");
        assert!(view.record.last_exit.is_some());
        assert!(engine.route("a").unwrap().is_none());
        assert_eq!((on_disk("running"), on_disk("stopped")), (1, 0));
        let held = world.in_use();
        assert!(!held.iter().any(|what| what.starts_with("box")), "{held:?}");
        engine.start("a").await.unwrap_err();
        injector.break_step(None);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!((on_disk("running"), on_disk("stopped")), (0, 1));

        engine.start("a").await.unwrap();
        injector.break_step(Some("store.commit"));
        world.crash_vmm(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        injector.break_step(None);
        engine.start("a").await.unwrap();
        world.guest_value(&id).unwrap();
    });
}

#[test]
fn a_guest_that_powers_off_is_stopped_and_not_crashed() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.power_off(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let view = engine.inspect("a").unwrap();
        assert_eq!(view.phase(), Phase::Stopped);
        assert!(view.record.last_exit.as_ref().unwrap().by_guest);
    });
}

#[test]
fn inv_36_a_guest_that_resets_its_machine_before_it_answers_is_booted_again() {
    story(async |world, engine| {
        world.reset_guests(2);
        let id = create(engine, "a").await;
        world.guest_value(&id).unwrap();
        assert_eq!(world.welcomes(&id).len(), 1);
        engine.stop("a").await.unwrap();
        let rests = world.in_use();

        // Not for ever, and then nothing is left.
        world.reset_guests(3);
        let error = engine.start("a").await.unwrap_err();
        assert!(error.to_string().contains("asked for a reset"), "{error}");
        assert_eq!(world.in_use(), rests);
        engine.start("a").await.unwrap();
        world.guest_value(&id).unwrap();
    });
}

#[test]
fn inv_10_inv_16_a_restored_guest_that_resets_its_machine_is_not_restored_over_what_it_wrote() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        let rests = world.in_use();
        world.reset_guests(1);
        let error = engine.resume("a", None).await.unwrap_err();
        assert!(error.to_string().contains("asked for a reset"), "{error}");
        assert_eq!(world.in_use(), rests);
        engine.resume("a", None).await.unwrap();
        world.guest_value(&id).unwrap();
    });
}

#[test]
fn inv_33_a_start_removes_strays_and_nothing_else() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        let (kept, before) = life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            let running = create(&engine, "running").await;
            create(&engine, "paused").await;
            engine.pause("paused").await.unwrap();
            tokio::time::sleep(Duration::from_secs(60)).await;
            (running, world.in_use())
        });
        let TemplateContent::Image { base } = life(async || {
            let engine = open(world.host(freeze)).await;
            engine.template(IMAGE).unwrap().content
        }) else {
            panic!("an image");
        };
        let head = HeadId {
            sandbox: kept.clone(),
            number: 99,
        };
        world.litter(
            &SandboxId::random(),
            Slot(77),
            &head,
            &base,
            &Object::Layer(LayerId::random()),
        );
        assert_ne!(world.in_use(), before);
        life(async || {
            let engine = open(world.host(freeze)).await;
            assert_eq!(world.in_use(), before);
            let removed = engine
                .events()
                .kept(1)
                .events
                .into_iter()
                .filter(|e| e.kind == "stray.removed");
            assert_eq!(removed.count(), 5, "each stray is reported");
            world.guest_value(&kept).unwrap();
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_33_data_that_something_unreadable_may_need_stay() {
    let world = World::new();
    let layer = life(async || {
        let engine = open(world.host(FreezeBy::Host)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        let template = engine.snapshot("a", n("warm")).await.unwrap();
        engine.destroy("a").await.unwrap();
        let TemplateContent::Snapshot { capture } = template.content else {
            panic!("a snapshot");
        };
        Object::Layer(capture.layer)
    });
    world.overwrite_manifest(&layer, b"{");
    world.litter_layer();
    let strays = || {
        let in_use = world.in_use().into_iter();
        in_use.filter(|what| what.starts_with("data of")).count()
    };
    life(async || {
        let engine = open(world.host(FreezeBy::Host)).await;
        assert_eq!(strays(), 1);
        assert!(world.content(&layer).is_some());
        engine.remove_template("warm").await.unwrap();
        engine.collect(false).await.unwrap();
        assert_eq!(world.content(&layer), None);
    });
    life(async || {
        let engine = open(world.host(FreezeBy::Host)).await;
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_36_a_sandbox_that_was_created_answers_at_once() {
    story(async |_, engine| {
        for i in 0..100 {
            let id = create(engine, &format!("a-{i}")).await;
            let route = engine.route(id.as_str()).unwrap().unwrap();
            let address = icebox_engine::host::GuestAddress { ip: route.ip };
            engine
                .host()
                .guest
                .sync(address, &route.token)
                .await
                .unwrap();
        }
    });
}

#[test]
fn inv_38_forks_share_nothing_that_they_write_and_outlive_each_other() {
    story(async |world, engine| {
        let parent = create(engine, "parent").await;
        world.tick();
        let at_fork = world.guest_value(&parent).unwrap();
        let forks: Vec<SandboxId> = engine
            .fork("parent", 3)
            .await
            .unwrap()
            .into_iter()
            .map(|fork| fork.unwrap().record.id.clone())
            .collect();
        assert_eq!(
            rests(engine, "parent"),
            Phase::Running,
            "the parent runs on"
        );
        let slots: std::collections::BTreeSet<_> =
            engine.list().iter().map(|view| view.record.slot).collect();
        let tokens: std::collections::HashSet<_> = engine
            .list()
            .iter()
            .map(|view| view.record.token.expose().to_owned())
            .collect();
        assert_eq!((slots.len(), tokens.len()), (4, 4), "identities differ");
        engine.destroy("parent").await.unwrap();
        engine.destroy(forks[0].as_str()).await.unwrap();
        engine.collect(false).await.unwrap();
        for fork in &forks[1..] {
            assert!(world.guest_value(fork).unwrap() >= at_fork);
            engine.stop(fork.as_str()).await.unwrap();
            engine.start(fork.as_str()).await.unwrap();
        }
    });
}

#[test]
fn inv_38_forks_in_the_making_outlive_their_parent_and_its_generations() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        life(async || {
            let world = World::new();
            let config = Config {
                keep: 1,
                ..Config::default()
            };
            let engine = Engine::open(world.host(freeze), config).await.unwrap();
            import_image(&world, &engine).await;
            for parent_goes in [false, true] {
                create(&engine, "parent").await;
                engine.pause("parent").await.unwrap();
                let forking = tokio::spawn({
                    let engine = engine.clone();
                    async move { engine.fork("parent", 30).await }
                });
                while engine.list().len() < 2 {
                    tokio::task::yield_now().await;
                }
                if parent_goes {
                    engine.destroy("parent").await.unwrap();
                } else {
                    for _ in 0..3 {
                        engine.resume("parent", None).await.unwrap();
                        engine.pause("parent").await.unwrap();
                    }
                }
                let forks = forking.await.unwrap().unwrap();
                assert_eq!(forks.len(), 30);
                for fork in forks {
                    world.guest_value(&fork.unwrap().record.id).unwrap();
                }
                if !parent_goes {
                    engine.resume("parent", None).await.unwrap();
                    engine.pause("parent").await.unwrap();
                    let kept = engine.inspect("parent").unwrap().generations.len();
                    assert_eq!(kept, 1, "what was kept for the forks goes after them");
                }
                for view in engine.list() {
                    engine.destroy(view.record.id.as_str()).await.unwrap();
                }
            }
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn forks_of_a_running_sandbox_do_not_pile_up_generations() {
    story(async |world, engine| {
        create(engine, "a").await;
        for _ in 0..20 {
            for fork in engine.fork("a", 1).await.unwrap() {
                let id = fork.unwrap().record.id.clone();
                engine.destroy(id.as_str()).await.unwrap();
            }
        }
        let keep = Config::default().keep;
        assert_eq!(engine.inspect("a").unwrap().generations.len(), keep);
        let of_a = |what: &String| what.starts_with("generation");
        assert_eq!(world.objects().into_iter().filter(of_a).count(), keep);
    });
}

#[test]
fn inv_44_another_vmm_version_is_refused_with_an_explanation_and_the_disk_still_boots() {
    let world = World::new();
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        engine.snapshot("a", n("warm")).await.unwrap();
        engine.pause("a").await.unwrap();
    });
    world.upgrade_vmm("2.0");
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        let error = engine.resume("a", None).await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("VMM version") && text.contains("1.0") && text.contains("2.0"),
            "{text}"
        );
        assert_eq!(rests(&engine, "a"), Phase::Paused);
        assert!(matches!(
            engine.create(from("warm")).await,
            Err(Error::Incompatible { .. })
        ));
        engine.stop("a").await.unwrap();
        engine.start("a").await.unwrap();
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_44_a_manifest_of_a_newer_or_damaged_format_stops_the_start() {
    for (manifest, says) in [
        (
            &br#"{"format":2,"writer":"icebox 9.0.0","revision":1,"payload":{}}"#[..],
            "icebox 9.0.0",
        ),
        (b"{", "damaged"),
    ] {
        let world = World::new();
        let id = life(async || {
            let engine = open(world.host(FreezeBy::Vmm)).await;
            import_image(&world, &engine).await;
            create(&engine, "a").await
        });
        world.overwrite_manifest(&Object::Sandbox(id.clone()), manifest);
        let before = (world.in_use(), world.objects());
        life(async || {
            let error = Engine::open(world.host(FreezeBy::Vmm), Config::default())
                .await
                .err()
                .unwrap();
            assert!(
                error.to_string().contains(says) && error.to_string().contains(id.as_str()),
                "{error}"
            );
        });
        assert_eq!(
            (world.in_use(), world.objects()),
            before,
            "nothing is touched"
        );
    }
}

#[test]
fn inv_44_a_manifest_that_says_more_than_is_known_stops_the_start_and_is_left_alone() {
    for of in ["sandbox", "generation"] {
        let world = World::new();
        let object = life(async || {
            let engine = open(world.host(FreezeBy::Vmm)).await;
            import_image(&world, &engine).await;
            let id = create(&engine, "a").await;
            engine.pause("a").await.unwrap();
            let view = engine.inspect("a").unwrap();
            let (object, bytes) = match of {
                "sandbox" => (Object::Sandbox(id), manifest::encode(1, &*view.record)),
                _ => {
                    let generation = &view.generations[0];
                    let object = Object::Generation(id, generation.number);
                    (object, manifest::encode(1, generation))
                }
            };
            let text = String::from_utf8(bytes).unwrap();
            let more = text.replacen("\"payload\": {", "\"payload\": { \"mood\": \"good\",", 1);
            let newer = more.replacen(&manifest::this_build(), "icebox 9.0.0", 1);
            world.overwrite_manifest(&object, newer.as_bytes());
            object
        });
        let before = (world.in_use(), world.objects());
        life(async || {
            let opened = Engine::open(world.host(FreezeBy::Vmm), Config::default()).await;
            let error = opened.err().unwrap();
            let text = error.to_string();
            for said in [&object.to_string(), "payload.mood", "icebox 9.0.0"] {
                assert!(text.contains(said), "{text}");
            }
            assert!(error.hint().unwrap().contains("newer"), "{error:?}");
        });
        let after = (world.in_use(), world.objects());
        assert_eq!(after, before, "nothing is touched");
    }
}

#[test]
fn inv_44_what_lacks_something_is_told_and_kept_and_not_used() {
    let spoil = |world: &World, object: &Object, says: &str| match says {
        "missing" => world.lose(object),
        _ => world.overwrite_manifest(object, b"{"),
    };
    for says in ["missing", "damaged"] {
        for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
            let world = World::new();
            let (layer, memory) = life(async || {
                let engine = open(world.host(freeze)).await;
                import_image(&world, &engine).await;
                create(&engine, "a").await;
                engine.pause("a").await.unwrap();
                engine.resume("a", None).await.unwrap();
                engine.pause("a").await.unwrap();
                create(&engine, "other").await;
                let template = engine.snapshot("other", n("warm")).await.unwrap();
                let TemplateContent::Snapshot { capture } = template.content else {
                    panic!("a snapshot");
                };
                engine.stop("other").await.unwrap();
                let generations = engine.inspect("a").unwrap().generations;
                let memory = generations[1].capture.memory.clone();
                (Object::Layer(capture.layer), Object::Memory(memory))
            });
            spoil(&world, &layer, says);
            spoil(&world, &memory, says);
            let before = world.objects();
            life(async || {
                let engine = open(world.host(freeze)).await;
                assert_eq!(world.objects(), before, "nothing is removed for it");

                let unusable = engine.unusable_templates();
                assert_eq!(unusable[0].0.name, n("warm"));
                assert!(!engine.templates().iter().any(|it| it.name == n("warm")));
                let error = engine.create(from("warm")).await.unwrap_err();
                let text = error.to_string();
                assert!(
                    matches!(error, Error::Unusable { .. })
                        && text.contains(&layer.to_string())
                        && text.contains(says),
                    "{text}"
                );

                let view = engine.inspect("a").unwrap();
                assert_eq!(view.generations.len(), 1);
                let why = &view.unusable[&GenerationNo(2)];
                assert!(why.contains(&memory.to_string()) && why.contains(says));
                let error = engine.resume("a", None).await.unwrap_err();
                assert!(matches!(error, Error::Unusable { .. }), "{error:?}");
                let told = engine.events().kept(1).events;
                for kind in ["template.unusable", "sandbox.generation-unusable"] {
                    assert!(told.iter().any(|event| event.kind == kind), "{kind}");
                }

                // What does not need it goes on, and nothing that it may need goes.
                engine.collect(false).await.unwrap();
                assert_eq!(world.objects(), before);
                engine.resume("a", Some(GenerationNo(1))).await.unwrap();
                engine.pause("a").await.unwrap();
                engine.destroy("a").await.unwrap();
                engine.remove_template("warm").await.unwrap();
                leave_nothing(&world, &engine).await;
            });
        }
    }
}

#[test]
fn a_generation_without_its_memory_still_has_its_disk() {
    let world = World::new();
    let capture = life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.inspect("a").unwrap().generations[0].capture.clone()
    });
    world.lose(&Object::Memory(capture.memory));
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        engine.resume("a", None).await.unwrap_err();
        engine.flatten("a", n("flat")).await.unwrap();
        engine.stop("a").await.unwrap();
        engine.start("a").await.unwrap();
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_47_slots_never_wrap() {
    story(async |_, engine| {
        let capacity = engine.host().network.capacity();
        for i in 0..capacity {
            create(engine, &format!("a-{i}")).await;
        }
        let error = engine.create(from(IMAGE)).await.unwrap_err();
        assert!(
            matches!(error, Error::Exhausted { .. }) && error.to_string().contains("256"),
            "{error}"
        );
        engine.destroy("a-7").await.unwrap();
        assert_eq!(
            engine.create(from(IMAGE)).await.unwrap().record.slot,
            Slot(7)
        );
    });
}

#[test]
fn inv_50_destroy_during_any_verb_ends_with_nothing_left() {
    story(async |_, engine| {
        for round in 0..6 {
            let name = format!("a-{round}");
            let creating = tokio::spawn({
                let (engine, request) = (engine.clone(), named(IMAGE, &name));
                async move { engine.create(request).await }
            });
            tokio::task::yield_now().await;
            if round > 0 {
                creating.await.unwrap().unwrap();
            }
            let other = tokio::spawn({
                let (engine, name) = (engine.clone(), name.clone());
                async move {
                    match round {
                        1 => drop(engine.pause(&name).await),
                        2 => drop(engine.snapshot(&name, "x".parse().unwrap()).await),
                        3 => drop(engine.fork(&name, 2).await),
                        4 => drop(engine.stop(&name).await),
                        _ => drop(engine.flatten(&name, "y".parse().unwrap()).await),
                    }
                }
            });
            tokio::task::yield_now().await;
            engine.destroy(&name).await.unwrap();
            other.await.unwrap();
            assert!(matches!(engine.inspect(&name), Err(Error::Unknown { .. })));
        }
    });
}

#[test]
fn inv_51_going_back_keeps_the_newest_disk_as_a_branch() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        world.tick();
        let newest = world.guest_value(&id).unwrap();
        world.crash_vmm(&id);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let error = engine.resume("a", None).await.unwrap_err();
        assert!(
            error.hint().unwrap().contains("--generation"),
            "an older one is never chosen silently"
        );
        engine.resume("a", Some(GenerationNo(1))).await.unwrap();
        let view = engine.inspect("a").unwrap();
        let listed: Vec<u32> = view
            .generations
            .iter()
            .map(|generation| generation.number.0)
            .collect();
        assert_eq!(listed, [1, 2], "later generations stay listed");
        let branch = &view.record.branches[0];
        engine.collect(false).await.unwrap();
        let content = world.content(&Object::Layer(branch.layer.clone())).unwrap();
        assert!(content.contains(&format!("({newest})")), "{content}");
        assert!(matches!(
            engine.resume("a", Some(GenerationNo(9))).await,
            Err(Error::NoGeneration { .. } | Error::Refused(_))
        ));
    });
}

#[test]
fn a_removal_that_did_not_end_admits_only_another() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        injector.break_step(Some("store.trash"));
        engine.destroy("a").await.unwrap_err();
        injector.break_step(None);
        for error in [
            engine.start("a").await.map(drop),
            engine.stop("a").await.map(drop),
            engine.flatten("a", n("flat")).await.map(drop),
        ] {
            assert!(matches!(error, Err(Error::Refused(_))), "{error:?}");
        }
        engine.destroy("a").await.unwrap();
    });
}

#[test]
fn inv_52_collection_removes_exactly_what_nothing_reaches() {
    story(async |_, engine| {
        create(engine, "a").await;
        for _ in 0..12 {
            engine.pause("a").await.unwrap();
            engine.resume("a", None).await.unwrap();
        }
        let kept = engine.inspect("a").unwrap().generations.len();
        assert_eq!(kept, Config::default().keep);
        let planned = engine.collect(true).await.unwrap();
        let removed = engine.collect(false).await.unwrap();
        assert_eq!(planned, removed, "the dry run is the plan");
        assert_eq!(engine.collect(false).await.unwrap().objects, []);
        engine.pause("a").await.unwrap();
        for number in engine.inspect("a").unwrap().record.generations.clone() {
            engine.resume("a", Some(number)).await.unwrap();
            engine.stop("a").await.unwrap();
        }
    });
}

#[test]
fn inv_52_what_would_not_go_is_collected_by_the_next_collection() {
    for lost in [When::Before, When::After] {
        story_of_faults(async |world, injector, engine| {
            create(engine, "a").await;
            engine.pause("a").await.unwrap();
            // The sandbox goes; its layer and its memory do not, or nobody hears of it.
            let others = std::iter::repeat(Some(lost));
            injector.script("store.trash", std::iter::once(None).chain(others));
            engine.destroy("a").await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            engine.collect(false).await.unwrap_err();
            injector.break_step(None);
            let planned = engine.collect(true).await.unwrap().objects;
            assert_eq!(planned.len(), 2, "{planned:?}");
            let removed = engine.collect(false).await.unwrap().objects;
            let names =
                |plan: &[(Object, _)]| plan.iter().map(|it| it.0.clone()).collect::<Vec<_>>();
            assert_eq!(names(&planned), names(&removed));
            assert_eq!(engine.collect(false).await.unwrap().objects, []);

            // The same image again, while its base is about to go.
            let others = std::iter::repeat(Some(lost));
            injector.script("store.trash", std::iter::once(None).chain(others));
            engine.remove_template(IMAGE).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            injector.break_step(None);
            import_image(world, engine).await;
            engine.collect(false).await.unwrap();
            let id = create(engine, "b").await;
            world.guest_value(&id).unwrap();
        });
    }
}

#[test]
fn what_is_asked_for_and_cannot_be_is_refused_and_leaves_nothing() {
    story(async |_, engine| {
        let mut requests = Vec::new();
        for (vcpus, mem_mib) in [
            (Some(0), None),
            (Some(200), None),
            (None, Some(0)),
            (None, Some(63)),
        ] {
            let mut request = from(IMAGE);
            (request.vcpus, request.mem_mib) = (vcpus, mem_mib);
            requests.push(request);
        }
        let mut small_disk = from(IMAGE);
        small_disk.disk_size = Some(icebox_engine::unit::Bytes(512));
        requests.push(small_disk);
        for request in requests {
            let error = engine.create(request).await.unwrap_err();
            assert!(
                matches!(error, Error::Invalid { .. }) && error.hint().is_some(),
                "{error}"
            );
        }
        for unknown in ["", "nothing", "..", "a/b", &"x".repeat(300)] {
            assert!(matches!(
                engine.create(from(unknown)).await,
                Err(Error::Unknown { .. })
            ));
            assert!(matches!(
                engine.pause(unknown).await,
                Err(Error::Unknown { .. })
            ));
        }
        create(engine, "a").await;
        engine.snapshot("a", n("warm")).await.unwrap();
        let mut other_shape = from("warm");
        other_shape.mem_mib = Some(256);
        assert!(matches!(
            engine.create(other_shape).await,
            Err(Error::Invalid { .. })
        ));
        assert!(matches!(
            engine.fork("a", 0).await,
            Err(Error::Invalid { .. })
        ));
        assert_eq!(engine.list().len(), 1);
    });
}

#[test]
fn a_flattened_disk_is_a_template_that_boots_with_what_was_on_it() {
    story(async |world, engine| {
        let id = create(engine, "a").await;
        world.tick();
        let value = world.guest_value(&id).unwrap();
        engine.flatten("a", n("flat")).await.unwrap();
        assert_eq!(rests(engine, "a"), Phase::Running);
        engine.destroy("a").await.unwrap();
        let copy = engine.create(from("flat")).await.unwrap().record.id.clone();
        assert!(world.guest_value(&copy).unwrap() >= value);
        let head = engine.inspect(copy.as_str()).unwrap().record.holds[2].clone();
        assert!(matches!(
            head,
            manifest::v1::Hold::Head {
                over: Under::Base(_),
                ..
            }
        ));
        run(engine, &copy).await.unwrap();
    });
}
