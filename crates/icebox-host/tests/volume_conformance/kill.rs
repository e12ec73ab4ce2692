//! `kill -9` between any two steps of an operation of the `dm-snapshot` driver, in earnest.
//!
//! The operation runs in a process of its own, which is traced (ptrace(2)): it is killed when it is about to make its n-th
//! system call that changes something, for every n that there is. What it leaves is then looked at, and finished, by
//! somebody who knows nothing of it.

use std::os::unix::fs::FileExt as _;
use std::process::Command;

use icebox_engine::host::{
    Chain, FreezeByHost, LiveFreeze, Removed, Store as _, VolumeDriver as _,
};
use icebox_engine::id::{HeadId, LayerId};
use icebox_engine::layout::{Layout, Object};
use icebox_engine::unit::Bytes;
use icebox_host::instance::Instance;
use icebox_host::volume::DmSnapshot;

use crate::devices::{another_process, attach, open, write};
use crate::faults::devices;
use crate::ground::{Disk, Ground, assert_same};

const MIB: u64 = 1 << 20;
/// Tells the process that is to be killed what to do: the operation, its directories, its head and its chain.
const ORDER: &str = "ICEBOX_KILL_ORDER";
/// The test that this process is. It does nothing without an order.
const VICTIM: &str = "kill::the_process_that_is_killed";
/// No operation has so many steps.
const STEPS_MAX: usize = 200;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
}

fn by_host(driver: &DmSnapshot) -> &dyn FreezeByHost {
    use icebox_engine::host::VolumeDriver as _;
    match driver.live_freeze() {
        LiveFreeze::ByHost(host) => host,
        LiveFreeze::ByVmm => panic!("this driver does not freeze"),
    }
}

fn next(head: &HeadId) -> HeadId {
    HeadId {
        number: head.number + 1,
        ..head.clone()
    }
}

#[test]
#[ignore = "the tests in here start it"]
fn the_process_that_is_killed() {
    let order = std::env::var(ORDER).unwrap();
    let [
        operation,
        data,
        run,
        sandbox,
        number,
        base,
        size,
        layers,
        staging,
    ] = order.split('\n').collect::<Vec<_>>()[..]
    else {
        panic!("an order has nine lines: {order}");
    };
    let driver = DmSnapshot::new(
        Layout::new(data, run),
        &Instance::of_data_directory(data.as_ref()),
    );
    let head = HeadId {
        sandbox: sandbox.parse().unwrap(),
        number: number.parse().unwrap(),
    };
    let chain = Chain {
        layers: layers
            .split_whitespace()
            .map(|layer| layer.parse().unwrap())
            .collect(),
        base: Some(base.parse().unwrap()),
        size: Bytes(size.parse().unwrap()),
    };
    let runtime = runtime();
    sys::be_traced();
    runtime.block_on(async {
        match operation {
            "attach" => drop(driver.attach(&head, &chain).await.unwrap()),
            "detach" => drop(driver.detach(&head).await.unwrap()),
            "freeze" => by_host(&driver)
                .freeze(&head, &next(&head), staging.as_ref())
                .await
                .unwrap(),
            other => panic!("{other} is no operation"),
        }
    });
}

/// Has another process do `operation`, and kills it before its step number `step`. Whether it came that far.
async fn killed(
    ground: &Ground,
    operation: &str,
    disk: &Disk,
    staging: &std::path::Path,
    step: usize,
) -> bool {
    let layers: Vec<_> = disk.chain.layers.iter().map(LayerId::as_str).collect();
    let order = [
        operation.to_owned(),
        ground.layout.data().display().to_string(),
        ground.layout.run().display().to_string(),
        disk.head.sandbox.to_string(),
        disk.head.number.to_string(),
        disk.chain.base.as_ref().unwrap().to_string(),
        disk.chain.size.0.to_string(),
        layers.join(" "),
        staging.display().to_string(),
    ];
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            VICTIM,
            "--exact",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ORDER, order.join("\n"))
        .stdout(std::process::Stdio::null());
    // All requests of a tracer come from one thread.
    tokio::task::spawn_blocking(move || sys::run_until(&mut command, step))
        .await
        .unwrap()
}

