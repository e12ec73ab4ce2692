//! The rules against a pool in memory that has ZFS's: what depends on what, and what may go when.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use icebox_engine::id::SandboxId;

use super::*;

#[derive(Clone, Debug, Default)]
struct Model {
    origin: Option<(Volume, Snapshot)>,
    /// Oldest first, each with what was on the disk then.
    snapshots: Vec<(Snapshot, u64)>,
    content: u64,
    is_open: bool,
    is_hidden: bool,
}

#[derive(Debug, Default)]
struct State {
    volumes: BTreeMap<Volume, Model>,
    /// Commands that still work; every one after them fails, as for a process that was killed.
    left: Option<usize>,
    commands: usize,
    listings: usize,
    /// What happens in the middle of a promotion, while what is moved is in neither volume.
    during_promotion: Option<Hook>,
}

struct Hook(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

#[derive(Clone, Debug, Default)]
struct Memory(Arc<Mutex<State>>);

fn error(kind: ErrorKind, what: impl std::fmt::Debug) -> HostError {
    HostError::new(kind, format!("{what:?}"))
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// The state, for a command.
    fn command(&self) -> Result<MutexGuard<'_, State>, HostError> {
        let mut state = self.state();
        state.commands += 1;
        match &mut state.left {
            Some(0) => return Err(error(ErrorKind::Other, "killed")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(state)
    }

    fn kill_after(&self, left: Option<usize>) {
        self.state().left = left;
    }

    fn volumes(&self) -> Vec<String> {
        self.state()
            .volumes
            .keys()
            .map(ToString::to_string)
            .collect()
    }
}

impl State {
    fn volume(&mut self, volume: &Volume) -> Result<&mut Model, HostError> {
        self.volumes
            .get_mut(volume)
            .ok_or_else(|| error(ErrorKind::NotFound, volume))
    }

    fn clones(&self, volume: &Volume, snapshot: &Snapshot) -> Vec<Volume> {
        let of = Some((volume.clone(), snapshot.clone()));
        let clones = self.volumes.iter().filter(|(_, it)| it.origin == of);
        clones.map(|(name, _)| name.clone()).collect()
    }

    fn look(&self, volume: &Volume, it: &Model) -> Look {
        let newest = it.snapshots.last().map(|(_, content)| *content);
        Look {
            origin: it.origin.clone(),
            written: match newest {
                Some(newest) if newest != it.content => 1 << 20,
                _ => 1024,
            },
            snapshots: it
                .snapshots
                .iter()
                .map(|(name, _)| Seen {
                    name: Some(name.clone()),
                    clones: self.clones(volume, name),
                    has_others: false,
                })
                .collect(),
        }
    }
}

impl Pool for Memory {
    fn list(&self) -> Result<Listing, HostError> {
        let mut state = self.command()?;
        state.listings += 1;
        let names = state.volumes.iter().map(|(volume, it)| {
            let snapshots = it.snapshots.iter().map(|(name, _)| name.clone());
            (volume.clone(), snapshots.collect())
        });
        Ok(Listing(names.collect()))
    }

    fn look(&self, at: Option<&Volume>) -> Result<BTreeMap<Volume, Look>, HostError> {
        let state = self.command()?;
        let wanted = |volume: &Volume| at.is_none_or(|at| at == volume);
        let volumes = state.volumes.iter().filter(|(volume, _)| wanted(volume));
        Ok(volumes
            .map(|(volume, it)| (volume.clone(), state.look(volume, it)))
            .collect())
    }

    fn snapshot(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        if it.snapshots.iter().any(|(name, _)| name == snapshot) {
            return Err(error(ErrorKind::AlreadyExists, snapshot));
        }
        it.snapshots.push((snapshot.clone(), it.content));
        Ok(())
    }

    fn make_clone(
        &self,
        (volume, snapshot): (&Volume, &Snapshot),
        to: &Volume,
        _size: u64,
    ) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        let found = it.snapshots.iter().find(|(name, _)| name == snapshot);
        let content = found.ok_or_else(|| error(ErrorKind::NotFound, snapshot))?.1;
        if state.volumes.contains_key(to) {
            return Err(error(ErrorKind::AlreadyExists, to));
        }
        let clone = Model {
            origin: Some((volume.clone(), snapshot.clone())),
            content,
            ..Model::default()
        };
        state.volumes.insert(to.clone(), clone);
        Ok(())
    }

    fn destroy(&self, volume: &Volume) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        if !it.snapshots.is_empty() || it.is_open {
            return Err(error(ErrorKind::Busy, volume));
        }
        state.volumes.remove(volume);
        Ok(())
    }

    fn destroy_snapshots(&self, volume: &Volume, snapshots: &[Snapshot]) -> Result<(), HostError> {
        let mut state = self.command()?;
        for snapshot in snapshots {
            if !state.clones(volume, snapshot).is_empty() {
                return Err(error(ErrorKind::Busy, snapshot));
            }
        }
        let it = state.volume(volume)?;
        it.snapshots.retain(|(name, _)| !snapshots.contains(name));
        Ok(())
    }

    fn promote(&self, clone: &Volume) -> Result<(), HostError> {
        let mut state = self.command()?;
        let origin = state.volume(clone)?.origin.clone();
        let (below, at) = origin.ok_or_else(|| error(ErrorKind::Invalid, clone))?;
        let it = state.volume(&below)?;
        let end = it
            .snapshots
            .iter()
            .position(|(name, _)| *name == at)
            .unwrap();
        let moved: Vec<_> = it.snapshots.drain(..=end).collect();
        if let Some(Hook(hook)) = state.during_promotion.take() {
            drop(state);
            hook();
            state = self.state();
        }
        let it = state.volume(&below)?;
        let before = it.origin.replace((clone.clone(), at));
        for other in state.volumes.values_mut() {
            if let Some((volume, snapshot)) = &mut other.origin
                && *volume == below
                && moved.iter().any(|(name, _)| name == snapshot)
            {
                *volume = clone.clone();
            }
        }
        let it = state.volume(clone)?;
        it.origin = before;
        for (name, _) in &moved {
            assert!(
                !it.snapshots.iter().any(|(own, _)| own == name),
                "{name} twice"
            );
        }
        it.snapshots.splice(0..0, moved);
        Ok(())
    }

    fn rename(&self, volume: &Volume, to: &Volume) -> Result<(), HostError> {
        let mut state = self.command()?;
        if state.volumes.contains_key(to) {
            return Err(error(ErrorKind::AlreadyExists, to));
        }
        let it = state.volumes.remove(volume);
        let it = it.ok_or_else(|| error(ErrorKind::NotFound, volume))?;
        assert!(
            it.is_hidden || matches!(volume, Volume::Base(_)),
            "{volume} has its device"
        );
        state.volumes.insert(to.clone(), it);
        for other in state.volumes.values_mut() {
            if let Some((below, _)) = &mut other.origin
                && below == volume
            {
                *below = to.clone();
            }
        }
        Ok(())
    }

    fn rename_snapshot(
        &self,
        volume: &Volume,
        snapshot: &Snapshot,
        to: &Snapshot,
    ) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        assert!(
            !it.snapshots.iter().any(|(name, _)| name == to),
            "{to} twice"
        );
        for (name, _) in &mut it.snapshots {
            if name == snapshot {
                *name = to.clone();
            }
        }
        for other in state.volumes.values_mut() {
            if let Some((below, name)) = &mut other.origin
                && below == volume
                && name == snapshot
            {
                *name = to.clone();
            }
        }
        Ok(())
    }

    fn hide(&self, volume: &Volume) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        if it.is_open {
            return Err(error(ErrorKind::Busy, volume));
        }
        it.is_hidden = true;
        Ok(())
    }

    fn roll_back(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError> {
        let mut state = self.command()?;
        let it = state.volume(volume)?;
        let (newest, content) = it.snapshots.last().unwrap();
        assert_eq!(newest, snapshot, "not the newest");
        it.content = *content;
        Ok(())
    }
}

