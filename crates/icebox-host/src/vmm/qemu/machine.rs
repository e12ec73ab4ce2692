//! One running QEMU.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, DiskSwitch, ErrorKind, ExitReason, HostError, Machine, MemorySource, Meter,
    ProcessIdentity, Save, SavePlan, VcpuState,
};
use icebox_engine::id::SandboxId;
use icebox_engine::layout::Layout;
use icebox_engine::unit::PAGE_SIZE;
use qapi::qmp::{self, MigrationCapability, MigrationStatus, RunState, ShutdownCause};
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::sync::watch;

use super::command::{FDSET_INCOMING, FDSET_SAVE, SOCKET};
use super::disk::{self, DISK_DEVICE, DiskFile};
use super::qmp::{BlockdevAdd, QUICK, Qmp, QmpError};
use crate::blocking::blocking;
use crate::launcher::{Ended, Process};
use crate::vmm::console::Outputs;
use crate::vmm::memory::{
    self, Diff, DiffError, GuestRam, ProcessMemory, ProcessMemoryError, SaveError, SaveOutcome,
};
use crate::vmm::meter::ProcessMeter;
use crate::vmm::watched::{TalkError, Watched, how_it_ended};

/// Device state is kilobytes; loading or saving it takes milliseconds, but the disk it is on may be slow.
const STATE_DEADLINE: Duration = Duration::from_secs(30);
/// Largest device state that is accepted from a QEMU. Real ones are 12 KiB.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// Largest guest memory that is believed: how much a QEMU says it has decides how long a save looks for it.
const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// To stop the vCPUs, QEMU first finishes the guest's requests in flight and flushes its disk, which takes as long as
/// the host has dirty pages of it; to let them run, it may have to finish that first.
const FLIP_DEADLINE: Duration = Duration::from_secs(30);
/// Before a monitor that cannot be talked to is tried again, to hear what QEMU announces.
const DEAF_PAUSE: Duration = Duration::from_secs(1);
/// A switch of heads drains the guest's requests in flight first.
const SWITCH_DEADLINE: Duration = Duration::from_secs(30);

/// A QEMU and the connection to it.
#[derive(Debug)]
pub(super) struct QemuMachine {
    vmm: Watched,
    qmp: Qmp,
}

impl QemuMachine {
    /// Begins to watch a QEMU: its console, its stderr, its end. These go on until it ends, whether or not this value
    /// still exists.
    pub(super) fn watch(
        sandbox: &SandboxId,
        process: Process,
        outputs: Outputs,
        layout: &Layout,
    ) -> Self {
        let qmp = Qmp::new(layout.vm(sandbox).join(SOCKET));
        let announced = qmp.announced();
        let log = layout.console_log(sandbox);
        let reason = |ended, last_words: String| async move {
            let asked = announced.guest_ended().await;
            ExitReason {
                by_guest: asked.is_some(),
                reset: asked == Some(ShutdownCause::guest_reset),
                detail: describe(ended, &last_words),
            }
        };
        let vmm = Watched::begin("QEMU", sandbox, process, outputs, log, reason);
        Self { vmm, qmp }
    }

    /// Which process it is.
    pub(super) fn watched(&self) -> &Process {
        self.vmm.process()
    }

    /// Waits until QEMU answers, or has ended.
    pub(super) async fn answers(&self, within: Duration) -> Result<(), HostError> {
        self.vmm.or_its_end("start", self.qmp.connect(within)).await
    }

    /// Loads what a save wrote. The vCPUs stand still before and after.
    pub(super) async fn restore(&self, memory: &MemorySource) -> Result<(), HostError> {
        // First the pages, since loading virtio device state reads the guest's memory.
        if let Some(diff) = &memory.diff {
            self.load_diff(memory, diff.clone()).await?;
        }
        let mut incoming = self.qmp.incoming();
        let load = async {
            let announce = qmp::MigrationCapabilityStatus {
                capability: MigrationCapability::events,
                state: true,
            };
            let command = qmp::migrate_set_capabilities {
                capabilities: vec![announce],
            };
            self.qmp.execute(command, QUICK).await?;
            self.qmp
                .execute(
                    qmp::migrate_incoming {
                        channels: None,
                        exit_on_error: None,
                        uri: Some(format!("file:/dev/fdset/{FDSET_INCOMING}")),
                    },
                    STATE_DEADLINE,
                )
                .await?;
            let done = |status: &Option<MigrationStatus>| {
                matches!(
                    status,
                    Some(MigrationStatus::completed | MigrationStatus::failed)
                )
            };
            tokio::time::timeout(STATE_DEADLINE, incoming.wait_for(done))
                .await
                .map_err(|_| QmpError::Timeout {
                    command: "migrate-incoming",
                    after: STATE_DEADLINE,
                })?
                .map_err(|_| QmpError::Gone {
                    command: "migrate-incoming",
                    source: io::ErrorKind::UnexpectedEof.into(),
                })?;
            // "completed" is said a moment before the state machine moves on.
            loop {
                match self.status().await? {
                    RunState::inmigrate => tokio::task::yield_now().await,
                    status => return Ok::<_, QmpError>(status),
                }
            }
        };
        match self.vmm.or_its_end("load device state", load).await? {
            RunState::paused | RunState::prelaunch => Ok(()),
            other => Err(self.vmm.error(
                ErrorKind::Other,
                format!("load device state: vCPUs are {other:?}, not paused"),
            )),
        }
    }

