//! The `dm-snapshot` driver: copy-on-write by device-mapper, on any file system.
//!
//! A head is a sparse file that the kernel keeps changed chunks in; what a VMM opens is a block device. Nothing of it is
//! specific to a VMM, a guest that writes much of its disk pays no metadata cache, and a freeze does not ask the VMM.
//!
//! ```text
//!  icebox-…-top-<sandbox>     linear     what the VMM opens: its node never changes
//!    icebox-…-head-<n>        snapshot   heads/<n>.cow, written
//!      icebox-…-layer-…       snapshot   layers/<id>/disk, read-only; shared by all heads above it
//!        …
//!          icebox-…-base-…    linear     bases/<digest>/image on a read-only loop device, and zeros up to the disk's
//!                                        size; one for all
//! ```
//!
//! **Who uses what is the kernel's to know.** A table that names a device keeps it open; so what is not a top and is not
//! open is used by nobody, and [goes](Stacks::collect). Loop devices go by themselves. Nothing is counted, and what a crash
//! leaves behind is found the same way (INV-15, INV-52).
//!
//! **A freeze** puts a new snapshot on the one that the guest writes to, and moves the top there:
//!
//! ```text
//! head <to> over head <from> ── next table of the top ── suspend ── flush <from> ── rename <from>.cow to the layer ── resume
//!                                                        └ guest I/O waits ┘        └ the point of no return
//! ```
//!
//! The files say how far it came: whether the guest goes on as `to` is whether `from`'s file is gone. A device that was
//! left suspended goes on when the engine asks.
//!
//! Guests' discards are not passed on: the `snapshot` target cannot give a chunk back. Each layer is a device that reads
//! pass through; layers are [merged](merge) as files, whoever has devices on them.

mod devices;
mod exceptions;
mod loops;
mod merge;
mod sys;

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, ErrorKind, FreezeByHost, HostError, LiveFreeze, MergeLayers,
    Removed, Space, Trouble, VolumeDriver, Watch, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;
use sha2::{Digest as _, Sha256};

use self::devices::{Control, Info, Number, Target};
use self::exceptions::{CHUNK, CHUNK_SECTORS};
use self::loops::{Access, Loop};
use super::flatten::{self, Change, Content, Layer};
use super::heads::{self, Heads};
use crate::fs::{self, failed};
use crate::instance::Instance;

const SECTOR: u64 = 512;
/// Between two looks at heads that are in use, at most.
const LOOK: Duration = Duration::from_millis(500);
/// What must be free on the file system of the stores for guests to write, since the kernel gives a snapshot up whose store
/// finds no room: this, or on a small one a part of it. Less than what new work is refused at.
const RESERVE: u64 = 256 << 20;
/// The part.
const RESERVE_PART: u64 = 32;
/// The most that all guests together, with whatever else writes there, are believed to write in a second.
const RATE: u64 = 2 << 30;

/// The `dm-snapshot` driver.
#[derive(Clone, Debug)]
pub struct DmSnapshot {
    heads: Heads,
    stacks: Arc<Stacks>,
}

impl DmSnapshot {
    /// The driver for the data directory of `layout`. Devices carry the tag of `instance`.
    #[must_use]
    pub fn new(layout: Layout, instance: &Instance) -> Self {
        Self {
            heads: Heads::new(layout, "cow"),
            stacks: Arc::new(Stacks {
                prefix: format!("icebox-{instance}-"),
                building: Mutex::default(),
            }),
        }
    }

    /// Does `work` with the stacks, on a thread that may block, after what was asked of this sandbox's heads before.
    async fn in_turn<T: Send + 'static>(
        &self,
        sandbox: &SandboxId,
        work: impl FnOnce(&Heads, &Stacks) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let stacks = Arc::clone(&self.stacks);
        self.heads
            .in_turn(sandbox, move |heads| work(heads, &stacks))
            .await
    }
}

