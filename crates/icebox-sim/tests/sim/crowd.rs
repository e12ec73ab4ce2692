//! Many clients at once, at the same sandbox and at different ones: nobody waits for ever, and no answer is lost.
//!
//! Steps take time here, each another, so that things happen between them. Once with a clock that jumps, where a run
//! follows from its seed, and once with several threads and the real clock, where locks could be taken in any order.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{IMAGE, create, import_image, leave_nothing, life, named, open, run};
use icebox_engine::id::SandboxId;
use icebox_engine::{Engine, Error, Outcome, Phase};
use icebox_sim::fault::{Injector, inject};
use icebox_sim::{FreezeBy, World};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

const CLIENTS: u64 = 50;
/// Of each client.
const VERBS: usize = 12;
/// Nothing takes as long, of what is tried here.
const FOR_EVER: Duration = Duration::from_secs(1800);

/// What became of the verbs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    answered: usize,
    refused: usize,
    /// Their clients had gone.
    left: usize,
}

impl Tally {
    fn total(&self) -> usize {
        self.answered + self.refused + self.left
    }
}

/// Asks for one verb at random.
async fn ask(engine: Engine, sandbox: String, random: &mut StdRng) -> Result<(), Error> {
    let name = |random: &mut StdRng| format!("n-{}", random.random_range(0..8)).parse().unwrap();
    match random.random_range(0..12) {
        0..3 => engine.pause(&sandbox).await.map(drop),
        3..6 => engine.resume(&sandbox, None).await.map(drop),
        6 => engine.stop(&sandbox).await.map(drop),
        7 => engine.start(&sandbox).await.map(drop),
        8 => engine.snapshot(&sandbox, name(random)).await.map(drop),
        9 => {
            let forks = engine.fork(&sandbox, 1).await?;
            for fork in forks {
                engine.destroy(fork?.record.id.as_str()).await?;
            }
            Ok(())
        }
        10 => engine
            .remove_template(name(random).as_str())
            .await
            .map(drop),
        _ => engine.collect(false).await.map(drop),
    }
}

/// What is said to somebody who asks for something that others have made senseless meanwhile.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::Refused(_)
            | Error::Busy { .. }
            | Error::NameTaken { .. }
            | Error::Unknown { .. }
            | Error::InUse { .. }
            | Error::Exhausted { .. }
            // By the real clock, on a machine that has other things to do.
            | Error::Deadline { .. }
    )
}

/// Many clients, each with a choice of sandboxes.
async fn crowd(engine: &Engine, sandboxes: &[SandboxId], seed: u64) -> Tally {
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (engine, sandboxes) = (engine.clone(), sandboxes.to_vec());
        clients.spawn(async move {
            let mut random = StdRng::seed_from_u64(seed * 1000 + client);
            let mut tally = Tally::default();
            for _ in 0..VERBS {
                let sandbox = &sandboxes[random.random_range(0..sandboxes.len())];
                let patience = match random.random_range(0..5) {
                    0 => Duration::from_millis(random.random_range(0..60)),
                    _ => FOR_EVER,
                };
                let asked = ask(engine.clone(), sandbox.to_string(), &mut random);
                match tokio::time::timeout(patience, asked).await {
                    Err(_) => {
                        assert!(patience < FOR_EVER, "a verb is never answered");
                        tally.left += 1;
                    }
                    Ok(Ok(())) => tally.answered += 1,
                    Ok(Err(error)) => {
                        assert!(is_refusal(&error), "{error:?}");
                        tally.refused += 1;
                    }
                }
            }
            tally
        });
    }
    let mut all = Tally::default();
    while let Some(tally) = clients.join_next().await {
        let tally = tally.unwrap();
        all.answered += tally.answered;
        all.refused += tally.refused;
        all.left += tally.left;
    }
    all
}

/// Lets a crowd at so many sandboxes, and looks at what is left of them: all of it.
async fn crowd_at(sandboxes: usize, freeze: FreezeBy, seed: u64, rest: Duration) {
    let (world, injector) = (World::new(), Injector::new());
    let engine = open(inject(world.host(freeze), &injector)).await;
    import_image(&world, &engine).await;
    let mut marks = BTreeMap::new();
    for number in 0..sandboxes {
        let id = create(&engine, &format!("s-{number}")).await;
        marks.insert(id.clone(), world.mark(&id).unwrap());
    }
    let ids: Vec<_> = marks.keys().cloned().collect();
    injector.take_time(seed);
    let tally = crowd(&engine, &ids, seed).await;
    println!("{sandboxes} sandboxes: {tally:?}");
    assert_eq!(tally.total(), usize::try_from(CLIENTS).unwrap() * VERBS);
    assert!(tally.answered > tally.total() / 4, "{tally:?}");
    // What clients that left had asked for ends by itself.
    while engine.list().iter().any(|view| view.busy.is_some()) {
        tokio::time::sleep(rest).await;
    }
    for view in engine.list() {
        assert_eq!(view.record.broken, None);
        let id = view.record.id.clone();
        let Some(mark) = marks.get(&id) else {
            // A fork whose client left before it could remove it.
            continue;
        };
        run(&engine, &id).await.unwrap();
        assert_eq!(World::mark_in(world.guest_value(&id).unwrap()), *mark);
    }
    let there = |id: &SandboxId| engine.list().iter().any(|view| view.record.id == *id);
    assert!(
        marks.keys().all(there),
        "nobody has asked for the removal of these"
    );
    leave_nothing(&world, &engine).await;
}