    async fn load_diff(&self, memory: &MemorySource, diff: PathBuf) -> Result<(), HostError> {
        let process = self.vmm.process().identity().clone();
        let base = memory.base.clone();
        let message = format!(
            "load memory of sandbox {} from {}",
            self.vmm.sandbox(),
            diff.display()
        );
        blocking(move || {
            let load = || -> Result<(), Box<dyn Error + Send + Sync>> {
                let process = ProcessMemory::open(&process)?;
                let ram = process.find_file(&base)?;
                let diff = Diff::open(File::open(diff)?, ram.bytes)?;
                diff.apply(|offset, bytes| process.write(ram, offset, bytes))?;
                Ok(())
            };
            load().map_err(|error| {
                // A damaged or foreign diff is the input's fault, not this machine's.
                let kind = if error.is::<DiffError>() {
                    ErrorKind::Invalid
                } else {
                    ErrorKind::Other
                };
                HostError::new(kind, message).caused_by(error)
            })
        })
        .await
    }

    async fn status(&self) -> Result<RunState, QmpError> {
        let status = self.qmp.execute(qmp::query_status {}, QUICK).await?.status;
        if status == RunState::io_error {
            self.qmp.announced().found_standing();
        }
        Ok(status)
    }

    /// Where the guest's memory is, when it is not a file's mapping.
    async fn anonymous_ram(&self) -> Result<GuestRam, HostError> {
        let size = self
            .qmp
            .execute(qmp::query_memory_size_summary {}, QUICK)
            .await?
            .base_memory;
        let answer = self
            .qmp
            .execute(
                qmp::human_monitor_command {
                    command_line: "gpa2hva 0".into(),
                    cpu_index: None,
                },
                QUICK,
            )
            .await?;
        let address = host_address(&answer).ok_or_else(|| {
            self.vmm.error(
                ErrorKind::Other,
                format!("find guest memory: unexpected answer {answer:?}"),
            )
        })?;
        if size > MEMORY_BYTES_MAX || size % PAGE_SIZE as u64 != 0 {
            return Err(self.vmm.error(
                ErrorKind::Invalid,
                format!("guest memory of {size} bytes is not credible"),
            ));
        }
        Ok(GuestRam {
            address,
            bytes: size,
        })
    }

    /// Has QEMU write device state into memory, and copies it from there: QEMU never holds a descriptor of the file,
    /// which is immutable as soon as it is published, and cannot fill the disk through it (what it writes counts
    /// against its own cgroup). Not a pipe, since QEMU truncates what it opens.
    async fn save_device_state(&self, path: &Path) -> Result<u64, HostError> {
        let failed = |error| HostError::io(format!("write device state {}", path.display()), error);
        let (state, writing) = state_buffer().map_err(failed)?;
        self.add_fd(FDSET_SAVE, "save", writing).await?;
        let saved = self
            .qmp
            .execute(
                qmp::xen_save_devices_state {
                    // Not part of a migration: block devices stay ours.
                    live: Some(false),
                    filename: format!("/dev/fdset/{FDSET_SAVE}"),
                },
                STATE_DEADLINE,
            )
            .await;
        self.remove_fdset(FDSET_SAVE).await?;
        saved?;
        let length = state.metadata().map_err(failed)?.len();
        if length == 0 || length > STATE_BYTES_MAX {
            return Err(self.vmm.error(
                ErrorKind::Invalid,
                format!("device state of {length} bytes is not credible"),
            ));
        }
        let path = path.to_owned();
        blocking(move || {
            copy_state(&state, length, &path).map_err(|error| {
                HostError::io(format!("write device state {}", path.display()), error)
            })
        })
        .await?;
        Ok(length)
    }

    async fn add_fd(&self, set: i64, name: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        let command = qmp::add_fd {
            fdset_id: Some(set),
            opaque: Some(name.to_owned()),
        };
        self.qmp
            .execute_with(command, vec![descriptor], QUICK)
            .await
            .map(drop)
    }

