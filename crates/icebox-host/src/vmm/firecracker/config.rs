//! A launch as data: from a plan to a box and to what the API is told. Pure.
//!
//! A saved state describes its machine by itself, and Firecracker takes no other description with it. So everything in it
//! that names something of the host has a path or name that is the same in every box, and what changes here changes
//! [`MACHINE_REVISION`]. A state may be what a guest that has taken its VMM over wrote: whatever it names, the next VMM
//! opens from inside its own box, where there is nothing but what that one may use.

use std::path::{Path, PathBuf};

use icebox_agent_api::cmdline;
use icebox_engine::host::{LaunchPlan, Start};
use serde_json::{Value, json};

use crate::launcher::{BOX_DIRECTORY, Bind, BoxSpec, Node};
use crate::vmm::console::{CONSOLE, STDERR};
use crate::vmm::own_disk::OwnDisk;
use crate::vmm::userfault::USERFAULTFD;
use crate::vmm::{PID_FILE, program_binds};

/// Which arrangement of devices this program makes.
pub(super) const MACHINE_REVISION: u32 = 1;

/// The directory that Firecracker makes its socket in, in the runtime directory.
pub(super) const API: &str = "api";
/// The socket in it.
pub(super) const SOCKET: &str = "api.sock";
/// The socket of the pager, if there is one, beside it.
pub(super) const PAGER_SOCKET: &str = "pager.sock";
/// A restore's device state, in the runtime directory: where it is kept only root may read it.
pub(super) const STATE: &str = "state";
/// The device state in a save of Firecracker's.
pub(super) const SAVED_STATE: &str = "state";
/// The memory in a save of Firecracker's.
pub(super) const SAVED_MEMORY: &str = "memory";

/// The tap's device, which Firecracker opens by itself, in the network namespace that it is in.
const TUN: &str = "/dev/net/tun";
/// The network card: a restore names it to give it its tap.
const NETWORK_CARD: &str = "net0";

/// A path in the box.
fn inside(name: &str) -> PathBuf {
    Path::new(BOX_DIRECTORY).join(name)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What of the host a box is made of, beside its plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own<'a> {
    /// The program.
    pub(super) program: &'a Path,
    /// What is booted, if it is: an ELF file.
    pub(super) kernel: Option<&'a Path>,
    /// The guest's disk.
    pub(super) disk: &'a OwnDisk,
    /// The runtime directory.
    pub(super) runtime: &'a Path,
    /// The directory that the VMM may write its saves to.
    pub(super) save: &'a Path,
    /// Whose the box is.
    pub(super) uid: u32,
    /// Whether a pager fills the memory of what is restored.
    pub(super) paged: bool,
}

/// The launcher's orders for a plan.
pub(super) fn box_spec(plan: &LaunchPlan, own: Own<'_>, cgroup_procs: Vec<PathBuf>) -> BoxSpec {
    let Own {
        program,
        kernel,
        disk,
        runtime,
        save,
        uid,
        paged,
    } = own;
    let mut devices = vec![Node::same("/dev/kvm"), Node::same(TUN)];
    let mut binds = program_binds(program);
    binds.push(Bind::writable(save, inside("save")));
    binds.push(Bind::writable(runtime.join(API), inside(API)));
    match &plan.start {
        Start::Boot { initramfs, .. } => {
            binds.extend(kernel.map(|kernel| Bind::read_only(kernel, inside("kernel"))));
            binds.push(Bind::read_only(initramfs, inside("initramfs")));
        }
        Start::Restore { memory, .. } => {
            binds.push(Bind::read_only(runtime.join(STATE), inside(STATE)));
            if !paged {
                binds.push(Bind::read_only(&memory.base, inside("memory")));
            } else if Path::new(USERFAULTFD).exists() {
                devices.push(Node::same(USERFAULTFD));
            }
        }
    }
    let mut spec = BoxSpec {
        program: program.to_owned(),
        pager: false,
        // At a level below, what requests say would be in the log, which is the console: the command line, with the agent's
        // first token.
        arguments: [
            "--api-sock",
            &text(&inside(API).join(SOCKET)),
            "--level",
            "Error",
        ]
        .map(str::to_owned)
        .to_vec(),
        cgroup_procs,
        pid_file: runtime.join(PID_FILE),
        network_namespace: Some(plan.network.namespace.clone()),
        uid,
        // A save is as long as the memory.
        file_bytes_max: disk.bytes().max(plan.geometry.memory().0),
        files: Vec::new(),
        stdout: Some(runtime.join(CONSOLE)),
        stderr: runtime.join(STDERR),
        binds,
        devices,
    };
    disk.expose(&mut spec);
    spec
}

