//! A launch as data: from a plan to a box and to what the API is told. Pure, but for a look at the disk.
//!
//! The machine is described anew for every launch, from the plan alone. A saved state comes with a description of its own,
//! which is not kept: it holds the command line of the first boot, and is what a VMM that may have been taken over by its
//! guest says about itself. So the same plan must make the same devices in the same order, and what changes here changes
//! [`MACHINE_REVISION`].

use std::path::{Path, PathBuf};

use icebox_engine::host::{LaunchPlan, Start};
use icebox_engine::unit::Geometry;
use serde_json::{Value, json};

use crate::launcher::{BOX_DIRECTORY, Bind, BoxSpec, Node, OpenFile, Source};
use crate::vmm::console::{CONSOLE, STDERR};
use crate::vmm::own_disk::OwnDisk;
use crate::vmm::userfault::USERFAULTFD;
use crate::vmm::{PID_FILE, program_binds};

/// Which arrangement of devices this program makes.
pub(super) const MACHINE_REVISION: u32 = 1;

/// The API's socket in the runtime directory.
pub(super) const SOCKET: &str = "api.sock";
/// A restore's machine, in the runtime directory.
pub(super) const CONFIG: &str = "config.json";
/// A restore's device state, in the runtime directory: where it is kept only root may read it.
pub(super) const STATE: &str = "state.json";
/// Links to what a boot needs, in the runtime directory. They go when the guest has booted: Cloud Hypervisor would boot it
/// again when it asks for a reset, which is to be the end of the VMM.
pub(super) const BOOT: &str = "boot";
/// The device state in a save of Cloud Hypervisor's.
pub(super) const SAVED_STATE: &str = "state.json";
/// The memory in a save of Cloud Hypervisor's.
pub(super) const SAVED_MEMORY: &str = "memory-ranges";

/// The network card: a restore names it to give it its tap.
const NETWORK_CARD: &str = "net0";

/// What a launch takes from its driver.
#[derive(Clone, Debug)]
pub(super) struct Common {
    /// The program.
    pub(super) program: PathBuf,
    /// Whether restored guests load their memory in the background.
    pub(super) lazy: bool,
}

/// A path in the box.
fn inside(name: &str) -> PathBuf {
    Path::new(BOX_DIRECTORY).join(name)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The launcher's orders for a plan. `save` is the directory that the VMM may write
/// its saves to.
pub(super) fn box_spec(
    common: &Common,
    plan: &LaunchPlan,
    disk: &OwnDisk,
    runtime: &Path,
    save: &Path,
    uid: u32,
    cgroup_procs: Vec<PathBuf>,
) -> BoxSpec {
    let mut binds = program_binds(&common.program);
    binds.push(Bind::writable(save, inside("save")));
    let mut devices = vec![Node::same("/dev/kvm")];
    match &plan.start {
        Start::Boot {
            kernel, initramfs, ..
        } => {
            binds.push(Bind::read_only(kernel, inside("kernel")));
            binds.push(Bind::read_only(initramfs, inside("initramfs")));
            binds.push(Bind::read_only(runtime.join(BOOT), inside(BOOT)));
        }
        Start::Restore { memory, .. } => {
            let snapshot = inside("snapshot");
            binds.push(Bind::read_only(runtime.join(CONFIG), snapshot.join(CONFIG)));
            binds.push(Bind::read_only(
                runtime.join(STATE),
                snapshot.join(SAVED_STATE),
            ));
            binds.push(Bind::read_only(&memory.base, snapshot.join(SAVED_MEMORY)));
            if common.lazy && Path::new(USERFAULTFD).exists() {
                devices.push(Node::same(USERFAULTFD));
            }
        }
    }
    let mut spec = BoxSpec {
        program: common.program.clone(),
        pager: false,
        arguments: vec!["--api-socket".to_owned(), "fd={api}".to_owned()],
        cgroup_procs,
        pid_file: runtime.join(PID_FILE),
        network_namespace: Some(plan.network.namespace.clone()),
        uid,
        // A save is as long as the memory.
        file_bytes_max: disk.bytes().max(plan.geometry.memory().0),
        files: vec![OpenFile {
            name: "api".to_owned(),
            source: Source::Listen(runtime.join(SOCKET)),
        }],
        stdout: Some(runtime.join(CONSOLE)),
        stderr: runtime.join(STDERR),
        binds,
        devices,
    };
    disk.expose(&mut spec);
    spec
}

/// The machine, without its network card.
fn machine(geometry: Geometry, disk: &OwnDisk, command_line: Option<&str>) -> Value {
    let boot = inside(BOOT);
    json!({
        "cpus": { "boot_vcpus": geometry.vcpus, "max_vcpus": geometry.vcpus },
        // Huge pages would be loaded, and kept, whole for every byte in them.
        "memory": { "size": geometry.memory().0, "thp": false },
        "payload": {
            "kernel": text(&boot.join("kernel")),
            // Opened also by a restore, which has no use for it.
            "initramfs": command_line.map(|_| text(&boot.join("initramfs"))),
            "cmdline": command_line,
        },
        "disks": [{
            "id": "disk0",
            "path": text(&disk.in_box()),
            // What a guest writes to the first sector decides nothing.
            "image_type": "Raw",
            // As with other VMMs: files by the page cache, which sandboxes share, and devices around it.
            "direct": disk.is_device(),
        }],
        "rng": { "src": "/dev/urandom" },
        "balloon": { "id": "balloon0", "size": 0, "free_page_reporting": true },
        // Stdout, which is a FIFO that never makes it wait.
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    })
}

/// What `vm.create` is told. The network card comes afterwards, with its tap.
pub(super) fn for_boot(plan: &LaunchPlan, disk: &OwnDisk, token: &str) -> Value {
    machine(plan.geometry, disk, Some(&command_line(token)))
}

/// The network card.
pub(super) fn network_card(plan: &LaunchPlan) -> Value {
    let mac = plan.network.guest_mac.map(|byte| format!("{byte:02x}"));
    json!({ "id": NETWORK_CARD, "mac": mac.join(":") })
}

/// The description of the machine that a restore finds beside its state.
pub(super) fn for_restore(plan: &LaunchPlan, disk: &OwnDisk) -> Value {
    let mut config = machine(plan.geometry, disk, None);
    let mut card = network_card(plan);
    // That it has a descriptor; which one is told with the request.
    card["fds"] = json!([-1]);
    config["net"] = json!([card]);
    config
}

/// What `vm.restore` is told. One tap goes with it.
pub(super) fn restore_request(common: &Common) -> Value {
    json!({
        "source_url": format!("file://{}", text(&inside("snapshot"))),
        "memory_restore_mode": if common.lazy { "OnDemand" } else { "Copy" },
        "net_fds": [{ "id": NETWORK_CARD, "num_fds": 1 }],
    })
}

/// What `vm.snapshot` is told.
pub(super) fn save_request() -> Value {
    json!({ "destination_url": format!("file://{}", text(&inside("save"))) })
}

/// A save that nothing can come of: its refusal says whether memory is still being loaded.
pub(super) fn save_to_nowhere() -> Value {
    json!({ "destination_url": "file:///nowhere" })
}

/// The guest's kernel command line. A reset ends the VMM: by a triple fault, at once after a panic.
fn command_line(token: &str) -> String {
    format!(
        "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 cryptomgr.notests icebox.token={token}"
    )
}
