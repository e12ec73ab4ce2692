//! Sandboxes that wait for who creates one: seen by nobody, given to one, never lost and never left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::stories::story;
use crate::support::{IMAGE, create, from, import_image, leave_nothing, life, named, open};
use icebox_engine::host::{Egress, GuestOrigin};
use icebox_engine::id::SandboxId;
use icebox_engine::manifest::v1::TemplateContent;
use icebox_engine::{CreateRequest, Engine, Error, Phase, Quota};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};

/// Lets everything that is under way end, and all that failed be tried again. The clock jumps, so this takes no time.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// The sandboxes whose VMM runs.
fn running(world: &World) -> BTreeSet<SandboxId> {
    let in_use = world.in_use();
    let vmms = in_use.iter().filter_map(|what| what.strip_prefix("vmm "));
    vmms.map(|vmm| vmm.split(' ').next().unwrap().parse().unwrap())
        .collect()
}

fn waiting(engine: &Engine, template: &str) -> usize {
    engine.waiting(&engine.template(template).unwrap().id)
}

async fn warm(engine: &Engine, template: &str, count: u16) {
    let template = engine.set_warm(template, count).await.unwrap();
    assert_eq!(template.warm, count);
    settle_down().await;
    assert_eq!(engine.waiting(&template.id), usize::from(count));
}

#[test]
fn inv_37_who_creates_gets_what_waits_with_an_identity_of_its_own_and_another_is_made() {
    story(async |world, engine| {
        create(engine, "origin").await;
        engine
            .snapshot("origin", "snapshot".parse().unwrap())
            .await
            .unwrap();
        engine.destroy("origin").await.unwrap();
        for template in [IMAGE, "snapshot"] {
            warm(engine, template, 2).await;
            let waited = running(world);
            assert_eq!(waited.len(), 2);
            let mut tokens = BTreeSet::new();
            for name in ["a", "b"] {
                let request = CreateRequest {
                    env: BTreeMap::from([("KEY".into(), name.into())]),
                    metadata: BTreeMap::from([("of".into(), name.into())]),
                    ..named(template, name)
                };
                let view = engine.create(request).await.unwrap();
                let (record, id) = (&view.record, view.record.id.clone());
                assert!(waited.contains(&id), "it was there before");
                assert_eq!(record.spec.metadata["of"], name);
                assert!(!record.waits);
                let told = world.welcomes(&id).pop().unwrap();
                assert_eq!(told.origin, GuestOrigin::Fork);
                assert_eq!((&*told.hostname, &*told.env["KEY"]), (name, name));
                assert_eq!(told.token, record.token);
                assert!(tokens.insert(record.token.expose().to_owned()));
                assert!(engine.route(name).unwrap().is_some());
                world.guest_value(&id).unwrap();
            }
            settle_down().await;
            assert_eq!((waiting(engine, template), running(world).len()), (2, 4));
            for name in ["a", "b"] {
                // One like any other.
                engine.pause(name).await.unwrap();
                engine.resume(name, None).await.unwrap();
                engine.destroy(name).await.unwrap();
            }
            warm(engine, template, 0).await;
            assert_eq!(running(world).len(), 0);
        }
    });
}

#[test]
fn what_waits_is_seen_by_nobody() {
    story(async |world, engine| {
        let next = engine.events().next_seq();
        warm(engine, IMAGE, 1).await;
        let id = running(world).into_iter().next().unwrap();
        assert!(engine.list().is_empty());
        for error in [
            engine.inspect(id.as_str()).unwrap_err(),
            engine.pause(id.as_str()).await.unwrap_err(),
            engine.destroy(id.as_str()).await.unwrap_err(),
            engine.route(id.as_str()).err().unwrap(),
        ] {
            assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
        }
        let said = engine.events().next_seq() - next;
        assert_eq!(said, 1, "that the template is warm");
        let too_many = engine.set_warm(IMAGE, 1000).await.unwrap_err();
        assert!(too_many.hint().unwrap().contains("at most"));
    });
}

#[test]
fn what_is_something_else_than_asked_for_goes_on_waiting() {
    story(async |world, engine| {
        warm(engine, IMAGE, 1).await;
        let waited = running(world);
        let others = [
            CreateRequest {
                vcpus: Some(2),
                ..from(IMAGE)
            },
            CreateRequest {
                egress: Egress::Internet,
                ..from(IMAGE)
            },
            CreateRequest {
                cold: true,
                ..from(IMAGE)
            },
        ];
        for request in others {
            let view = engine.create(request).await.unwrap();
            assert!(!waited.contains(&view.record.id));
            engine.destroy(view.record.id.as_str()).await.unwrap();
            settle_down().await;
        }
        // Nor is it another team's.
        engine.publish_template(IMAGE, true).await.unwrap();
        let acme = engine.of_team("acme".parse().unwrap());
        let view = acme.create(from(IMAGE)).await.unwrap();
        assert!(!waited.contains(&view.record.id));
        let refused = acme.set_warm(IMAGE, 1).await;
        assert!(matches!(refused, Err(Error::Unknown { .. })), "{refused:?}");
    });
}

