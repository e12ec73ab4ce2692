//! Which volumes and snapshots there are, what is needed of them, and how they go.
//!
//! ZFS ties a clone to the snapshot that it was made of, and a snapshot to its volume; neither goes while the other needs
//! it. Sandboxes go in any order. So a volume that nobody writes to any more is *kept* for its snapshots, and goes as soon
//! as its newest snapshot is a clone's origin: `zfs promote` then moves all its snapshots to the clone.
//!
//! ```text
//!   removed head A:     A@1 ── A@2 ── (A)              A@1 ── A@2            needed: kept-A
//!   resumed from 2:                └── B                          └── B      ──promote──>   B@1 ── B@2 ── (B)
//! ```
//!
//! What remains is one volume for each head and base, and one for each layer at which nothing goes on. Nothing is
//! destroyed with what depends on it (`-r`, `-R`): a step that is planned wrong fails, and loses nothing.
//!
//! Every removal begins with the step that makes the thing disappear by name. What follows is found again by whoever comes
//! later ([`Datasets::finish_removals`]), since the names and the origins say it all.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use icebox_engine::host::{Ensured, ErrorKind, HostError, Removed};
use icebox_engine::id::{Digest, HeadId, LayerId};

use super::names::{Line, Next, Snapshot, Volume};

/// Steps of one removal, far above what any takes. A bound so that a pool that says one thing and does another cannot keep
/// a thread for good.
const STEPS_MAX: usize = 1000;

/// How often to list a pool in which something moved meanwhile. One removal moves a few things.
const LISTINGS_MAX: usize = 100;

/// What a volume may keep beyond its newest snapshot without being rolled back, in bytes. A fresh clone has written 12 KiB,
/// and one that was just rolled back, 1 KiB.
const LITTLE: u64 = 64 << 10;

/// What is done to datasets, one command each. Everything here blocks, for a bounded time.
///
/// An error of kind [`ErrorKind::NotFound`] says that a dataset is not there, although the root is.
pub(super) trait Pool: Send + Sync {
    /// The names of all volumes and snapshots of ours. None if the root was never made.
    fn list(&self) -> Result<Listing, HostError>;
    /// One volume with its snapshots, or all of them.
    fn look(&self, at: Option<&Volume>) -> Result<BTreeMap<Volume, Look>, HostError>;
    /// Takes a snapshot of everything that the volume was given to write. Durable on return, as is all that follows.
    fn snapshot(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError>;
    /// Makes a volume over a snapshot, `size` bytes long.
    fn make_clone(
        &self,
        from: (&Volume, &Snapshot),
        to: &Volume,
        size: u64,
    ) -> Result<(), HostError>;
    /// Destroys a volume without snapshots that nobody has open.
    fn destroy(&self, volume: &Volume) -> Result<(), HostError>;
    /// Destroys snapshots that have no clones.
    fn destroy_snapshots(&self, volume: &Volume, snapshots: &[Snapshot]) -> Result<(), HostError>;
    /// Moves the snapshots that a clone was made over to the clone, up to its origin.
    fn promote(&self, clone: &Volume) -> Result<(), HostError>;
    /// Gives a volume, which has no device, another name.
    fn rename(&self, volume: &Volume, to: &Volume) -> Result<(), HostError>;
    /// Gives a snapshot another name.
    fn rename_snapshot(
        &self,
        volume: &Volume,
        snapshot: &Snapshot,
        to: &Snapshot,
    ) -> Result<(), HostError>;
    /// Takes the volume's device away. [`ErrorKind::Busy`] if somebody has it open.
    fn hide(&self, volume: &Volume) -> Result<(), HostError>;
    /// Throws away what was written to a volume since this, its newest snapshot.
    fn roll_back(&self, volume: &Volume, snapshot: &Snapshot) -> Result<(), HostError>;
}

/// The names that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listing(pub(super) BTreeMap<Volume, BTreeSet<Snapshot>>);

impl Listing {
    /// How a line goes on, by the snapshots in its volume.
    fn next(line: &Line, snapshots: &BTreeSet<Snapshot>) -> Next {
        let own = snapshots.iter().filter_map(|it| it.next_of(line));
        own.max().unwrap_or(Next::Head(line.0.number))
    }