/// A pool, and what should be in it.
struct World {
    pool: Memory,
    datasets: Datasets<Memory>,
    heads: BTreeMap<HeadId, u64>,
    layers: BTreeMap<LayerId, u64>,
    bases: BTreeMap<Digest, u64>,
    written: u64,
}

impl World {
    fn new() -> Self {
        let pool = Memory::default();
        Self {
            datasets: Datasets::new(pool.clone()),
            pool,
            heads: BTreeMap::new(),
            layers: BTreeMap::new(),
            bases: BTreeMap::new(),
            written: 0,
        }
    }

    /// A daemon that starts anew, knowing nothing.
    fn restart(&mut self) {
        self.pool.kill_after(None);
        self.datasets = Datasets::new(self.pool.clone());
    }

    fn import(&mut self) -> Digest {
        self.written += 1;
        let (content, mut bytes) = (self.written, [0; 32]);
        bytes[..8].copy_from_slice(&content.to_be_bytes());
        let digest = Digest::from_bytes(bytes);
        self.import_as(&digest, content).unwrap();
        self.bases.insert(digest.clone(), content);
        digest
    }

    fn import_as(&self, digest: &Digest, content: u64) -> Result<(), HostError> {
        self.datasets.import(digest, |import| {
            let model = Model {
                content,
                ..Model::default()
            };
            self.pool.command()?.volumes.insert(import.clone(), model);
            self.pool.snapshot(import, &Snapshot::Image)
        })
    }