#[async_trait]
impl VolumeDriver for DmSnapshot {
    fn name(&self) -> &'static str {
        "dm-snapshot"
    }

    async fn probe(&self) -> Result<(), HostError> {
        let stacks = Arc::clone(&self.stacks);
        self.heads
            .run(move |heads| stacks.probe(heads.layout().data()))
            .await
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        LiveFreeze::ByHost(self)
    }

    fn watch(&self) -> Option<&dyn WatchHeads> {
        Some(self)
    }

    fn layers_are_whole(&self) -> bool {
        false
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        Some(self)
    }

    /// Refuses an image that is not a whole number of sectors: no block device could show its end.
    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        let ensured = self.heads.ensure_base(base).await?;
        let base = base.clone();
        self.heads
            .run(move |heads| require_sectors(&heads.layout().base_image(&base)))
            .await?;
        Ok(ensured)
    }

    async fn remove_base(&self, _base: &Digest) -> Result<Removed, HostError> {
        // Its device went with the last one that used it.
        Ok(Removed::AlreadyAbsent)
    }

    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        let sandbox = head.sandbox.clone();
        let (head, chain) = (head.clone(), chain.clone());
        self.heads
            .in_turn(&sandbox, move |heads| {
                require_chain(heads.layout(), &chain)?;
                heads.ensure(&head, |file, path| empty(file, path, chain.size))
            })
            .await
    }

    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let sandbox = head.sandbox.clone();
        let head = head.clone();
        self.heads
            .in_turn(&sandbox, move |heads| heads.remove(&head))
            .await
    }

    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        let (head, chain) = (head.clone(), chain.clone());
        self.in_turn(&head.sandbox.clone(), move |heads, stacks| {
            require_chain(heads.layout(), &chain)?;
            let path = heads.path(&head);
            let found = exceptions::size_for(fs::length(&path)?).unwrap_or(0);
            heads::require_size(&path, found, chain.size)?;
            let path = stacks.attach(heads, &head, &chain)?;
            Ok(BlockDevice::Raw { path })
        })
        .await
    }

    async fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        let head = head.clone();
        self.in_turn(&head.sandbox.clone(), move |_, stacks| stacks.detach(&head))
            .await
    }

    async fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        let head = head.clone();
        self.in_turn(&head.sandbox.clone(), move |heads, stacks| {
            // The device's own page cache first, then the file's.
            if fs::exists(&heads.path(&head))? {
                stacks.flush(heads, &head)?;
            }
            heads.flush(&head)
        })
        .await
    }

    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let sandbox = head.sandbox.clone();
        let (head, staging) = (head.clone(), staging.to_owned());
        self.heads
            .in_turn(&sandbox, move |heads| heads.seal(&head, &staging))
            .await
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let (chain, out) = (chain.clone(), out.to_owned());
        self.heads
            .run(move |heads| flatten(heads.layout(), &chain, &out))
            .await
    }

    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let head = head.clone();
        self.heads
            .run(move |heads| fs::allocated(&heads.path(&head)))
            .await
    }

    async fn space(&self) -> Result<Option<Space>, HostError> {
        Ok(None)
    }

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        self.heads.run(Heads::list).await
    }

    /// A layer is a file in its directory.
    async fn remove_layer(&self, _layer: &LayerId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        let layer = layer.clone();
        self.heads
            .run(move |heads| fs::allocated(&heads.layout().layer_disk(&layer)))
            .await
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl WatchHeads for DmSnapshot {
    /// One ioctl for each head, answered from the kernel's memory.
    async fn look(&self, heads: &[HeadId]) -> Result<Watch, HostError> {
        let (stacks, heads) = (Arc::clone(&self.stacks), heads.to_vec());
        self.heads
            .run(move |files| {
                let room = Room::of(files.layout().data())?;
                Ok(Watch {
                    troubled: stacks.troubled(files, heads, &room)?,
                    again_in: room.look_again_in(),
                })
            })
            .await
    }
}

#[async_trait]
impl FreezeByHost for DmSnapshot {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        let (from, to, staging) = (from.clone(), to.clone(), staging.to_owned());
        self.in_turn(&from.sandbox.clone(), move |heads, stacks| {
            freeze(heads, stacks, &from, &to, &staging)
        })
        .await
    }

    /// Either way, a device that a freeze left suspended goes on: as `to` if it is, as it was if it is not.
    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        let (from, to) = (from.clone(), to.clone());
        self.in_turn(&from.sandbox.clone(), move |heads, stacks| {
            let frozen = !fs::exists(&heads.path(&from))? && fs::exists(&heads.path(&to))?;
            if frozen {
                stacks.finish(heads, &from, &to)?;
            } else {
                stacks.go_on(&from)?;
            }
            Ok(frozen)
        })
        .await
    }
}

