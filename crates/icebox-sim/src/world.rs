//! The state of a host in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use icebox_engine::host::{
    CpuFeatures, ErrorKind, ExitReason, Host, HostError, ProcessIdentity, Space, Welcome,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId, Slot};
use icebox_engine::layout::{LAYER_DISK, Object};
use icebox_engine::manifest::{self, v1};
use icebox_engine::unit::{Bytes, Geometry};
use icebox_engine::{Event, Sample};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

use crate::clock::SimClock;
use crate::guest::{SimGuest, SimKernels};
use crate::journal::SimJournal;
use crate::net::{SimBoxes, SimNetwork};
use crate::store::SimStore;
use crate::vmm::{SimVmm, killed};
use crate::volume::{FreezeBy, SimVolumes};

/// The content of a file, as far as the lifecycle can tell contents apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum File {
    /// A raw disk image.
    Image { content: u64, size: Bytes },
    /// A whole disk: the number that a guest wrote last.
    Disk(u64),
    /// What was written over what is below, if anything was.
    Written(Option<u64>),
    /// A full memory: the number that a guest held, and its page for the tests.
    Memory { value: u64, page: u64 },
    /// What differs from a full memory. A page that is as it was is not in it; one that was zeroed is.
    Changes { value: u64, page: Option<u64> },
    /// A device state.
    Devices {
        value: u64,
        token: String,
        geometry: Geometry,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) manifest: Option<Vec<u8>>,
    pub(crate) files: BTreeMap<String, File>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) driver: &'static str,
    /// What was written to it, if anything was.
    pub(crate) value: Option<u64>,
    /// The layer or base under it.
    pub(crate) under: Object,
    pub(crate) attached: bool,
}

/// What the vCPUs of a simulated guest do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vcpus {
    /// They run.
    Running,
    /// They stand still.
    Paused,
    /// They stand still: a write to the disk found no room.
    Stalled,
}

pub(crate) struct Vm {
    pub(crate) process: ProcessIdentity,
    pub(crate) vcpus: Vcpus,
    pub(crate) wedged: bool,
    /// Whether it has been told the time since it stood still.
    pub(crate) knows_time: bool,
    pub(crate) head: HeadId,
    /// The layers that it has open.
    pub(crate) opened: Vec<LayerId>,
    pub(crate) value: u64,
    /// A page of its memory that only tests write to.
    pub(crate) page: u64,
    pub(crate) token: String,
    pub(crate) geometry: Geometry,
    /// What it has used.
    pub(crate) cpu: Duration,
    pub(crate) exit: watch::Sender<Option<ExitReason>>,
    pub(crate) stalled: watch::Sender<bool>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) objects: BTreeMap<Object, Directory>,
    pub(crate) staging: BTreeMap<Object, Directory>,
    pub(crate) trash: BTreeSet<Object>,
    pub(crate) loose_files: BTreeMap<PathBuf, File>,
    pub(crate) heads: BTreeMap<HeadId, Head>,
    /// Layers whose data are outside their directories.
    pub(crate) pool: BTreeMap<LayerId, u64>,
    pub(crate) networks: BTreeSet<Slot>,
    pub(crate) boxes: BTreeSet<SandboxId>,
    pub(crate) vms: BTreeMap<SandboxId, Vm>,
    pub(crate) welcomes: BTreeMap<SandboxId, Vec<Welcome>>,
    /// What the wall clock showed when somebody looked at it last.
    pub(crate) wall: Timestamp,
    pub(crate) next_pid: u32,
    pub(crate) next_value: u64,
    pub(crate) marks: u64,
    pub(crate) loses_heads: bool,
    pub(crate) lost: BTreeSet<HeadId>,
    pub(crate) starves: bool,
    /// What is left on the simulated file system, if little is.
    pub(crate) left: Option<Bytes>,
    pub(crate) vcpus_stuck: bool,
    pub(crate) save_fails: bool,
    pub(crate) agent_wedged: bool,
    pub(crate) works: bool,
    /// So many guests that run next ask for a reset.
    pub(crate) resets: u32,
    pub(crate) events: Vec<Event>,
    pub(crate) samples: BTreeMap<SandboxId, Vec<Sample>>,
    pub(crate) merges_corrupt: bool,
    /// What went though it was in use.
    pub(crate) taken_away: Vec<String>,
    pub(crate) vmm_version: Option<String>,
    pub(crate) cpu_features: CpuFeatures,
}

