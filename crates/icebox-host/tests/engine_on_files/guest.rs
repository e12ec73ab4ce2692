//! A VMM and its guests, made up, on real disks.
//!
//! A guest is one number. Whenever it runs it writes the next number to its memory and to the first block of its disk:
//! when it starts, when it goes on, and when it is asked anything.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Capabilities, Counters, CpuFeatures, DiskSwitch, ErrorKind, ExitReason, Guest,
    GuestAddress, HostError, LaunchPlan, Machine, Meter, ProcessIdentity, Removed, Save, SavePlan,
    SavedMemory, SavedPages, Secret, Start, VcpuState, Vmm, VmmIdentity, Welcome,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::{MEMORY_BASE, MEMORY_DIFF};
use icebox_engine::unit::{Bytes, Geometry};
use icebox_host::volume::qcow2::format::CLUSTER;
use tokio::sync::watch;

struct Vm {
    process: ProcessIdentity,
    disk: Disk,
    value: u64,
    token: String,
    geometry: Geometry,
    runs: bool,
    exit: watch::Sender<Option<ExitReason>>,
}

/// A disk that a VMM has open. It keeps the descriptor of the top, whatever happens to the name.
struct Disk {
    device: BlockDevice,
    top: File,
}

#[derive(Default)]
struct State {
    vms: BTreeMap<SandboxId, Vm>,
    last: u64,
}

/// All VMs. Cheap to clone; they outlive every engine.
#[derive(Clone)]
pub(crate) struct Guests {
    state: Arc<Mutex<State>>,
    identity: VmmIdentity,
}

impl Default for Guests {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            identity: VmmIdentity {
                name: "number".into(),
                version: "1".into(),
                machine: "number".into(),
                cpu: "number".into(),
                cpu_features: CpuFeatures::default(),
                accelerator: "none".into(),
                accelerator_reason: "a number needs none".into(),
            },
        }
    }
}

fn gone() -> HostError {
    HostError::new(ErrorKind::Gone, "the VMM has ended")
}

impl Guests {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What a running guest wrote last, after checking that its memory and its disk agree.
    pub(crate) fn value(&self, sandbox: &SandboxId) -> Result<u64, String> {
        let state = self.lock();
        let vm = state.vms.get(sandbox).ok_or("no VMM runs")?;
        let disk = vm.disk.read().map_err(|error| error.to_string())?;
        match (vm.runs, disk == vm.value) {
            (true, true) => Ok(disk),
            (false, _) => Err("its vCPUs stand still".into()),
            (_, false) => Err(format!("memory holds {} and the disk {disk}", vm.value)),
        }
    }

    pub(crate) fn list(&self) -> Vec<String> {
        let state = self.lock();
        let vms = state.vms.iter();
        vms.map(|(id, vm)| format!("vmm {id} runs={} on {:?}", vm.runs, vm.disk.device))
            .collect()
    }

    fn machine(&self, sandbox: &SandboxId, vm: &Vm) -> Arc<dyn Machine> {
        Arc::new(Number {
            guests: self.clone(),
            sandbox: sandbox.clone(),
            process: vm.process.clone(),
            exit: vm.exit.subscribe(),
        })
    }
}

impl State {
    /// A guest that runs does something.
    fn tick(&mut self, sandbox: &SandboxId) -> Result<(), HostError> {
        self.last += 1;
        if let Some(vm) = self.vms.get_mut(sandbox).filter(|vm| vm.runs) {
            vm.value = self.last;
            vm.disk
                .write(vm.value)
                .map_err(|error| HostError::io("write to the disk", error))?;
        }
        Ok(())
    }

    /// The running guest that accepts `token` does something.
    fn answer(&mut self, token: &Secret) -> Result<(), HostError> {
        let asked = self
            .vms
            .iter()
            .find(|(_, vm)| vm.runs && vm.token == token.expose())
            .map(|(id, _)| id.clone());
        let id =
            asked.ok_or_else(|| HostError::new(ErrorKind::Invalid, "no guest has that token"))?;
        self.tick(&id)
    }
}

