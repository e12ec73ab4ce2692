//! Short operations: what a create, a pause or a fork waits for, and what a fork takes.

use std::time::Instant;

use crate::Options;
use crate::ground::Ground;
use crate::table::{Table, median, ms, number};

pub(crate) const COLUMNS: &[&str] = &[
    "driver",
    "create head",
    "attach",
    "detach",
    "freeze",
    "fork",
    "remove",
    "KiB per fork",
    "head and attach, first",
    "… with 50 others",
    "… with the most others",
];

const BASE: u64 = 64 << 20;
const DISK: u64 = 1 << 30;

pub(crate) async fn measure(ground: &mut Ground, options: &Options, table: &mut Table) {
    let base = ground.base(BASE, 50).await;
    let chain = ground.on_base(&base, DISK);
    let (mut created, mut attached, mut detached, mut removed) = Default::default();
    for _ in 0..options.repetitions {
        // The sandbox's own directory is not the driver's cost; the head in it is.
        let begun = Instant::now();
        let volume = ground.volume(&chain).await;
        push(&mut created, begun);
        let begun = Instant::now();
        ground.attach(&volume).await;
        push(&mut attached, begun);
        let begun = Instant::now();
        ground.driver.detach(&volume.head).await.unwrap();
        push(&mut detached, begun);
        let begun = Instant::now();
        ground.driver.remove_head(&volume.head).await.unwrap();
        push(&mut removed, begun);
        ground.remove(&volume).await;
    }

    let mut frozen = Vec::new();
    let mut volume = ground.volume(&chain).await;
    ground.attach(&volume).await;
    let mut layer = None;
    for _ in 0..options.repetitions.min(10) {
        let begun = Instant::now();
        layer = Some(ground.freeze(&mut volume).await);
        push(&mut frozen, begun);
    }
    let layer = layer.unwrap();

    // All at once, as a fan-out has them.
    let below = volume.chain.clone();
    assert_eq!(below.layers.first(), Some(&layer));
    let before = ground.used();
    let (mut forked, mut forks) = (Vec::new(), Vec::new());
    for _ in 0..options.repetitions {
        let begun = Instant::now();
        let fork = ground.volume(&below).await;
        ground.attach(&fork).await;
        push(&mut forked, begun);
        forks.push(fork);
    }
    let per_fork = (ground.used().saturating_sub(before)) as f64 / forks.len() as f64 / 1024.0;
    for fork in &forks {
        ground.remove(fork).await;
    }
    ground.remove(&volume).await;

    let (mut crowd, mut times) = (Vec::new(), Vec::new());
    for _ in 0..options.heads {
        let begun = Instant::now();
        let volume = ground.volume(&chain).await;
        ground.attach(&volume).await;
        push(&mut times, begun);
        crowd.push(volume);
    }
    for volume in &crowd {
        ground.remove(volume).await;
    }
    let around = |index: usize| {
        let from = index.min(times.len()).saturating_sub(5);
        let to = (from + 5).min(times.len());
        let mut near = times[from..to].to_vec();
        number(median(&mut near))
    };
    table.push(vec![
        ground.name.to_owned(),
        number(median(&mut created)),
        number(median(&mut attached)),
        number(median(&mut detached)),
        number(median(&mut frozen)),
        number(median(&mut forked)),
        number(median(&mut removed)),
        number(per_fork),
        around(0),
        around(50),
        around(times.len()),
    ]);
}

fn push(times: &mut Vec<f64>, begun: Instant) {
    times.push(ms(begun.elapsed()));
}