/// A host in memory. Cheap to clone; all clones are the same world.
#[derive(Clone, Default)]
pub struct World {
    state: Arc<Mutex<State>>,
}

/// Where published objects seem to be.
const OBJECTS: &str = "/sim/objects";
/// Where staged objects seem to be.
const STAGING: &str = "/sim/staging";

pub(crate) fn object_path(object: &Object, file: &str) -> PathBuf {
    Path::new(OBJECTS).join(object.flat_name()).join(file)
}

pub(crate) fn staging_path(object: &Object) -> PathBuf {
    Path::new(STAGING).join(object.flat_name())
}

fn invalid(message: impl Into<String>) -> HostError {
    HostError::new(ErrorKind::Invalid, message)
}

/// A number that a guest writes has two parts: above, the mark that it was told to keep, and below, how often anything
/// was written before. So a number may grow as it likes, and still shows which of a guest's pasts it comes from.
const MARK_SHIFT: u32 = 40;
const BELOW_MARK: u64 = (1 << MARK_SHIFT) - 1;

impl State {
    /// Every running guest writes one number to its memory and to its disk.
    pub(crate) fn tick(&mut self) {
        self.next_value += 1;
        let value = self.next_value;
        for vm in self
            .vms
            .values_mut()
            .filter(|vm| vm.vcpus == Vcpus::Running)
        {
            vm.value = (vm.value & !BELOW_MARK) | value;
            if let Some(head) = self.heads.get_mut(&vm.head) {
                head.value = Some(vm.value);
            }
        }
    }

    pub(crate) fn space(&self, place: &str) -> Space {
        /// Of the simulated file system.
        const TOTAL: Bytes = Bytes::mib(64 << 10);
        Space {
            place: place.to_owned(),
            total: TOTAL,
            available: self.left.unwrap_or(TOTAL),
        }
    }

    /// The directory and file name that a path of ours means.
    pub(crate) fn directory_of(
        &mut self,
        path: &Path,
    ) -> Result<(&mut Directory, String), HostError> {
        let unknown = || invalid(format!("{} is no path of this world", path.display()));
        let file = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(unknown)?
            .to_owned();
        let parent = path.parent().ok_or_else(unknown)?;
        let object = parent
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(Object::from_flat_name);
        let object = object.ok_or_else(unknown)?;
        let directories = if parent.starts_with(STAGING) {
            &mut self.staging
        } else {
            &mut self.objects
        };
        Ok((directories.get_mut(&object).ok_or_else(unknown)?, file))
    }

    pub(crate) fn read(&mut self, path: &Path) -> Result<File, HostError> {
        if let Some(file) = self.loose_files.get(path) {
            return Ok(file.clone());
        }
        let missing = || {
            HostError::new(
                ErrorKind::NotFound,
                format!("{} does not exist", path.display()),
            )
        };
        let (directory, name) = self.directory_of(path).map_err(|_| missing())?;
        directory.files.get(&name).cloned().ok_or_else(missing)
    }

    pub(crate) fn write(&mut self, path: &Path, file: File) -> Result<(), HostError> {
        let (directory, name) = self.directory_of(path)?;
        directory.files.insert(name, file);
        Ok(())
    }

    /// What a guest would read from an immutable object. Reading through what does not exist is a lost disk.
    pub(crate) fn resolve_object(&self, object: &Object) -> Result<u64, HostError> {
        if let Object::Layer(layer) = object
            && let Some(content) = self.pool.get(layer)
        {
            return Ok(*content);
        }
        let (mut next, mut newest) = (object.clone(), None);
        loop {
            let published = self.objects.get(&next);
            match published.and_then(|directory| directory.files.values().next()) {
                Some(File::Disk(value) | File::Image { content: value, .. }) => {
                    return Ok(newest.unwrap_or(*value));
                }
                Some(File::Written(written)) => {
                    newest = newest.or(*written);
                    next = self.below(&next)?;
                }
                _ => {
                    let message = format!("{next} is under a head and does not exist");
                    return Err(invalid(message));
                }
            }
        }
    }

    /// What a published layer says that it sits on.
    pub(crate) fn below(&self, layer: &Object) -> Result<Object, HostError> {
        let published = self.objects.get(layer);
        let bytes = published.and_then(|directory| directory.manifest.as_deref());
        let (_, layer) = manifest::decode::<v1::Layer>(layer, bytes)
            .map_err(|error| invalid(error.to_string()))?;
        let parent = layer.parent.map(Object::Layer);
        parent
            .or(layer.base.map(Object::Base))
            .ok_or_else(|| invalid(format!("layer {} sits on nothing", layer.id)))
    }

