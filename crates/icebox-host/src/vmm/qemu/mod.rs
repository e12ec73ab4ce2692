//! QEMU, 8.2 or newer: the `microvm` machine with virtio devices, under KVM or TCG.
//!
//! ```text
//!   launch   command (plan → arguments, descriptors, binds) → launcher → QEMU in its box → monitor
//!   save     device state by QMP through a pipe, changed pages from /proc (memory)
//!   restore  QEMU over the memory's base, mapped privately; the diff written into it; then device state
//! ```
//!
//! Decisions worth knowing:
//! - Device state is saved with `xen-save-devices-state`, the one QMP command that saves devices without memory. It
//!   is independent of Xen, takes a millisecond, and what it writes loads through `-incoming`.
//! - A cold boot runs on anonymous memory, a restore on the memory's base. So a first save writes what the guest ever
//!   touched, and later ones what it changed.
//! - `vmgenid` does not exist on `microvm`: after a restore the agent is told who it is instead, before anything else
//!   runs.
//!
//! What it does not do: networks (`network`), limits (`boxes`), disk formats (`volume`).

mod accelerator;
mod binary;
mod clock;
mod command;
mod disk;
mod machine;
mod qmp;
mod sys;

use std::io;
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

pub use accelerator::{Accelerator, AcceleratorChoice};

use self::binary::Binary;
use self::clock::Calibration;
use self::command::{BOOT_CONFIG, Common, SOCKET};
use self::machine::QemuMachine;
use crate::boxes::HostBoxes;
use crate::launcher::Launcher;
use crate::vmm::check_memory;
use crate::vmm::console::{CONSOLE, Outputs, STDERR};
use crate::vmm::processes::{self, Processes};

/// What manifests and users call it.
pub const NAME: &str = "qemu";

/// From exec to the monitor's greeting: 30 ms on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The most virtual CPUs of a guest: what `microvm` has been tried with.
const MAX_VCPUS: u8 = 32;

/// What a daemon decides about QEMU.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The emulator, if it is not where distributions put it.
    pub program: Option<PathBuf>,
    /// What runs guest code.
    pub accelerator: AcceleratorChoice,
    /// A kernel to try KVM with, if one has been imported.
    pub probe_kernel: Option<PathBuf>,
    /// How VMMs are put into their boxes.
    pub launcher: Launcher,
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    common: Common,
    identity: VmmIdentity,
    launcher: Launcher,
    layout: Layout,
    boxes: Arc<HostBoxes>,
    processes: Processes,
    calibration: Calibration,
}

impl Qemu {
    /// Finds QEMU and the accelerator that works here. Takes as long as the accelerator's probe: up to ten seconds
    /// where `/dev/kvm` exists but does not run guests, and none where it was seen to since the machine booted.
    ///
    /// # Errors
    /// QEMU is missing or too old, or the accelerator that was asked for does not work: with a hint.
    pub async fn find(
        config: QemuConfig,
        layout: Layout,
        boxes: Arc<HostBoxes>,
    ) -> Result<Self, HostError> {
        let calibration = Calibration::begin();
        let binary = Binary::find(config.program.as_deref()).await?;
        let chosen = accelerator::choose(
            config.accelerator,
            &binary,
            config.probe_kernel.as_deref(),
            layout.run(),
        )
        .await?;
        let identity = VmmIdentity {
            name: NAME.into(),
            version: binary.version,
            machine: format!(
                "{} revision {}",
                command::machine(chosen.accelerator),
                command::MACHINE_REVISION
            ),
            cpu: accelerator::cpu_model(chosen.accelerator)
                .map_err(|error| HostError::io("read the host's CPU model", error))?,
            cpu_features: accelerator::cpu_features(chosen.accelerator)
                .map_err(|error| HostError::io("ask KVM for the features of CPUs", error))?,
            accelerator: chosen.accelerator.to_string(),
            accelerator_reason: chosen.reason,
        };
        Ok(Self {
            common: Common {
                program: binary.path,
                accelerator: chosen.accelerator,
            },
            identity,
            launcher: config.launcher,
            processes: Processes::new(layout.clone(), Arc::clone(&boxes)),
            layout,
            boxes,
            calibration,
        })
    }

    async fn start(&self, plan: &LaunchPlan, runtime: &Path) -> Result<QemuMachine, HostError> {
        if plan.geometry.vcpus == 0 || plan.geometry.vcpus > MAX_VCPUS || plan.geometry.mem_mib == 0
        {
            return Err(HostError::new(
                ErrorKind::Invalid,
                format!("QEMU runs guests with 1 to {MAX_VCPUS} CPUs and some memory"),
            ));
        }
        check_memory(plan)?;
        let storage = disk::look_at(&plan.disk)?;
        let outputs = Outputs::create(runtime).map_err(|error| {
            HostError::io(
                format!("prepare runtime directory {}", runtime.display()),
                error,
            )
        })?;
        if let Start::Boot { token, .. } = &plan.start {
            let tsc_khz = self.calibration.khz().await;
            let (accelerator, vcpus) = (self.common.accelerator, plan.geometry.vcpus);
            let line = command::kernel_command_line(accelerator, vcpus, tsc_khz, token.expose());
            write_boot_config(&runtime.join(BOOT_CONFIG), &command::boot_config(&line))
                .map_err(|error| HostError::io("write the boot configuration", error))?;
        }
        let spec = command::box_spec(
            &self.common,
            plan,
            runtime,
            self.boxes.uid(plan.slot),
            storage,
            self.boxes.cgroups().join_files(&plan.sandbox),
        );
        let process = self.launcher.launch(&spec).await?;
        Ok(QemuMachine::watch(
            &plan.sandbox,
            process,
            outputs,
            &self.layout,
        ))
    }

    /// Brings a machine that has just started to where a launch ends.
    async fn begin(&self, plan: &LaunchPlan, machine: &QemuMachine) -> Result<(), HostError> {
        machine.answers(START_DEADLINE).await?;
        match &plan.start {
            Start::Boot { .. } => Ok(()),
            Start::Restore { memory, .. } => machine.restore(memory).await,
        }
    }
}

#[async_trait]
impl Vmm for Qemu {
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
            max_vcpus: MAX_VCPUS,
        }
    }

    async fn launch(&self, plan: LaunchPlan) -> Result<Arc<dyn Machine>, HostError> {
        let runtime = self.layout.vm(&plan.sandbox);
        let machine = self.start(&plan, &runtime).await?;
        match self.begin(&plan, &machine).await {
            Ok(()) => Ok(Arc::new(machine)),
            Err(error) => {
                processes::end(machine.watched()).await?;
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
        let machine = QemuMachine::watch(sandbox, process, outputs, &self.layout);
        // To hear the guest's end. A monitor that does not answer now is no reason to lose the machine: whatever is
        // asked of it later has its own deadline.
        if let Err(error) = machine.answers(qmp::QUICK).await {
            tracing::warn!(%sandbox, %error, "adopted a VMM that does not answer");
        }
        Ok(Some(Arc::new(machine)))
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        self.processes
            .kill(sandbox, recorded, &[SOCKET, CONSOLE, STDERR, BOOT_CONFIG])
            .await
    }
}

/// Readable by the box's uid, which sees it under a bind mount; nobody else on the host can enter its directory.
fn write_boot_config(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    std::fs::write(path, text)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444))
}