#[test]
fn inv_22_a_name_is_given_once_and_nothing_taken_for_one_that_is_refused() {
    story(async |world, engine| {
        warm(engine, IMAGE, 2).await;
        let (one, other) = tokio::join!(
            engine.create(named(IMAGE, "a")),
            engine.create(named(IMAGE, "a"))
        );
        let lost = [one.map(drop), other.map(drop)];
        let lost: Vec<_> = lost.into_iter().filter_map(Result::err).collect();
        assert!(matches!(lost[..], [Error::NameTaken { .. }]), "{lost:?}");
        settle_down().await;
        assert_eq!(running(world).len(), 3);
        engine.destroy("a").await.unwrap();
        engine.create(named(IMAGE, "a")).await.unwrap();
    });
}

#[test]
fn limits_count_what_waits_and_a_failure_is_told_once_and_tried_again() {
    story(async |world, engine| {
        let quota = |running| Quota {
            running: Some(running),
            ..Quota::default()
        };
        engine.set_quota("default".parse().unwrap(), quota(2));
        let newest = engine.events().next_seq();
        engine.set_warm(IMAGE, 3).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((waiting(engine, IMAGE), running(world).len()), (2, 2));
        let said = engine.events().next_seq() - newest;
        assert_eq!(said, 3, "of each that waits, and of the failure");
        let taken = engine.create(from(IMAGE)).await.unwrap();
        engine.set_quota("default".parse().unwrap(), quota(4));
        settle_down().await;
        assert_eq!((waiting(engine, IMAGE), running(world).len()), (3, 4));
        // What is lowered is gone at once.
        engine.set_warm(IMAGE, 1).await.unwrap();
        assert_eq!((waiting(engine, IMAGE), running(world).len()), (1, 2));
        world.guest_value(&taken.record.id).unwrap();
    });
}

#[test]
fn inv_31_what_dies_while_it_waits_is_replaced_and_nobody_gets_it() {
    story(async |world, engine| {
        warm(engine, IMAGE, 1).await;
        let before = running(world);
        world.crash_vmm(before.first().unwrap());
        let view = engine.create(from(IMAGE)).await.unwrap();
        world.guest_value(&view.record.id).unwrap();
        settle_down().await;
        assert_eq!(waiting(engine, IMAGE), 1);
        assert!(running(world).is_disjoint(&before));
        assert_eq!((engine.list().len(), running(world).len()), (1, 2));
    });
}

#[test]
fn inv_24_a_template_goes_with_what_waits_and_stays_for_what_was_taken() {
    story(async |world, engine| {
        create(engine, "origin").await;
        let template = engine
            .snapshot("origin", "snapshot".parse().unwrap())
            .await
            .unwrap();
        assert!(matches!(template.content, TemplateContent::Snapshot { .. }));
        warm(engine, "snapshot", 2).await;
        engine.create(named("snapshot", "a")).await.unwrap();
        settle_down().await;
        let refused = engine.remove_template("snapshot").await.unwrap_err();
        let Error::InUse { users, .. } = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(users, ["sandbox a"]);
        settle_down().await;
        assert_eq!(waiting(engine, "snapshot"), 2);
        engine.destroy("a").await.unwrap();
        engine.remove_template("snapshot").await.unwrap();
        assert_eq!(running(world).len(), 1, "the origin");
        settle_down().await;
        assert_eq!(running(world).len(), 1);
    });
}

#[test]
fn inv_34_a_drain_removes_what_waits() {
    let world = World::new();
    life(async || {
        let engine = open(world.host(FreezeBy::Host)).await;
        import_image(&world, &engine).await;
        warm(&engine, IMAGE, 2).await;
        create(&engine, "a").await;
        settle_down().await;
        let drained = engine.drain().await.unwrap();
        assert_eq!(drained.paused, ["a"]);
        settle_down().await;
        assert_eq!(running(&world).len(), 0);
    });
    life(async || {
        let engine = open(world.host(FreezeBy::Host)).await;
        settle_down().await;
        assert_eq!((waiting(&engine, IMAGE), running(&world).len()), (2, 2));
        assert_eq!(engine.inspect("a").unwrap().phase(), Phase::Paused);
        leave_nothing(&world, &engine).await;
    });
}

