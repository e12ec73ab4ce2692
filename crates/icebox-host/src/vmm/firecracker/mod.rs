//! Firecracker, 1.14 or newer: MMIO virtio devices, under KVM.
//!
//! ```text
//!   boot     config (plan → box, requests) → launcher → it listens → /machine-config … /actions
//!   save     /snapshot/create into a directory of its own → state, copied; memory, with the guest's own pages
//!   restore  state and memory at constant paths → /snapshot/load with the slot's tap
//! ```
//!
//! Decisions worth knowing:
//! - The box does what its jailer does, and more: docs/decisions/virtual-machines.md compares them.
//! - It makes its socket itself, so it gets a directory for that, which is root's before the guest runs.
//! - It maps the one file of a memory that it is given: memories are always whole ([`memory::save_flat`]).
//! - It loads ELF kernels only; what is compressed in others is unpacked once, beside them.
//! - It can switch no disks, so its sandboxes need a volume driver whose heads the host freezes.
//! - A guest's write that finds no room is an error that the guest sees: nothing stands still for it.
//!
//! - Its memory is mapped from its file, which loads it lazily, and shares what is only read between all guests on it. If it
//!   is asked for, a pager fills it instead, a process beside it: [`crate::pager`].
//!
//! [`memory::save_flat`]: super::memory::save_flat

mod config;
pub(super) mod machine;

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    Capabilities, ErrorKind, HostError, LaunchPlan, Machine, ProcessIdentity, Removed, Start, Vmm,
    VmmIdentity,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::Layout;
use object::read::elf::FileHeader as _;
use object::{Endianness, elf};
use serde_json::Value;
use tokio::process::Command;

use self::config::{API, PAGER_SOCKET, SOCKET, STATE};
use self::machine::{FirecrackerMachine, FirecrackerWays, Lost};
use crate::blocking::blocking;
use crate::boxes::HostBoxes;
use crate::guest_image::vmlinux;
use crate::launcher::{Launcher, Process};
use crate::pager::{self, PAGER_STATE, PagerPlan};
use crate::vmm::api::{Api, ApiError, Dialect, QUICK};
use crate::vmm::console::{CONSOLE, Outputs, STDERR};
use crate::vmm::own_disk::OwnDisk;
use crate::vmm::own_save::{SaveArea, create_for, expose};
use crate::vmm::processes::{self, Processes};
use crate::vmm::{check_memory, check_undivided, cpu, program, trial, userfault};

/// What manifests and users call it, and what its program is called.
pub const NAME: &str = "firecracker";

/// Its API.
pub(super) const DIALECT: Dialect = Dialect {
    name: "Firecracker",
    prefix: "",
    reason,
};

/// The words of a refusal.
fn reason(body: &[u8]) -> Option<String> {
    let said: Value = serde_json::from_slice(body).ok()?;
    said["fault_message"].as_str().map(str::to_owned)
}

/// The oldest with free page reporting.
const OLDEST: (u32, u32) = (1, 14);
const HINT: &str = "take version 1.14 or newer from github.com/firecracker-microvm/firecracker/releases (the file firecracker-v…-x86_64 in its archive), put it into PATH as firecracker, or name it with `firecracker` in the settings";
/// From exec to its socket: some milliseconds on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// Loading a kernel, or a machine. With the start, less than the engine gives a launch.
const BEGIN_DEADLINE: Duration = Duration::from_secs(30);
/// The most virtual CPUs of a guest: its own limit.
const MAX_VCPUS: u8 = 32;
/// The file that remembers what KVM was proven with, by a Firecracker that filters its own system calls.
const PROVEN: &str = "firecracker-works";
/// The same, of one that does not.
const PROVEN_UNFILTERED: &str = "firecracker-works-unfiltered";

/// What a daemon decides about Firecracker.
#[derive(Clone, Debug)]
pub struct FirecrackerConfig {
    /// The program, if it is not to be looked for.
    pub program: Option<PathBuf>,
    /// A kernel to try it with, if one has been imported.
    pub probe_kernel: Option<PathBuf>,
    /// How VMMs are put into their boxes.
    pub launcher: Launcher,
    /// Whether memory of what is restored is filled by a process of its own, not mapped from its file.
    pub pager: bool,
}