    /// What a guest would read from a head.
    pub(crate) fn resolve(&self, head: &HeadId) -> Result<u64, HostError> {
        let found = self
            .heads
            .get(head)
            .ok_or_else(|| invalid(format!("head {head} does not exist")))?;
        found
            .value
            .map_or_else(|| self.resolve_object(&found.under), Ok)
    }

    /// Lets a guest that has just begun to run reset its machine, if the next ones are to.
    pub(crate) fn reset_if_asked(&mut self, sandbox: &SandboxId) {
        if self.resets > 0 {
            self.resets -= 1;
            let reason = ExitReason {
                by_guest: true,
                reset: true,
                detail: "the guest asked for a reset".into(),
            };
            self.end_vm(sandbox, reason);
        }
    }

    pub(crate) fn end_vm(&mut self, sandbox: &SandboxId, reason: ExitReason) -> bool {
        let Some(vm) = self.vms.remove(sandbox) else {
            return false;
        };
        vm.exit.send_replace(Some(reason));
        true
    }
}

impl World {
    /// An empty host.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The traits over this world. `freeze` decides who freezes disks by default; both drivers are there.
    #[must_use]
    pub fn host(&self, freeze: FreezeBy) -> Host {
        let mut volumes: Vec<Arc<dyn icebox_engine::host::VolumeDriver>> = vec![
            Arc::new(SimVolumes::new(self.clone(), FreezeBy::Vmm)),
            Arc::new(SimVolumes::new(self.clone(), FreezeBy::Host)),
        ];
        if freeze == FreezeBy::Host {
            volumes.reverse();
        }
        Host {
            store: Arc::new(SimStore::new(self.clone())),
            volumes,
            vmms: vec![Arc::new(SimVmm::new(self.clone()))],
            journal: Arc::new(SimJournal::new(self.clone())),
            clock: Arc::new(SimClock::new(self.clone())),
            network: Arc::new(SimNetwork::new(self.clone())),
            boxes: Arc::new(SimBoxes::new(self.clone())),
            kernels: Arc::new(SimKernels),
            guest: Arc::new(SimGuest::new(self.clone())),
        }
    }

    /// Puts a raw image at a path, for an import.
    pub fn add_image(&self, path: impl Into<PathBuf>, content: u64, size: Bytes) {
        self.lock()
            .loose_files
            .insert(path.into(), File::Image { content, size });
    }

    /// The number that a running guest wrote last, after checking that its memory and its disk agree.
    ///
    /// # Errors
    /// It does not run, or memory and disk are of different instants.
    pub fn guest_value(&self, sandbox: &SandboxId) -> Result<u64, String> {
        let state = self.lock();
        let vm = state.vms.get(sandbox).ok_or("no VMM runs")?;
        let disk = state.resolve(&vm.head).map_err(|error| error.to_string())?;
        if vm.vcpus != Vcpus::Running {
            return Err("its vCPUs stand still".into());
        }
        if let Some(gone) = state.taken_away.first() {
            return Err(gone.clone());
        }
        if disk != vm.value {
            return Err(format!("memory holds {} and the disk {disk}", vm.value));
        }
        Ok(disk)
    }

    /// Has a running guest write a mark to its memory and to its disk, and keep it until it is told another: what a user
    /// wrote and was told is safe. No mark is like another. `None` if no vCPUs run.
    #[must_use]
    pub fn mark(&self, sandbox: &SandboxId) -> Option<u64> {
        let mut state = self.lock();
        let mark = state.marks + 1;
        let vm = state.vms.get_mut(sandbox)?;
        if vm.vcpus != Vcpus::Running {
            return None;
        }
        vm.value = (mark << MARK_SHIFT) | (vm.value & BELOW_MARK);
        let (value, head) = (vm.value, vm.head.clone());
        if let Some(head) = state.heads.get_mut(&head) {
            head.value = Some(value);
        }
        state.marks = mark;
        Some(mark)
    }

    /// What a guest would read from a disk that nobody writes to.
    ///
    /// # Errors
    /// It, or something that it stands on, is not there.
    pub fn read(&self, layer: &Object) -> Result<u64, String> {
        let content = self.lock().resolve_object(layer);
        content.map_err(|error| error.to_string())
    }

    /// The mark in a number that a guest wrote.
    #[must_use]
    pub fn mark_in(value: u64) -> u64 {
        value >> MARK_SHIFT
    }

