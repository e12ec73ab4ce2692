//! Sandboxes that end by themselves and begin to, daemons that pause everything, and what is remembered of it all: told
//! as stories, with all the time in the world.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::stories::{story, story_of_faults};
use crate::support::{IMAGE, create, import_image, leave_nothing, life, named, open, run};
use futures_util::future::join_all;
use icebox_engine::id::SandboxId;
use icebox_engine::manifest::v1::OnTimeout;
use icebox_engine::{
    Config, CreateRequest, Engine, Error, LifetimeChange, Limit, Outcome, Phase, Refusal,
    Resolution,
};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};
use jiff::SignedDuration;

const MINUTE: Duration = Duration::from_secs(60);

fn after(time: Duration) -> Option<Limit> {
    Some(Limit::After(time))
}

fn idle(time: Duration) -> LifetimeChange {
    LifetimeChange {
        idle: after(time),
        ..LifetimeChange::default()
    }
}

fn run_for(time: Duration) -> LifetimeChange {
    LifetimeChange {
        run: after(time),
        ..LifetimeChange::default()
    }
}

async fn create_with(engine: &Engine, name: &str, lifetime: LifetimeChange) -> SandboxId {
    let request = CreateRequest {
        lifetime,
        ..named(IMAGE, name)
    };
    engine.create(request).await.unwrap().record.id.clone()
}

/// Where it rests; nowhere, if there is no such sandbox.
fn rests(engine: &Engine, wanted: &str) -> Option<Phase> {
    engine.inspect(wanted).ok().map(|view| view.phase())
}

/// How often that happened since this engine began.
fn happened(engine: &Engine, kind: &str) -> usize {
    let all = engine.events().kept(1).events;
    all.iter().filter(|event| event.kind == kind).count()
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

#[test]
fn inv_35_an_idle_sandbox_is_paused_and_an_open_connection_is_activity() {
    story(async |world, engine| {
        let id = create_with(engine, "a", idle(MINUTE)).await;
        create(engine, "b").await;
        pass(MINUTE - Duration::from_secs(1)).await;
        let route = engine.route("a").unwrap().unwrap();
        pass(MINUTE * 10).await;
        assert_eq!(
            rests(engine, "a"),
            Some(Phase::Running),
            "somebody is inside"
        );
        drop(route);
        pass(MINUTE - Duration::from_secs(1)).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        pass(Duration::from_secs(2)).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
        assert_eq!(happened(engine, "sandbox.timed-out"), 1);
        assert_eq!(rests(engine, "b"), Some(Phase::Running), "it has no time");
        run(engine, &id).await.unwrap();
        world.guest_value(&id).unwrap();
        // Nothing that was asked of it, and nothing it was asked for: the time begins anew.
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
    });
}

#[test]
fn inv_35_a_command_that_runs_is_activity_and_a_guest_that_says_nothing_is_idle() {
    story(async |world, engine| {
        create_with(engine, "a", idle(MINUTE)).await;
        world.put_to_work(true);
        pass(MINUTE * 30).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        world.put_to_work(false);
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));

        engine.resume("a", None).await.unwrap();
        world.wedge_agents(true);
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
        world.wedge_agents(false);
    });
}

#[test]
fn inv_35_the_run_time_ends_whatever_happens_and_may_destroy() {
    story(async |_, engine| {
        let destroy = LifetimeChange {
            then: Some(OnTimeout::Destroy),
            ..run_for(MINUTE * 5)
        };
        create_with(engine, "a", destroy).await;
        create_with(engine, "b", run_for(MINUTE * 5)).await;
        let routes = ["a", "b"].map(|name| engine.route(name).unwrap().unwrap());
        pass(MINUTE * 5 + Duration::from_secs(8)).await;
        // The connections were given five seconds to end.
        for route in routes {
            route.pass.revoked().await;
        }
        assert_eq!(rests(engine, "a"), None);
        assert_eq!(rests(engine, "b"), Some(Phase::Paused));
        // Nobody of its name is hit by what was meant for it.
        create(engine, "a").await;
        pass(MINUTE * 30).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        // Each run has its time.
        engine.resume("b", None).await.unwrap();
        pass(MINUTE * 4).await;
        assert_eq!(rests(engine, "b"), Some(Phase::Running));
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "b"), Some(Phase::Paused));
    });
}

