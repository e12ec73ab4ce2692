//! Cloud Hypervisor, 52 or newer: PCI virtio devices, under KVM.
//!
//! ```text
//!   boot     config (plan → box, description) → launcher → it listens → vm.create, vm.add-net with the tap, vm.boot
//!   save     vm.snapshot into a directory of its own → state and pages that are not zero, copied
//!   restore  description, state and memory at constant paths → vm.restore with the tap
//! ```
//!
//! Decisions worth knowing:
//! - Its API is all that it is told by, not its command line: that is public, and holds no descriptor that the API could
//!   name. Taps go with requests.
//! - It writes a save by itself, all memory of it. A restored guest loads it in the background where the host lets the
//!   box have a userfaultfd; else before it runs.
//! - It can switch no disks, so its sandboxes need a volume driver whose heads the host freezes.
//! - A guest's write that finds no room is an error that the guest sees: nothing stands still for it.

mod config;
pub(super) mod machine;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    Capabilities, ErrorKind, HostError, LaunchPlan, Machine, ProcessIdentity, Removed, Start, Vmm,
    VmmIdentity,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::Layout;
use tokio::process::Command;

use self::config::{BOOT, CONFIG, Common, SOCKET, STATE};
use self::machine::{ChMachine, ChWays};
use crate::blocking::blocking;
use crate::boxes::HostBoxes;
use crate::launcher::{Launcher, Process};
use crate::network;
use crate::vmm::api::{Api, Dialect, QUICK};
use crate::vmm::console::{CONSOLE, Outputs, STDERR};
use crate::vmm::own_disk::OwnDisk;
use crate::vmm::own_save::{SaveArea, expose};
use crate::vmm::processes::{self, Processes};
use crate::vmm::{check_memory, check_undivided, cpu, program, trial, userfault};

/// What manifests and users call it, and what its program is called.
pub const NAME: &str = "cloud-hypervisor";

/// Its API.
pub(super) const DIALECT: Dialect = Dialect {
    name: "Cloud Hypervisor",
    prefix: "/api/v1/",
    reason,
};

/// The words of a refusal: since version 52 a list of reasons, each the cause of the one before.
fn reason(body: &[u8]) -> Option<String> {
    let reasons: Vec<String> = serde_json::from_slice(body).ok()?;
    Some(reasons.join(": "))
}

/// The oldest that loads memory in the background, and whose refusals can be told apart.
const OLDEST: (u32, u32) = (52, 0);
const HINT: &str = "take version 52 or newer from github.com/cloud-hypervisor/cloud-hypervisor/releases (the file cloud-hypervisor-static), put it into PATH as cloud-hypervisor, or name it with `cloud_hypervisor` in the settings";
/// From exec to the first answer: some milliseconds on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// Loading a kernel, or all of a memory where none is loaded in the background. With the start, less than the engine gives a
/// launch.
const BEGIN_DEADLINE: Duration = Duration::from_secs(38);
/// The most virtual CPUs of a guest: as with other VMMs.
const MAX_VCPUS: u8 = 32;
/// The file that remembers what KVM was proven with.
const PROVEN: &str = "cloud-hypervisor-works";

/// What a daemon decides about Cloud Hypervisor.
#[derive(Clone, Debug)]
pub struct CloudHypervisorConfig {
    /// The program, if it is not to be looked for.
    pub program: Option<PathBuf>,
    /// A kernel to try it with, if one has been imported.
    pub probe_kernel: Option<PathBuf>,
    /// How VMMs are put into their boxes.
    pub launcher: Launcher,
}

/// The driver.
#[derive(Debug)]
pub struct CloudHypervisor {
    common: Common,
    identity: VmmIdentity,
    launcher: Launcher,
    layout: Layout,
    boxes: Arc<HostBoxes>,
    processes: Processes,
}