#[async_trait]
impl MergeLayers for DmSnapshot {
    async fn merge(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.heads
            .run(move |heads| {
                let run = open_run(heads.layout(), &run, size)?;
                fs::create_whole(&disk, |file| {
                    merge::write(&run, size.0, file).map_err(|error| error.at(&disk))
                })
            })
            .await
    }

    async fn verify(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.heads
            .run(move |heads| {
                let run = open_run(heads.layout(), &run, size)?;
                let merged = fs::open_file(&disk)?;
                fs::forget_cached(&merged);
                let found = exceptions::size_for(fs::length(&disk)?).unwrap_or(0);
                heads::require_size(&disk, found, size)?;
                merge::compare(&run, size.0, &merged).map_err(|error| error.at(&disk))
            })
            .await
    }
}

/// The devices of one installation. Everything here blocks.
#[derive(Debug)]
struct Stacks {
    /// Of every name.
    prefix: String,
    /// Held while a stack is built or taken down: between the moment that a device is made and the one that something
    /// above it keeps it open, nobody collects. Never held while guest I/O is waited for.
    building: Mutex<Tops>,
}

/// Heads that this process attached. Their tops are right; others' are looked at.
#[derive(Debug, Default)]
struct Tops(HashSet<HeadId>);

/// A device that stays, since we have it open.
struct Held {
    number: Number,
    _open: File,
}

impl Stacks {
    fn lock(&self) -> MutexGuard<'_, Tops> {
        // Whoever panicked in here left devices, which the next one collects.
        self.building.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn top_name(&self, sandbox: &SandboxId) -> String {
        format!("{}top-{sandbox}", self.prefix)
    }

    fn head_name(&self, head: &HeadId) -> String {
        format!("{}head-{}-{}", self.prefix, head.sandbox, head.number)
    }

    /// What heads of other sizes see under it is another device. So is what they see who were attached before layers
    /// under it were merged: a device keeps those that it was made over.
    fn layer_name(&self, layer: &LayerId, below: &[LayerId], sectors: u64) -> String {
        let mut hash = Sha256::new();
        for layer in below {
            hash.update(layer.as_str());
        }
        let below: String = hash.finalize()[..5]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("{}layer-{layer}-{below}-{sectors}", self.prefix)
    }

    fn base_name(&self, base: &Digest, sectors: u64) -> String {
        format!("{}base-{base}-{sectors}", self.prefix)
    }

    /// Builds the stack of a head from below, and returns the node of its top.
    fn attach(&self, heads: &Heads, head: &HeadId, chain: &Chain) -> Result<PathBuf, HostError> {
        let mut tops = self.lock();
        let control = Control::open()?;
        let name = self.top_name(&head.sandbox);
        if let Some(top) = control.info(&name)? {
            let is_ours = self.is_on(&control, &top, head)?;
            if is_ours && (top.is_open || tops.0.contains(head)) {
                return Ok(top.number.node());
            }
            if top.is_open {
                return Err(HostError::new(
                    ErrorKind::Busy,
                    format!("attach head {head}: {name} is in use with another head"),
                ));
            }
            // Left by somebody who died: what is under it may be anything (INV-14).
            control.remove_patiently(&name)?;
        }
        tops.0.retain(|attached| attached.sandbox != head.sandbox);
        self.collect(&control)?;
        let built = self.build(&control, heads, head, chain);
        if built.is_err() {
            // The error is what matters; what it leaves is collected by whoever is next.
            if let Err(error) = self.collect(&control) {
                tracing::warn!(%error, "could not remove the devices of a disk that was not attached");
            }
        }
        let number = built?;
        tops.0.insert(head.clone());
        Ok(number.node())
    }

