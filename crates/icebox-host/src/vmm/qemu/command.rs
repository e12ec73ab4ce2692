//! A launch as data: from a plan to arguments, descriptors and binds. Pure.
//!
//! The same for a boot and a restore, up to what differs: saved device state loads only into the same devices in the
//! same order. Whatever changes here changes [`MACHINE_REVISION`].

use std::path::{Path, PathBuf};

use icebox_engine::host::{LaunchPlan, Start};
use icebox_engine::unit::Geometry;

use super::disk::{self, Storage};
use crate::launcher::{BOX_DIRECTORY, Bind, BoxSpec, Node, OpenFile, Source};
use crate::vmm::console::{CONSOLE, STDERR};
use crate::vmm::qemu::Accelerator;
use crate::vmm::{PID_FILE, program_binds};

/// Which arrangement of devices this program makes. Part of [`VmmIdentity::machine`](icebox_engine::host::VmmIdentity),
/// so that state saved with another arrangement is refused with an explanation rather than by a crash.
pub(super) const MACHINE_REVISION: u32 = 1;

/// fdsets of everything that is not a disk.
pub(super) const FDSET_CONSOLE: i64 = 1;
/// Device state to load.
pub(super) const FDSET_INCOMING: i64 = 2;
/// Device state to write.
pub(super) const FDSET_SAVE: i64 = 3;

/// TCG's buffer for translated code. By default it is up to 1 GiB, of which a guest that runs long enough dirties
/// everything. When it is full, it is flushed and translation begins anew: with 32 MiB, a guest in which a few dozen
/// programs had run took twice the processor time of one with 128; with 256 it took as much.
pub(super) const TRANSLATION_BUFFER_MIB: u32 = 128;

/// Files of one VMM's runtime directory.
pub(super) const SOCKET: &str = "qmp.sock";
/// The kernel command line, as a QEMU configuration file.
pub(super) const BOOT_CONFIG: &str = "boot.conf";

/// What every launch of one driver has in common.
#[derive(Clone, Debug)]
pub(super) struct Common {
    /// The emulator.
    pub(super) program: PathBuf,
    /// What runs guest code.
    pub(super) accelerator: Accelerator,
}

/// The launcher's orders for a plan. `runtime` is the VMM's runtime directory; `uid` the box's;
/// `storage` what its disk is.
pub(super) fn box_spec(
    common: &Common,
    plan: &LaunchPlan,
    runtime: &Path,
    uid: u32,
    storage: Storage,
    cgroup_procs: Vec<PathBuf>,
) -> BoxSpec {
    let mut command = Command::default();
    command.machine(common.accelerator, plan.geometry);
    match &plan.start {
        Start::Boot {
            kernel, initramfs, ..
        } => {
            command.object(format!(
                "memory-backend-ram,id=ram,size={}M,merge=off,dump=off",
                plan.geometry.mem_mib
            ));
            let kernel = command.file_in_box("kernel", kernel);
            let initramfs = command.file_in_box("initramfs", initramfs);
            let config = command.file_in_box(BOOT_CONFIG, &runtime.join(BOOT_CONFIG));
            command.args(["-kernel", &kernel, "-initrd", &initramfs]);
            // The command line holds the agent's first token: a process's arguments are public, this file is not.
            command.args(["-readconfig", &config]);
        }
        Start::Restore {
            device_state,
            memory,
        } => {
            let base = command.file_in_box("memory", &memory.base);
            // share=off: writes go to a private copy. readonly=on: the file is opened read-only, so that no discard can
            // punch holes into it; rom=off: it is RAM nevertheless. Needs QEMU 8.2.
            command.object(format!(
                "memory-backend-file,id=ram,size={}M,mem-path={base},share=off,readonly=on,rom=off,merge=off,dump=off",
                plan.geometry.mem_mib
            ));
            command.fdset(
                FDSET_INCOMING,
                "device-state",
                Source::Read(device_state.clone()),
            );
            command.args(["-S", "-incoming", "defer"]);
        }
    }
    command.console(runtime);
    command.monitor(runtime);
    command.disk(plan, storage);
    command.devices(plan);

    let mut binds = command.binds;
    binds.extend(program_binds(&common.program));
    BoxSpec {
        program: common.program.clone(),
        pager: false,
        arguments: command.arguments,
        cgroup_procs,
        pid_file: runtime.join(PID_FILE),
        network_namespace: Some(plan.network.namespace.clone()),
        uid,
        file_bytes_max: storage.head_bytes_max,
        files: command.files,
        stdout: None,
        stderr: runtime.join(STDERR),
        binds,
        devices: match common.accelerator {
            Accelerator::Kvm => vec![Node::same("/dev/kvm")],
            Accelerator::Tcg => Vec::new(),
        },
    }
}

