//! The engine over the real store and the real volume drivers, failed and killed at every step.
//!
//! The engine's own tests do this over a host in memory, whose store and volumes are what the engine's author thought
//! they are. Here they are files. Only the VMM, its guest and its network are made up: a [guest](guest) writes one number
//! to its memory and to the first block of its disk, so that a capture that is not one instant, a lost head or a wrong
//! chain shows.
//!
//! Data lies in memory (`/dev/shm`) if there is room, for `reflink` on an XFS there: durability is the subject of other
//! tests, and a flush to nowhere is quick. Needs root and, for `reflink`, `mkfs.xfs` and a loop device.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;
#[path = "../support/mounts.rs"]
mod mounts;
mod place;
mod scene;

use std::time::Duration;

use icebox_engine::{Engine, Error, Phase};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use place::{Driver, Place, in_private_mounts};
use scene::{Scene, points, run};

/// Runs `work` in a runtime of its own, whose clock jumps over waits. Dropping the runtime is `kill -9`, except that file
/// operations under way are finished.
fn life<T>(work: impl AsyncFnOnce() -> T) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(work())
}

/// Lets everything that is under way end. The clock jumps, so this takes no time.
async fn settle_down() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// Sets a scene, runs its verb with one fault, starts again twice, and leaves nothing. Returns the verb's steps.
fn case(driver: Driver, scene: Scene, fault: Option<Fault>) -> Vec<&'static str> {
    let place = Place::new(driver);
    let injector = Injector::new();
    let open = async || {
        let host = inject(place.host(), &injector);
        // Hours go by, of which nobody looks at every second.
        let config = icebox_engine::Config {
            measures: false,
            ..icebox_engine::Config::default()
        };
        Engine::open(host, config).await.unwrap()
    };
    let (trace, floor) = life(async || {
        let engine = open().await;
        scene.set(&place, &engine).await;
        settle_down().await;
        let floor = floor(&place, &engine);
        injector.arm(fault);
        let outcome = tokio::select! {
            biased;
            () = injector.reached() => None,
            result = scene.act(&engine) => Some(result),
        };
        let trace = injector.trace();
        if let Some(outcome) = outcome {
            settle_down().await;
            injector.arm(None);
            look_at_living(scene, &engine, &outcome);
        }
        (trace, floor)
    });
    injector.arm(None);
    let picture = life(async || {
        let engine = open().await;
        settle_down().await;
        look_at_recovered(scene, &engine);
        place.picture()
    });
    life(async || {
        let engine = open().await;
        settle_down().await;
        assert_eq!(place.picture(), picture, "a second start changes nothing");
        for view in engine.list() {
            let id = view.record.id.clone();
            run(&engine, &id).await.unwrap();
            let value = place.guests.value(&id).unwrap();
            assert!(value >= floor, "{id} lost {floor}: it has {value}");
            // Each with a disk and a memory of one instant, whatever was interrupted.
            for point in points(&engine, &id) {
                engine.rollback(id.as_str(), point, true).await.unwrap();
                place.guests.value(&id).unwrap();
            }
        }
        for view in engine.list() {
            engine.destroy(view.record.id.as_str()).await.unwrap();
        }
        for template in engine.templates() {
            engine.remove_template(template.id.as_str()).await.unwrap();
        }
        engine.collect(false).await.unwrap();
    });
    place.assert_empty();
    trace
}

/// The last number that a guest had written before the verb.
fn floor(place: &Place, engine: &Engine) -> u64 {
    engine
        .list()
        .into_iter()
        .filter(|view| view.phase() == Phase::Running)
        .map(|view| place.guests.value(&view.record.id).unwrap())
        .max()
        .unwrap_or(1)
}

fn look_at_living(scene: Scene, engine: &Engine, outcome: &Result<(), Error>) {
    let rests = scene.rests(engine);
    if outcome.is_ok() {
        assert_eq!(rests, scene.after());
    }
    for view in engine.list() {
        if view.record.broken.is_none() {
            assert_eq!(view.record.intent, None, "a freeze is left unfinished");
        }
    }
}

fn look_at_recovered(scene: Scene, engine: &Engine) {
    let rests = scene.rests(engine);
    assert!(
        rests == scene.before() || rests == scene.after(),
        "after the start it rests at {rests:?}"
    );
    for view in engine.list() {
        assert_eq!(view.record.broken, None, "nothing is broken after a start");
        assert_eq!(
            view.record.intent, None,
            "nothing is unfinished after a start"
        );
    }
}

/// Every step of every scene.
fn matrix(driver: Driver, kind: Kind) {
    // Killed before a step is killed after the one before it.
    let whens: &[When] = match kind {
        Kind::Crash => &[When::After],
        _ => &[When::Before, When::After],
    };
    for scene in Scene::ALL {
        let steps = case(driver, scene, None);
        assert!(!steps.is_empty(), "{scene:?} has steps");
        for (at, step) in steps.into_iter().enumerate() {
            for &when in whens {
                let fault = Some(Fault { at, when, kind });
                let run = std::panic::AssertUnwindSafe(|| case(driver, scene, fault));
                if let Err(panic) = std::panic::catch_unwind(run) {
                    eprintln!(
                        "in the case: {scene:?}, {driver:?}, {kind:?} {when:?} step {at} ({step})"
                    );
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
}

#[test]
fn inv_30_inv_52_the_engine_is_killed_at_every_step_over_qcow2() {
    matrix(Driver::Qcow2, Kind::Crash);
}

#[test]
fn inv_33_inv_52_every_step_fails_over_qcow2() {
    matrix(Driver::Qcow2, Kind::Fail);
}

#[test]
fn inv_30_inv_52_the_engine_is_killed_at_every_step_over_reflink() {
    in_private_mounts(
        "inv_30_inv_52_the_engine_is_killed_at_every_step_over_reflink",
        || matrix(Driver::Reflink, Kind::Crash),
    );
}

#[test]
fn inv_33_inv_52_every_step_fails_over_reflink() {
    in_private_mounts("inv_33_inv_52_every_step_fails_over_reflink", || {
        matrix(Driver::Reflink, Kind::Fail);
    });
}