    async fn remove_fdset(&self, set: i64) -> Result<(), QmpError> {
        let command = qmp::remove_fd {
            fd: None,
            fdset_id: set,
        };
        self.qmp.execute(command, QUICK).await.map(drop)
    }
}

/// Completes when it is so. Never, if nobody says any more whether it is.
async fn until(said: &mut watch::Receiver<bool>) {
    if said.wait_for(|so| *so).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A file in memory, and a descriptor of it that can only be written.
fn state_buffer() -> io::Result<(File, OwnedFd)> {
    let buffer: File = memfd_create("device-state", MemfdFlags::CLOEXEC)?.into();
    let writing = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", buffer.as_raw_fd()))?;
    Ok((buffer, writing.into()))
}

fn copy_state(state: &File, length: u64, path: &Path) -> io::Result<()> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    state.read_exact_at(&mut bytes, 0)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)?
        .write_all(&bytes)
}

/// The blocking part of a save. `anonymous` is where the memory is when it is not a mapping of the old base.
fn write_memory(
    process: &ProcessIdentity,
    anonymous: Option<GuestRam>,
    plan: &SavePlan,
) -> Result<SaveOutcome, SaveError> {
    let process = ProcessMemory::open(process)?;
    let old_base = plan
        .restored_from
        .as_ref()
        .map(|memory| memory.base.as_path());
    let ram = match (anonymous, old_base) {
        (Some(ram), _) => {
            process.check_anonymous(ram)?;
            ram
        }
        (None, Some(base)) => process.find_file(base)?,
        (None, None) => return Err(ProcessMemoryError::NotMapped("any memory".into()).into()),
    };
    memory::save(&process, ram, old_base, &plan.memory)
}

/// `gpa2hva`'s "Host virtual address for 0x0 (ram) is 0x7f…".
fn host_address(answer: &str) -> Option<u64> {
    let (_, address) = answer.trim().rsplit_once(" is 0x")?;
    u64::from_str_radix(address, 16).ok()
}

/// How a QEMU ended, for people. What is left out is harmless, and said on every restore: a save of devices has no
/// description of itself.
fn describe(ended: Ended, last_words: &str) -> String {
    let words = last_words.lines();
    let words = words.filter(|line| !line.contains("Expected vmdescription section"));
    how_it_ended("QEMU", ended, words)
}

impl TalkError for QmpError {
    fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn process(&self) -> ProcessIdentity {
        self.vmm.process().identity().clone()
    }

    async fn probe(&self) -> Result<VcpuState, HostError> {
        let status = self.vmm.or_its_end("probe", self.status()).await?;
        match status {
            RunState::running => Ok(VcpuState::Running),
            RunState::paused | RunState::prelaunch | RunState::save_vm | RunState::suspended => {
                Ok(VcpuState::Paused)
            }
            RunState::io_error => Ok(VcpuState::Stalled),
            other => Err(self
                .vmm
                .error(ErrorKind::Other, format!("vCPUs are {other:?}"))),
        }
    }

    fn meter(&self) -> Result<Box<dyn Meter>, HostError> {
        Ok(Box::new(ProcessMeter::open(self.vmm.process().identity())?))
    }

    async fn pause_vcpus(&self) -> Result<(), HostError> {
        self.vmm
            .or_its_end("pause vCPUs", async {
                self.qmp
                    .execute(qmp::stop {}, FLIP_DEADLINE)
                    .await
                    .map(drop)
            })
            .await
    }

    async fn resume_vcpus(&self) -> Result<(), HostError> {
        self.vmm
            .or_its_end("resume vCPUs", async {
                self.qmp
                    .execute(qmp::cont {}, FLIP_DEADLINE)
                    .await
                    .map(drop)
            })
            .await
    }

    async fn save(&self, plan: SavePlan) -> Result<Save, HostError> {
        match self.probe().await? {
            VcpuState::Paused => {}
            VcpuState::Running => {
                return Err(self.vmm.error(ErrorKind::Invalid, "save while vCPUs run"));
            }
            VcpuState::Stalled => {
                let message = "a write to the guest's disk found no room";
                return Err(self.vmm.error(ErrorKind::Exhausted, message));
            }
        }
        let anonymous = match &plan.restored_from {
            None => Some(self.anonymous_ram().await?),
            Some(_) => None,
        };
        let state_bytes = self.save_device_state(&plan.device_state).await?;

        let process = self.vmm.process().identity().clone();
        let message = format!("save memory of sandbox {}", self.vmm.sandbox());
        let saved = blocking(move || {
            write_memory(&process, anonymous, &plan).map_err(|error| error.into_host(message))
        })
        .await?;
        Ok(Save::Done(saved.with_state(state_bytes)))
    }