    fn heads(&self) -> impl Iterator<Item = (HeadId, &Line)> {
        self.0.iter().filter_map(|(volume, snapshots)| {
            let Volume::Head(line) = volume else {
                return None;
            };
            match Self::next(line, snapshots) {
                Next::Head(number) => Some((line.head(number), line)),
                Next::End => None,
            }
        })
    }

    /// The line that goes on as `head`.
    fn head(&self, head: &HeadId) -> Option<Line> {
        self.heads()
            .find_map(|(id, line)| (id == *head).then(|| line.clone()))
    }

    fn layers(&self) -> impl Iterator<Item = (&LayerId, &Volume, &Snapshot)> {
        self.0.iter().flat_map(|(volume, snapshots)| {
            let of_layers = snapshots.iter();
            of_layers.filter_map(move |it| Some((it.layer()?, volume, it)))
        })
    }

    fn layer(&self, layer: &LayerId) -> Option<(Volume, Snapshot)> {
        self.layers()
            .find(|(id, _, _)| *id == layer)
            .map(|(_, volume, snapshot)| (volume.clone(), snapshot.clone()))
    }

    fn has_base(&self, digest: &Digest) -> bool {
        self.0.contains_key(&Volume::Base(digest.clone()))
    }
}

/// A volume and its snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// What it is a clone of, if that is ours.
    pub(super) origin: Option<(Volume, Snapshot)>,
    /// Bytes that were written to it since its newest snapshot.
    pub(super) written: u64,
    /// Oldest first.
    pub(super) snapshots: Vec<Seen>,
}

/// A snapshot and what was made over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// `None` if it is not ours.
    pub(super) name: Option<Snapshot>,
    /// Volumes of ours.
    pub(super) clones: Vec<Volume>,
    /// Whether there are clones that are not ours.
    pub(super) has_others: bool,
}

impl Seen {
    fn is_cloned(&self) -> bool {
        self.has_others || !self.clones.is_empty()
    }
}

/// What to do next about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Keep,
    DestroySnapshots(Vec<Snapshot>),
    Promote(Volume),
    Destroy,
    RollBack(Snapshot),
    /// Nothing: all that is there is needed.
    Rest,
}

/// Whether a snapshot is only there for its clones, or to say how its line goes on.
fn is_gone(volume: &Volume, snapshot: &Snapshot) -> bool {
    match snapshot {
        Snapshot::Image => !matches!(volume, Volume::Base(_) | Volume::Import(_)),
        Snapshot::Frozen { layer, .. } => layer.is_none(),
    }
}

/// The snapshot that says under which number a line goes on.
fn marker(volume: &Volume, look: &Look) -> Option<Snapshot> {
    let Volume::Head(line) = volume else {
        return None;
    };
    let ours = look.snapshots.iter().filter_map(|seen| seen.name.as_ref());
    ours.filter_map(|it| Some((it.next_of(line)?, it)))
        .max()
        .map(|(_, snapshot)| snapshot.clone())
}

/// The next step about a volume; `goes` if nobody writes to it any more.
fn plan(volume: &Volume, look: &Look, goes: bool) -> Step {
    if goes && matches!(volume, Volume::Head(_)) {
        // Its snapshots say which head it is, so it must not be one when they go.
        return match look.snapshots.is_empty() {
            true => Step::Destroy,
            false => Step::Keep,
        };
    }
    let marker = marker(volume, look);
    let unneeded: Vec<Snapshot> = look
        .snapshots
        .iter()
        .filter(|seen| !seen.is_cloned())
        .filter_map(|seen| seen.name.clone())
        .filter(|name| is_gone(volume, name) && Some(name) != marker.as_ref())
        .collect();
    if !unneeded.is_empty() {
        return Step::DestroySnapshots(unneeded);
    }
    match look.snapshots.last() {
        _ if !goes => Step::Rest,
        None => Step::Destroy,
        Some(newest) => match (newest.clones.first(), &newest.name) {
            (Some(clone), _) => Step::Promote(clone.clone()),
            (None, Some(name)) if volume.is_kept() && look.written > LITTLE => {
                Step::RollBack(name.clone())
            }
            (None, _) => Step::Rest,
        },
    }
}