#[test]
fn inv_35_times_are_changed_while_it_runs_and_while_it_does_not() {
    story(async |_, engine| {
        create(engine, "a").await;
        engine.set_lifetime("a", idle(MINUTE)).await.unwrap();
        pass(MINUTE / 2).await;
        engine.set_lifetime("a", idle(MINUTE * 5)).await.unwrap();
        pass(MINUTE * 4).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        let never = LifetimeChange {
            idle: Some(Limit::Never),
            ..LifetimeChange::default()
        };
        engine.set_lifetime("a", never).await.unwrap();
        pass(MINUTE * 60).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        engine
            .set_lifetime("a", run_for(Duration::ZERO))
            .await
            .unwrap();
        pass(Duration::from_secs(1)).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
        engine.set_lifetime("a", run_for(MINUTE)).await.unwrap();
        engine.resume("a", None).await.unwrap();
        pass(MINUTE + Duration::from_secs(1)).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
        let long = LifetimeChange {
            run: after(Duration::from_secs(u64::MAX)),
            ..LifetimeChange::default()
        };
        let error = engine.set_lifetime("a", long).await.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    });
}

#[test]
fn inv_35_a_pause_that_fails_leaves_it_running_and_is_tried_again() {
    story_of_faults(async |world, injector, engine| {
        let id = create_with(engine, "a", run_for(MINUTE)).await;
        injector.break_step(Some("machine.save"));
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        world.guest_value(&id).unwrap();
        assert!(engine.route("a").unwrap().is_some(), "its gate is open");
        assert_eq!(happened(engine, "sandbox.timeout-failed"), 1, "said once");
        pass(MINUTE * 600).await;
        let tries = injector
            .trace()
            .iter()
            .filter(|it| **it == "machine.save")
            .count();
        assert!((10..100).contains(&tries), "{tries} tries");
        injector.break_step(None);
        pass(MINUTE * 11).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
    });
}

#[test]
fn inv_35_a_time_that_was_over_while_no_daemon_ran_is_acted_on_by_the_next() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        let world = World::new();
        life(async || {
            let engine = open(world.host(freeze)).await;
            import_image(&world, &engine).await;
            create_with(&engine, "runs", run_for(MINUTE * 5)).await;
            create_with(&engine, "idles", idle(MINUTE * 5)).await;
            create_with(&engine, "busy", idle(MINUTE * 5)).await;
            let busy = engine.route("busy").unwrap();
            pass(MINUTE * 4).await;
            drop(busy);
        });
        world.step_clock(SignedDuration::from_mins(4));
        life(async || {
            let engine = open(world.host(freeze)).await;
            pass(Duration::from_secs(10)).await;
            assert_eq!(rests(&engine, "runs"), Some(Phase::Paused));
            assert_eq!(rests(&engine, "idles"), Some(Phase::Paused));
            let busy = rests(&engine, "busy");
            assert_eq!(busy, Some(Phase::Running), "four minutes of five");
            pass(MINUTE * 3).await;
            assert_eq!(rests(&engine, "busy"), Some(Phase::Paused));
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_35_idle_times_do_not_go_by_the_wall_clock() {
    story(async |world, engine| {
        create_with(engine, "a", idle(MINUTE * 5)).await;
        world.step_clock(SignedDuration::from_hours(30));
        pass(MINUTE * 4).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        world.step_clock(SignedDuration::from_hours(-60));
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
    });
}

#[test]
fn inv_19_whoever_asks_for_a_paused_sandbox_wakes_it_once() {
    story_of_faults(async |world, injector, engine| {
        let wakes = LifetimeChange {
            auto_resume: Some(true),
            ..run_for(MINUTE)
        };
        let id = create_with(engine, "a", wakes).await;
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));
        injector.arm(None);
        let asking = (0..100).map(|_| engine.route_awake("a"));
        for route in join_all(asking).await {
            assert!(route.unwrap().is_some());
        }
        let launches = injector
            .trace()
            .iter()
            .filter(|it| **it == "vmm.launch")
            .count();
        assert_eq!(launches, 1);
        world.guest_value(&id).unwrap();
        // However short its run was to be, this one lasts.
        pass(MINUTE * 4).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
        pass(MINUTE * 2).await;
        assert_eq!(rests(engine, "a"), Some(Phase::Paused));

        injector.break_step(Some("vmm.launch"));
        let asking = (0..10).map(|_| engine.route_awake("a"));
        for route in join_all(asking).await {
            assert!(matches!(route.err(), Some(Error::NotWoken { .. })));
        }
        injector.break_step(None);
        assert!(
            engine.route_awake("a").await.unwrap().is_some(),
            "a new try"
        );
    });
}

