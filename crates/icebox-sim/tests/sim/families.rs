//! Sandboxes that come from each other go in any order, and whoever stays has everything it had.

use std::collections::BTreeMap;

use crate::stories::story;
use crate::support::{create, named, run};
use icebox_engine::Engine;
use icebox_sim::World;

/// A parent, a fork of it, a fork of that, and a template of the second, each with something that the others have not.
async fn family(world: &World, engine: &Engine) -> BTreeMap<String, u64> {
    let mut marks = BTreeMap::new();
    let mut last = create(engine, "parent").await;
    marks.insert(last.to_string(), world.mark(&last).unwrap());
    for _ in 0..2 {
        let forks = engine.fork(last.as_str(), 1).await.unwrap();
        let fork = forks.into_iter().next().unwrap().unwrap().record.id.clone();
        let inherited = World::mark_in(world.guest_value(&fork).unwrap());
        assert_eq!(
            inherited,
            marks[last.as_str()],
            "a fork begins with what its parent had"
        );
        marks.insert(fork.to_string(), world.mark(&fork).unwrap());
        last = fork;
    }
    let name = "heirloom".parse().unwrap();
    engine.snapshot(last.as_str(), name).await.unwrap();
    marks.insert("heirloom".to_owned(), marks[last.as_str()]);
    // What it writes later is its own.
    marks.insert(last.to_string(), world.mark(&last).unwrap());
    marks
}

/// Every order of so many.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(count - 1);
    let with = |order: &Vec<usize>, at| {
        let mut order = order.clone();
        order.insert(at, count - 1);
        order
    };
    let longer = |order: &Vec<usize>| (0..count).map(|at| with(order, at)).collect::<Vec<_>>();
    shorter.iter().flat_map(longer).collect()
}

/// Each of those that are left is paused and resumed, or made a sandbox of.
async fn look(world: &World, engine: &Engine, marks: &BTreeMap<String, u64>) {
    for (name, mark) in marks {
        let id = if name == "heirloom" {
            engine
                .create(named(name, "heir"))
                .await
                .unwrap()
                .record
                .id
                .clone()
        } else {
            engine.pause(name).await.unwrap();
            engine.collect(false).await.unwrap();
            let id = name.parse().unwrap();
            run(engine, &id).await.unwrap();
            id
        };
        assert_eq!(
            World::mark_in(world.guest_value(&id).unwrap()),
            *mark,
            "{name}"
        );
        if name == "heirloom" {
            engine.destroy("heir").await.unwrap();
        }
    }
}

#[test]
fn inv_24_inv_38_a_family_goes_in_any_order() {
    let orders = orders(4);
    assert_eq!(orders.len(), 24);
    for order in orders {
        story(async |world, engine| {
            let mut marks = family(world, engine).await;
            let members: Vec<_> = marks.keys().cloned().collect();
            for member in &order {
                let name = &members[*member];
                if name == "heirloom" {
                    engine.remove_template(name).await.unwrap();
                } else {
                    engine.destroy(name).await.unwrap();
                }
                marks.remove(name);
                engine.collect(false).await.unwrap();
                look(world, engine, &marks).await;
            }
        });
    }
}

#[test]
fn inv_10_inv_24_thirty_rounds_with_a_fork_of_each_lose_nothing() {
    story(async |world, engine| {
        let mut last = create(engine, "first").await;
        for round in 0..30 {
            let mark = world.mark(&last).unwrap();
            engine.pause(last.as_str()).await.unwrap();
            // Of a paused one and of a running one, in turn.
            if round % 2 == 0 {
                engine.resume(last.as_str(), None).await.unwrap();
            }
            let forks = engine.fork(last.as_str(), 1).await.unwrap();
            let fork = forks.into_iter().next().unwrap().unwrap().record.id.clone();
            let value = world.guest_value(&fork).unwrap();
            assert_eq!(World::mark_in(value), mark, "in round {round}");
            engine.destroy(last.as_str()).await.unwrap();
            engine.collect(false).await.unwrap();
            last = fork;
        }
    });
}