    fn head(&mut self, id: HeadId, layer: Option<&LayerId>, base: Option<&Digest>) -> HeadId {
        let content = match (layer, base) {
            (Some(layer), _) => self.layers[layer],
            (None, base) => self.bases[base.unwrap()],
        };
        self.datasets.clone_head(&id, layer, base, 1).unwrap();
        self.heads.insert(id.clone(), content);
        id
    }

    fn on_base(&mut self, base: &Digest) -> HeadId {
        self.head(first(), None, Some(base))
    }

    fn on_layer(&mut self, layer: &LayerId) -> HeadId {
        self.head(first(), Some(layer), None)
    }

    fn write(&mut self, head: &HeadId) {
        self.written += 1;
        let volume = self.datasets.head(head).unwrap().unwrap();
        self.pool.state().volume(&volume).unwrap().content = self.written;
        self.heads.insert(head.clone(), self.written);
    }

    fn freeze(&mut self, head: &HeadId) -> (LayerId, HeadId) {
        let (layer, to) = (LayerId::random(), after(head));
        self.datasets.freeze(head, &to, &layer, |_| Ok(())).unwrap();
        let content = self.heads.remove(head).unwrap();
        self.layers.insert(layer.clone(), content);
        self.heads.insert(to.clone(), content);
        (layer, to)
    }

    fn remove_head(&mut self, head: &HeadId) {
        assert_eq!(self.datasets.remove_head(head).unwrap(), Removed::Removed);
        assert_eq!(
            self.datasets.remove_head(head).unwrap(),
            Removed::AlreadyAbsent
        );
        self.heads.remove(head);
    }

    fn remove_layer(&mut self, layer: &LayerId) {
        assert_eq!(self.datasets.remove_layer(layer).unwrap(), Removed::Removed);
        assert_eq!(
            self.datasets.remove_layer(layer).unwrap(),
            Removed::AlreadyAbsent
        );
        self.layers.remove(layer);
    }

    fn remove_base(&mut self, base: &Digest) {
        assert_eq!(self.datasets.remove_base(base).unwrap(), Removed::Removed);
        assert_eq!(
            self.datasets.remove_base(base).unwrap(),
            Removed::AlreadyAbsent
        );
        self.bases.remove(base);
    }

    /// All that should be there is, with its content; and no more volumes than that can need.
    fn check(&self) {
        let left = self.pool.state().left.take();
        self.check_all();
        self.pool.kill_after(left);
    }

    fn check_all(&self) {
        let datasets = Datasets::new(self.pool.clone());
        let heads: Vec<HeadId> = self.heads.keys().cloned().collect();
        assert_eq!(datasets.heads().unwrap(), heads);
        let layers: Vec<LayerId> = self.layers.keys().cloned().collect();
        assert_eq!(datasets.layers().unwrap(), layers);
        for datasets in [&datasets, &self.datasets] {
            for (head, content) in &self.heads {
                let volume = datasets.head(head).unwrap().unwrap();
                assert_eq!(
                    self.pool.state().volumes[&volume].content,
                    *content,
                    "{head}"
                );
            }
            for (layer, content) in &self.layers {
                let (volume, snapshot) = datasets.layer(layer).unwrap().unwrap();
                let found = self.pool.state().volumes[&volume].snapshots.clone();
                let found = found.into_iter().find(|(name, _)| *name == snapshot);
                assert_eq!(found.unwrap().1, *content, "{layer}");
            }
            for base in self.bases.keys() {
                assert!(datasets.has_base(base).unwrap());
            }
        }
        let needed = self.heads.len() + self.layers.len() + self.bases.len();
        let volumes = self.pool.volumes();
        assert!(volumes.len() <= needed, "{volumes:#?} for {needed} things");
        let state = self.pool.state();
        for (volume, it) in &state.volumes {
            if volume.is_kept() {
                assert!(it.is_hidden || matches!(volume, Volume::KeptBase(_)));
                let newest = it.snapshots.last().unwrap();
                assert!(newest.0.layer().is_some(), "{volume} is kept for nothing");
                assert_eq!(it.content, newest.1, "{volume} holds what nobody reads");
            }
        }
    }