/// A listing, while it is right.
#[derive(Default)]
struct Known {
    listing: Option<Listing>,
    /// Counts changes, so that a listing that one overtook is not taken for the newest.
    changes: u64,
    /// How many commands are moving something now, and how many have. ZFS lists one dataset after the other: what moves
    /// from one that comes later to one that was shown already is missing.
    moving: usize,
    moved: u64,
}

/// The datasets of one installation. Everything here blocks.
pub(super) struct Datasets<P> {
    pub(super) pool: P,
    /// Never held while a command runs.
    known: Mutex<Known>,
    /// Told when something has moved.
    settled: Condvar,
    /// Held while snapshots move between volumes. Never needed for a freeze.
    removing: Mutex<()>,
    /// Bases that this process is importing.
    importing: Mutex<HashSet<Digest>>,
    /// A removal was not finished: the next one looks at everything.
    is_untidy: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked left what a listing shows.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: Pool> Datasets<P> {
    pub(super) fn new(pool: P) -> Self {
        Self {
            pool,
            known: Mutex::default(),
            settled: Condvar::new(),
            removing: Mutex::default(),
            importing: Mutex::default(),
            is_untidy: AtomicBool::new(false),
        }
    }

    /// Writes down what was just done.
    fn did(&self, change: impl FnOnce(&mut BTreeMap<Volume, BTreeSet<Snapshot>>)) {
        let mut known = lock(&self.known);
        known.changes += 1;
        if let Some(listing) = &mut known.listing {
            change(&mut listing.0);
        }
    }

    /// Somebody else changed something.
    fn forget(&self) {
        let mut known = lock(&self.known);
        known.changes += 1;
        known.listing = None;
    }

    /// Runs a command that moves what is known by its place, and writes down what it did.
    fn moving(
        &self,
        command: impl FnOnce() -> Result<(), HostError>,
        change: impl FnOnce(&mut BTreeMap<Volume, BTreeSet<Snapshot>>),
    ) -> Result<(), HostError> {
        lock(&self.known).moving += 1;
        // Or everybody would wait for it for good.
        let moved = catch_unwind(AssertUnwindSafe(command));
        let mut known = lock(&self.known);
        known.moving -= 1;
        known.moved += 1;
        known.changes += 1;
        match (&moved, &mut known.listing) {
            (Ok(Ok(())), Some(listing)) => change(&mut listing.0),
            // Whether it moved is for the next listing to say.
            _ => known.listing = None,
        }
        drop(known);
        self.settled.notify_all();
        moved.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A new listing, of a time at which nothing moved.
    fn listing(&self) -> Result<Listing, HostError> {
        for _ in 0..LISTINGS_MAX {
            let (changes, moved) = {
                let known = lock(&self.known);
                let settled = self.settled.wait_while(known, |known| known.moving > 0);
                let known = settled.unwrap_or_else(PoisonError::into_inner);
                (known.changes, known.moved)
            };
            let listing = self.pool.list()?;
            let mut known = lock(&self.known);
            if known.moving > 0 || known.moved != moved {
                continue;
            }
            if known.changes == changes {
                known.listing = Some(listing.clone());
            }
            return Ok(listing);
        }
        Err(HostError::new(
            ErrorKind::Busy,
            "volumes move about the pool faster than it can be listed",
        ))
    }

    /// What `find` finds in what is known. Nobody else makes anything here, and what is not there any more is noticed
    /// where it is used.
    fn find<T>(&self, find: impl Fn(&Listing) -> Option<T>) -> Result<Option<T>, HostError> {
        if let Some(listing) = &lock(&self.known).listing {
            return Ok(find(listing));
        }
        Ok(find(&self.listing()?))
    }

    /// Does what depends on where something is, again if it was not there any more.
    pub(super) fn at<T>(&self, work: impl Fn() -> Result<T, HostError>) -> Result<T, HostError> {
        match work() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.forget();
                work()
            }
            other => other,
        }
    }