    /// QEMU stops the vCPUs by itself when a write finds no room (`werror=enospc`, its default), and says `STOP`; only its
    /// state tells that from a stop of ours.
    async fn stalled(&self) {
        let announced = self.qmp.announced();
        let mut stands = announced.stands();
        loop {
            tokio::select! {
                () = until(&mut stands) => {}
                // What happened meanwhile nobody heard.
                () = announced.deaf() => tokio::time::sleep(DEAF_PAUSE).await,
            }
            match self.status().await {
                Ok(RunState::io_error) => return,
                Ok(_) => tokio::select! {
                    changed = stands.changed() => {
                        if changed.is_err() {
                            std::future::pending::<()>().await;
                        }
                    }
                    () = announced.deaf() => {}
                },
                Err(error) => {
                    tracing::debug!(sandbox = %self.vmm.sandbox(), %error, "asking why the vCPUs stand still");
                    tokio::time::sleep(DEAF_PAUSE).await;
                }
            }
        }
    }

    fn disk_switch(&self) -> Option<&dyn DiskSwitch> {
        Some(self)
    }

    async fn exited(&self) -> ExitReason {
        self.vmm.exited().await
    }
}

impl QemuMachine {
    /// Name of the node that the guest's writes go to.
    async fn active_node(&self) -> Result<String, HostError> {
        let devices = self.qmp.execute(qmp::query_block {}, QUICK).await?;
        devices
            .into_iter()
            .find(|device| {
                device.qdev.as_deref().is_some_and(|qdev| {
                    qdev == DISK_DEVICE || qdev.contains(&format!("/{DISK_DEVICE}"))
                })
            })
            .and_then(|device| device.inserted?.node_name)
            .ok_or_else(|| self.vmm.error(ErrorKind::Other, "it has no disk"))
    }

    /// Puts a new head over the active node.
    async fn put_on(&self, head: &DiskFile<'_>, active: String) -> Result<(), HostError> {
        let open = |write: bool| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .open(head.path)
                .map(OwnedFd::from)
                .map_err(|error| {
                    HostError::io(format!("open new head {}", head.path.display()), error)
                })
        };
        let (read, write) = (open(false)?, open(true)?);
        self.add_fd(head.fdset, &format!("{}-r", head.node), read)
            .await?;
        self.add_fd(head.fdset, &format!("{}-w", head.node), write)
            .await?;
        let node = BlockdevAdd(disk::detached_node(head));
        self.qmp.execute(node, QUICK).await?;
        let command = qmp::blockdev_snapshot(qmp::BlockdevSnapshot {
            node: active,
            overlay: head.node.clone(),
        });
        self.qmp.execute(command, SWITCH_DEADLINE).await?;
        Ok(())
    }

    /// Removes what an attempt to put a head on has left in QEMU. What is in use after all, QEMU keeps.
    async fn take_off(&self, head: &DiskFile<'_>) {
        let node = qmp::blockdev_del {
            node_name: head.node.clone(),
        };
        if let Err(error) = self.qmp.execute(node, QUICK).await {
            tracing::debug!(sandbox = %self.vmm.sandbox(), %error, "no node to remove");
        }
        if let Err(error) = self.remove_fdset(head.fdset).await {
            tracing::debug!(sandbox = %self.vmm.sandbox(), %error, "no descriptors to remove");
        }
    }

    /// Removes the read-write descriptors that no node under the active one needs any more.
    async fn drop_writable(&self, active: &str) -> Result<(), HostError> {
        let keep = format!("{active}-w");
        for set in self.qmp.execute(qmp::query_fdsets {}, QUICK).await? {
            for descriptor in set.fds {
                let is_stale = descriptor
                    .opaque
                    .is_some_and(|name| name.ends_with("-w") && name != keep);
                if is_stale {
                    let command = qmp::remove_fd {
                        fd: Some(descriptor.fd),
                        fdset_id: set.fdset_id,
                    };
                    self.qmp.execute(command, QUICK).await?;
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl DiskSwitch for QemuMachine {
    async fn switch(&self, to: &BlockDevice) -> Result<(), HostError> {
        let active = self.active_node().await?;
        let sets = self.qmp.execute(qmp::query_fdsets {}, QUICK).await?;
        let next = sets
            .iter()
            .map(|set| set.fdset_id)
            .max()
            .unwrap_or_default()
            + 1;
        let head = disk::head(to, next);
        if active != head.node
            && let Err(error) = self.put_on(&head, active).await
        {
            self.take_off(&head).await;
            return Err(error);
        }
        self.drop_writable(&head.node).await
    }

    async fn is_on(&self, head: &BlockDevice) -> Result<bool, HostError> {
        Ok(self.active_node().await? == disk::head(head, 0).node)
    }
}