    fn empty(&mut self) {
        self.pool.kill_after(None);
        for head in self.heads.keys().cloned().collect::<Vec<_>>() {
            self.remove_head(&head);
        }
        for layer in self.layers.keys().cloned().collect::<Vec<_>>() {
            self.remove_layer(&layer);
        }
        for base in self.bases.keys().cloned().collect::<Vec<_>>() {
            self.remove_base(&base);
        }
        assert_eq!(self.pool.volumes(), Vec::<String>::new());
    }
}

fn first() -> HeadId {
    HeadId {
        sandbox: SandboxId::random(),
        number: 1,
    }
}

fn after(head: &HeadId) -> HeadId {
    HeadId {
        number: head.number + 1,
        ..head.clone()
    }
}

/// Numbers that look random, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // Knuth's constants of a linear congruential generator.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }

    fn pick<T: Clone>(&mut self, from: impl Iterator<Item = T>) -> Option<T> {
        let all: Vec<T> = from.collect();
        (!all.is_empty()).then(|| all[self.roll(all.len())].clone())
    }
}

#[test]
fn inv_24_inv_52_everything_goes_in_any_order_and_takes_what_only_it_needed() {
    for seed in 0..150 {
        let (mut world, mut dice) = (World::new(), Dice(seed));
        for _ in 0..60 {
            let head = dice.pick(world.heads.keys().cloned());
            let layer = dice.pick(world.layers.keys().cloned());
            let base = dice.pick(world.bases.keys().cloned());
            match (dice.roll(12), head, layer, base) {
                (0, ..) => drop(world.import()),
                (1, _, _, Some(base)) => drop(world.on_base(&base)),
                (2 | 3, _, Some(layer), _) => drop(world.on_layer(&layer)),
                (4 | 5, Some(head), ..) => world.write(&head),
                (6 | 7, Some(head), ..) => drop(world.freeze(&head)),
                (8, Some(head), ..) => world.remove_head(&head),
                (9, _, Some(layer), _) => world.remove_layer(&layer),
                (10, _, _, Some(base)) => world.remove_base(&base),
                (11, ..) => world.restart(),
                _ => continue,
            }
            world.check();
        }
        world.empty();
    }
}

#[test]
fn pauses_and_resumes_leave_no_more_than_the_last() {
    let mut world = World::new();
    let base = world.import();
    let mut head = world.on_base(&base);
    let mut generation = None;
    for _ in 0..20 {
        world.write(&head);
        let (layer, to) = world.freeze(&head);
        world.remove_head(&to);
        head = world.head(after(&to), Some(&layer), None);
        if let Some(old) = generation.replace(layer) {
            world.remove_layer(&old);
        }
        world.check();
        let volumes = world.pool.volumes();
        assert!(volumes.len() <= 3, "{volumes:?}");
    }
    world.empty();
}

#[derive(Clone, Debug)]
enum Thing {
    Head(HeadId),
    Layer(LayerId),
    Base(Digest),
}

impl World {
    fn remove(&mut self, thing: &Thing) -> Result<(), HostError> {
        match thing {
            Thing::Head(head) => {
                self.datasets.remove_head(head)?;
                self.heads.remove(head);
            }
            Thing::Layer(layer) => {
                self.datasets.remove_layer(layer)?;
                self.layers.remove(layer);
            }
            Thing::Base(base) => {
                self.datasets.remove_base(base)?;
                self.bases.remove(base);
            }
        }
        Ok(())
    }
}