    /// Writes to a page of a running guest's memory that nothing else writes to.
    pub fn write_page(&self, sandbox: &SandboxId, content: u64) {
        if let Some(vm) = self.lock().vms.get_mut(sandbox) {
            vm.page = content;
        }
    }

    /// What [`write_page`](Self::write_page) wrote last, as the running guest has it.
    #[must_use]
    pub fn page(&self, sandbox: &SandboxId) -> Option<u64> {
        self.lock().vms.get(sandbox).map(|vm| vm.page)
    }

    /// The process that runs a guest.
    #[must_use]
    pub fn process(&self, sandbox: &SandboxId) -> Option<ProcessIdentity> {
        self.lock().vms.get(sandbox).map(|vm| vm.process.clone())
    }

    /// What the guests that were this sandbox have been told, in order.
    #[must_use]
    pub fn welcomes(&self, sandbox: &SandboxId) -> Vec<Welcome> {
        self.lock()
            .welcomes
            .get(sandbox)
            .cloned()
            .unwrap_or_default()
    }

    /// Lets every running guest write once more.
    pub fn tick(&self) {
        self.lock().tick();
    }

    /// Lets time go by while nobody runs, or sets the wall clock, back too.
    ///
    /// # Panics
    /// If that leads beyond the calendar.
    pub fn step_clock(&self, by: SignedDuration) {
        self.lock().wall += by;
    }

    /// Ends a VMM, as `kill -9` would.
    pub fn crash_vmm(&self, sandbox: &SandboxId) {
        self.lock().end_vm(sandbox, killed());
    }

    /// Lets a guest power off.
    pub fn power_off(&self, sandbox: &SandboxId) {
        let reason = ExitReason {
            by_guest: true,
            reset: false,
            detail: "the guest powered off".into(),
        };
        self.lock().end_vm(sandbox, reason);
    }

    /// Makes the next guests that boot, or go on, ask for a reset instead of answering.
    pub fn reset_guests(&self, count: u32) {
        self.lock().resets = count;
    }

    /// What a guest's vCPUs do, if it has a VMM.
    #[must_use]
    pub fn vcpus(&self, sandbox: &SandboxId) -> Option<Vcpus> {
        self.lock().vms.get(sandbox).map(|vm| vm.vcpus)
    }

    /// Makes a VMM answer nothing any more.
    pub fn wedge_vmm(&self, sandbox: &SandboxId) {
        if let Some(vm) = self.lock().vms.get_mut(sandbox) {
            vm.wedged = true;
        }
    }

    /// Makes guest agents answer nothing any more, or again.
    pub fn wedge_agents(&self, wedged: bool) {
        self.lock().agent_wedged = wedged;
    }

    /// Has commands run in all guests, or not any more.
    pub fn put_to_work(&self, works: bool) {
        self.lock().works = works;
    }

    /// Lets a running guest use so much of a CPU.
    pub fn spend(&self, sandbox: &SandboxId, cpu: Duration) {
        if let Some(vm) = self.lock().vms.get_mut(sandbox) {
            vm.cpu += cpu;
        }
    }

    /// Whether a sandbox's guest has the host's time: not if it stood still and was not told.
    #[must_use]
    pub fn knows_time(&self, sandbox: &SandboxId) -> bool {
        let state = self.lock();
        state.vms.get(sandbox).is_some_and(|vm| vm.knows_time)
    }

    /// Makes `resume_vcpus` fail from now on, or work again.
    pub fn stick_vcpus(&self, stuck: bool) {
        self.lock().vcpus_stuck = stuck;
    }

    /// Makes merged layers hold something else than what they were made of, or not.
    pub fn corrupt_merges(&self, corrupt: bool) {
        self.lock().merges_corrupt = corrupt;
    }

    /// Makes the next save of a memory fail.
    pub fn fail_next_save(&self) {
        self.lock().save_fails = true;
    }

    /// Leaves so much room on the simulated file system, or with `None` all that anybody could want.
    pub fn set_left(&self, left: Option<Bytes>) {
        self.lock().left = left;
    }

    /// Lets a guest write to a file system without room: it stands still.
    pub fn stall(&self, sandbox: &SandboxId) {
        let mut state = self.lock();
        state.left = Some(Bytes(0));
        if let Some(vm) = state.vms.get_mut(sandbox) {
            vm.vcpus = Vcpus::Stalled;
            vm.knows_time = false;
            vm.stalled.send_replace(true);
        }
    }

    /// Makes volumes ones that can lose heads, for hosts made from now on.
    pub fn with_heads_to_lose(&self) {
        self.lock().loses_heads = true;
    }