    fn build(
        &self,
        control: &Control,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<Number, HostError> {
        let layout = heads.layout();
        let sectors = chain.size.0 / SECTOR;
        let base = chain.base.as_ref().ok_or_else(no_base)?;
        let mut below = self.base(control, layout, base, sectors)?;
        for (at, layer) in chain.layers.iter().enumerate().rev() {
            let path = layout.layer_disk(layer);
            let file = fs::open_file(&path)?;
            exceptions::require_usable(&file).map_err(|error| error.at(&path))?;
            // No kernel saw it, so it has no header, and a read-only store cannot be given one: it changes nothing.
            if exceptions::is_unused(&file).map_err(|error| error.at(&path))? {
                continue;
            }
            let name = self.layer_name(layer, &chain.layers[at + 1..], sectors);
            below = shared(control, &name, || {
                let store = Loop::on(&file, &path, Access::ReadOnly)?;
                Ok((vec![snapshot(sectors, below.number, &store)], vec![store]))
            })?;
        }
        let snapshot = self.head(control, heads, head, sectors, below.number)?;
        let name = self.top_name(&head.sandbox);
        let table = [linear(sectors, snapshot.number)];
        make(control, &name, &table, false).map(|top| top.number)
    }

    /// The bottom: the image, and zeros up to the size of the disk.
    fn base(
        &self,
        control: &Control,
        layout: &Layout,
        base: &Digest,
        sectors: u64,
    ) -> Result<Held, HostError> {
        shared(control, &self.base_name(base, sectors), || {
            let path = layout.base_image(base);
            let image = Loop::on(&fs::open_file(&path)?, &path, Access::ReadOnly)?;
            let length = image.size()? / SECTOR;
            let mut table = vec![linear(length.min(sectors), image.number())];
            if sectors > length {
                table.push(Target::new(length, sectors - length, "zero", String::new()));
            }
            Ok((table, vec![image]))
        })
    }

    /// The snapshot that is written to. One of its name that nobody uses is stale.
    fn head(
        &self,
        control: &Control,
        heads: &Heads,
        head: &HeadId,
        sectors: u64,
        below: Number,
    ) -> Result<Held, HostError> {
        let name = self.head_name(head);
        if control.info(&name)?.is_some() {
            control.remove(&name)?;
        }
        let path = heads.path(head);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| failed("open", &path, error))?;
        exceptions::require_usable(&file).map_err(|error| error.at(&path))?;
        let store = Loop::on(&file, &path, Access::ReadWrite)?;
        make(control, &name, &[snapshot(sectors, below, &store)], false)
    }

    /// Why the kernel has given the snapshot of a head up; `None` if it has not, or there is none.
    fn lost(
        &self,
        control: &Control,
        heads: &Heads,
        head: &HeadId,
    ) -> Result<Option<String>, HostError> {
        // Otherwise sectors in use, of how many, and of how many of them are its own: Documentation/admin-guide/
        // device-mapper/snapshot.rst in Linux.
        let status = control.status(&self.head_name(head))?.unwrap_or_default();
        let is_sound =
            |target: &Target| target.parameters.starts_with(|c: char| c.is_ascii_digit());
        let Some(target) = status.iter().find(|target| !is_sound(target)) else {
            return Ok(None);
        };
        let path = heads.path(head);
        let free = fs::space(heads.layout().data()).map_or_else(
            |error| error.to_string(),
            |space| format!("{} are free on its file system", space.available),
        );
        Ok(Some(format!(
            "the kernel gave up {} ({}), since a write to it failed; {free}",
            path.display(),
            target.parameters,
        )))
    }

    /// Which of `wanted` are lost, or could be by the next write.
    fn troubled(
        &self,
        heads: &Heads,
        wanted: Vec<HeadId>,
        room: &Room,
    ) -> Result<Vec<(HeadId, Trouble)>, HostError> {
        let control = Control::open()?;
        let mut troubled = Vec::new();
        for head in wanted {
            if let Some(why) = self.lost(&control, heads, &head)? {
                troubled.push((head, Trouble::Lost { why }));
            } else if let Some(why) = room.lacks() {
                troubled.push((head, Trouble::Starved { why }));
            }
        }
        Ok(troubled)
    }