/// The same with several threads, and a clock that nobody stops.
fn on_threads(work: impl Future<Output = ()> + Send + 'static) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let done = tokio::time::timeout(FOR_EVER, tokio::spawn(work)).await;
        done.expect("nobody waits for ever").unwrap();
    });
}

#[test]
fn inv_19_inv_20_inv_21_fifty_clients_of_one_sandbox() {
    for (seed, freeze) in [(1, FreezeBy::Vmm), (2, FreezeBy::Host), (3, FreezeBy::Vmm)] {
        life(async || crowd_at(1, freeze, seed, Duration::from_secs(60)).await);
    }
}

#[test]
fn inv_19_inv_20_inv_21_fifty_clients_of_ten_sandboxes() {
    for (seed, freeze) in [(4, FreezeBy::Vmm), (5, FreezeBy::Host), (6, FreezeBy::Vmm)] {
        life(async || crowd_at(10, freeze, seed, Duration::from_secs(60)).await);
    }
}

#[test]
fn inv_19_inv_20_inv_21_fifty_clients_on_several_threads() {
    // Both wait more than they do.
    let pace = Duration::from_millis(10);
    std::thread::scope(|scope| {
        scope.spawn(|| on_threads(crowd_at(1, FreezeBy::Vmm, 7, pace)));
        scope.spawn(|| on_threads(crowd_at(10, FreezeBy::Host, 8, pace)));
    });
}

/// A host whose steps take time, with an engine.
async fn slow() -> (World, Engine) {
    let (world, injector) = (World::new(), Injector::new());
    let engine = open(inject(world.host(FreezeBy::Vmm), &injector)).await;
    import_image(&world, &engine).await;
    injector.take_time(9);
    (world, engine)
}

/// Asks for the same from many sides at once.
async fn at_once<T: Send + 'static, F>(ask: impl Fn(u64) -> F) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
{
    let mut asked = JoinSet::new();
    for client in 0..CLIENTS {
        asked.spawn(ask(client));
    }
    asked.join_all().await
}

#[test]
fn inv_19_equal_verbs_of_fifty_clients_are_done_once() {
    life(async || {
        let (world, engine) = slow().await;
        create(&engine, "a").await;
        let changed = |outcomes: &[Result<Outcome, Error>]| {
            let changed = |it: &&Result<Outcome, Error>| matches!(it, Ok(Outcome::Changed));
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
            outcomes.iter().filter(changed).count()
        };
        for round in 1..=3 {
            let paused = at_once(|_| {
                let engine = engine.clone();
                async move { engine.pause("a").await.map(|(outcome, _)| outcome) }
            });
            assert_eq!(changed(&paused.await), 1);
            assert_eq!(engine.inspect("a").unwrap().record.generations.len(), round);
            let resumed = at_once(|_| {
                let engine = engine.clone();
                async move { engine.resume("a", None).await.map(|(outcome, _)| outcome) }
            });
            assert_eq!(changed(&resumed.await), 1);
        }
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_22_of_fifty_clients_that_want_one_name_one_has_it() {
    life(async || {
        let (world, engine) = slow().await;
        let wins = |results: Vec<Result<(), Error>>| {
            let taken =
                |it: &Result<(), Error>| matches!(it, Ok(()) | Err(Error::NameTaken { .. }));
            assert!(results.iter().all(taken), "{results:?}");
            results.iter().filter(|it| it.is_ok()).count()
        };
        let created = at_once(|_| {
            let engine = engine.clone();
            async move { engine.create(named(IMAGE, "one")).await.map(drop) }
        });
        assert_eq!(wins(created.await), 1);
        assert_eq!(engine.list().len(), 1);
        for number in 0..CLIENTS {
            create(&engine, &format!("s-{number}")).await;
        }
        let snapshots = at_once(|client| {
            let engine = engine.clone();
            let name = "same".parse().unwrap();
            async move {
                engine
                    .snapshot(&format!("s-{client}"), name)
                    .await
                    .map(drop)
            }
        });
        assert_eq!(wins(snapshots.await), 1);
        assert_eq!(engine.templates().len(), 2);
        leave_nothing(&world, &engine).await;
    });
}

#[test]
fn inv_19_inv_21_a_wedged_sandbox_keeps_no_other_waiting() {
    life(async || {
        let (world, engine) = slow().await;
        let wedged = create(&engine, "wedged").await;
        for number in 0..CLIENTS {
            create(&engine, &format!("s-{number}")).await;
        }
        let alone = Instant::now();
        engine.pause("s-0").await.unwrap();
        engine.resume("s-0", None).await.unwrap();
        let alone = alone.elapsed();
        world.wedge_vmm(&wedged);
        let hopeless: Vec<_> = (0..20)
            .map(|_| {
                let engine = engine.clone();
                tokio::spawn(async move { engine.pause("wedged").await.map(drop) })
            })
            .collect();
        let rounds = at_once(|client| {
            let engine = engine.clone();
            async move {
                let (begun, sandbox) = (Instant::now(), format!("s-{client}"));
                engine.pause(&sandbox).await.unwrap();
                engine.resume(&sandbox, None).await.unwrap();
                begun.elapsed()
            }
        });
        for took in rounds.await {
            assert!(took < alone * 3, "{took:?}, alone {alone:?}");
        }
        engine.destroy("wedged").await.unwrap();
        for asked in hopeless {
            asked.await.unwrap().unwrap_err();
        }
        for view in engine.list() {
            assert_eq!(view.phase(), Phase::Running);
        }
        leave_nothing(&world, &engine).await;
    });
}