pub(crate) async fn inv_30_dm_snapshot_an_attach_killed_at_any_step_is_done_again(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, 4096, 1).await;
    ground.freeze(&mut disk).await;
    ground.write(&mut disk, MIB, 4096, 2).await;
    let mut steps = 0;
    for step in 0..STEPS_MAX {
        let was_killed = killed(ground, "attach", &disk, "".as_ref(), step).await;
        let path = another_process(ground)
            .attach(&disk.head, &disk.chain)
            .await
            .unwrap();
        let icebox_engine::host::BlockDevice::Raw { path } = path else {
            panic!("not a block device");
        };
        let found = std::fs::read(path).unwrap();
        assert_same(&found, &disk.content, &format!("killed at step {step}"));
        another_process(ground).detach(&disk.head).await.unwrap();
        assert_eq!(devices(ground), Vec::<String>::new(), "step {step}");
        if !was_killed {
            steps = step;
            break;
        }
    }
    assert!(steps > 10, "only {steps} steps were found");
}

pub(crate) async fn inv_30_dm_snapshot_a_detach_killed_at_any_step_is_done_again(ground: &Ground) {
    let mut disk = ground.disk().await;
    ground.write(&mut disk, 0, 4096, 1).await;
    ground.freeze(&mut disk).await;
    let mut steps = 0;
    for step in 0..STEPS_MAX {
        let vmm = open(&attach(ground, &disk).await);
        write(&vmm, &mut disk, MIB, u8::try_from(step).unwrap());
        drop(vmm);
        let was_killed = killed(ground, "detach", &disk, "".as_ref(), step).await;
        let again = another_process(ground).detach(&disk.head).await.unwrap();
        assert!(was_killed || again == Removed::AlreadyAbsent);
        assert_eq!(devices(ground), Vec::<String>::new(), "step {step}");
        ground.assert_content(&disk).await;
        if !was_killed {
            steps = step;
            break;
        }
    }
    assert!(steps >= 4, "only {steps} steps were found");
}

pub(crate) async fn inv_30_dm_snapshot_a_freeze_killed_at_any_step_ends_one_way_or_the_other(
    ground: &Ground,
) {
    let first = ground.disk().await;
    let (mut steps, mut taken_back, mut finished) = (0, 0, 0);
    for step in 0..STEPS_MAX {
        let mut disk = ground.disk_on(first.chain.clone(), &first.content).await;
        let vmm = open(&attach(ground, &disk).await);
        write(&vmm, &mut disk, MIB, 1);
        // In the host's cache: the freeze must see it.
        vmm.write_all_at(&[2; 4096], 2 * MIB).unwrap();
        disk.content[2 << 20..][..4096].fill(2);
        let frozen = disk.content.clone();
        let layer = LayerId::random();
        let object = Object::Layer(layer.clone());
        let staging = ground.store.staged(&object).await.unwrap();
        let was_killed = killed(ground, "freeze", &disk, &staging, step).await;

        let later = another_process(ground);
        let to = next(&disk.head);
        let is_frozen = by_host(&later).is_frozen(&disk.head, &to).await.unwrap();
        // Whichever way it went, the guest's writes do not wait.
        write(&vmm, &mut disk, 3 * MIB, 3);
        if is_frozen {
            finished += 1;
            ground.store.publish(&object, b"{}").await.unwrap();
            disk.chain = ground.chain_over(&layer, &disk);
            disk.head = to;
            let flat = ground.flattened(&disk.chain).await;
            assert_same(&flat, &frozen, &format!("the layer, killed at step {step}"));
        } else {
            assert!(was_killed);
            taken_back += 1;
            later.remove_head(&to).await.unwrap();
            ground.store.discard(&object).await.unwrap();
        }
        drop(vmm);
        later.detach(&disk.head).await.unwrap();
        assert_eq!(devices(ground), Vec::<String>::new(), "step {step}");
        ground.assert_content(&disk).await;
        if !was_killed {
            steps = step;
            break;
        }
    }
    assert!(
        steps > 10 && taken_back > 5 && finished > 2,
        "{steps} steps were found: {taken_back} freezes were taken back, {finished} finished"
    );
}

/// ptrace(2).
mod sys {
    #![allow(unsafe_code, reason = "there is no safe interface to ptrace")]