    /// The volume that goes on as `head`.
    pub(super) fn head(&self, head: &HeadId) -> Result<Option<Volume>, HostError> {
        self.find(|listing| listing.head(head).map(Volume::Head))
    }

    /// Where a layer's data are.
    pub(super) fn layer(&self, layer: &LayerId) -> Result<Option<(Volume, Snapshot)>, HostError> {
        self.find(|listing| listing.layer(layer))
    }

    /// Whether a base is there, whole.
    pub(super) fn has_base(&self, digest: &Digest) -> Result<bool, HostError> {
        let found = self.find(|listing| listing.has_base(digest).then_some(()))?;
        Ok(found.is_some())
    }

    /// All heads, sorted.
    pub(super) fn heads(&self) -> Result<Vec<HeadId>, HostError> {
        let listing = self.listing()?;
        let mut heads: Vec<HeadId> = listing.heads().map(|(id, _)| id).collect();
        heads.sort_unstable();
        Ok(heads)
    }

    /// All layers, sorted.
    pub(super) fn layers(&self) -> Result<Vec<LayerId>, HostError> {
        let listing = self.listing()?;
        let mut layers: Vec<LayerId> = listing.layers().map(|(id, ..)| id.clone()).collect();
        layers.sort_unstable();
        Ok(layers)
    }

    /// Imports a base: `fill` makes the volume that it is given, and the snapshot [`Snapshot::Image`] of it.
    ///
    /// Its name is that of a base only when it is whole and durable.
    pub(super) fn import(
        &self,
        digest: &Digest,
        fill: impl FnOnce(&Volume) -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let (import, base) = (Volume::Import(digest.clone()), Volume::Base(digest.clone()));
        lock(&self.importing).insert(digest.clone());
        let made = || {
            self.discard(&import)?;
            fill(&import)?;
            self.pool.hide(&import)?;
            self.pool.rename(&import, &base)
        };
        let made = made().inspect_err(|_| {
            if let Err(error) = self.discard(&import) {
                tracing::warn!(%error, "an import that failed is left for the next one to remove");
            }
        });
        lock(&self.importing).remove(digest);
        made?;
        self.did(|volumes| {
            volumes.insert(base, BTreeSet::from([Snapshot::Image]));
        });
        Ok(())
    }

    /// Destroys a volume that was never finished, whatever of it there is.
    pub(super) fn discard(&self, volume: &Volume) -> Result<(), HostError> {
        let Some(look) = self.look(volume)? else {
            return Ok(());
        };
        let snapshots: Vec<Snapshot> = look
            .snapshots
            .iter()
            .filter_map(|it| it.name.clone())
            .collect();
        if !snapshots.is_empty() {
            self.pool.destroy_snapshots(volume, &snapshots)?;
        }
        self.pool.destroy(volume)
    }