    /// Refuses a head that the kernel has given up.
    fn require_sound(
        &self,
        control: &Control,
        heads: &Heads,
        head: &HeadId,
    ) -> Result<(), HostError> {
        match self.lost(control, heads, head)? {
            None => Ok(()),
            Some(why) => Err(HostError::new(
                ErrorKind::Invalid,
                format!("the disk of head {head} is lost: {why}"),
            )
            .hint(exceptions::WAY_BACK)),
        }
    }

    /// Whether `top` leads to the snapshot of `head`.
    fn is_on(&self, control: &Control, top: &Info, head: &HeadId) -> Result<bool, HostError> {
        let Some(snapshot) = control.info(&self.head_name(head))? else {
            return Ok(false);
        };
        if !top.is_active {
            return Ok(false);
        }
        let table = control.table(&self.top_name(&head.sandbox))?;
        Ok(matches!(
            table.as_slice(),
            [target] if target.parameters == format!("{} 0", snapshot.number)
        ))
    }

    /// The top of `head`'s sandbox, if it leads there.
    fn top_of(&self, control: &Control, head: &HeadId) -> Result<Option<Info>, HostError> {
        match control.info(&self.top_name(&head.sandbox))? {
            Some(top) if self.is_on(control, &top, head)? => Ok(Some(top)),
            _ => Ok(None),
        }
    }