    use std::ffi::c_long;
    use std::process::Command;

    use libc::{c_int, pid_t};

    /// The calling process is traced by the one that started it, and stops.
    pub(super) fn be_traced() {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: takes no pointers.
        let traced = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) };
        assert_eq!(traced, 0);
        // SAFETY: takes no pointers.
        let raised = unsafe { libc::raise(libc::SIGSTOP) };
        assert_eq!(raised, 0);
    }

    fn request(what: libc::c_uint, pid: pid_t, data: usize) -> c_long {
        let none = std::ptr::null_mut::<libc::c_void>();
        let data = data as *mut libc::c_void;
        // SAFETY: these requests take a number where others take a pointer.
        unsafe { libc::ptrace(what, pid, none, data) }
    }

    /// The system call that a stopped thread is about to make, with its second argument; `None` if it has made it.
    fn about_to(pid: pid_t) -> Option<(c_long, u64)> {
        let mut info = std::mem::MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
        let size = size_of::<libc::ptrace_syscall_info>();
        // SAFETY: the kernel writes at most `size` bytes to `info`.
        let got =
            unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, pid, size, info.as_mut_ptr()) };
        assert!(got > 0, "{}", std::io::Error::last_os_error());
        // SAFETY: all zeros, with which it began, is a value of it.
        let info = unsafe { info.assume_init() };
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return None;
        }
        // SAFETY: `op` says that this is what the union holds.
        let entry = unsafe { info.u.entry };
        Some((c_long::try_from(entry.nr).unwrap(), entry.args[1]))
    }

    /// Whether a system call changes something of device-mapper's, of a loop device's, or of a file's name or mode.
    fn is_step(call: c_long, second: u64) -> bool {
        /// Device-mapper's commands that only ask: list, status, table.
        const QUESTIONS: [u64; 3] = [2, 7, 12];
        match call {
            libc::SYS_ioctl => match (second >> 8) & 0xff {
                0xfd => !QUESTIONS.contains(&(second & 0xff)),
                0x4c => true,
                _ => false,
            },
            libc::SYS_rename
            | libc::SYS_renameat
            | libc::SYS_renameat2
            | libc::SYS_unlink
            | libc::SYS_unlinkat
            | libc::SYS_fchmod
            | libc::SYS_ftruncate
            | libc::SYS_fsync => true,
            _ => false,
        }
    }

    /// Runs a command that calls [`be_traced`], and kills it before its step number `step`. Whether it came that far.
    #[expect(
        clippy::zombie_processes,
        reason = "it is waited for by number, as its threads are"
    )]
    pub(super) fn run_until(command: &mut Command, step: usize) -> bool {
        let mut child = command.spawn().unwrap();
        let leader = pid_t::try_from(child.id()).unwrap();
        let (mut seen, mut is_traced, mut was_killed) = (0, false, false);
        loop {
            let mut status: c_int = 0;
            // SAFETY: `status` is written to.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
            if pid == -1 {
                break;
            }
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if pid == leader {
                    let ended_well = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
                    assert!(
                        was_killed || ended_well,
                        "the operation failed: {status:#x}"
                    );
                    break;
                }
                continue;
            }
            let signal = libc::WSTOPSIG(status);
            let mut pass_on = 0;
            if !is_traced {
                is_traced = true;
                let options = libc::PTRACE_O_TRACESYSGOOD
                    | libc::PTRACE_O_TRACECLONE
                    | libc::PTRACE_O_EXITKILL;
                let set = request(
                    libc::PTRACE_SETOPTIONS,
                    pid,
                    usize::try_from(options).unwrap(),
                );
                assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            } else if signal == libc::SIGTRAP | 0x80 {
                if let Some((call, second)) = about_to(pid)
                    && is_step(call, second)
                    && !was_killed
                {
                    if seen == step {
                        was_killed = true;
                        child.kill().unwrap();
                    }
                    seen += 1;
                }
            } else if signal != libc::SIGTRAP && signal != libc::SIGSTOP {
                pass_on = usize::try_from(signal).unwrap();
            }
            // One that is being killed has no more to do.
            request(libc::PTRACE_SYSCALL, pid, pass_on);
        }
        was_killed
    }
}
