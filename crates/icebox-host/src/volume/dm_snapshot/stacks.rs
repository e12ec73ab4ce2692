//! Devices: the stack of a head, built from below, moved by a freeze, watched and taken down.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use icebox_engine::host::{Chain, ErrorKind, HostError, Removed, Trouble, Watch};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::Layout;
use icebox_engine::unit::Bytes;
use sha2::{Digest as _, Sha256};

use super::devices::{Control, Info, Number, Target};
use super::exceptions::{self, CHUNK_SECTORS};
use super::loops::{Access, Loop};
use super::{SECTOR, no_base};
use crate::fs::{self, failed};
use crate::instance::Instance;
use crate::volume::heads::Heads;

/// Between two looks at heads that are in use, at most.
const LOOK: Duration = Duration::from_millis(500);
/// What must be free on the file system of the stores for guests to write, since the kernel gives a snapshot up whose store
/// finds no room: this, or on a small one a part of it. Less than what new work is refused at.
const RESERVE: u64 = 256 << 20;
/// The part.
const RESERVE_PART: u64 = 32;
/// The most that all guests together, with whatever else writes there, are believed to write in a second.
const RATE: u64 = 2 << 30;

/// The devices of one installation. Everything here blocks.
#[derive(Debug)]
pub(super) struct Stacks {
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
    pub(super) fn of(instance: &Instance) -> Self {
        Self {
            prefix: format!("icebox-{instance}-"),
            building: Mutex::default(),
        }
    }

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
    pub(super) fn attach(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<PathBuf, HostError> {
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
    pub(super) fn look(&self, heads: &Heads, wanted: Vec<HeadId>) -> Result<Watch, HostError> {
        let room = Room::of(heads.layout().data())?;
        let control = Control::open()?;
        let mut troubled = Vec::new();
        for head in wanted {
            if let Some(why) = self.lost(&control, heads, &head)? {
                troubled.push((head, Trouble::Lost { why }));
            } else if let Some(why) = room.lacks() {
                troubled.push((head, Trouble::Starved { why }));
            }
        }
        Ok(Watch {
            troubled,
            again_in: room.look_again_in(),
        })
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
    pub(super) fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
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

    pub(super) fn flush(&self, heads: &Heads, head: &HeadId) -> Result<(), HostError> {
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
    pub(super) fn go_on(&self, head: &HeadId) -> Result<(), HostError> {
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
    pub(super) fn finish(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
    ) -> Result<(), HostError> {
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

    /// Moves the top, if there is one, from one head to another, and does `commit` while guest I/O waits. If `commit` fails,
    /// the top goes on as it was.
    pub(super) fn freeze(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
        commit: impl FnOnce() -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let control = if_any(Control::open())?;
        let top = match &control {
            Some(control) => self.top_of(control, from)?,
            None => None,
        };
        let (Some(control), Some(top)) = (control, top) else {
            return commit();
        };
        let name = self.top_name(&from.sandbox);
        // Most of what is dirty goes while the guest runs.
        self.flush_top(&control, heads, from, &top)?;
        let _snapshot = self.prepare(&control, heads, from, to)?;
        let committed = control
            .suspend(&name)
            .and_then(|()| self.require_sound(&control, heads, from))
            .and_then(|()| commit());
        if let Err(error) = committed {
            if fs::exists(&heads.path(from))? {
                self.go_on(from)?;
            }
            return Err(error);
        }
        control.resume(&name)?;
        let mut tops = self.lock();
        if tops.0.remove(from) {
            tops.0.insert(to.clone());
        }
        Ok(())
    }

    /// Writes to a snapshot of a scratch file, and looks that the file stays as it is.
    pub(super) fn probe(&self, data: &Path) -> Result<(), HostError> {
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

fn lost_device(head: &HeadId) -> HostError {
    HostError::new(
        ErrorKind::NotFound,
        format!("the device of head {head} is gone"),
    )
}