#[test]
fn inv_51_only_what_was_paused_is_woken() {
    story(async |world, engine| {
        let wakes = LifetimeChange {
            auto_resume: Some(true),
            ..LifetimeChange::default()
        };
        let id = create_with(engine, "a", wakes).await;
        create(engine, "b").await;
        engine.pause("b").await.unwrap();
        assert!(
            engine.route_awake("b").await.unwrap().is_none(),
            "it was not to be"
        );
        engine.pause("a").await.unwrap();
        engine.resume("a", None).await.unwrap();
        world.crash_vmm(&id);
        pass(Duration::from_secs(1)).await;
        assert!(engine.route_awake("a").await.unwrap().is_none());
        assert_eq!(rests(engine, "a"), Some(Phase::Stopped));
        // A pause that is under way is waited for.
        engine.start("a").await.unwrap();
        let pausing = tokio::spawn({
            let engine = engine.clone();
            async move { engine.pause("a").await }
        });
        tokio::task::yield_now().await;
        assert!(engine.route_awake("a").await.unwrap().is_some());
        pausing.await.unwrap().unwrap();
        assert_eq!(rests(engine, "a"), Some(Phase::Running));
    });
}

#[test]
fn inv_34_a_drain_pauses_all_at_most_eight_at_once_and_refuses_what_is_new() {
    story_of_faults(async |world, injector, engine| {
        let mut ids = BTreeSet::new();
        for n in 0..20 {
            ids.insert(create(engine, &format!("s{n}")).await);
        }
        create(engine, "paused").await;
        engine.pause("paused").await.unwrap();
        // One cannot be paused.
        let wedged = engine.inspect("s7").unwrap().record.id.clone();
        world.wedge_vmm(&wedged);
        injector.arm(None);
        let drained = engine.drain().await.unwrap();
        assert_eq!(drained.paused.len(), 19);
        let [(name, error)] = &drained.failed[..] else {
            panic!("{:?}", drained.failed);
        };
        assert_eq!(name, "s7");
        assert!(matches!(error, Error::Deadline { .. }), "{error:?}");
        assert_eq!(rests(engine, "s7"), Some(Phase::Running));
        let events = engine.events().kept(1).events;
        let kinds: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
        let at = |kind| kinds.iter().position(|it| *it == kind).unwrap();
        assert!(at("daemon.draining") < at("sandbox.drain-failed"));
        assert_eq!(at("daemon.drained"), kinds.len() - 1);
        let paused = events[at("daemon.draining")..].iter();
        assert_eq!(paused.filter(|it| it.kind == "sandbox.paused").count(), 19);
        // Nineteen guests, and eight may stand still at once.
        let mut standing = 0_i32;
        for step in injector.trace() {
            match step {
                "machine.pause_vcpus" => standing += 1,
                "vmm.kill" => standing -= 1,
                _ => {}
            }
            assert!(standing <= 8, "{standing} at once");
        }

        for refused in [
            engine.create(named(IMAGE, "new")).await.map(drop),
            engine.resume("paused", None).await.map(drop),
            engine.fork("paused", 1).await.map(drop),
        ] {
            assert!(matches!(refused, Err(Error::Draining)), "{refused:?}");
        }
        // Again: the same one.
        assert_eq!(engine.drain().await.unwrap().failed.len(), 1);
    });
}

#[test]
fn inv_34_what_is_being_made_when_a_drain_begins_is_paused_as_well() {
    for freeze in [FreezeBy::Vmm, FreezeBy::Host] {
        life(async || {
            let (world, injector) = (World::new(), Injector::new());
            let engine = open(inject(world.host(freeze), &injector)).await;
            import_image(&world, &engine).await;
            injector.arm(Some(Fault {
                at: 5,
                when: When::Before,
                kind: Kind::Hold,
            }));
            let creating = tokio::spawn({
                let engine = engine.clone();
                async move { engine.create(named(IMAGE, "a")).await.map(drop) }
            });
            injector.reached().await;
            assert_eq!(engine.inspect("a").unwrap().busy, Some("creating"));
            let draining = tokio::spawn({
                let engine = engine.clone();
                async move { engine.drain().await }
            });
            tokio::task::yield_now().await;
            injector.go_on();
            assert_eq!(draining.await.unwrap().unwrap().paused, ["a"]);
            creating.await.unwrap().unwrap();
            assert_eq!(rests(&engine, "a"), Some(Phase::Paused));
            assert_eq!(engine.pause("a").await.unwrap().0, Outcome::AlreadyThere);
            let refused = engine.start("a").await.unwrap_err();
            assert!(matches!(
                refused,
                Error::Refused(Refusal::WrongPhase { .. })
            ));
            leave_nothing(&world, &engine).await;
        });
    }
}