#[async_trait]
impl Vmm for Guests {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: true,
            live_save: true,
            differential_save: true,
            lazy_restore: true,
            keeps_cpu_features: false,
            resize: false,
            max_vcpus: 8,
        }
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        let mut state = self.lock();
        if state.vms.contains_key(&plan.sandbox) {
            return Err(HostError::new(ErrorKind::AlreadyExists, "it runs already"));
        }
        let opened = Disk::open(&plan.disk)?;
        let disk = opened
            .read()
            .map_err(|error| HostError::io("read the disk", error))?;
        let (value, token, runs) = match &plan.start {
            Start::Boot { token, .. } => (disk, token.expose().to_owned(), true),
            Start::Restore {
                device_state,
                memory,
            } => {
                let (value, token) = load(device_state, plan.geometry)?;
                let pages = memory.diff.as_ref().unwrap_or(&memory.base);
                let pages = read_number(&File::open(pages).unwrap(), 0).unwrap();
                if pages != value || disk != value {
                    let message = format!(
                        "devices of {value}, memory of {pages}, disk of {disk}: not one instant"
                    );
                    return Err(HostError::new(ErrorKind::Invalid, message));
                }
                (value, token, false)
            }
        };
        let pid = u32::try_from(state.last).unwrap() + 1000;
        let vm = Vm {
            process: ProcessIdentity {
                pid,
                start_ticks: 1,
                boot_id: "this".into(),
            },
            disk: opened,
            value,
            token,
            geometry: plan.geometry,
            runs,
            exit: watch::Sender::new(None),
        };
        let machine = self.machine(&plan.sandbox, &vm);
        state.vms.insert(plan.sandbox.clone(), vm);
        state.tick(&plan.sandbox)?;
        Ok(machine)
    }

    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        let state = self.lock();
        let found = state.vms.get(sandbox);
        let found = found.filter(|vm| recorded.is_none_or(|process| *process == vm.process));
        Ok(found.map(|vm| self.machine(sandbox, vm)))
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        _recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        let Some(vm) = self.lock().vms.remove(sandbox) else {
            return Ok(Removed::AlreadyAbsent);
        };
        vm.exit.send_replace(Some(ExitReason {
            by_guest: false,
            reset: false,
            detail: "killed".into(),
        }));
        Ok(Removed::Removed)
    }
}

struct Number {
    guests: Guests,
    sandbox: SandboxId,
    process: ProcessIdentity,
    exit: watch::Receiver<Option<ExitReason>>,
}

impl Number {
    fn with<T>(&self, work: impl FnOnce(&mut Vm) -> T) -> Result<T, HostError> {
        let mut state = self.guests.lock();
        let vm = state.vms.get_mut(&self.sandbox);
        vm.filter(|vm| vm.process == self.process)
            .map(work)
            .ok_or_else(gone)
    }
}

/// What a number uses.
struct Nothing;

impl Meter for Nothing {
    fn read(&mut self) -> Result<Counters, HostError> {
        Ok(Counters::default())
    }
}

#[async_trait]
impl Machine for Number {
    fn process(&self) -> ProcessIdentity {
        self.process.clone()
    }

    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        Ok(Box::new(Nothing))
    }

    async fn probe(&self) -> Result<VcpuState, HostError> {
        self.with(|vm| match vm.runs {
            true => VcpuState::Running,
            false => VcpuState::Paused,
        })
    }

    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.with(|vm| vm.runs = false)
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        self.with(|vm| vm.runs = true)?;
        self.guests.lock().tick(&self.sandbox)
    }

    async fn save(&self, plan: SavePlan) -> Result<Save, HostError> {
        let (value, token, geometry) = self.with(|vm| (vm.value, vm.token.clone(), vm.geometry))?;
        let (pages, file) = match plan.restored_from {
            None => (SavedPages::Full, MEMORY_BASE),
            Some(_) => (SavedPages::Diff, MEMORY_DIFF),
        };
        let devices = format!("{value} {} {} {token}", geometry.vcpus, geometry.mem_mib);
        fs::write(&plan.device_state, devices)
            .and_then(|()| fs::write(plan.memory.join(file), value.to_be_bytes()))
            .map_err(|error| HostError::io("save", error))?;
        Ok(Save::Done(SavedMemory {
            pages,
            changed_pages: 1,
            zero_pages: 0,
            allocated: Bytes(8192),
        }))
    }

    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        Some(self)
    }

    async fn stalled(&self) {
        std::future::pending::<()>().await;
    }

    async fn exited(&self) -> ExitReason {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        ended.ok().and_then(|reason| reason.clone()).unwrap()
    }
}