    /// Makes a head of `size` bytes over a layer, or else over the base.
    pub(super) fn clone_head(
        &self,
        head: &HeadId,
        layer: Option<&LayerId>,
        base: Option<&Digest>,
        size: u64,
    ) -> Result<Ensured, HostError> {
        let volume = Volume::Head(Line(head.clone()));
        self.at(|| {
            let (from, snapshot) = match (layer, base) {
                (Some(layer), _) => self.layer(layer)?.ok_or_else(|| no_layer(layer))?,
                (None, Some(base)) if self.has_base(base)? => {
                    (Volume::Base(base.clone()), Snapshot::Image)
                }
                (None, Some(base)) => {
                    return Err(HostError::new(
                        ErrorKind::NotFound,
                        format!("base {base} was not imported into the pool"),
                    ));
                }
                (None, None) => {
                    return Err(HostError::new(
                        ErrorKind::Invalid,
                        "a disk on neither a layer nor a base",
                    ));
                }
            };
            self.pool.make_clone((&from, &snapshot), &volume, size)
        })?;
        self.did(|volumes| {
            volumes.insert(volume.clone(), BTreeSet::new());
        });
        Ok(Ensured::Created)
    }

    /// What `from` holds becomes `layer`, and its volume goes on as `to`. `flush` is called with the volume just before.
    pub(super) fn freeze(
        &self,
        from: &HeadId,
        to: &HeadId,
        layer: &LayerId,
        flush: impl Fn(&Volume) -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let frozen = self.at(|| {
            let Some(Volume::Head(line)) = self.head(from)? else {
                return Ok(None);
            };
            if lock(&self.known)
                .listing
                .as_ref()
                .and_then(|it| it.head(to))
                .is_some()
            {
                return Err(HostError::new(
                    ErrorKind::AlreadyExists,
                    format!("freeze head {from}: head {to} exists already"),
                ));
            }
            let volume = Volume::Head(line.clone());
            flush(&volume)?;
            let snapshot = Snapshot::Frozen {
                layer: Some(layer.clone()),
                line,
                next: Next::Head(to.number),
            };
            self.pool.snapshot(&volume, &snapshot)?;
            Ok(Some((volume, snapshot)))
        })?;
        match frozen {
            Some((volume, snapshot)) => {
                self.did(|volumes| {
                    volumes.entry(volume).or_default().insert(snapshot);
                });
                Ok(())
            }
            None => match self.layer(layer)? {
                Some((_, snapshot)) if snapshot.goes_on_as(to) => Ok(()),
                _ => Err(lost(from, layer)),
            },
        }
    }

