//! A place to run guests in: directories, network slots, boxes and a driver of its own, and a check that nothing of
//! it is left on the host.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command as HostCommand;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use icebox_agent_api::client::{AgentClient, Command};
use icebox_agent_api::{AGENT_PORT, Token};
use icebox_engine::host::{
    BlockDevice, Boxes, Chain, Egress, ExitReason, LaunchPlan, Limits, Machine, MemorySource,
    Network, SavePlan, SavedMemory, SavedPages, Secret, SlotNetwork, Start, Vmm, VolumeDriver,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId, Slot};
use icebox_engine::layout::{DEVICE_STATE, Layout, MEMORY_BASE, MEMORY_DIFF, Object};
use icebox_engine::unit::{Bytes, Geometry};
use icebox_host::boxes::HostBoxes;
use icebox_host::cgroup::Cgroups;
use icebox_host::guest_image::fixture;
use icebox_host::instance::Instance;
use icebox_host::launcher::Launcher;
use icebox_host::network::{NetworkConfig, NetworkSlots};
use icebox_host::vmm::qemu::{AcceleratorChoice, Qemu, QemuConfig};
use icebox_host::volume::Qcow2;

/// The guest that tests run unless they say otherwise.
pub(crate) const GEOMETRY: Geometry = Geometry {
    vcpus: 1,
    mem_mib: 256,
};
/// A boot under emulation on a busy machine.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// Anything that a test runs in a guest, on a machine that is busy with other guests.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// Slots, and so uids, of one lab.
const SLOTS: u32 = 64;
pub(crate) const DISK_SIZE: Bytes = Bytes::mib(1024);

/// Everything round the guests of one test.
pub(crate) struct Lab {
    pub(crate) layout: Layout,
    pub(crate) boxes: Arc<HostBoxes>,
    pub(crate) qemu: Qemu,
    pub(crate) volumes: Qcow2,
    pub(crate) base: Digest,
    network: NetworkSlots,
    marks: Marks,
    next_slot: AtomicU16,
    directory: tempfile::TempDir,
}

impl Lab {
    /// Root, or a word about why the test cannot run. Every test calls it first.
    pub(crate) async fn open() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root: they make namespaces and cgroups"
        );
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let layout = Layout::new(&data, directory.path().join("run"));
        let instance = Instance::of_data_directory(&data);
        let place = place();
        let first_uid = 1_000_000 + place * SLOTS;
        let boxes = Arc::new(HostBoxes::new(
            layout.clone(),
            Cgroups::detect(&instance),
            first_uid,
        ));
        let mut config = NetworkConfig::new(instance.clone());
        config.pool_size = 0;
        config.prefix = format!("10.{}.{}.0/24", 220 + place / 256, place % 256)
            .parse()
            .unwrap();
        let network = NetworkSlots::open(config).await.unwrap();
        let qemu = qemu(&layout, &boxes).await;

        // Any name will do for a base that is only ever read.
        let base = Digest::from_bytes([7; 32]);
        let image = layout.base_image(&base);
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(fixture::debian_image().unwrap(), image).unwrap();
        Self {
            volumes: Qcow2::new(layout.clone()),
            layout,
            boxes,
            qemu,
            base,
            network,
            marks: Marks {
                instance,
                first_uid,
            },
            next_slot: AtomicU16::new(0),
            directory,
        }
    }

    /// A directory for whatever a test keeps.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A guest that does not run yet: slot, box and an empty disk over the Debian image.
    pub(crate) async fn guest(&self) -> Guest<'_> {
        let id = SandboxId::random();
        let slot = Slot(self.next_slot.fetch_add(1, Ordering::Relaxed));
        assert!(u32::from(slot.0) < SLOTS);
        let network = self.network.ensure(slot, Egress::Deny).await.unwrap();
        let limits = Limits {
            geometry: GEOMETRY,
            pids_max: 128,
        };
        self.boxes.ensure(&id, slot, limits).await.unwrap();
        fs::create_dir_all(self.layout.object(&Object::Sandbox(id.clone()))).unwrap();
        let mut guest = Guest {
            lab: self,
            id,
            slot,
            network,
            token: Secret::random(),
            layers: Vec::new(),
            head: 0,
            memory: None,
            saves: 0,
        };
        guest.new_head().await;
        guest
    }

    /// Ends everything and checks that nothing is left.
    pub(crate) async fn close(self) {
        let marks = self.marks;
        let directory = self.directory.path().to_owned();
        for sandbox in self.boxes.list().await.unwrap() {
            self.qemu.kill(&sandbox, None).await.unwrap();
            self.boxes.release(&sandbox).await.unwrap();
        }
        for slot in 0..self.next_slot.load(Ordering::Relaxed) {
            self.network.release(Slot(slot)).await.unwrap();
        }
        self.network.close().await.unwrap();
        self.directory.close().unwrap();

        let tag = marks.instance.as_str();
        let mut left: Vec<String> = processes_of(marks.first_uid)
            .into_iter()
            .map(|pid| format!("process {pid}"))
            .collect();
        for (what, found) in [
            ("mount", fs::read_to_string("/proc/self/mountinfo").unwrap()),
            ("nftables", output("nft", &["list", "tables"])),
            ("link", output("ip", &["-o", "link"])),
            ("namespace", output("ls", &["/run/netns"])),
            (
                "cgroup",
                output(
                    "find",
                    &["/sys/fs/cgroup", "-maxdepth", "2", "-name", "icebox-*"],
                ),
            ),
        ] {
            let ours =
                |line: &&str| line.contains(tag) || line.contains(directory.to_str().unwrap());
            left.extend(
                found
                    .lines()
                    .filter(ours)
                    .map(|line| format!("{what} {line}")),
            );
        }
        assert!(left.is_empty(), "left on the host: {left:#?}");
    }
}