    /// Cuts the images of all bases in half.
    pub fn cut_bases(&self) {
        for (object, directory) in &mut self.lock().objects {
            if matches!(object, Object::Base(_)) {
                for file in directory.files.values_mut() {
                    if let File::Image { size, .. } = file {
                        *size = Bytes(size.0 / 2);
                    }
                }
            }
        }
    }

    /// Loses the disk that a running guest writes to.
    pub fn lose_disk(&self, sandbox: &SandboxId) {
        let mut state = self.lock();
        let head = state.vms.get(sandbox).map(|vm| vm.head.clone());
        state.lost.extend(head);
    }

    /// Makes every disk one that the next write may lose, or not any more.
    pub fn starve_disks(&self, starve: bool) {
        self.lock().starves = starve;
    }

    /// Replaces the VMM by another version, for hosts made from now on.
    pub fn upgrade_vmm(&self, version: &str) {
        self.lock().vmm_version = Some(version.to_owned());
    }

    /// Has the CPU features of these names, for hosts made from now on.
    pub fn offer_cpu_features(&self, names: &str) {
        self.lock().cpu_features = CpuFeatures::from(names.to_owned());
    }

    /// Replaces the bytes of an object's manifest.
    pub fn overwrite_manifest(&self, object: &Object, manifest: &[u8]) {
        if let Some(directory) = self.lock().objects.get_mut(object) {
            directory.manifest = Some(manifest.to_vec());
        }
    }

    /// Loses an object with all its files.
    pub fn lose(&self, object: &Object) {
        self.lock().objects.remove(object);
    }

    /// Puts things on the host that no manifest holds: a box with a VMM, a network, a head, a staging directory, a layer's
    /// data.
    pub fn litter(
        &self,
        box_of: &SandboxId,
        slot: Slot,
        head: &HeadId,
        base: &Digest,
        staged: &Object,
    ) {
        let mut state = self.lock();
        state.boxes.insert(box_of.clone());
        state.networks.insert(slot);
        let under = Object::Base(base.clone());
        let stray = Head {
            driver: "sim-by-vmm",
            value: Some(1),
            under,
            attached: false,
        };
        state.heads.insert(head.clone(), stray);
        state.staging.insert(staged.clone(), Directory::default());
        drop(state);
        self.litter_layer();
    }

    /// Puts a layer's data on the host that no manifest knows.
    pub fn litter_layer(&self) {
        self.lock().pool.insert(LayerId::random(), 1);
    }

    /// Everything on the host that is not an object at rest, in words: what a leak check compares.
    #[must_use]
    pub fn in_use(&self) -> Vec<String> {
        let state = self.lock();
        let heads = state
            .heads
            .iter()
            .map(|(head, it)| format!("head {head} attached={}", it.attached));
        let networks = state.networks.iter().map(|slot| format!("network {slot}"));
        let boxes = state.boxes.iter().map(|id| format!("box {id}"));
        let vms = state
            .vms
            .iter()
            .map(|(id, vm)| format!("vmm {id} {:?}", vm.vcpus));
        let staging = state
            .staging
            .keys()
            .map(|object| format!("staged {object}"));
        let trash = state.trash.iter().map(|object| format!("trash {object}"));
        let pool = state
            .pool
            .keys()
            .filter(|layer| !state.objects.contains_key(&Object::Layer((*layer).clone())))
            .map(|layer| format!("data of layer {layer}"));
        heads
            .chain(networks)
            .chain(boxes)
            .chain(vms)
            .chain(staging)
            .chain(trash)
            .chain(pool)
            .collect()
    }

    /// The objects that exist, in words.
    #[must_use]
    pub fn objects(&self) -> Vec<String> {
        self.lock()
            .objects
            .keys()
            .map(ToString::to_string)
            .collect()
    }

    /// All manifests, as text.
    #[must_use]
    pub fn manifests(&self) -> Vec<String> {
        let state = self.lock();
        let manifests = state
            .objects
            .values()
            .filter_map(|directory| directory.manifest.clone());
        manifests
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    /// The content of an object's files, in words: what must not change in something immutable.
    #[must_use]
    pub fn content(&self, object: &Object) -> Option<String> {
        let state = self.lock();
        let mut files = state.objects.get(object)?.files.clone();
        if let Object::Layer(layer) = object
            && let Some(content) = state.pool.get(layer)
        {
            files.insert(LAYER_DISK.to_owned(), File::Disk(*content));
        }
        Some(format!("{files:?}"))
    }
}