#[test]
fn inv_49_numbers_go_on_after_a_kill_and_nothing_that_was_shown_is_another_event() {
    let world = World::new();
    let last = life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        let shown = engine.events().past(1).await;
        assert_eq!(shown.missed, 0);
        shown.events
    });
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        engine.pause("a").await.unwrap();
        let all = engine.events().past(1).await.events;
        assert_eq!(all[..last.len()], last[..]);
        assert!(all.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
        let newest = all.last().unwrap();
        assert_eq!(newest.kind, "sandbox.paused");
        let followed = engine.events().since(newest.seq).await.events;
        assert_eq!(followed, std::slice::from_ref(newest));
        leave_nothing(&world, &engine).await;
    });
}

/// An engine that measures what sandboxes use, of which steps can be broken.
async fn measuring(world: &World, freeze: FreezeBy, injector: &Injector) -> Engine {
    let host = inject(world.host(freeze), injector);
    Engine::open(host, Config::default()).await.unwrap()
}

#[test]
fn inv_45_a_sandbox_is_measured_exactly_while_it_runs() {
    life(async || {
        let (world, injector) = (World::new(), Injector::new());
        let engine = &measuring(&world, FreezeBy::Vmm, &injector).await;
        import_image(&world, engine).await;
        let id = create(engine, "a").await;
        let samples = async || {
            let history = engine.samples("a", None, Some(Resolution::Second)).await;
            history.unwrap().len()
        };
        pass(Duration::from_secs(10)).await;
        world.spend(&id, Duration::from_millis(250));
        pass(Duration::from_secs(1)).await;
        let history = engine.samples("a", None, Some(Resolution::Second)).await;
        let history = history.unwrap();
        assert!((10..=11).contains(&history.len()), "{}", history.len());
        assert_eq!(history.iter().map(|it| it.cpu_permille).sum::<u32>(), 250);
        assert!(history.iter().all(|it| it.memory_kib == 128 << 10));
        // A pause that fails changes nothing.
        injector.break_step(Some("machine.save"));
        engine.pause("a").await.unwrap_err();
        injector.break_step(None);
        let before = samples().await;
        pass(Duration::from_secs(10)).await;
        assert!((9..=10).contains(&(samples().await - before)));
        engine.pause("a").await.unwrap();
        let before = samples().await;
        pass(MINUTE * 5).await;
        assert_eq!(samples().await, before, "it does not run");
        engine.resume("a", None).await.unwrap();
        pass(Duration::from_secs(10)).await;
        assert!((9..=11).contains(&(samples().await - before)));
        engine.destroy("a").await.unwrap();
        assert!(engine.samples("a", None, None).await.is_err());
        leave_nothing(&world, engine).await;
    });
}

#[test]
fn what_a_sandbox_used_is_known_for_two_days_and_by_the_next_daemon() {
    let (world, injector) = (World::new(), Injector::new());
    life(async || {
        let engine = measuring(&world, FreezeBy::Vmm, &injector).await;
        import_image(&world, &engine).await;
        create(&engine, "a").await;
        pass(MINUTE * 180).await;
        let all = engine.samples("a", None, None).await.unwrap();
        let of = |seconds| all.iter().filter(|it| it.seconds == seconds).count();
        assert!((590..=600).contains(&of(1)), "{}", of(1));
        assert!((650..=720).contains(&of(10)), "{}", of(10));
        assert!((55..=65).contains(&of(60)), "{}", of(60));
        assert!(
            all.windows(2).all(|pair| pair[0].at < pair[1].at),
            "in order"
        );
    });
    life(async || {
        let engine = open(world.host(FreezeBy::Vmm)).await;
        let all = engine.samples("a", None, None).await.unwrap();
        assert!((175..=180).contains(&all.len()), "{}", all.len());
        leave_nothing(&world, &engine).await;
    });
}