/// What tells a lab's things on the host from others. A failed test leaves none of them.
struct Marks {
    instance: Instance,
    first_uid: u32,
}

impl Drop for Marks {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for pid in processes_of(self.first_uid) {
            output("kill", &["-9", &pid.to_string()]);
        }
        let tag = self.instance.as_str();
        for namespace in output("ls", &["/run/netns"])
            .lines()
            .filter(|name| name.contains(tag))
        {
            output("ip", &["netns", "delete", namespace]);
        }
        output(
            "nft",
            &["delete", "table", "inet", &format!("icebox_{tag}")],
        );
        let groups = output(
            "find",
            &[
                "/sys/fs/cgroup",
                "-depth",
                "-path",
                &format!("*icebox-{tag}*"),
                "-type",
                "d",
            ],
        );
        for group in groups.lines() {
            output("rmdir", &[group]);
        }
    }
}

/// The driver, as a daemon makes it.
pub(crate) async fn qemu(layout: &Layout, boxes: &Arc<HostBoxes>) -> Qemu {
    let config = QemuConfig {
        program: None,
        accelerator: AcceleratorChoice::Auto,
        probe_kernel: Some(fixture::kernel().unwrap().image()),
        launcher: launcher(),
    };
    Qemu::find(config, layout.clone(), Arc::clone(boxes))
        .await
        .unwrap()
}

/// The launcher, as a program of its own.
pub(crate) fn launcher() -> Launcher {
    Launcher::new(env!("CARGO_BIN_EXE_box-launch"), [""; 0])
}

/// Tests run beside each other, in threads and in processes: a number that no other one has now.
fn place() -> u32 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // 8 per process, 1,024 processes.
    (std::process::id() % 1024) * 8 + u32::from(NEXT.fetch_add(1, Ordering::Relaxed) % 8)
}

fn processes_of(first_uid: u32) -> BTreeSet<u32> {
    use std::os::unix::fs::MetadataExt;
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let uid = entry.metadata().ok()?.uid();
            (first_uid..first_uid + SLOTS).contains(&uid).then_some(pid)
        })
        .collect()
}