/// Whether the sandbox that was asked for is there, whole; and one waits, and there is nothing else.
fn look(world: &World, engine: &Engine) -> bool {
    let list = engine.list();
    for view in &list {
        assert_eq!(view.record.broken, None);
        assert_eq!(view.busy, None);
        assert_eq!(view.phase(), Phase::Running);
        assert_eq!(view.record.name, Some("subject".parse().unwrap()));
        assert!(engine.route("subject").unwrap().is_some());
        world.guest_value(&view.record.id).unwrap();
    }
    assert!(list.len() <= 1);
    assert_eq!(
        (waiting(engine, IMAGE), running(world).len()),
        (1, 1 + list.len())
    );
    !list.is_empty()
}

/// Takes what waits, with one fault. Returns the steps of that, and of making another.
fn take(freeze: FreezeBy, fault: Option<Fault>) -> Vec<&'static str> {
    let (world, injector) = (World::new(), Injector::new());
    let host = || inject(world.host(freeze), &injector);
    let (trace, created) = life(async || {
        let engine = open(host()).await;
        import_image(&world, &engine).await;
        warm(&engine, IMAGE, 1).await;
        injector.arm(fault);
        let outcome = {
            let creating = engine.create(named(IMAGE, "subject"));
            tokio::select! {
                biased;
                () = injector.reached() => None,
                created = creating => Some(created.is_ok()),
            }
        };
        let crashes = fault.is_some_and(|it| it.kind == Kind::Crash);
        if crashes {
            if outcome.is_some() {
                // It strikes while another is made, if it does.
                tokio::select! {
                    biased;
                    () = injector.reached() => {}
                    () = settle_down() => {}
                }
            }
            return (injector.trace(), outcome);
        }
        settle_down().await;
        let trace = injector.trace();
        injector.arm(None);
        settle_down().await;
        let is_there = look(&world, &engine);
        // A client that went away changes nothing.
        assert_eq!(is_there, outcome.unwrap_or(true));
        (trace, Some(is_there))
    });
    injector.arm(None);
    let is_there = life(async || {
        let engine = open(host()).await;
        settle_down().await;
        look(&world, &engine)
    });
    if let Some(created) = created {
        assert_eq!(is_there, created, "what was reported is so");
    }
    life(async || {
        let engine = open(host()).await;
        settle_down().await;
        assert_eq!(look(&world, &engine), is_there);
        leave_nothing(&world, &engine).await;
    });
    trace
}

fn matrix(kind: Kind) {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let steps = take(freeze, None);
        assert!(
            steps[2..].starts_with(&["guest.welcome", "store.commit"]),
            "{steps:?}"
        );
        for (at, step) in steps.into_iter().enumerate() {
            for when in [When::Before, When::After] {
                let run = || take(freeze, Some(Fault { at, when, kind }));
                if let Err(panic) = std::panic::catch_unwind(run) {
                    eprintln!("in the case: {freeze:?}, {kind:?} {when:?} step {at} ({step})");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
}

#[test]
fn inv_11_taking_fails_at_every_step() {
    matrix(Kind::Fail);
}

#[test]
fn inv_30_taking_is_killed_at_every_step() {
    matrix(Kind::Crash);
}

#[test]
fn inv_20_client_leaves_taking_at_every_step() {
    matrix(Kind::Cancel);
}

/// Nobody knows whether the sandbox was taken: its name is nobody else's until that is known.
#[test]
fn inv_11_inv_22_a_taking_in_doubt_keeps_the_name_until_it_is_settled() {
    for then_killed in [false, true] {
        let (world, injector) = (World::new(), Injector::new());
        let host = || inject(world.host(FreezeBy::Host), &injector);
        life(async || {
            let engine = open(host()).await;
            import_image(&world, &engine).await;
            warm(&engine, IMAGE, 1).await;
            let lost = [Some(When::After)].into_iter();
            let fails = std::iter::repeat(Some(When::Before));
            injector.script("store.commit", lost.chain(fails));
            engine.create(named(IMAGE, "subject")).await.unwrap_err();
            let again = engine.create(named(IMAGE, "subject")).await;
            assert!(matches!(again, Err(Error::NameTaken { .. })), "{again:?}");
            if then_killed {
                return;
            }
            injector.break_step(None);
            settle_down().await;
            assert!(!look(&world, &engine), "it was not taken");
            engine.create(named(IMAGE, "subject")).await.unwrap();
            settle_down().await;
        });
        injector.break_step(None);
        life(async || {
            let engine = open(host()).await;
            settle_down().await;
            assert!(look(&world, &engine));
            leave_nothing(&world, &engine).await;
        });
    }
}