/// Two lines, three layers, and forks of one of them.
fn scene() -> World {
    let mut world = World::new();
    let base = world.import();
    let head = world.on_base(&base);
    world.write(&head);
    let (layer, head) = world.freeze(&head);
    world.write(&head);
    let (_, head) = world.freeze(&head);
    world.on_layer(&layer);
    let fork = world.on_layer(&layer);
    world.write(&fork);
    world.write(&head);
    world.freeze(&fork);
    world
}

#[test]
fn inv_30_a_removal_that_was_killed_anywhere_is_finished() {
    let things = |world: &World| {
        let heads = world.heads.keys().cloned().map(Thing::Head);
        let layers = world.layers.keys().cloned().map(Thing::Layer);
        let bases = world.bases.keys().cloned().map(Thing::Base);
        heads.chain(layers).chain(bases).collect::<Vec<_>>()
    };
    // In an order of their own for each round, and killed after every number of commands.
    for round in 0..12 {
        for left in 0.. {
            let (mut world, mut dice) = (scene(), Dice(round));
            let mut things = things(&world);
            world.pool.kill_after(Some(left));
            let mut killed = false;
            while !things.is_empty() && !killed {
                let next = things.swap_remove(dice.roll(things.len()));
                killed = world.remove(&next).is_err();
                if killed {
                    world.restart();
                    // As a start does.
                    world.datasets.finish_removals().unwrap();
                    let settled = world.pool.volumes();
                    world.datasets.finish_removals().unwrap();
                    assert_eq!(
                        world.pool.volumes(),
                        settled,
                        "a second start changes nothing"
                    );
                    world.remove(&next).unwrap();
                }
                world.check();
            }
            world.empty();
            if !killed {
                assert!(left > 10, "there is something to kill");
                break;
            }
        }
    }
}

#[test]
fn inv_25_an_import_that_was_killed_anywhere_is_no_base() {
    let digest = Digest::from_bytes([1; 32]);
    for left in 0.. {
        let mut world = World::new();
        world.pool.kill_after(Some(left));
        let killed = world.import_as(&digest, 7).is_err();
        world.restart();
        let whole = world.datasets.has_base(&digest).unwrap();
        assert_eq!(
            whole,
            world
                .pool
                .volumes()
                .iter()
                .any(|name| name.starts_with("base-"))
        );
        if !whole {
            world.datasets.finish_removals().unwrap();
            assert_eq!(world.pool.volumes(), Vec::<String>::new());
            world.import_as(&digest, 7).unwrap();
        }
        world.bases.insert(digest.clone(), 7);
        let head = world.on_base(&digest);
        assert_eq!(world.heads[&head], 7);
        world.check();
        world.empty();
        if !killed {
            return;
        }
    }
}

#[test]
fn inv_09_inv_30_a_freeze_that_was_killed_was_or_was_not() {
    for left in 0.. {
        let mut world = World::new();
        let base = world.import();
        let head = world.on_base(&base);
        world.write(&head);
        world.restart();
        let (layer, to) = (LayerId::random(), after(&head));
        world.pool.kill_after(Some(left));
        let freeze = |world: &World| world.datasets.freeze(&head, &to, &layer, |_| Ok(()));
        let killed = freeze(&world).is_err();
        world.restart();
        if world.datasets.is_frozen(&head, &to).unwrap() {
            assert!(world.datasets.layer(&layer).unwrap().is_some());
        } else {
            assert_eq!(world.datasets.heads().unwrap(), std::slice::from_ref(&head));
            world.write(&head);
        }
        freeze(&world).unwrap();
        freeze(&world).unwrap();
        let content = world.heads.remove(&head).unwrap();
        world.heads.insert(to.clone(), content);
        world.layers.insert(layer, content);
        world.check();
        world.empty();
        if !killed {
            return;
        }
    }
}

#[test]
fn a_sealed_head_is_a_layer_and_nothing_goes_on() {
    for left in 0.. {
        let mut world = World::new();
        let base = world.import();
        let head = world.on_base(&base);
        world.write(&head);
        let layer = LayerId::random();
        let seal = |world: &World| world.datasets.seal(&head, &layer, |_| Ok(()));
        world.pool.kill_after(Some(left));
        let killed = seal(&world).is_err();
        world.restart();
        seal(&world).unwrap();
        seal(&world).unwrap();
        let content = world.heads.remove(&head).unwrap();
        world.layers.insert(layer.clone(), content);
        world.check();
        world.on_layer(&layer);
        world.empty();
        if !killed {
            return;
        }
    }
}