/// What the API is told for a boot, in this order: the request, and what it says.
pub(super) fn for_boot(
    plan: &LaunchPlan,
    disk: &OwnDisk,
    token: &str,
) -> Vec<(&'static str, Value)> {
    let mac = plan.network.guest_mac.map(|byte| format!("{byte:02x}"));
    vec![
        (
            "/machine-config",
            json!({
                "vcpu_count": plan.geometry.vcpus,
                "mem_size_mib": plan.geometry.mem_mib,
                "smt": false,
                // A guest that was booted is saved whole.
                "track_dirty_pages": false,
            }),
        ),
        (
            "/boot-source",
            json!({
                "kernel_image_path": text(&inside("kernel")),
                "initrd_path": text(&inside("initramfs")),
                "boot_args": command_line(token),
            }),
        ),
        (
            "/drives/disk0",
            json!({
                "drive_id": "disk0",
                "path_on_host": text(&disk.in_box()),
                "is_root_device": false,
                "is_read_only": false,
                // Flushes that the guest asks for are made.
                "cache_type": "Writeback",
                "io_engine": "Sync",
            }),
        ),
        (
            "/network-interfaces/net0",
            json!({
                "iface_id": NETWORK_CARD,
                "guest_mac": mac.join(":"),
                "host_dev_name": plan.network.tap,
            }),
        ),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({
                "amount_mib": 0,
                "deflate_on_oom": true,
                "stats_polling_interval_s": 0,
                "free_page_reporting": true,
            }),
        ),
        ("/actions", json!({ "action_type": "InstanceStart" })),
    ]
}

/// What `/snapshot/load` is told. Changes are tracked from then on: a later save would be of all that is in the page cache.
pub(super) fn for_restore(plan: &LaunchPlan, paged: bool) -> Value {
    let (path, kind) = if paged {
        (inside(API).join(PAGER_SOCKET), "Uffd")
    } else {
        (inside("memory"), "File")
    };
    json!({
        "snapshot_path": text(&inside(STATE)),
        "mem_backend": { "backend_path": text(&path), "backend_type": kind },
        "track_dirty_pages": true,
        "resume_vm": false,
        "network_overrides": [{
            "iface_id": NETWORK_CARD,
            "host_dev_name": plan.network.tap,
        }],
    })
}

/// How much of the memory a save writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    Full,
    /// What has changed since the restore, or the last save.
    Diff,
}

/// What `/snapshot/create` is told.
pub(super) fn save_request(extent: Extent) -> Value {
    let save = inside("save");
    json!({
        "snapshot_type": match extent {
            Extent::Full => "Full",
            Extent::Diff => "Diff",
        },
        "snapshot_path": text(&save.join(SAVED_STATE)),
        "mem_file_path": text(&save.join(SAVED_MEMORY)),
    })
}

/// What a kernel is tried with, as a file: there are no arguments for it.
pub(super) fn for_trial(kernel: &Path, command_line: &str) -> Value {
    json!({
        "boot-source": { "kernel_image_path": text(kernel), "boot_args": command_line },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
    })
}

