//! The `zfs` driver: a volume for each head, in a pool that the user has.
//!
//! What a VMM opens is a block device, copy-on-write is the pool's, and so are checksums, compression and redundancy. A
//! layer is a snapshot, so it stands alone as far as the engine can tell: what it needs of others is the pool's to know.
//!
//! ```text
//! base      image ── copied without its zeros ──> import-<digest> ── snapshot ── rename to base-<digest>: it is there
//! head      clone of the base's or a layer's snapshot: head-<sandbox>-<n>
//! freeze    flush the device ── snapshot, whose name says that the volume goes on as the next head
//!                               └ the point of no return, and all there is to it
//! ```
//!
//! The guest keeps its volume and its device through every freeze. [`datasets`] says how things go that others need.
//!
//! Everything is below a dataset of its own in the one that the user names ([`names`]). Nothing else in the pool is touched;
//! where there is no udev, others' devices are asked for their names ([`nodes`]).

mod command;
mod datasets;
mod names;
mod nodes;
mod pool;
mod stream;
mod sys;

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, MergeLayers,
    Removed, Space, VolumeDriver, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{Layout, Object};
use icebox_engine::unit::Bytes;

use self::datasets::{Datasets, Pool as _, no_head, no_layer};
use self::names::{Root, Snapshot, Volume};
use self::pool::{BLOCK, ZfsPool};
use super::heads;
use crate::blocking::blocking;
use crate::fs::{self, failed};
use crate::instance::Instance;
use crate::pace::Pace;
use crate::turns::Turns;

/// The `zfs` driver.
#[derive(Clone)]
pub struct Zfs {
    layout: Layout,
    /// `None` if the user named no dataset.
    datasets: Option<Arc<Datasets<ZfsPool>>>,
    /// By sandbox, as of drivers that keep heads in files.
    sandboxes: Turns,
    /// By digest: of two first users, one imports.
    bases: Turns,
}

impl Zfs {
    /// The driver for the data directory of `layout`, with its volumes in `dataset`, which carry the tag of `instance`.
    /// Without a dataset it cannot work, and says so. Nothing is looked at yet.
    ///
    /// # Errors
    /// `dataset` is no name of a dataset.
    pub fn new(
        layout: Layout,
        instance: &Instance,
        dataset: Option<&str>,
    ) -> Result<Self, HostError> {
        let datasets = match dataset {
            Some(dataset) => {
                let root = Root::new(dataset, instance)?;
                let pool = ZfsPool::new(root, layout.clone());
                Some(Arc::new(Datasets::new(pool)))
            }
            None => None,
        };
        Ok(Self {
            layout,
            datasets,
            sandboxes: Turns::new(),
            bases: Turns::new(),
        })
    }

    fn datasets(&self) -> Result<Arc<Datasets<ZfsPool>>, HostError> {
        self.datasets.clone().ok_or_else(|| {
            HostError::new(
                ErrorKind::Unsupported,
                "no dataset is named that zfs volumes could be in",
            )
            .hint("make one, `zfs create -o mountpoint=none POOL/icebox`, and name it in icebox.toml: zfs.dataset = \"POOL/icebox\"")
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Datasets<ZfsPool>) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let datasets = self.datasets()?;
        blocking(move || work(&datasets)).await
    }

    /// Runs `work` after everything that was asked of this sandbox's heads before.
    async fn in_turn<T: Send + 'static>(
        &self,
        sandbox: &SandboxId,
        work: impl FnOnce(&Datasets<ZfsPool>) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let datasets = self.datasets()?;
        self.sandboxes.run(sandbox, move || work(&datasets)).await
    }

    async fn of_base<T: Send + 'static>(
        &self,
        base: &Digest,
        work: impl FnOnce(&Datasets<ZfsPool>) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let datasets = self.datasets()?;
        self.bases.run(base, move || work(&datasets)).await
    }
}