impl CloudHypervisor {
    /// Finds Cloud Hypervisor, and proves that it runs a guest here, which takes a guest's boot; none if it was seen to
    /// since the machine booted.
    ///
    /// # Errors
    /// It is not there, too old, or runs no guest: with a hint.
    pub async fn find(
        config: CloudHypervisorConfig,
        layout: Layout,
        boxes: Arc<HostBoxes>,
    ) -> Result<Self, HostError> {
        let program =
            program::find(config.program.as_deref(), NAME).map_err(|error| error.hint(HINT))?;
        let version = version(&program).await?;
        let kernel = config.probe_kernel.as_deref();
        let accelerator_reason = prove(&program, &version, kernel, layout.run()).await?;
        let lazy = userfault::is_there();
        let identity = VmmIdentity {
            name: NAME.into(),
            version,
            machine: format!("pci revision {}", config::MACHINE_REVISION),
            cpu: cpu::host_model()
                .map_err(|error| HostError::io("read the host's CPU model", error))?,
            cpu_features: cpu::offered_by_kvm()
                .map_err(|error| HostError::io("ask KVM for the features of CPUs", error))?,
            accelerator: "kvm".into(),
            accelerator_reason,
        };
        Ok(Self {
            common: Common { program, lazy },
            identity,
            launcher: config.launcher,
            processes: Processes::new(layout.clone(), Arc::clone(&boxes)),
            layout,
            boxes,
        })
    }

    async fn start(&self, plan: &LaunchPlan) -> Result<ChMachine, HostError> {
        if plan.geometry.vcpus == 0 || plan.geometry.vcpus > MAX_VCPUS || plan.geometry.mem_mib == 0
        {
            return Err(HostError::new(
                ErrorKind::Invalid,
                format!("Cloud Hypervisor runs guests with 1 to {MAX_VCPUS} CPUs and some memory"),
            ));
        }
        check_memory(plan)?;
        check_undivided(DIALECT.name, plan)?;
        let disk = OwnDisk::look_at(DIALECT.name, &plan.disk)?;
        let runtime = self.layout.vm(&plan.sandbox);
        let save_area = self.layout.save_area(&plan.sandbox);
        let uid = self.boxes.uid(plan.slot);
        let outputs = prepare(plan, &disk, &runtime, &save_area, uid).map_err(|error| {
            HostError::io(
                format!("prepare the box of sandbox {}", plan.sandbox),
                error,
            )
        })?;
        let spec = config::box_spec(
            &self.common,
            plan,
            &disk,
            &runtime,
            &save_area,
            uid,
            self.boxes.cgroups().join_files(&plan.sandbox),
        );
        let process = self.launcher.launch(&spec).await?;
        let is_loaded = !self.common.lazy || matches!(plan.start, Start::Boot { .. });
        Ok(self.watch(&plan.sandbox, process, outputs, is_loaded))
    }

    fn watch(
        &self,
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        is_loaded: bool,
    ) -> ChMachine {
        let log = self.layout.console_log(sandbox);
        let api = Api::new(&DIALECT, self.layout.vm(sandbox).join(SOCKET));
        let save_area = SaveArea::new(self.layout.save_area(sandbox));
        let ways = ChWays::new(is_loaded);
        ChMachine::watch(sandbox, process, outputs, log, api, save_area, ways)
    }

    /// Brings a machine that has just started to where a launch ends.
    async fn begin(&self, plan: &LaunchPlan, machine: &ChMachine) -> Result<(), HostError> {
        let (namespace, tap) = (plan.network.namespace.clone(), plan.network.tap.clone());
        let tap = blocking(move || network::open_tap(&namespace, &tap)).await?;
        let disk = OwnDisk::look_at(DIALECT.name, &plan.disk)?;
        let api = machine.api();
        let ready = async { api.get("vmm.ping", START_DEADLINE).await.map(drop) };
        machine.vmm().or_its_end("start", ready).await?;
        let runtime = self.layout.vm(&plan.sandbox);
        let (operation, files): (_, &[&str]) = match &plan.start {
            Start::Boot { token, .. } => {
                let created = config::for_boot(plan, &disk, token.expose());
                let boot = async {
                    api.put("vm.create", Some(&created), QUICK).await?;
                    let card = config::network_card(plan);
                    api.put_with("vm.add-net", Some(&card), vec![tap], QUICK)
                        .await?;
                    api.put("vm.boot", None, BEGIN_DEADLINE).await
                };
                machine.vmm().or_its_end("boot", boot).await?;
                ("boot", &["boot/kernel", "boot/initramfs"])
            }
            Start::Restore { .. } => {
                let asked = config::restore_request(&self.common);
                let restored = api.put_with("vm.restore", Some(&asked), vec![tap], BEGIN_DEADLINE);
                machine.vmm().or_its_end("restore", restored).await?;
                ("restore", &[CONFIG, STATE])
            }
        };
        for file in files {
            fs::remove_file(runtime.join(file)).map_err(|error| {
                HostError::io(
                    format!(
                        "remove {file} after the {operation} of sandbox {}",
                        plan.sandbox
                    ),
                    error,
                )
            })?;
        }
        Ok(())
    }
}