    /// Takes down the stack of a head, and what only it used.
    fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        let Some(control) = if_any(Control::open())? else {
            return Ok(Removed::AlreadyAbsent);
        };
        let name = self.top_name(&head.sandbox);
        let removed = match control.info(&name)? {
            Some(top) if !top.is_active || self.is_on(&control, &top, head)? => {
                control.remove_patiently(&name)?
            }
            _ => Removed::AlreadyAbsent,
        };
        let mut tops = self.lock();
        tops.0.remove(head);
        self.collect(&control)?;
        Ok(removed)
    }

    /// Removes every device that is under no top. To be called with the lock.
    fn collect(&self, control: &Control) -> Result<(), HostError> {
        let tops = format!("{}top-", self.prefix);
        loop {
            let mut removed = false;
            for name in control.list(&self.prefix)? {
                if name.starts_with(&tops) {
                    continue;
                }
                // One that is not ours by its identity is nobody's business here.
                let unused = matches!(control.info(&name), Ok(Some(info)) if !info.is_open);
                if unused {
                    match control.remove(&name) {
                        Ok(_) => removed = true,
                        // Somebody looks at it at this moment; whoever collects next removes it.
                        Err(error) if error.kind() == ErrorKind::Busy => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            // What one kept open may be free now.
            if !removed {
                return Ok(());
            }
        }
    }

    fn flush(&self, heads: &Heads, head: &HeadId) -> Result<(), HostError> {
        let Some(control) = if_any(Control::open())? else {
            return Ok(());
        };
        match self.top_of(&control, head)? {
            Some(top) => self.flush_top(&control, heads, head, &top),
            None => Ok(()),
        }
    }

    /// Flushes a top. If that fails because its head is lost, that is the error.
    fn flush_top(
        &self,
        control: &Control,
        heads: &Heads,
        head: &HeadId,
        top: &Info,
    ) -> Result<(), HostError> {
        flush_node(&top.number.node()).map_err(|error| {
            let lost = self.require_sound(control, heads, head);
            lost.err().unwrap_or(error)
        })
    }

    /// Lets a top go on by the table it has.
    fn go_on(&self, head: &HeadId) -> Result<(), HostError> {
        let Some(control) = if_any(Control::open())? else {
            return Ok(());
        };
        let name = self.top_name(&head.sandbox);
        if let Some(top) = self.top_of(&control, head)? {
            control.clear(&name)?;
            if top.is_suspended {
                control.resume(&name)?;
            }
            let _building = self.lock();
            self.collect(&control)?;
        }
        Ok(())
    }

    /// Makes the snapshot of `to` over that of `from`, and the next table of the top that leads there.
    fn prepare(
        &self,
        control: &Control,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
    ) -> Result<Held, HostError> {
        let _building = self.lock();
        let below = control
            .info(&self.head_name(from))?
            .ok_or_else(|| lost_device(from))?;
        let length = fs::length(&heads.path(to))?;
        let sectors = exceptions::size_for(length).unwrap_or(0) / SECTOR;
        let snapshot = self.head(control, heads, to, sectors, below.number)?;
        let name = self.top_name(&from.sandbox);
        control.load(&name, &[linear(sectors, snapshot.number)], false)?;
        Ok(snapshot)
    }

    /// The other end of a freeze: the top goes on as `to`. It may have done so already.
    fn finish(&self, heads: &Heads, from: &HeadId, to: &HeadId) -> Result<(), HostError> {
        let Some(control) = if_any(Control::open())? else {
            return Ok(());
        };
        let name = self.top_name(&from.sandbox);
        if self.top_of(&control, from)?.is_some() {
            // Killed in between: whatever table was next, it is made again.
            control.suspend(&name)?;
            control.clear(&name)?;
            let _snapshot = self.prepare(&control, heads, from, to)?;
            control.resume(&name)?;
        } else if let Some(top) = self.top_of(&control, to)?
            && top.is_suspended
        {
            control.resume(&name)?;
        } else {
            return Ok(());
        }
        let mut tops = self.lock();
        if tops.0.remove(from) {
            tops.0.insert(to.clone());
        }
        Ok(())
    }

    /// Writes to a snapshot of a scratch file, and looks that the file stays as it is.
    fn probe(&self, data: &Path) -> Result<(), HostError> {
        const CONTENT: [u8; 4096] = [0x5a; 4096];
        const SIZE: u64 = 1 << 20;
        let _building = self.lock();
        let control = Control::open()?;
        self.collect(&control)?;
        let scratch = |length: u64| {
            tempfile::tempfile_in(data)
                .and_then(|file| file.set_len(length).map(|()| file))
                .map_err(|error| failed("make a scratch file in", data, error))
        };
        let access = |error| failed("use a scratch device on a file in", data, error);
        let (origin, store) = (scratch(SIZE)?, scratch(exceptions::length_for(SIZE))?);
        origin.write_all_at(&CONTENT, 0).map_err(access)?;

        let sectors = SIZE / SECTOR;
        let name = |kind: &str| format!("{}probe-{kind}-{}", self.prefix, std::process::id());
        let try_it = || -> Result<[u8; 4096], HostError> {
            let image = Loop::on(&origin, data, Access::ReadOnly)?;
            let table = [
                linear(sectors, image.number()),
                Target::new(sectors, CHUNK_SECTORS, "zero", String::new()),
            ];
            let below = make(&control, &name("base"), &table, true)?;
            let store = Loop::on(&store, data, Access::ReadWrite)?;
            let table = [snapshot(sectors, below.number, &store)];
            let above = make(&control, &name("head"), &table, false)?;
            let node = above.number.node();
            let mut first = [0; 4096];
            let device = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&node)
                .map_err(|error| failed("open", &node, error))?;
            device.read_exact_at(&mut first, 0).map_err(access)?;
            device.write_all_at(&[1; 4096], 0).map_err(access)?;
            device.sync_all().map_err(access)?;
            Ok(first)
        };
        let tried = try_it();
        self.collect(&control)?;
        let found = tried?;
        let mut after = [0; 4096];
        origin.read_exact_at(&mut after, 0).map_err(access)?;
        if found != CONTENT || after != CONTENT {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                "a device-mapper snapshot here does not show its origin, or lets writes through to it",
            ));
        }
        Ok(())
    }
}

/// How much room there is for stores to grow.
struct Room {
    available: Bytes,
    reserve: Bytes,
}

impl Room {
    fn of(data: &Path) -> Result<Self, HostError> {
        let space = fs::space(data)?;
        Ok(Self {
            available: space.available,
            reserve: Bytes(RESERVE.min(space.total.0 / RESERVE_PART)),
        })
    }

    /// Why guests must not write, if they must not.
    fn lacks(&self) -> Option<String> {
        (self.available < self.reserve).then(|| {
            format!(
                "only {} are free on the file system of its disk, and a write that found no room would cost it the disk; it goes on when {} are",
                self.available, self.reserve
            )
        })
    }

    /// Before the reserve can have been used up. Where it has been touched, nobody writes.
    fn look_again_in(&self) -> Duration {
        match self.available.0.checked_sub(self.reserve.0) {
            Some(left) => LOOK.min(Duration::from_millis(left / (RATE / 1000))),
            None => LOOK,
        }
    }
}