/// The guest's kernel command line. A reset by the keyboard controller ends the VMM, and is all that does: there is nothing
/// to turn the machine off with.
fn command_line(token: &str) -> String {
    format!(
        "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests {off}=reset {token_is}={token}",
        off = cmdline::OFF,
        token_is = cmdline::TOKEN,
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use icebox_engine::host::{BlockDevice, MemorySource, Secret, SlotNetwork};
    use icebox_engine::id::{SandboxId, Slot};
    use icebox_engine::unit::Geometry;

    use super::*;

    fn plan(disk: &Path, start: Start) -> LaunchPlan {
        LaunchPlan {
            sandbox: SandboxId::random(),
            slot: Slot(3),
            geometry: Geometry {
                vcpus: 2,
                mem_mib: 256,
            },
            disk: BlockDevice::Raw { path: disk.into() },
            network: SlotNetwork {
                host_address: [10, 213, 0, 2].into(),
                namespace: "/run/netns/x".into(),
                tap: "tap0".into(),
                guest_mac: [2, 0, 0, 0, 0, 1],
            },
            start,
        }
    }

    /// Every absolute path in a value.
    fn paths(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::String(text) if text.starts_with('/') => drop(into.insert(text.clone())),
            Value::Array(values) => values.iter().for_each(|value| paths(value, into)),
            Value::Object(fields) => fields.values().for_each(|value| paths(value, into)),
            _ => {}
        }
    }

    #[test]
    fn inv_18_whatever_a_saved_state_can_name_is_the_same_in_every_box() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let secret = Secret::from("the-token".to_owned());
        let boot = plan(
            disk.path(),
            Start::Boot {
                kernel: "/srv/kernels/1/vmlinuz".into(),
                initramfs: "/srv/kernels/1/initramfs".into(),
                token: secret,
            },
        );
        let restore = plan(
            disk.path(),
            Start::Restore {
                device_state: "/srv/generations/7/device-state".into(),
                memory: MemorySource {
                    base: "/srv/memories/9/base".into(),
                    diff: None,
                },
            },
        );
        let found = OwnDisk::look_at("Firecracker", &boot.disk).unwrap();
        let kernel = Path::new("/srv/kernels/1/vmlinux");
        let spec = |plan: &LaunchPlan, kernel| {
            let own = Own {
                program: Path::new("/opt/firecracker"),
                kernel,
                disk: &found,
                runtime: Path::new("/run/vm/1"),
                save: Path::new("/srv/1/save"),
                uid: 10_001,
                paged: false,
            };
            box_spec(plan, own, Vec::new())
        };
        let of_boot = spec(&boot, Some(kernel));
        let mut named = BTreeSet::new();
        for (_, told) in for_boot(&boot, &found, "the-token") {
            paths(&told, &mut named);
        }
        let of_restore = spec(&restore, None);
        paths(&for_restore(&restore, false), &mut named);
        let there: BTreeSet<_> = [&of_boot, &of_restore]
            .into_iter()
            .flat_map(|spec| spec.binds.iter().map(|bind| text(&bind.target)))
            .collect();
        assert!(named.is_subset(&there), "{named:?} {there:?}");
        assert!(named.iter().all(|path| path.starts_with(BOX_DIRECTORY)));
        // INV-43: what is public does not have the token.
        let public = format!("{:?}", of_boot.arguments);
        assert!(!public.contains("the-token"), "{public}");
        let mut saves = BTreeSet::new();
        paths(&save_request(Extent::Diff), &mut saves);
        let writable = |spec: &BoxSpec, path: &str| {
            let mut binds = spec.binds.iter().filter(|bind| bind.writable);
            binds.any(|bind| Path::new(path).starts_with(&bind.target))
        };
        assert!(saves.iter().all(|path| writable(&of_boot, path)));
        assert!(
            named
                .iter()
                .all(|path| writable(&of_boot, path) == path.ends_with("disk"))
        );
    }
}