#[async_trait]
impl Vmm for CloudHypervisor {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: false,
            live_save: true,
            differential_save: false,
            lazy_restore: self.common.lazy,
            keeps_cpu_features: true,
            resize: false,
            max_vcpus: MAX_VCPUS,
        }
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        let machine = self.start(&plan).await?;
        match self.begin(&plan, &machine).await {
            Ok(()) => Ok(Arc::new(machine)),
            Err(error) => {
                processes::end(machine.vmm().process()).await?;
                Err(error)
            }
        }
    }

    async fn adopt(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Option<Arc<dyn Machine>>, HostError> {
        let Some(process) = self.processes.running(sandbox, recorded)? else {
            return Ok(None);
        };
        let outputs = Outputs::open(&self.layout.vm(sandbox))
            .map_err(|error| HostError::io(format!("find the VMM of sandbox {sandbox}"), error))?;
        let machine = self.watch(sandbox, process, outputs, !self.common.lazy);
        Ok(Some(Arc::new(machine)))
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        self.processes
            .kill(sandbox, recorded, &[SOCKET, CONSOLE, STDERR, CONFIG, STATE])
            .await
    }
}

/// Asks for the version.
async fn version(program: &Path) -> Result<String, HostError> {
    let unsupported = |message| HostError::new(ErrorKind::Unsupported, message).hint(HINT);
    let said = program::version(program).await?;
    let version = said
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cloud-hypervisor v"))
        .ok_or_else(|| unsupported(format!("{} is not Cloud Hypervisor", program.display())))?;
    match program::major_and_minor(version) {
        Some(found) if found >= OLDEST => Ok(version.to_owned()),
        _ => Err(unsupported(format!(
            "Cloud Hypervisor {version} is too old: {} is needed",
            OLDEST.0
        ))),
    }
}

/// Boots a kernel up to where it asks for its root file system, unless that was done since this machine booted. Says what
/// it did.
async fn prove(
    program: &Path,
    version: &str,
    kernel: Option<&Path>,
    run: &Path,
) -> Result<String, HostError> {
    let failed = |why: String| {
        HostError::new(
            ErrorKind::Unsupported,
            format!("Cloud Hypervisor runs no guest here: {why}"),
        )
        .hint("it needs KVM: enable (nested) virtualisation; `icebox doctor` says what runs here instead")
    };
    trial::kvm_opens().map_err(failed)?;
    let Some(kernel) = kernel else {
        return Ok("KVM can be opened; no kernel was there to try".into());
    };
    let proof = trial::Proof::of(program, version, Some(kernel)).map_err(failed)?;
    let reason = "KVM runs the sandboxes' kernel".to_owned();
    if proof.is_known(run, PROVEN) {
        return Ok(reason);
    }
    let mut command = Command::new(program);
    command.arg("--kernel").arg(kernel);
    command.args(["--cmdline", trial::COMMAND_LINE]);
    command.args(["--cpus", "boot=1", "--memory", "size=256M"]);
    command.args(["--serial", "tty", "--console", "off"]);
    trial::watch(command, trial::NO_ROOT, trial::SILENCE_MAX)
        .await
        .map_err(failed)?;
    proof.remember(run, PROVEN);
    Ok(reason)
}

/// Makes what a box is made of, as its uid can use it.
fn prepare(
    plan: &LaunchPlan,
    disk: &OwnDisk,
    runtime: &Path,
    save_area: &Path,
    uid: u32,
) -> io::Result<Outputs> {
    let outputs = Outputs::create(runtime)?;
    SaveArea::new(save_area.to_owned()).create(uid)?;
    disk.hand_over(uid)?;
    match &plan.start {
        Start::Boot { .. } => {
            let boot = runtime.join(BOOT);
            if boot.exists() {
                fs::remove_dir_all(&boot)?;
            }
            DirBuilder::new().mode(0o755).create(&boot)?;
            for name in ["kernel", "initramfs"] {
                symlink(Path::new("..").join(name), boot.join(name))?;
            }
        }
        Start::Restore { device_state, .. } => {
            let config = config::for_restore(plan, disk).to_string();
            expose(&runtime.join(CONFIG), config.as_bytes())?;
            expose(&runtime.join(STATE), &fs::read(device_state)?)?;
        }
    }
    Ok(outputs)
}