#[test]
fn inv_12_a_head_in_use_stays_with_all_that_is_below() {
    let mut world = World::new();
    let base = world.import();
    let whole = world.on_base(&base);
    let frozen = world.on_base(&base);
    let (_, frozen) = world.freeze(&frozen);
    for head in [whole, frozen] {
        let volume = world.datasets.head(&head).unwrap().unwrap();
        let open = |is_open| world.pool.state().volume(&volume).unwrap().is_open = is_open;
        open(true);
        let error = world.datasets.remove_head(&head).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        world.check();
        open(false);
    }
    world.empty();
}

#[test]
fn what_is_not_ours_keeps_what_it_needs_and_is_left() {
    let line = Line(first());
    let frozen = Snapshot::Frozen {
        layer: None,
        line: line.clone(),
        next: Next::Head(2),
    };
    let seen = |name: Option<&Snapshot>, has_others| Seen {
        name: name.cloned(),
        clones: Vec::new(),
        has_others,
    };
    let look = |snapshots| Look {
        snapshots,
        written: 1 << 20,
        ..Look::default()
    };
    let kept = Volume::Kept(line);
    // Somebody cloned it, or took a snapshot since.
    let cloned = look(vec![seen(Some(&frozen), true)]);
    assert!(matches!(plan(&kept, &cloned, true), Step::RollBack(_)));
    let newer = look(vec![seen(None, false)]);
    assert_eq!(plan(&kept, &newer, true), Step::Rest);
    let both = look(vec![seen(Some(&frozen), false), seen(None, false)]);
    assert_eq!(
        plan(&kept, &both, true),
        Step::DestroySnapshots(vec![frozen])
    );
}

#[test]
fn a_stale_listing_is_noticed() {
    let mut world = World::new();
    let base = world.import();
    let head = world.on_base(&base);
    let (layer, head) = world.freeze(&head);
    world.remove_head(&head);
    let fork = world.on_layer(&layer);
    // Another process removes what makes the layer move to the fork.
    let other = Datasets::new(world.pool.clone());
    other.listing().unwrap();
    world.remove_base(&base);
    other.forget();
    let known = other.layer(&layer).unwrap().unwrap();
    assert_eq!(known, world.datasets.layer(&layer).unwrap().unwrap());
    lock(&other.known).listing = Some(Listing(BTreeMap::from([(
        Volume::Kept(Line(first())),
        BTreeSet::from([known.1]),
    )])));
    let late = first();
    other.clone_head(&late, Some(&layer), None, 1).unwrap();
    world.datasets.forget();
    let content = world.layers[&layer];
    world.heads.insert(late, content);
    world.check();
    assert!(world.heads.contains_key(&fork));
    world.empty();
}

#[test]
fn inv_24_a_layer_that_moves_to_another_volume_is_there_all_the_time() {
    let mut world = World::new();
    let base = world.import();
    let parent = world.on_base(&base);
    let (layer, parent) = world.freeze(&parent);
    world.on_layer(&layer);
    // Somebody who knows nothing yet asks for the layer while it is in no volume.
    let datasets = Arc::new(Datasets::new(world.pool.clone()));
    let (found, hears) = mpsc::channel();
    let hook = {
        let (datasets, pool, layer) = (datasets.clone(), world.pool.clone(), layer.clone());
        move || {
            let before = pool.state().listings;
            thread::spawn(move || found.send(datasets.layer(&layer)));
            // Whoever lists now sees no layer: enough time to do that.
            let until = Instant::now() + Duration::from_millis(200);
            while pool.state().listings == before && Instant::now() < until {
                thread::yield_now();
            }
        }
    };
    world.pool.state().during_promotion = Some(Hook(Box::new(hook)));
    assert_eq!(datasets.remove_head(&parent).unwrap(), Removed::Removed);
    let found = hears.recv().unwrap().unwrap();
    assert!(found.is_some(), "the layer is called absent");
    assert!(datasets.layer(&layer).unwrap().is_some(), "and for good");
}
