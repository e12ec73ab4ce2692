//! A VMM in memory.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Capabilities, Counters, DiskSwitch, ErrorKind, ExitReason, HostError, LaunchPlan,
    Machine, MemorySource, Meter, ProcessIdentity, Removed, Save, SavePlan, SavedMemory,
    SavedPages, Start, VcpuState, Vmm, VmmIdentity,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::{MEMORY_BASE, MEMORY_DIFF};
use icebox_engine::unit::Bytes;
use tokio::sync::watch;

use crate::volume::{head_of, layers_of};
use crate::world::{File, State, Vcpus, Vm, World};

pub(crate) struct SimVmm {
    world: World,
    identity: VmmIdentity,
}

struct SimMachine {
    world: World,
    sandbox: SandboxId,
    process: ProcessIdentity,
    exit: watch::Receiver<Option<ExitReason>>,
    stalled: watch::Receiver<bool>,
}

impl SimVmm {
    pub(crate) fn new(world: World) -> Self {
        let (version, cpu_features) = {
            let state = world.lock();
            (state.vmm_version.clone(), state.cpu_features.clone())
        };
        let identity = VmmIdentity {
            name: "sim".into(),
            version: version.unwrap_or_else(|| "1.0".into()),
            machine: "sim".into(),
            cpu: "sim".into(),
            cpu_features,
            accelerator: "none".into(),
            accelerator_reason: "a simulation needs none".into(),
        };
        Self { world, identity }
    }

    fn machine(&self, sandbox: &SandboxId, vm: &Vm) -> Arc<dyn Machine> {
        Arc::new(SimMachine {
            world: self.world.clone(),
            sandbox: sandbox.clone(),
            process: vm.process.clone(),
            exit: vm.exit.subscribe(),
            stalled: vm.stalled.subscribe(),
        })
    }
}

impl State {
    /// The number and the page that a memory holds.
    fn memory(&mut self, source: &MemorySource) -> Result<(u64, u64), HostError> {
        let no_memory = || HostError::new(ErrorKind::Invalid, "that is no memory");
        let File::Memory { value, page } = self.read(&source.base)? else {
            return Err(no_memory());
        };
        match source.diff.as_ref().map(|diff| self.read(diff)) {
            None => Ok((value, page)),
            Some(changes) => match changes? {
                File::Changes {
                    value,
                    page: changed,
                } => Ok((value, changed.unwrap_or(page))),
                _ => Err(no_memory()),
            },
        }
    }
}

/// How a VMM ends that is killed.
pub(crate) fn killed() -> ExitReason {
    ExitReason {
        by_guest: false,
        reset: false,
        detail: "killed by signal 9".into(),
    }
}

fn gone() -> HostError {
    HostError::new(ErrorKind::Gone, "the VMM has ended")
}

#[async_trait]
impl Vmm for SimVmm {
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
        let mut state = self.world.lock();
        state.tick();
        if state.vms.contains_key(&plan.sandbox) {
            return Err(HostError::new(
                ErrorKind::AlreadyExists,
                "a VMM of this sandbox runs already",
            ));
        }
        if !state.boxes.contains(&plan.sandbox) || !state.networks.contains(&plan.slot) {
            return Err(HostError::new(
                ErrorKind::NotFound,
                "the VMM has no box or no network",
            ));
        }
        let head = head_of(&plan.disk)?;
        let disk = state.resolve(&head)?;
        let opened = layers_of(&plan.disk)?;
        let (value, page, token, vcpus) = match &plan.start {
            Start::Boot { token, .. } => (disk, 0, token.expose().to_owned(), Vcpus::Running),
            Start::Restore {
                device_state,
                memory,
            } => {
                let File::Devices {
                    value,
                    token,
                    geometry,
                } = state.read(device_state)?
                else {
                    return Err(HostError::new(
                        ErrorKind::Invalid,
                        "that is no device state",
                    ));
                };
                let (held, page) = state.memory(memory)?;
                if held != value || disk != value || geometry != plan.geometry {
                    let message = format!(
                        "devices of {value}, memory of {held}, disk of {disk}: not one instant"
                    );
                    return Err(HostError::new(ErrorKind::Invalid, message));
                }
                (value, page, token, Vcpus::Paused)
            }
        };
        state.next_pid += 1;
        let process = ProcessIdentity {
            pid: state.next_pid,
            start_ticks: u64::from(state.next_pid),
            boot_id: "sim".into(),
        };
        let exit = watch::Sender::new(None);
        let vm = Vm {
            process,
            vcpus,
            knows_time: false,
            wedged: false,
            head,
            opened,
            value,
            page,
            token,
            geometry: plan.geometry,
            cpu: Duration::ZERO,
            exit,
            stalled: watch::Sender::new(false),
        };
        let machine = self.machine(&plan.sandbox, &vm);
        state.vms.insert(plan.sandbox.clone(), vm);
        if matches!(plan.start, Start::Boot { .. }) {
            state.reset_if_asked(&plan.sandbox);
        }
        Ok(machine)
    }

    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        let state = self.world.lock();
        let found = state
            .vms
            .get(sandbox)
            .filter(|vm| recorded.is_none_or(|process| *process == vm.process));
        Ok(found.map(|vm| self.machine(sandbox, vm)))
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        _recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        let was_there = state.end_vm(sandbox, killed());
        Ok(if was_there {
            Removed::Removed
        } else {
            Removed::AlreadyAbsent
        })
    }
}