/// Output of a program of the host. Failures read as nothing.
pub(crate) fn output(program: &str, arguments: &[&str]) -> String {
    HostCommand::new(program)
        .args(arguments)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

/// One sandbox, without an engine.
pub(crate) struct Guest<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) id: SandboxId,
    pub(crate) slot: Slot,
    pub(crate) network: SlotNetwork,
    pub(crate) token: Secret,
    /// Newest first.
    pub(crate) layers: Vec<LayerId>,
    pub(crate) head: u32,
    pub(crate) memory: Option<MemorySource>,
    saves: u32,
}

impl Guest<'_> {
    fn head_id(&self) -> HeadId {
        HeadId {
            sandbox: self.id.clone(),
            number: self.head,
        }
    }

    fn chain(&self) -> Chain {
        Chain {
            layers: self.layers.clone(),
            base: Some(self.lab.base.clone()),
            size: DISK_SIZE,
        }
    }

    async fn new_head(&mut self) {
        self.head += 1;
        self.lab
            .volumes
            .ensure_head(&self.head_id(), &self.chain())
            .await
            .unwrap();
    }

    pub(crate) async fn disk(&self) -> BlockDevice {
        self.lab
            .volumes
            .attach(&self.head_id(), &self.chain())
            .await
            .unwrap()
    }

    pub(crate) fn head_path(&self) -> PathBuf {
        self.lab.layout.head(&self.head_id(), "qcow2")
    }

    async fn plan(&self, start: Start) -> LaunchPlan {
        LaunchPlan {
            sandbox: self.id.clone(),
            slot: self.slot,
            geometry: GEOMETRY,
            disk: self.disk().await,
            network: self.network.clone(),
            start,
        }
    }

    pub(crate) async fn boot_plan(&self) -> LaunchPlan {
        let start = Start::Boot {
            kernel: fixture::kernel().unwrap().image(),
            initramfs: fixture::initramfs().unwrap().path,
            token: self.token.clone(),
        };
        self.plan(start).await
    }

    /// The plan to bring back what was saved last.
    pub(crate) async fn restore_plan(&self) -> LaunchPlan {
        let start = Start::Restore {
            device_state: self.stage().join(DEVICE_STATE),
            memory: self.memory.clone().unwrap(),
        };
        self.plan(start).await
    }

    fn stage(&self) -> PathBuf {
        self.lab
            .path()
            .join(format!("save-{}-{}", self.id, self.saves))
    }

    /// Starts the guest and waits until its agent answers.
    pub(crate) async fn boot(&self) -> Arc<dyn Machine> {
        self.boot_as(self.boot_plan().await).await
    }

    /// As [`boot`](Self::boot), by a plan. A guest that asks for a reset gets one, as from an engine: its kernel may find no
    /// timer on a busy machine.
    pub(crate) async fn boot_as(&self, plan: LaunchPlan) -> Arc<dyn Machine> {
        loop {
            let machine = self.lab.qemu.launch(plan.clone()).await.unwrap();
            match self.ready(&*machine).await {
                Ok(()) => return machine,
                Err(reason) => assert!(reason.reset, "{reason:?}; console: {}", self.console()),
            }
            let process = machine.process();
            let killed = self.lab.qemu.kill(&self.id, Some(&process));
            killed.await.unwrap();
        }
    }

    /// Brings back what was saved last, and lets it run.
    pub(crate) async fn restore(&self) -> Arc<dyn Machine> {
        let machine = self
            .lab
            .qemu
            .launch(self.restore_plan().await)
            .await
            .unwrap();
        machine.resume_vcpus().await.unwrap();
        self.ready(&*machine).await.unwrap();
        machine
    }

    pub(crate) async fn ready(&self, machine: &dyn Machine) -> Result<(), ExitReason> {
        let deadline = Instant::now() + READY_DEADLINE;
        let mut pause = tokio::time::interval(Duration::from_millis(10));
        while let Err(error) = self.agent().health(Duration::from_secs(5)).await {
            assert!(
                Instant::now() < deadline,
                "not ready: {error}; console: {}",
                self.console()
            );
            tokio::select! {
                _ = pause.tick() => {}
                reason = machine.exited() => return Err(reason),
            }
        }
        Ok(())
    }

    fn console(&self) -> String {
        fs::read_to_string(self.lab.layout.console_log(&self.id)).unwrap_or_default()
    }

    pub(crate) fn agent(&self) -> AgentClient {
        AgentClient::tcp(SocketAddr::from((self.network.host_address, AGENT_PORT)))
            .with_token(&Token::new(self.token.expose()))
            .with_user("root")
    }

    /// Runs a shell command in the guest, and gives what it prints.
    pub(crate) async fn sh(&self, script: &str) -> String {
        let mut command = Command::new("/bin/sh").args(["-c", script]);
        command.timeout = Some(COMMAND_DEADLINE);
        let output = self.agent().run(command).await.unwrap();
        assert_eq!(
            output.exit.shell_code(),
            0,
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Starts a program in the guest that outlives the connection.
    pub(crate) async fn spawn(&self, name: &str, script: &str) {
        let file = format!("/root/{name}");
        self.agent()
            .run(
                Command::new("/bin/sh")
                    .args(["-c", &format!("cat > {file} <<'END'\n{script}\nEND")]),
            )
            .await
            .unwrap();
        self.sh(&format!(
            "setsid python3 {file} >/root/{name}.log 2>&1 </dev/null &"
        ))
        .await;
    }

    /// Writes memory and device state of a machine that stands still.
    pub(crate) async fn save(&mut self, machine: &dyn Machine) -> SavedMemory {
        self.saves += 1;
        let stage = self.stage();
        fs::create_dir_all(&stage).unwrap();
        let plan = SavePlan {
            device_state: stage.join(DEVICE_STATE),
            memory: stage.clone(),
            restored_from: self.memory.clone(),
        };
        let saved = machine.save(plan).await.unwrap().finish().await.unwrap();
        self.memory = Some(match (saved.pages, self.memory.take()) {
            (SavedPages::Full, _) => MemorySource {
                base: stage.join(MEMORY_BASE),
                diff: None,
            },
            (SavedPages::Diff, old) => MemorySource {
                base: old.unwrap().base,
                diff: Some(stage.join(MEMORY_DIFF)),
            },
        });
        saved
    }

    /// Freezes the disk: the head becomes a layer under a new head, which the machine switches to if there is one.
    pub(crate) async fn freeze(&mut self, machine: Option<&dyn Machine>) {
        let old = self.head_id();
        self.new_head().await;
        if let Some(machine) = machine {
            let to = BlockDevice::Qcow2 {
                head: self.head_path(),
                layers: vec![self.lab.layout.head(&old, "qcow2")],
                base: self.lab.layout.base_image(&self.lab.base),
            };
            let switch = machine.disk_switch().unwrap();
            switch.switch(&to).await.unwrap();
            assert!(switch.is_on(&to).await.unwrap());
        }
        self.lab.volumes.flush(&old).await.unwrap();
        let layer = LayerId::random();
        let directory = self.lab.layout.layer_disk(&layer);
        let directory = directory.parent().unwrap();
        fs::create_dir_all(directory).unwrap();
        self.lab.volumes.seal(&old, directory).await.unwrap();
        self.layers.insert(0, layer);
    }

    /// Pauses: save, freeze, and no process any more.
    pub(crate) async fn pause(&mut self, machine: Arc<dyn Machine>) -> SavedMemory {
        machine.pause_vcpus().await.unwrap();
        let saved = self.save(&*machine).await;
        self.freeze(Some(&*machine)).await;
        self.lab
            .qemu
            .kill(&self.id, Some(&machine.process()))
            .await
            .unwrap();
        saved
    }

    /// The disk as of the newest layer, as a raw image.
    pub(crate) async fn flatten(&self, name: &str) -> PathBuf {
        let raw = self.lab.path().join(name);
        self.lab.volumes.flatten(&self.chain(), &raw).await.unwrap();
        raw
    }
}