/// The driver.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    /// Whether a save costs what has changed.
    shares_blocks: bool,
    /// Whether memory is filled, not mapped.
    pager: bool,
    identity: VmmIdentity,
    launcher: Launcher,
    layout: Layout,
    boxes: Arc<HostBoxes>,
    processes: Processes,
}

impl Firecracker {
    /// Finds Firecracker, and proves that it runs a guest here, which takes a guest's boot; none if it was seen to since the
    /// machine booted.
    ///
    /// # Errors
    /// It is not there, too old, or runs no guest: with a hint.
    pub async fn find(
        config: FirecrackerConfig,
        layout: Layout,
        boxes: Arc<HostBoxes>,
    ) -> Result<Self, HostError> {
        let program =
            program::find(config.program.as_deref(), NAME).map_err(|error| error.hint(HINT))?;
        if config.pager && !userfault::is_there() {
            return Err(HostError::new(
                ErrorKind::Unsupported,
                "Firecracker cannot be used with a pager: this kernel gives it no userfaultfd",
            )
            .hint("leave `firecracker_pager` out of the settings, or take Linux 6.1 or newer, which has /dev/userfaultfd"));
        }
        let version = version(&program).await?;
        let format = snapshot_format(&program).await?;
        let kernel = config.probe_kernel.as_deref();
        let accelerator_reason = prove(&program, &version, kernel, &layout).await?;
        let identity = VmmIdentity {
            name: NAME.into(),
            version,
            machine: format!("mmio revision {}, state {format}", config::MACHINE_REVISION),
            cpu: cpu::host_model()
                .map_err(|error| HostError::io("read the host's CPU model", error))?,
            cpu_features: cpu::offered_by_kvm()
                .map_err(|error| HostError::io("ask KVM for the features of CPUs", error))?,
            accelerator: "kvm".into(),
            accelerator_reason,
        };
        let data = layout.data().to_owned();
        let shares_blocks = blocking(move || Ok(crate::fs::shares_blocks(&data))).await?;
        Ok(Self {
            program,
            shares_blocks,
            pager: config.pager,
            identity,
            launcher: config.launcher,
            processes: Processes::new(layout.clone(), Arc::clone(&boxes)),
            layout,
            boxes,
        })
    }

    async fn start(&self, plan: &LaunchPlan) -> Result<FirecrackerMachine, HostError> {
        if plan.geometry.vcpus == 0 || plan.geometry.vcpus > MAX_VCPUS || plan.geometry.mem_mib == 0
        {
            return Err(HostError::new(
                ErrorKind::Invalid,
                format!("Firecracker runs guests with 1 to {MAX_VCPUS} CPUs and some memory"),
            ));
        }
        check_memory(plan)?;
        check_undivided(DIALECT.name, plan)?;
        let disk = OwnDisk::look_at(DIALECT.name, &plan.disk)?;
        let kernel = match &plan.start {
            Start::Boot { kernel, .. } => {
                let image = kernel.clone();
                let found = blocking(move || {
                    let beside = image.parent().unwrap_or(Path::new("/"));
                    vmlinux::ensure(&image, beside).map_err(HostError::from)
                });
                Some(found.await?)
            }
            Start::Restore { .. } => None,
        };
        let runtime = self.layout.vm(&plan.sandbox);
        let save_area = self.layout.save_area(&plan.sandbox);
        let uid = self.boxes.uid(plan.slot);
        let outputs = prepare(plan, &disk, &runtime, &save_area, uid).map_err(|error| {
            HostError::io(
                format!("prepare the box of sandbox {}", plan.sandbox),
                error,
            )
        })?;
        let own = config::Own {
            program: &self.program,
            kernel: kernel.as_deref(),
            disk: &disk,
            runtime: &runtime,
            save: &save_area,
            uid,
            paged: self.is_paged(plan),
        };
        let join = self.boxes.cgroups().join_files(&plan.sandbox);
        let spec = config::box_spec(plan, own, join);
        let pager = self.start_pager(plan, uid).await?;
        let process = match self.launcher.launch(&spec).await {
            Ok(process) => process,
            Err(error) => {
                if let Some(pager) = &pager {
                    processes::end(pager).await?;
                }
                return Err(error.into());
            }
        };
        let lost = Lost::default();
        if let Some(pager) = pager {
            tokio::spawn(keep_together(process.clone(), pager, Arc::clone(&lost)));
        }
        Ok(self.watch(&plan.sandbox, process, outputs, lost))
    }

