//! The virtual machine: started, listened to, and never waited for longer than agreed.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::image::Image;
use crate::run::Failure;

/// What to do with the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Run the suite and end.
    Run,
    /// Run the suite, then give a shell.
    Keep,
    /// Give a shell.
    Shell,
}

impl Mode {
    /// As the machine's init knows it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Keep => "keep",
            Self::Shell => "shell",
        }
    }
}

/// Boots the machine and shows what it says, until it powers itself off.
///
/// # Errors
/// It could not be started, or it took longer than `longest` and was killed; whoever has a shell in it has all the time
/// in the world. A machine that crashed ends like one that did not: the suite's disk tells.
pub(super) fn run(
    image: &Image,
    suite: &Path,
    mode: Mode,
    longest: Duration,
) -> Result<(), Failure> {
    let mut qemu = command(image, suite);
    let cannot = |error| Failure(format!("cannot start qemu-system-x86_64: {error}"));
    if mode != Mode::Run {
        let status = qemu
            .args(["-serial", "mon:stdio"])
            .status()
            .map_err(cannot)?;
        return ended(status);
    }
    let mut child = qemu
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let listened = listen(&mut child, Instant::now() + longest);
    if listened.is_err() {
        child
            .kill()
            .map_err(|error| Failure(format!("cannot kill QEMU: {error}")))?;
    }
    let status = child
        .wait()
        .map_err(|error| Failure(format!("waiting for QEMU: {error}")))?;
    listened.and_then(|()| ended(status))
}

fn ended(status: std::process::ExitStatus) -> Result<(), Failure> {
    if status.success() {
        Ok(())
    } else {
        Err(Failure(format!("the test host's QEMU ended with {status}")))
    }
}

fn command(image: &Image, suite: &Path) -> Command {
    // It goes when we go, however that happens.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    // `max` brings emulated SVM, so that there is a KVM inside. Copies of memory are twice as fast without ERMS; Linux 6.1
    // takes FSRM without ERMS for a licence to copy short buffers with no end, over its own code. Page tables of four
    // levels are walked faster than five.
    command.args([
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max,erms=off,fsrm=off,la57=off",
    ]);
    command.args(["-smp", "2", "-m", "6G", "-device", "virtio-rng-pci"]);
    command.arg("-kernel").arg(image.vmlinuz());
    command.arg("-initrd").arg(image.initramfs());
    // A panic ends the machine; what protects a real CPU costs an emulated one; on a busy host a check of the timer takes
    // one that is late for one that is broken.
    command.args([
        "-append",
        "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off no_timer_check",
    ]);
    for (path, options) in [(image.root(), "snapshot=on"), (suite, "snapshot=off")] {
        // A comma ends an option unless it is doubled.
        let path = path.display().to_string().replace(',', ",,");
        command.arg("-drive");
        command.arg(format!(
            "file={path},format=raw,if=virtio,cache=unsafe,{options}"
        ));
    }
    command
}

/// Copies the machine's console to ours until it is closed, which QEMU does when it ends.
fn listen(child: &mut Child, until: Instant) -> Result<(), Failure> {
    let Some(mut console) = child.stdout.take() else {
        return Ok(());
    };
    let (heard, said) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            // A terminal's line ends.
            let text: Vec<u8> = buffer[..count]
                .iter()
                .copied()
                .filter(|byte| *byte != b'\r')
                .collect();
            if heard.send(text).is_err() {
                break;
            }
        }
    });
    let mut out = std::io::stdout();
    loop {
        match said.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(text) => out
                .write_all(&text)
                .and_then(|()| out.flush())
                .map_err(|error| Failure(format!("standard output: {error}")))?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                return Err(Failure(
                    "the test host did not end in time and was killed; `--keep` gives a shell to look around".to_owned(),
                ));
            }
        }
    }
}