impl SimMachine {
    /// Does something with the VMM, which answers unless it is wedged.
    async fn with<T>(&self, work: impl FnOnce(&mut Vm) -> T) -> Result<T, HostError> {
        let answer = {
            let mut state = self.world.lock();
            state.tick();
            let vm = state
                .vms
                .get_mut(&self.sandbox)
                .filter(|vm| vm.process == self.process)
                .ok_or_else(gone)?;
            if vm.wedged { None } else { Some(work(vm)) }
        };
        match answer {
            Some(answer) => Ok(answer),
            None => std::future::pending().await,
        }
    }
}

/// Measures one VMM. Its guest does nothing for it.
struct SimMeter {
    world: World,
    sandbox: SandboxId,
    process: ProcessIdentity,
}

impl Meter for SimMeter {
    fn read(&mut self) -> Result<Counters, HostError> {
        let state = self.world.lock();
        let vm = state.vms.get(&self.sandbox);
        let vm = vm
            .filter(|vm| vm.process == self.process)
            .ok_or_else(gone)?;
        Ok(Counters {
            cpu: vm.cpu,
            memory: vm.geometry.memory(),
            ..Counters::default()
        })
    }
}

#[async_trait]
impl Machine for SimMachine {
    fn process(&self) -> ProcessIdentity {
        self.process.clone()
    }

    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        Ok(Box::new(SimMeter {
            world: self.world.clone(),
            sandbox: self.sandbox.clone(),
            process: self.process.clone(),
        }))
    }

    async fn probe(&self) -> Result<VcpuState, HostError> {
        self.with(|vm| match vm.vcpus {
            Vcpus::Running => VcpuState::Running,
            Vcpus::Paused => VcpuState::Paused,
            Vcpus::Stalled => VcpuState::Stalled,
        })
        .await
    }

    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.with(|vm| {
            if vm.vcpus == Vcpus::Running {
                vm.vcpus = Vcpus::Paused;
                vm.knows_time = false;
            }
        })
        .await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        if self.world.lock().vcpus_stuck {
            return Err(HostError::new(
                ErrorKind::Other,
                "the VMM refuses to continue",
            ));
        }
        self.with(|vm| {
            vm.vcpus = Vcpus::Running;
            vm.stalled.send_replace(false);
        })
        .await?;
        self.world.lock().reset_if_asked(&self.sandbox);
        Ok(())
    }

    /// The memory is written once the guest may run again: what it is then does not count.
    async fn save(&self, plan: SavePlan) -> Result<Save, HostError> {
        let (value, page, token, geometry) = self
            .with(|vm| (vm.value, vm.page, vm.token.clone(), vm.geometry))
            .await?;
        let mut state = self.world.lock();
        let (pages, file, memory) = match plan.restored_from {
            None => (SavedPages::Full, MEMORY_BASE, File::Memory { value, page }),
            Some(from) => {
                let full = MemorySource { diff: None, ..from };
                let changed = state.memory(&full)?.1 != page;
                let page = changed.then_some(page);
                (SavedPages::Diff, MEMORY_DIFF, File::Changes { value, page })
            }
        };
        if std::mem::take(&mut state.save_fails) {
            return Err(HostError::new(
                ErrorKind::Exhausted,
                "no space for the memory",
            ));
        }
        state.write(
            &plan.device_state,
            File::Devices {
                value,
                token,
                geometry,
            },
        )?;
        drop(state);
        let world = self.world.clone();
        Ok(Save::Rest(Box::pin(async move {
            world.lock().write(&plan.memory.join(file), memory)?;
            Ok(SavedMemory {
                pages,
                changed_pages: 1,
                zero_pages: 0,
                allocated: Bytes(8192),
            })
        })))
    }

    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        Some(self)
    }

    async fn stalled(&self) {
        // The sender goes with the VMM, whose end is told elsewhere.
        if self
            .stalled
            .clone()
            .wait_for(|stalled| *stalled)
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    async fn exited(&self) -> ExitReason {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(reason) => reason
                .clone()
                .unwrap_or_else(|| unreachable!("it was waited for")),
            Err(_) => ExitReason {
                by_guest: false,
                reset: false,
                detail: "the VMM has ended".into(),
            },
        }
    }
}

#[async_trait]
impl DiskSwitch for SimMachine {
    async fn switch(&self, to: &BlockDevice) -> Result<(), HostError> {
        let (to, layers) = (head_of(to)?, layers_of(to)?);
        self.with(|_| ()).await?;
        let mut state = self.world.lock();
        let from = state.vms.get(&self.sandbox).ok_or_else(gone)?.head.clone();
        if from == to {
            return Ok(());
        }
        // What the guest reads through the new head from now on.
        let content = state.resolve(&from)?;
        let head = state.heads.get_mut(&to).ok_or_else(|| {
            HostError::new(ErrorKind::NotFound, format!("head {to} does not exist"))
        })?;
        head.value = Some(content);
        let vm = state.vms.get_mut(&self.sandbox).ok_or_else(gone)?;
        vm.head = to;
        // The head that it wrote to so far is the newest layer from now on.
        vm.opened.extend(layers.into_iter().next());
        Ok(())
    }

    async fn is_on(&self, head: &BlockDevice) -> Result<bool, HostError> {
        let head = head_of(head)?;
        self.with(|vm| vm.head == head).await
    }
}