    /// Whether a pager fills the memory of this guest.
    fn is_paged(&self, plan: &LaunchPlan) -> bool {
        self.pager && matches!(plan.start, Start::Restore { .. })
    }

    /// Starts what fills the memory of this guest, if something is to. It listens on return.
    async fn start_pager(&self, plan: &LaunchPlan, uid: u32) -> Result<Option<Process>, HostError> {
        let (true, Start::Restore { memory, .. }) = (self.is_paged(plan), &plan.start) else {
            return Ok(None);
        };
        let runtime = self.layout.vm(&plan.sandbox);
        let socket = runtime.join(API).join(PAGER_SOCKET);
        let failed = |error| {
            let message = format!("start the pager of sandbox {}", plan.sandbox);
            HostError::io(message, error)
        };
        let pager = PagerPlan {
            base: &memory.base,
            bytes: plan.geometry.memory().0,
            runtime: &runtime,
            socket: socket.clone(),
            network_namespace: plan.network.namespace.clone(),
            stderr: runtime.join(STDERR),
            uid,
            cgroup_procs: self.boxes.cgroups().join_files(&plan.sandbox),
        };
        let spec = pager.box_spec().map_err(failed)?;
        let process = self.launcher.launch(&spec).await?;
        // Nobody of this uid runs yet but the pager, which sees no directory.
        if let Err(error) = lchown(&socket, Some(uid), Some(uid)) {
            processes::end(&process).await?;
            return Err(failed(error));
        }
        Ok(Some(process))
    }

    fn watch(
        &self,
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        lost: Lost,
    ) -> FirecrackerMachine {
        let log = self.layout.console_log(sandbox);
        let runtime = self.layout.vm(sandbox);
        let api = Api::new(&DIALECT, runtime.join(API).join(SOCKET));
        let save_area = SaveArea::new(self.layout.save_area(sandbox));
        let ways = FirecrackerWays {
            pager_state: runtime.join(PAGER_STATE),
            lost,
        };
        FirecrackerMachine::watch(sandbox, process, outputs, log, api, save_area, ways)
    }

    /// Brings a machine that has just started to where a launch ends.
    async fn begin(
        &self,
        plan: &LaunchPlan,
        machine: &FirecrackerMachine,
    ) -> Result<(), HostError> {
        let api = machine.api();
        let ready = api.listens(START_DEADLINE);
        machine.vmm().or_its_end("start", ready).await?;
        let runtime = self.layout.vm(&plan.sandbox);
        // From here on, what the daemon talks to is what has made the socket, whatever the guest makes of its VMM.
        seal(&runtime.join(API)).map_err(|error| {
            let message = format!("seal the API of sandbox {}", plan.sandbox);
            HostError::io(message, error)
        })?;
        match &plan.start {
            Start::Boot { token, .. } => {
                let disk = OwnDisk::look_at(DIALECT.name, &plan.disk)?;
                let told = config::for_boot(plan, &disk, token.expose());
                let boot = async {
                    for (request, says) in &told {
                        let within = match *request {
                            "/actions" => BEGIN_DEADLINE,
                            _ => QUICK,
                        };
                        api.put(request, Some(says), within).await?;
                    }
                    Ok::<_, ApiError>(())
                };
                machine.vmm().or_its_end("boot", boot).await
            }
            Start::Restore { .. } => {
                let asked = config::for_restore(plan, self.is_paged(plan));
                let restored = api.put("/snapshot/load", Some(&asked), BEGIN_DEADLINE);
                machine.vmm().or_its_end("restore", restored).await?;
                fs::remove_file(runtime.join(STATE)).map_err(|error| {
                    let message = format!("remove the state of sandbox {}", plan.sandbox);
                    HostError::io(message, error)
                })
            }
        }
    }
}

