//! `/init` of the initramfs: drivers, root filesystem, switch root.
//!
//! The initramfs holds this program, the kernel modules that find the disk and the network, and the order to load
//! them in. Any ext4 root filesystem will do: nothing in it is run, and all it needs are the directories that
//! filesystems are mounted on, which are made if they are missing.

use std::{
    convert::Infallible,
    error::Error,
    fs, io,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use icebox_agent_api::cmdline;
use rustix::{
    fs::inotify,
    io::Errno,
    mount::MountFlags,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

use super::{KernelParameters, SUPERVISE_ROLE, power};

/// Absolute paths of the modules inside the initramfs, one to a line, in the order to load them.
const MODULE_ORDER: &str = "/etc/modules.load-order";
/// A timer that should have gone off after a millisecond, and has not after this long, does not.
const TIMER_TIMEOUT: Duration = Duration::from_secs(2);
/// Where the real root is put together.
const NEW_ROOT: &str = "/newroot";
/// Where this program lives in the real root: on a tmpfs, so nothing of the image is changed by it.
const HOME: &str = "/run/icebox";
/// Devices appear while their drivers load; one that has not after this long does not come.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(10);

/// What process 1 failed to do.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
struct BootError {
    operation: String,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: impl Into<String>) -> impl FnOnce(E) -> BootError {
    move |source| BootError {
        operation: operation.into(),
        source: source.into(),
    }
}

pub(super) fn run() -> Result<Infallible, Box<dyn Error>> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, Path::new(target), MountFlags::empty(), "")?;
    }
    if !has_timer()? {
        // Whoever started the machine sees what was asked for, and starts another.
        eprintln!("icebox: the kernel has found no timer, so the machine is reset");
        power::reset_now();
    }
    let parameters = KernelParameters::read(Path::new("/proc/cmdline"))?;
    load_modules()?;
    mount_root(&parameters)?;
    let program = install()?;
    for name in ["/dev", "/proc", "/sys"] {
        let target = in_new_root(name)?;
        rustix::mount::mount_move(name, &target)
            .map_err(failed(format!("move {name} to the real root")))?;
    }
    // What the initramfs holds would stay in memory for good.
    empty_initramfs()?;
    std::env::set_current_dir(NEW_ROOT).map_err(failed("enter the real root"))?;
    rustix::mount::mount_move(".", "/").map_err(failed("move the real root to /"))?;
    rustix::process::chroot(".").map_err(failed("switch to the real root"))?;
    std::env::set_current_dir("/").map_err(failed("enter the real root"))?;
    let error = Command::new(&program)
        .arg0("icebox-agent")
        .arg(SUPERVISE_ROLE)
        .env_clear()
        .exec();
    Err(failed(format!("run {}", program.display()))(error).into())
}

fn mount(kind: &str, target: &Path, flags: MountFlags, options: &str) -> Result<(), BootError> {
    let operation = || format!("mount {kind} on {}", target.display());
    fs::create_dir_all(target).map_err(failed(operation()))?;
    let options = std::ffi::CString::new(options)
        .map_err(|error| failed(operation())(io::Error::other(error)))?;
    rustix::mount::mount(kind, target, kind, flags, options.as_c_str()).map_err(failed(operation()))
}

/// Whether the kernel has a timer. Without one it boots and answers, but whatever sleeps never wakes up.
///
/// An emulated machine has only the processor's own, which the kernel measures for a tenth of a second. It counts ticks of
/// the time-stamp counter, late ones at once: where the host lets the emulator wait for as long as that just then, nothing is
/// left to be measured, and the kernel takes the timer for one that stands still ("APIC frequency too slow").
fn has_timer() -> Result<bool, BootError> {
    let operation = || "set a timer";
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)
        .map_err(failed(operation()))?;
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once).map_err(failed(operation()))?;
    let begun = Instant::now();
    // Nothing that would wait can be used to wait.
    loop {
        let is_over = begun.elapsed() > TIMER_TIMEOUT;
        match rustix::io::read(&timer, &mut [0; 8]) {
            Ok(_) => return Ok(true),
            Err(Errno::AGAIN) if is_over => return Ok(false),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(failed(operation())(errno)),
        }
    }
}

fn load_modules() -> Result<(), BootError> {
    let order = match fs::read_to_string(MODULE_ORDER) {
        Ok(order) => order,
        // A kernel that has everything built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(format!("read {MODULE_ORDER}"))(error)),
    };
    for path in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let operation = || format!("load the kernel module {path}");
        let file = fs::File::open(path).map_err(failed(operation()))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(operation())(errno)),
        }
    }
    Ok(())
}

fn mount_root(parameters: &KernelParameters) -> Result<(), BootError> {
    let device = parameters.get(cmdline::ROOT).unwrap_or("/dev/vda");
    let kind = parameters.get(cmdline::ROOT_FS_TYPE).unwrap_or("ext4");
    wait_for(Path::new(device)).map_err(failed(format!("find the root device {device}")))?;
    let operation = || format!("mount the root filesystem {device} ({kind})");
    fs::create_dir_all(NEW_ROOT).map_err(failed(operation()))?;
    // A read that writes a time would cost every fork blocks of its own.
    rustix::mount::mount(
        device,
        NEW_ROOT,
        kind,
        MountFlags::NOATIME,
        None::<&std::ffi::CStr>,
    )
    .map_err(failed(operation()))
}

/// Waits until a device file appears.
fn wait_for(device: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE)?;
    loop {
        if device.exists() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut ready = [rustix::event::PollFd::new(
            &watch,
            rustix::event::PollFlags::IN,
        )];
        if rustix::event::poll(&mut ready, Some(&timeout))? > 0 {
            // Which file it was does not matter: the loop looks for itself.
            rustix::io::read(&watch, &mut [0; 4096])?;
        }
    }
}

/// Copies this program to a tmpfs in the real root. Returns its path as seen from there.
fn install() -> Result<PathBuf, BootError> {
    let run = in_new_root("/run")?;
    mount(
        "tmpfs",
        &run,
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=0755,size=25%",
    )?;
    let home = in_new_root(HOME)?;
    // Settings with tokens in them are kept beside it.
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700))
        .map_err(failed("protect /run/icebox"))?;
    let program = home.join("icebox-agent");
    fs::copy("/init", &program).map_err(failed("copy the agent to the real root"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .map_err(failed("make the agent executable"))?;
    Ok(Path::new(HOME).join("icebox-agent"))
}

fn in_new_root(path: &str) -> Result<PathBuf, BootError> {
    let path = Path::new(NEW_ROOT).join(path.trim_start_matches('/'));
    fs::create_dir_all(&path).map_err(failed(format!("make the directory {}", path.display())))?;
    Ok(path)
}

/// Removes every file of the initramfs, and nothing of what is mounted in it.
fn empty_initramfs() -> Result<(), BootError> {
    let operation = "empty the initramfs";
    let device = fs::metadata("/").map_err(failed(operation))?.dev();
    remove_files(Path::new("/"), device).map_err(failed(operation))
}

fn remove_files(directory: &Path, device: u64) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            remove_files(&path, device)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