/// A device that others use too: the one that is there, or a new one with the table that `table` makes. What that table
/// needs is kept until it is loaded.
fn shared(
    control: &Control,
    name: &str,
    table: impl FnOnce() -> Result<(Vec<Target>, Vec<Loop>), HostError>,
) -> Result<Held, HostError> {
    match control.info(name)? {
        Some(info) if info.is_active => hold(info.number),
        Some(_) => Err(HostError::new(
            ErrorKind::Busy,
            format!("the device-mapper device {name} has no table, and somebody has it open"),
        )),
        None => {
            let (table, _needed) = table()?;
            make(control, name, &table, true)
        }
    }
}

/// Makes a device. If that fails, it is not there.
fn make(
    control: &Control,
    name: &str,
    table: &[Target],
    read_only: bool,
) -> Result<Held, HostError> {
    control.create(name)?;
    let made = control
        .load(name, table, read_only)
        .and_then(|()| control.resume(name))
        .and_then(|()| control.info(name))
        .and_then(|info| {
            let info = info.ok_or_else(|| {
                HostError::new(
                    ErrorKind::Gone,
                    format!("{name} was removed by somebody else"),
                )
            })?;
            hold(info.number)
        });
    if made.is_err()
        && let Err(error) = control.remove(name)
    {
        tracing::warn!(%error, "could not remove a device that was not finished");
    }
    made
}

fn hold(number: Number) -> Result<Held, HostError> {
    Ok(Held {
        number,
        _open: fs::open_file(&number.node())?,
    })
}

fn linear(sectors: u64, on: Number) -> Target {
    Target::new(0, sectors, "linear", format!("{on} 0"))
}

/// Persistent, so that it outlives the device.
fn snapshot(sectors: u64, origin: Number, store: &Loop) -> Target {
    let store = store.number();
    Target::new(
        0,
        sectors,
        "snapshot",
        format!("{origin} {store} P {CHUNK_SECTORS}"),
    )
}

fn flush_node(node: &Path) -> Result<(), HostError> {
    fs::open_file(node)?
        .sync_all()
        .map_err(|error| failed("flush", node, error))
}

/// Where there is no device-mapper, there are no devices.
fn if_any(control: Result<Control, HostError>) -> Result<Option<Control>, HostError> {
    match control {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        other => other.map(Some),
    }
}

fn empty(file: &File, path: &Path, size: Bytes) -> Result<(), HostError> {
    file.set_len(exceptions::length_for(size.0))
        .map_err(|error| failed("set the size of", path, error))
}

fn freeze(
    heads: &Heads,
    stacks: &Stacks,
    from: &HeadId,
    to: &HeadId,
    staging: &Path,
) -> Result<(), HostError> {
    let (old, new) = (heads.path(from), heads.path(to));
    let disk = staging.join(LAYER_DISK);
    if fs::exists(&old)? {
        exceptions::require_usable(&fs::open_file(&old)?).map_err(|error| error.at(&old))?;
        // One of an earlier attempt is empty: nothing is written to it before this is over.
        let length = fs::length(&old)?;
        heads.ensure(to, |file, path| {
            file.set_len(length)
                .map_err(|error| failed("set the size of", path, error))
        })?;
        freeze_devices(heads, stacks, from, to, || heads.seal(from, staging))
    } else if fs::exists(&new)? && (fs::exists(&disk)? || heads.is_published(staging)?) {
        stacks.finish(heads, from, to)?;
        fs::sync_directory(&heads.layout().heads(&from.sandbox))
    } else {
        Err(heads.lost(from, &disk))
    }
}