#[async_trait]
impl Vmm for Firecracker {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_switch: false,
            live_save: true,
            differential_save: self.shares_blocks,
            lazy_restore: true,
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
                if let Some(pager) = self.processes.pager(&plan.sandbox)? {
                    processes::end(&pager).await?;
                }
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
        let lost = Lost::default();
        let has_pager = self.layout.vm(sandbox).join(PAGER_STATE).exists();
        match self.processes.pager(sandbox)? {
            Some(pager) if has_pager => {
                tokio::spawn(keep_together(process.clone(), pager, Arc::clone(&lost)));
            }
            None if has_pager => end_without_pager(&process, &lost),
            _ => {}
        }
        Ok(Some(Arc::new(self.watch(sandbox, process, outputs, lost))))
    }

    async fn kill(
        &self,
        sandbox: &SandboxId,
        recorded: Option<&ProcessIdentity>,
    ) -> Result<Removed, HostError> {
        self.processes
            .kill(sandbox, recorded, &[CONSOLE, STDERR, STATE])
            .await
    }
}

/// Waits until a VMM or its pager has ended, and ends the other one.
async fn keep_together(vmm: Process, pager: Process, lost: Lost) {
    tokio::select! {
        biased;
        _ = vmm.ended() => {}
        _ = pager.ended() => end_without_pager(&vmm, &lost),
    }
    // It ends by itself, unless something is wrong with it.
    if let Err(error) = pager.kill() {
        tracing::warn!(pid = pager.identity().pid, %error, "a pager cannot be ended");
    }
}

/// Ends a VMM whose guest would wait for its memory for ever.
fn end_without_pager(vmm: &Process, lost: &Lost) {
    if vmm.has_ended() {
        return;
    }
    lost.store(true, Ordering::Release);
    if let Err(error) = vmm.kill() {
        tracing::error!(pid = vmm.identity().pid, %error, "a VMM without its pager cannot be ended");
    }
}

/// Asks for the version.
async fn version(program: &Path) -> Result<String, HostError> {
    let unsupported = |message| HostError::new(ErrorKind::Unsupported, message).hint(HINT);
    let said = program::version(program).await?;
    let version = said
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("Firecracker v"))
        .map(str::trim)
        .ok_or_else(|| unsupported(format!("{} is not Firecracker", program.display())))?;
    match program::major_and_minor(version) {
        Some(found) if found >= OLDEST => Ok(version.to_owned()),
        _ => Err(unsupported(format!(
            "Firecracker {version} is too old: {}.{} is needed",
            OLDEST.0, OLDEST.1
        ))),
    }
}

/// Asks for the format of saved states.
async fn snapshot_format(program: &Path) -> Result<String, HostError> {
    let said = program::answer(program, "--snapshot-version").await?;
    let format = said.lines().next().map(str::trim).unwrap_or_default();
    if format.starts_with('v') {
        return Ok(format.to_owned());
    }
    let message = format!(
        "{} does not say which states it restores",
        program.display()
    );
    Err(HostError::new(ErrorKind::Unsupported, message).hint(HINT))
}

/// Boots a kernel up to where it asks for its root file system, unless that was done since this machine booted. Says what
/// it did.
async fn prove(
    program: &Path,
    version: &str,
    kernel: Option<&Path>,
    layout: &Layout,
) -> Result<String, HostError> {
    let failed = |why: String| {
        HostError::new(
            ErrorKind::Unsupported,
            format!("Firecracker runs no guest here: {why}"),
        )
        .hint("it needs KVM: enable (nested) virtualisation; `icebox doctor` says what runs here instead")
    };
    trial::kvm_opens().map_err(failed)?;
    let Some(kernel) = kernel else {
        return Ok("KVM can be opened; no kernel was there to try".into());
    };
    let proof = trial::Proof::of(program, version, Some(kernel)).map_err(failed)?;
    let run = layout.run();
    if proof.is_known(run, PROVEN) {
        return Ok(reason_of(true));
    }
    if proof.is_known(run, PROVEN_UNFILTERED) {
        return Ok(reason_of(false));
    }
    // Unpacked beside a kernel of ours, which needs it again; else only for the trial.
    let scratch = tempfile::tempdir().map_err(|error| failed(error.to_string()))?;
    let beside = kernel.parent().filter(|it| it.starts_with(layout.data()));
    let (image, place) = (
        kernel.to_owned(),
        beside.unwrap_or(scratch.path()).to_owned(),
    );
    let unpacked = blocking(move || vmlinux::ensure(&image, &place).map_err(HostError::from));
    let unpacked = unpacked.await?;
    let description = scratch.path().join("machine.json");
    let machine = config::for_trial(&unpacked, trial::COMMAND_LINE);
    fs::write(&description, machine.to_string()).map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command.args(["--no-api", "--level", "Error", "--config-file"]);
    command.arg(&description);
    let filters = |pid: Option<u32>| pid.is_some_and(has_seccomp_filter);
    let filters = trial::watch_and_ask(command, trial::NO_ROOT, trial::SILENCE_MAX, filters)
        .await
        .map_err(failed)?;
    // What is built for gnu has a filter that allows everything.
    let filters = filters && is_static(program);
    proof.remember(run, if filters { PROVEN } else { PROVEN_UNFILTERED });
    Ok(reason_of(filters))
}