#[async_trait]
impl VolumeDriver for Zfs {
    fn name(&self) -> &'static str {
        "zfs"
    }

    async fn probe(&self) -> Result<(), HostError> {
        self.run(probe).await
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        LiveFreeze::ByHost(self)
    }

    /// A pool that fails fails its guests' writes, which their VMMs notice; no disk is lost by that.
    fn watch(&self) -> Option<&dyn WatchHeads> {
        None
    }

    fn layers_are_whole(&self) -> bool {
        true
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        None
    }

    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        let (image, digest) = (self.layout.base_image(base), base.clone());
        self.of_base(base, move |datasets| {
            heads::require_image(&image)?;
            datasets.pool.ensure_root()?;
            if datasets.has_base(&digest)? {
                return Ok(Ensured::AlreadyPresent);
            }
            datasets.import(&digest, |import| datasets.pool.fill(import, &image))?;
            Ok(Ensured::Created)
        })
        .await
    }

    async fn remove_base(&self, base: &Digest) -> Result<Removed, HostError> {
        let digest = base.clone();
        self.of_base(base, move |datasets| datasets.remove_base(&digest))
            .await
    }

    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        let (layout, head, chain) = (self.layout.clone(), head.clone(), chain.clone());
        self.in_turn(&head.sandbox.clone(), move |datasets| {
            ensure_head(datasets, &layout, &head, &chain)
        })
        .await
    }

    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let head = head.clone();
        self.in_turn(&head.sandbox.clone(), move |datasets| {
            datasets.remove_head(&head)
        })
        .await
    }

    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        let (head, size) = (head.clone(), chain.size);
        self.in_turn(&head.sandbox.clone(), move |datasets| {
            let volume = datasets.head(&head)?.ok_or_else(|| no_head(&head))?;
            let path = datasets.pool.node(&volume)?;
            let found = nodes::size(&path)?;
            heads::require_size(&path, found, size)?;
            Ok(BlockDevice::Raw { path })
        })
        .await
    }

    /// A volume has its device as long as it is a head.
    async fn detach(&self, _head: &HeadId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        let head = head.clone();
        self.in_turn(&head.sandbox.clone(), move |datasets| {
            let volume = datasets.head(&head)?.ok_or_else(|| no_head(&head))?;
            datasets.pool.flush(&volume)
        })
        .await
    }

    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let (head, layer) = (head.clone(), layer_of(staging)?);
        self.in_turn(&head.sandbox.clone(), move |datasets| {
            datasets.seal(&head, &layer, |volume| datasets.pool.flush(volume))
        })
        .await
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let (layout, chain, out) = (self.layout.clone(), chain.clone(), out.to_owned());
        self.run(move |datasets| flatten(datasets, &layout, &chain, &out))
            .await
    }

    async fn remove_layer(&self, layer: &LayerId) -> Result<Removed, HostError> {
        let layer = layer.clone();
        self.run(move |datasets| datasets.remove_layer(&layer))
            .await
    }

    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let head = head.clone();
        self.run(move |datasets| {
            let volume = datasets.head(&head)?.ok_or_else(|| no_head(&head))?;
            datasets.pool.written(&volume, None)
        })
        .await
    }

    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        let layer = layer.clone();
        self.run(move |datasets| {
            datasets.at(|| {
                let found = datasets.layer(&layer)?;
                let (volume, snapshot) = found.ok_or_else(|| no_layer(&layer))?;
                datasets.pool.written(&volume, Some(&snapshot))
            })
        })
        .await
    }

    async fn space(&self) -> Result<Option<Space>, HostError> {
        if self.datasets.is_none() {
            return Ok(None);
        }
        self.run(|datasets| datasets.pool.space()).await.map(Some)
    }

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        self.run(Datasets::heads).await
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        self.run(|datasets| {
            datasets.finish_removals()?;
            datasets.layers()
        })
        .await
    }
}

#[async_trait]
impl FreezeByHost for Zfs {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        let (from, to, layer) = (from.clone(), to.clone(), layer_of(staging)?);
        self.in_turn(&from.sandbox.clone(), move |datasets| {
            datasets.freeze(&from, &to, &layer, |volume| datasets.pool.flush(volume))
        })
        .await
    }

    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        let (from, to) = (from.clone(), to.clone());
        self.in_turn(&from.sandbox.clone(), move |datasets| {
            datasets.is_frozen(&from, &to)
        })
        .await
    }
}