#[async_trait]
impl DiskSwitch for Number {
    async fn switch(&self, to: &BlockDevice) -> Result<(), HostError> {
        let opened = Disk::open(to)?;
        self.with(|vm| vm.disk = opened)
    }

    async fn is_on(&self, head: &BlockDevice) -> Result<bool, HostError> {
        self.with(|vm| top(&vm.disk.device) == top(head))
    }
}

#[async_trait]
impl Guest for Guests {
    async fn is_working(&self, _at: GuestAddress, _token: &Secret) -> Result<bool, HostError> {
        Ok(false)
    }

    async fn welcome(&self, _at: GuestAddress, welcome: &Welcome) -> Result<(), HostError> {
        let mut state = self.lock();
        let vm = state.vms.get_mut(&welcome.sandbox).ok_or_else(gone)?;
        // A repeated welcome finds the new token in force already.
        let known = [welcome.current_token.expose(), welcome.token.expose()];
        if !vm.runs || !known.contains(&vm.token.as_str()) {
            return Err(HostError::new(
                ErrorKind::Invalid,
                "it does not answer to that",
            ));
        }
        welcome.token.expose().clone_into(&mut vm.token);
        state.tick(&welcome.sandbox)
    }

    async fn prepare(&self, _at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.lock().answer(token)
    }

    async fn set_clock(&self, _at: GuestAddress, _token: &Secret) -> Result<(), HostError> {
        Ok(())
    }

    async fn sync(&self, _at: GuestAddress, token: &Secret) -> Result<(), HostError> {
        self.lock().answer(token)
    }
}

/// Reads a device state.
fn load(path: &Path, expected: Geometry) -> Result<(u64, String), HostError> {
    let text = fs::read_to_string(path).map_err(|error| HostError::io("read devices", error))?;
    let words: Vec<_> = text.split(' ').collect();
    let [value, vcpus, mem_mib, token] = words[..] else {
        return Err(HostError::new(
            ErrorKind::Invalid,
            "that is no device state",
        ));
    };
    let geometry = Geometry {
        vcpus: vcpus.parse().unwrap(),
        mem_mib: mem_mib.parse().unwrap(),
    };
    assert_eq!(geometry, expected);
    Ok((value.parse().unwrap(), token.to_owned()))
}

fn top(disk: &BlockDevice) -> &Path {
    match disk {
        BlockDevice::Raw { path } | BlockDevice::Qcow2 { head: path, .. } => path,
    }
}

fn read_number(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

// An overlay in which only the first block is ever written: its L2 table and its one cluster follow what an empty
// overlay has, whose L1 table is the fourth cluster.
const L1: u64 = 3 * CLUSTER;
const L2: u64 = 4 * CLUSTER;
const DATA: u64 = 5 * CLUSTER;
const COPIED: u64 = 1 << 63;

impl Disk {
    fn open(device: &BlockDevice) -> Result<Self, HostError> {
        let top = OpenOptions::new().read(true).write(true).open(top(device));
        Ok(Self {
            device: device.clone(),
            top: top.map_err(|error| HostError::io("open the disk", error))?,
        })
    }

    /// The number in the first block.
    fn read(&self) -> io::Result<u64> {
        let BlockDevice::Qcow2 { layers, base, .. } = &self.device else {
            return read_number(&self.top, 0);
        };
        if read_number(&self.top, L1)? != 0 {
            return read_number(&self.top, DATA);
        }
        for path in layers {
            let overlay = File::open(path)?;
            if read_number(&overlay, L1)? != 0 {
                return read_number(&overlay, DATA);
            }
        }
        read_number(&File::open(base)?, 0)
    }

    /// Writes a number to the first block.
    fn write(&self, value: u64) -> io::Result<()> {
        let BlockDevice::Qcow2 { .. } = self.device else {
            return self.top.write_all_at(&value.to_be_bytes(), 0);
        };
        self.top.set_len(DATA + CLUSTER)?;
        self.top.write_all_at(&value.to_be_bytes(), DATA)?;
        self.top.write_all_at(&(DATA | COPIED).to_be_bytes(), L2)?;
        self.top.write_all_at(&1_u64.to_be_bytes(), L2 + 8)?;
        self.top.write_all_at(&(L2 | COPIED).to_be_bytes(), L1)
    }
}