fn reason_of(filters: bool) -> String {
    let reason = "KVM runs the sandboxes' kernel";
    if filters {
        return reason.to_owned();
    }
    format!(
        "{reason}; this build of Firecracker has no filter for its system calls, as its releases have"
    )
}

/// Whether a program needs no interpreter, as releases do not, which are built for musl.
fn is_static(program: &Path) -> bool {
    let Ok(bytes) = fs::read(program) else {
        return false;
    };
    let needs_interpreter = || {
        let header = elf::FileHeader64::<Endianness>::parse(&*bytes)?;
        let endian = header.endian()?;
        let mut segments = header.program_headers(endian, &*bytes)?.iter();
        Ok::<_, object::Error>(segments.any(|it| it.p_type.get(endian) == elf::PT_INTERP))
    };
    needs_interpreter().is_ok_and(|needs| !needs)
}

/// Whether a process has put a filter before its system calls: one more than it has from this process, which may run in a
/// container. proc_pid_status(5).
fn has_seccomp_filter(pid: u32) -> bool {
    let filters = |process: &str| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp_filters:"));
        count.and_then(|count| count.trim().parse::<u32>().ok())
    };
    filters(&pid.to_string()) > filters("self")
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
    // Of an earlier VMM that had a pager.
    pager::state::remove(&runtime.join(PAGER_STATE))?;
    let api = runtime.join(API);
    // What an earlier VMM has left: it would not listen where there is a socket.
    match fs::remove_dir_all(&api) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    create_for(&api, uid)?;
    if let Start::Restore { device_state, .. } = &plan.start {
        expose(&runtime.join(STATE), &fs::read(device_state)?)?;
    }
    Ok(outputs)
}

/// Takes a directory of a box's uid back: it can look into it, and change nothing.
fn seal(directory: &Path) -> io::Result<()> {
    chown(directory, Some(0), Some(0))?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_image::fixture;

    /// A program that says these things.
    fn saying(directory: &Path, version: &str, format: &str) -> PathBuf {
        let path = directory.join("firecracker");
        let script = format!(
            "#!/bin/sh\ncase $1 in\n--version) echo '{version}'; echo;;\n--snapshot-version) echo '{format}';;\nesac\n"
        );
        fixture::script(&path, &script).unwrap();
        path
    }

    #[tokio::test]
    async fn inv_26_inv_44_what_is_no_firecracker_or_too_old_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let it = |version, format| saying(directory.path(), version, format);
        let program = it("Firecracker v1.16.1", "v10.0.0");
        assert_eq!(version(&program).await.unwrap(), "1.16.1");
        assert_eq!(snapshot_format(&program).await.unwrap(), "v10.0.0");
        for (says, why) in [
            ("Firecracker v1.13.9", "too old: 1.14 is needed"),
            ("cloud-hypervisor v53.0", "is not Firecracker"),
            ("", "is not Firecracker"),
        ] {
            let error = version(&it(says, "v10.0.0")).await.unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
            assert!(error.hint_text().is_some());
        }
        let error = snapshot_format(&it("Firecracker v1.16.1", "")).await;
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_program_that_needs_an_interpreter_is_no_release() {
        let directory = tempfile::tempdir().unwrap();
        let script = saying(directory.path(), "Firecracker v1.16.1", "v10.0.0");
        assert!(!is_static(&script));
        assert!(!is_static(Path::new("/bin/sh")));
    }

    #[test]
    fn a_refusal_is_told_in_its_words() {
        let said = br#"{"fault_message": "Load snapshot error: no"}"#;
        assert_eq!(reason(said).unwrap(), "Load snapshot error: no");
        assert_eq!(reason(b"plainly"), None);
    }
}