/// A digest of what a volume holds, by what `zfs send` says of a snapshot of it. Which volume that is of does not count:
/// snapshots move.
///
/// # Errors
/// The stream could not be read, or is none.
#[cfg(feature = "fixture")]
pub fn digest_of_stream(stream: &mut dyn std::io::Read) -> std::io::Result<Digest> {
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    stream::read(stream, |offset, data| {
        hash.update(offset.to_be_bytes());
        hash.update(data);
        Ok(())
    })?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// The layer that a staging directory is for.
fn layer_of(staging: &Path) -> Result<LayerId, HostError> {
    let name = staging.file_name().and_then(|name| name.to_str());
    match name.and_then(Object::from_flat_name) {
        Some(Object::Layer(layer)) => Ok(layer),
        _ => Err(HostError::new(
            ErrorKind::Invalid,
            format!("{} is not where a layer is made", staging.display()),
        )),
    }
}

fn ensure_head(
    datasets: &Datasets<ZfsPool>,
    layout: &Layout,
    head: &HeadId,
    chain: &Chain,
) -> Result<Ensured, HostError> {
    // One of a sandbox that is gone would stay for good: its directory says that it is there.
    let directory = layout.object(&Object::Sandbox(head.sandbox.clone()));
    if !fs::exists(&directory)? {
        return Err(HostError::new(
            ErrorKind::NotFound,
            format!("make head {head}: there is no {}", directory.display()),
        ));
    }
    if let Some(volume) = datasets.head(head)? {
        // Whoever made it may have died before it had its size.
        datasets.pool.grow(&volume, chain.size.0)?;
        return Ok(Ensured::AlreadyPresent);
    }
    let layer = chain.layers.first();
    let below = match (layer, &chain.base) {
        (Some(layer), _) => datasets.at(|| {
            let (volume, snapshot) = datasets.layer(layer)?.ok_or_else(|| no_layer(layer))?;
            datasets.pool.size(&volume, Some(&snapshot))
        })?,
        (None, Some(base)) => {
            let image = layout.base_image(base);
            heads::require_image(&image)?;
            fs::length(&image)?
        }
        (None, None) => 0,
    };
    if chain.size.0 < below || !chain.size.0.is_multiple_of(BLOCK) {
        return Err(HostError::new(
            ErrorKind::Invalid,
            format!(
                "a disk of {} bytes over one of {below}: a zfs volume must be at least as big, and a multiple of {BLOCK}",
                chain.size.0
            ),
        )
        .hint(format!(
            "a disk of {} bytes can be made",
            chain.size.0.max(below).next_multiple_of(BLOCK)
        )));
    }
    datasets.clone_head(head, layer, chain.base.as_ref(), chain.size.0)
}

/// Writes the disk as of `chain` to `out`.
fn flatten(
    datasets: &Datasets<ZfsPool>,
    layout: &Layout,
    chain: &Chain,
    out: &Path,
) -> Result<(), HostError> {
    let set_length = |file: &std::fs::File| {
        file.set_len(chain.size.0)
            .map_err(|error| failed("set the size of", out, error))
    };
    match (chain.layers.first(), &chain.base) {
        (Some(layer), _) => datasets.at(|| {
            let (volume, snapshot) = datasets.layer(layer)?.ok_or_else(|| no_layer(layer))?;
            fs::create_whole(out, |file| {
                set_length(file)?;
                let mut pace = Pace::beside_guests(layout);
                datasets.pool.read(&volume, &snapshot, file, &mut pace)
            })
        }),
        // The image is there, beside what was made of it.
        (None, Some(base)) => {
            let image = layout.base_image(base);
            heads::require_image(&image)?;
            let source = fs::open_file(&image)?;
            fs::create_whole(out, |file| {
                fs::sparse_copy(&source, file)
                    .map_err(|error| failed(&format!("copy {} to", image.display()), out, error))?;
                set_length(file)
            })
        }
        (None, None) => Err(HostError::new(
            ErrorKind::Invalid,
            "a disk on neither a layer nor a base",
        )),
    }
}

/// Tells trials of one process apart.
static TRIALS: AtomicU8 = AtomicU8::new(0);

/// Writes to a clone of a scratch volume, and looks that the volume stays as it is.
fn probe(datasets: &Datasets<ZfsPool>) -> Result<(), HostError> {
    let pool = &datasets.pool;
    pool.ensure_root()?;
    let number = TRIALS.fetch_add(2, Ordering::Relaxed);
    let trial = |number| Volume::Probe(std::process::id(), number);
    let (origin, clone) = (trial(number), trial(number.wrapping_add(1)));
    let try_it = || -> Result<bool, HostError> {
        const CONTENT: [u8; 4096] = [0x5a; 4096];
        const SIZE: u64 = 1 << 20;
        let first = |volume: &Volume, write: Option<[u8; 4096]>| {
            let node = pool.node(volume)?;
            let access = |error| failed("use", &node, error);
            let device = nodes::open(&node, true)?;
            if let Some(content) = write {
                device.write_all_at(&content, 0).map_err(access)?;
                device.sync_all().map_err(access)?;
            }
            let mut found = [0; 4096];
            device.read_exact_at(&mut found, 0).map_err(access)?;
            Ok::<_, HostError>(found)
        };
        pool.create(&origin, SIZE)?;
        first(&origin, Some(CONTENT))?;
        pool.snapshot(&origin, &Snapshot::Image)?;
        pool.make_clone((&origin, &Snapshot::Image), &clone, SIZE)?;
        let shown = first(&clone, None)?;
        first(&clone, Some([1; 4096]))?;
        Ok(shown == CONTENT && first(&origin, None)? == CONTENT)
    };
    let tried = try_it();
    let removed = datasets
        .discard(&clone)
        .and_then(|()| datasets.discard(&origin));
    if !tried? {
        return Err(HostError::new(
            ErrorKind::Unsupported,
            "a clone here does not show its origin, or lets writes through to it",
        ));
    }
    removed
}