    /// Whether a freeze of `from` was done: its line goes on as `to`. Asks the pool.
    pub(super) fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        let listing = self.listing()?;
        Ok(listing.head(from).is_none() && listing.head(to).is_some())
    }

    /// What `head` holds becomes `layer`, and nothing goes on.
    pub(super) fn seal(
        &self,
        head: &HeadId,
        layer: &LayerId,
        flush: impl Fn(&Volume) -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let _removing = lock(&self.removing);
        let sealed = self.at(|| {
            let Some(Volume::Head(line)) = self.head(head)? else {
                return Ok(None);
            };
            let volume = Volume::Head(line.clone());
            flush(&volume)?;
            let snapshot = Snapshot::Frozen {
                layer: Some(layer.clone()),
                line,
                next: Next::End,
            };
            self.pool.snapshot(&volume, &snapshot)?;
            Ok(Some((volume, snapshot)))
        })?;
        match sealed {
            Some((volume, snapshot)) => {
                self.did(|volumes| {
                    volumes.entry(volume.clone()).or_default().insert(snapshot);
                });
                self.tidy(volume, true)
            }
            None => match self.layer(layer)? {
                Some((volume @ Volume::Head(_), snapshot)) if snapshot.ends(&head.sandbox) => {
                    self.tidy(volume, true)
                }
                Some((_, snapshot)) if snapshot.ends(&head.sandbox) => Ok(()),
                _ => Err(lost(head, layer)),
            },
        }
    }

    /// What `find` finds in what is known, or else in a new listing: for what is about to be called absent.
    fn find_surely<T>(&self, find: impl Fn(&Listing) -> Option<T>) -> Result<Option<T>, HostError> {
        match self.find(&find)? {
            None => Ok(find(&self.listing()?)),
            found => Ok(found),
        }
    }

    /// Ensures that a head is not there, and nothing that only it needed.
    pub(super) fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let _removing = lock(&self.removing);
        self.catch_up()?;
        self.at(|| {
            let found = self.find_surely(|listing| listing.head(head))?;
            let Some(line) = found else {
                return Ok(Removed::AlreadyAbsent);
            };
            let volume = Volume::Head(line);
            let look = self.look(&volume)?.ok_or_else(|| no_head(head))?;
            self.tidy_from(volume, look, true)?;
            Ok(Removed::Removed)
        })
    }

    /// Ensures that a layer is not there, and nothing that only it needed.
    pub(super) fn remove_layer(&self, layer: &LayerId) -> Result<Removed, HostError> {
        let _removing = lock(&self.removing);
        self.catch_up()?;
        self.at(|| {
            let found = self.find_surely(|listing| listing.layer(layer))?;
            let Some((volume, snapshot)) = found else {
                return Ok(Removed::AlreadyAbsent);
            };
            let look = self.look(&volume)?.ok_or_else(|| no_layer(layer))?;
            let mut all = look.snapshots.iter();
            let seen = all.find(|seen| seen.name.as_ref() == Some(&snapshot));
            let seen = seen.ok_or_else(|| no_layer(layer))?;
            if seen.is_cloned() || marker(&volume, &look).as_ref() == Some(&snapshot) {
                let gone = snapshot.gone();
                self.pool.rename_snapshot(&volume, &snapshot, &gone)?;
                self.did(|volumes| {
                    if let Some(snapshots) = volumes.get_mut(&volume) {
                        snapshots.remove(&snapshot);
                        snapshots.insert(gone);
                    }
                });
            } else {
                self.destroy_snapshots(&volume, &[snapshot])?;
            }
            // A volume that is written to needs what it needed before.
            if volume.is_kept() {
                self.tidy(volume, true)?;
            }
            Ok(Removed::Removed)
        })
    }

    /// Ensures that a base is not there. What heads and layers need of it stays with them.
    pub(super) fn remove_base(&self, digest: &Digest) -> Result<Removed, HostError> {
        let _removing = lock(&self.removing);
        self.catch_up()?;
        let base = Volume::Base(digest.clone());
        if !self.listing()?.has_base(digest) {
            return Ok(Removed::AlreadyAbsent);
        }
        let kept = base.kept();
        self.rename(&base, &kept)?;
        self.tidy(kept, true)?;
        Ok(Removed::Removed)
    }

    /// Finishes what was begun by somebody who died, or could not be done then.
    pub(super) fn finish_removals(&self) -> Result<(), HostError> {
        let _removing = lock(&self.removing);
        self.is_untidy.store(true, Ordering::Relaxed);
        self.catch_up()
    }

    fn catch_up(&self) -> Result<(), HostError> {
        if !self.is_untidy.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let finished = self.finish_all();
        if finished.is_err() {
            self.is_untidy.store(true, Ordering::Relaxed);
        }
        finished
    }

    fn finish_all(&self) -> Result<(), HostError> {
        for (volume, look) in self.pool.look(None)? {
            let goes = match &volume {
                Volume::Base(_) => continue,
                Volume::Import(digest) if lock(&self.importing).contains(digest) => continue,
                Volume::Import(_) => {
                    self.discard(&volume)?;
                    continue;
                }
                // Its maker removes it, if there is one.
                Volume::Probe(process, _) if is_running(*process) => continue,
                Volume::Probe(..) | Volume::Kept(_) | Volume::KeptBase(_) => true,
                Volume::Head(line) => {
                    let ours = look.snapshots.iter().filter_map(|seen| seen.name.clone());
                    Listing::next(line, &ours.collect()) == Next::End
                }
            };
            if plan(&volume, &look, goes) != Step::Rest {
                self.tidy(volume, goes)?;
            }
        }
        Ok(())
    }

    fn look(&self, volume: &Volume) -> Result<Option<Look>, HostError> {
        let mut looks = self.pool.look(Some(volume))?;
        Ok(looks.remove(volume))
    }

    fn tidy(&self, volume: Volume, goes: bool) -> Result<(), HostError> {
        match self.look(&volume)? {
            Some(look) => self.tidy_from(volume, look, goes),
            None => Ok(()),
        }
    }

    /// Removes what is not needed of a volume; if it `goes`, the volume too, or it is kept for its snapshots. Then the same
    /// of what it was a clone of. The caller holds `removing`.
    fn tidy_from(&self, volume: Volume, look: Look, goes: bool) -> Result<(), HostError> {
        let (mut volume, mut look, mut goes) = (volume, look, goes);
        for _ in 0..STEPS_MAX {
            match plan(&volume, &look, goes) {
                Step::Keep => {
                    let kept = volume.kept();
                    self.pool.hide(&volume)?;
                    self.rename(&volume, &kept)?;
                    volume = kept;
                }
                Step::DestroySnapshots(snapshots) => self.destroy_snapshots(&volume, &snapshots)?,
                Step::Promote(clone) => match self.promote(&volume, clone) {
                    // It is being read. It stays for now.
                    Err(error) if error.kind() == ErrorKind::Busy => {
                        self.is_untidy.store(true, Ordering::Relaxed);
                        return Ok(());
                    }
                    promoted => promoted?,
                },
                Step::Destroy => {
                    self.pool.destroy(&volume)?;
                    self.did(|volumes| {
                        volumes.remove(&volume);
                    });
                    match look.origin {
                        Some((below, snapshot))
                            if below.is_kept() || is_gone(&below, &snapshot) =>
                        {
                            goes = below.is_kept();
                            volume = below;
                        }
                        _ => return Ok(()),
                    }
                }
                Step::RollBack(newest) => self.pool.roll_back(&volume, &newest)?,
                Step::Rest => return Ok(()),
            }
            match self.look(&volume)? {
                Some(next) => look = next,
                None => return Ok(()),
            }
        }
        Err(HostError::new(
            ErrorKind::Other,
            format!("removing {volume}: the pool does not do what it says"),
        ))
    }

    fn rename(&self, volume: &Volume, to: &Volume) -> Result<(), HostError> {
        self.moving(
            || self.pool.rename(volume, to),
            |volumes| {
                if let Some(snapshots) = volumes.remove(volume) {
                    volumes.insert(to.clone(), snapshots);
                }
            },
        )
    }

    /// Moves the snapshots of `volume` to its clone.
    fn promote(&self, volume: &Volume, clone: Volume) -> Result<(), HostError> {
        self.moving(
            || self.pool.promote(&clone),
            |volumes| {
                let moved = volumes.get_mut(volume).map(std::mem::take);
                let all = volumes.entry(clone.clone()).or_default();
                all.extend(moved.into_iter().flatten());
            },
        )
    }

    fn destroy_snapshots(&self, volume: &Volume, snapshots: &[Snapshot]) -> Result<(), HostError> {
        self.pool.destroy_snapshots(volume, snapshots)?;
        self.did(|volumes| {
            if let Some(known) = volumes.get_mut(volume) {
                known.retain(|it| !snapshots.contains(it));
            }
        });
        Ok(())
    }
}

fn is_running(process: u32) -> bool {
    std::path::Path::new("/proc")
        .join(process.to_string())
        .exists()
}

pub(super) fn no_layer(layer: &LayerId) -> HostError {
    HostError::new(
        ErrorKind::NotFound,
        format!("layer {layer} is not in the pool"),
    )
}

pub(super) fn no_head(head: &HeadId) -> HostError {
    HostError::new(
        ErrorKind::NotFound,
        format!("head {head} is not in the pool"),
    )
}

/// Neither the head nor what it would have become is there.
fn lost(head: &HeadId, layer: &LayerId) -> HostError {
    HostError::new(
        ErrorKind::NotFound,
        format!(
            "freeze head {head}: neither it nor the layer {layer} that it becomes is in the pool"
        ),
    )
}

#[cfg(test)]
mod tests;