/// Moves the top, if there is one, from one head to another, and does `commit` while guest I/O waits. If `commit` fails,
/// the top goes on as it was.
fn freeze_devices(
    heads: &Heads,
    stacks: &Stacks,
    from: &HeadId,
    to: &HeadId,
    commit: impl FnOnce() -> Result<(), HostError>,
) -> Result<(), HostError> {
    let control = if_any(Control::open())?;
    let top = match &control {
        Some(control) => stacks.top_of(control, from)?,
        None => None,
    };
    let (Some(control), Some(top)) = (control, top) else {
        return commit();
    };
    let name = stacks.top_name(&from.sandbox);
    // Most of what is dirty goes while the guest runs.
    stacks.flush_top(&control, heads, from, &top)?;
    let _snapshot = stacks.prepare(&control, heads, from, to)?;
    let committed = control
        .suspend(&name)
        .and_then(|()| stacks.require_sound(&control, heads, from))
        .and_then(|()| commit());
    if let Err(error) = committed {
        if fs::exists(&heads.path(from))? {
            stacks.go_on(from)?;
        }
        return Err(error);
    }
    control.resume(&name)?;
    let mut tops = stacks.lock();
    if tops.0.remove(from) {
        tops.0.insert(to.clone());
    }
    Ok(())
}

/// Refuses an image that does not end with a sector.
fn require_sectors(image: &Path) -> Result<(), HostError> {
    let length = fs::length(image)?;
    if length > 0 && length.is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(HostError::new(
        ErrorKind::Invalid,
        format!(
            "{} has {length} bytes, which is not a whole number of sectors",
            image.display()
        ),
    )
    .hint("append zeros up to a multiple of 512 bytes: truncate --size=%512"))
}

/// Opens layers for a merge.
fn open_run(layout: &Layout, run: &[LayerId], size: Bytes) -> Result<Vec<File>, HostError> {
    let open = |layer| {
        let path = layout.layer_disk(layer);
        require_store(&path, size)?;
        fs::open_file(&path)
    };
    run.iter().map(open).collect()
}

/// Refuses a file that is no store for a disk of at most `size`.
fn require_store(path: &Path, size: Bytes) -> Result<(), HostError> {
    let length = fs::length(path)?;
    let found = exceptions::size_for(length).ok_or_else(|| {
        HostError::new(
            ErrorKind::Invalid,
            format!(
                "{} has {length} bytes: no exception store has",
                path.display()
            ),
        )
    })?;
    heads::require_room(path, found, size)
}

/// Refuses a chain whose files are not all there and what they should be. Returns its base's image.
fn require_chain(layout: &Layout, chain: &Chain) -> Result<PathBuf, HostError> {
    let image = layout.base_image(chain.base.as_ref().ok_or_else(no_base)?);
    heads::require_image(&image)?;
    require_sectors(&image)?;
    heads::require_room(&image, fs::length(&image)?, chain.size)?;
    for layer in &chain.layers {
        require_store(&layout.layer_disk(layer), chain.size)?;
    }
    Ok(image)
}

fn no_base() -> HostError {
    HostError::new(ErrorKind::Invalid, "a disk on no base")
}

fn lost_device(head: &HeadId) -> HostError {
    HostError::new(
        ErrorKind::NotFound,
        format!("the device of head {head} is gone"),
    )
}

/// A layer's store, and its name for messages.
struct Store {
    path: PathBuf,
    file: File,
}

impl Layer for Store {
    fn file(&self) -> &File {
        &self.file
    }

    /// Chunks that lie apart on the disk lie side by side in the store.
    fn read_ahead(&self) -> u64 {
        flatten::PIECE
    }

    fn for_each_change(
        &self,
        size: u64,
        each: &mut dyn FnMut(Change) -> io::Result<()>,
    ) -> Result<(), HostError> {
        exceptions::for_each_run(&self.file, size, |run| {
            each(Change {
                blocks: run.old..run.old + run.length,
                content: Content::At(run.new * CHUNK),
            })?;
            Ok(())
        })
        .map_err(|error| error.at(&self.path))
    }
}

/// Writes the disk as of `chain` to `out`, which does not exist yet.
fn flatten(layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError> {
    let image = require_chain(layout, chain)?;
    let base = fs::open_file(&image)?;
    let layers: Vec<Store> = chain
        .layers
        .iter()
        .map(|layer| {
            let path = layout.layer_disk(layer);
            let file = fs::open_file(&path)?;
            Ok(Store { path, file })
        })
        .collect::<Result<_, HostError>>()?;
    flatten::to_file(layout, (&base, &image), &layers, chain.size.0, out)
}