/// The guest's kernel command line.
pub(super) fn kernel_command_line(
    accelerator: Accelerator,
    vcpus: u8,
    tsc_khz: Option<u64>,
    token: &str,
) -> String {
    // reboot=t: a triple fault, since the machine has no keyboard controller; panic=-1: at once.
    let mut line =
        String::from("console=ttyS0 quiet loglevel=4 reboot=t panic=-1 cryptomgr.notests");
    if accelerator == Accelerator::Tcg {
        // Nothing to mitigate: translated code does not speculate as the processor that the guest believes in would.
        line.push_str(" mitigations=off");
        // Not the one more that the machine has room for: see `smp`. Its counter goes by the host's time. The kernel would
        // compare it with its own ticks, which a busy host makes late, and go by those for ever after.
        line.push_str(&format!(" possible_cpus={vcpus} tsc=reliable"));
        if let Some(khz) = tsc_khz {
            // Without it the kernel calibrates its timer against another emulated one, and may do so forever.
            line.push_str(&format!(" tsc_early_khz={khz}"));
        }
    }
    line.push_str(&format!(" icebox.token={token}"));
    line
}

/// QEMU's configuration file for a boot. The command line must not contain a double quote and stay under 1 KiB, which is
/// all that QEMU's parser takes.
pub(super) fn boot_config(command_line: &str) -> String {
    format!("[machine]\n  append = \"{command_line}\"\n")
}

/// Arguments, and what they refer to.
#[derive(Debug, Default)]
struct Command {
    arguments: Vec<String>,
    files: Vec<OpenFile>,
    binds: Vec<Bind>,
}

impl Command {
    fn args<const N: usize>(&mut self, arguments: [&str; N]) {
        self.arguments.extend(arguments.map(str::to_owned));
    }

    fn option(&mut self, name: &str, value: String) {
        self.arguments.push(name.to_owned());
        self.arguments.push(value);
    }

    fn object(&mut self, value: String) {
        self.option("-object", value);
    }

    /// Opens a file for QEMU; its arguments refer to it as `{name}`.
    fn open(&mut self, name: &str, source: Source) {
        self.files.push(OpenFile {
            name: name.to_owned(),
            source,
        });
    }

    /// Puts a descriptor into an fdset.
    fn fdset(&mut self, set: i64, name: &str, source: Source) {
        self.open(name, source);
        self.option("-add-fd", format!("fd={{{name}}},set={set},opaque={name}"));
    }

    /// Makes a file appear in the box, and returns its path there.
    fn file_in_box(&mut self, name: &str, source: &Path) -> String {
        let target = Path::new(BOX_DIRECTORY).join(name);
        let path = target.display().to_string();
        self.binds.push(Bind::read_only(source, target));
        path
    }

    fn machine(&mut self, accelerator: Accelerator, geometry: Geometry) {
        self.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        // The firmware's memory is not part of a save of devices only, so a reset could not work: it ends the VMM.
        self.args(["-no-reboot"]);
        self.args([
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]);
        self.option("-machine", machine(accelerator).into());
        match accelerator {
            Accelerator::Kvm => self.args(["-accel", "kvm"]),
            Accelerator::Tcg => self.option(
                "-accel",
                format!("tcg,thread=multi,tb-size={TRANSLATION_BUFFER_MIB}"),
            ),
        }
        self.args(["-cpu", cpu(accelerator)]);
        self.option("-smp", smp(accelerator, geometry.vcpus));
        self.option("-m", format!("{}M", geometry.mem_mib));
        // A save is of devices only: without a configuration section, that is what an incoming stream begins with.
        self.args(["-global", "migration.send-configuration=off"]);
    }

    fn console(&mut self, runtime: &Path) {
        self.fdset(
            FDSET_CONSOLE,
            "console",
            Source::Write(runtime.join(CONSOLE)),
        );
        // Never used: with a reader of its own, QEMU can write to the FIFO while no daemon reads it. What does not
        // fit is dropped by the kernel's serial driver, so neither guest nor host pays for a log that nobody reads.
        self.open("console-keeper", Source::ReadWrite(runtime.join(CONSOLE)));
        self.option(
            "-chardev",
            format!("file,id=console,path=/dev/fdset/{FDSET_CONSOLE},append=on"),
        );
        self.args(["-serial", "chardev:console"]);
    }

    fn monitor(&mut self, runtime: &Path) {
        self.open("qmp", Source::Listen(runtime.join(SOCKET)));
        self.args(["-chardev", "socket,id=qmp,fd={qmp},server=on,wait=off"]);
        self.args(["-mon", "chardev=qmp,mode=control"]);
    }

    fn disk(&mut self, plan: &LaunchPlan, storage: Storage) {
        let files = disk::files(&plan.disk, storage);
        for file in &files {
            let (read, write) = (format!("{}-r", file.node), format!("{}-w", file.node));
            if file.is_device {
                // QEMU takes one that is as it would have opened it.
                let source = Source::ReadWriteDirect(file.path.to_owned());
                self.fdset(file.fdset, &write, source);
                continue;
            }
            self.fdset(file.fdset, &read, Source::Read(file.path.to_owned()));
            if file.access == disk::Access::ReadWrite {
                self.fdset(file.fdset, &write, Source::ReadWrite(file.path.to_owned()));
            }
        }
        for node in disk::nodes(&files) {
            self.option("-blockdev", node.to_string());
        }
        let top = files
            .last()
            .map(|file| file.node.as_str())
            .unwrap_or_default();
        self.option(
            "-device",
            format!("virtio-blk-device,id={},drive={top}", disk::DISK_DEVICE),
        );
    }

    fn devices(&mut self, plan: &LaunchPlan) {
        self.open(
            "tap",
            Source::Tap {
                namespace: plan.network.namespace.clone(),
                name: plan.network.tap.clone(),
            },
        );
        self.args(["-netdev", "tap,id=net0,fd={tap}"]);
        let mac = plan
            .network
            .guest_mac
            .map(|byte| format!("{byte:02x}"))
            .join(":");
        self.option(
            "-device",
            format!("virtio-net-device,id=nic0,netdev=net0,mac={mac}"),
        );
        self.args(["-device", "virtio-rng-device,id=rng0"]);
        // No free page reporting: a discard over a mapped memory would be refused, or worse.
        self.args(["-device", "virtio-balloon-device,id=balloon0"]);
    }
}

/// Machine type and its options. ACPI, since Debian's kernel finds no virtio-mmio devices without.
pub(super) fn machine(accelerator: Accelerator) -> &'static str {
    // The legacy timers only cost time: 20 to 44 s to boot under nested KVM with them, 9 to 11 s without. Under TCG
    // the clock chip stays, since a kernel that is told of none by ACPI looks for it for a second.
    //
    // The interrupt controllers are all in the kernel. This machine's default has the I/O APICs in QEMU: then the kernel
    // keeps a guest's end of an interrupt until the virtual CPU runs next, no capture has it in it, and after the restore
    // the controller waits for that end with all later interrupts of the device. The second I/O APIC does not work there;
    // the first has pins for eight devices, of which a sandbox has four.
    match accelerator {
        Accelerator::Kvm => {
            "microvm,kernel-irqchip=on,ioapic2=off,acpi=on,rtc=off,pit=off,pic=off,pcie=off,usb=off,auto-kernel-cmdline=off,memory-backend=ram,mem-merge=off,dump-guest-core=off"
        }
        Accelerator::Tcg => {
            "microvm,acpi=on,rtc=on,pit=off,pic=off,pcie=off,usb=off,auto-kernel-cmdline=off,memory-backend=ram,mem-merge=off,dump-guest-core=off"
        }
    }
}

/// The machine that KVM is tried with: the one that sandboxes get, without what a probe does not have.
pub(super) const PROBE_MACHINE: &str = "microvm,kernel-irqchip=on,ioapic2=off,acpi=on,rtc=off,pit=off,pic=off,pcie=off,usb=off,auto-kernel-cmdline=off";

/// How many CPUs a guest has, and may have.
///
/// TCG of a machine that never has a second CPU takes locked instructions apart, and then they order nothing. Linux orders
/// what it writes to a virtio queue with one (`lock addl`) against what QEMU's main thread, on another CPU of the host,
/// writes there: now and then neither sees the other's, and a disk or network stands still for ever. The kernel must not
/// count on a second one, since it does not trust the time-stamp counters of several: it is told so on its command line.
fn smp(accelerator: Accelerator, vcpus: u8) -> String {
    match accelerator {
        Accelerator::Kvm => vcpus.to_string(),
        Accelerator::Tcg => format!("{vcpus},maxcpus={}", vcpus.max(2)),
    }
}

/// The CPU model that a guest sees.
pub(super) fn cpu(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        // Everything that TCG emulates but five-level page tables, which only make every walk longer.
        Accelerator::Tcg => "max,-la57",
    }
}
