//! The virtual machine: started, listened to, and never waited for longer than agreed.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::image::Image;
use super::power::PowerDisk;
use crate::run::Failure;

/// The line with which a test asks for a power cut (`crates/icebox/tests/system/power_cut.rs`).
const POWER_CUT: &[u8] = b"cut the power now\n";
/// The line with which it says what the power is to be cut at every flush of.
const BEGINNING: &[u8] = b"cut the power at every flush from here\n";

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

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By itself. One that crashed looks the same: the suite's disk tells.
    PoweredOff,
    /// It was killed, as a test asked.
    PowerCut,
}

/// What a machine is made of.
#[derive(Clone, Copy)]
pub(super) struct Machine<'a> {
    /// What its lines begin with.
    pub(super) name: &'a str,
    pub(super) image: &'a Image,
    pub(super) suite: &'a Path,
    pub(super) power: Option<Power<'a>>,
}

/// A disk for tests of power cuts.
#[derive(Clone, Copy)]
pub(super) enum Power<'a> {
    /// What is done to it is noted.
    Noted(&'a PowerDisk),
    /// As a cut has left it; what is done to it is thrown away.
    AfterCut(&'a PowerDisk),
}

impl Machine<'_> {
    /// Boots the machine and shows what it says, until it powers itself off.
    ///
    /// # Errors
    /// It could not be started, or it took longer than `longest` and was killed; whoever has a shell in it has all the
    /// time in the world.
    pub(super) fn run(&self, mode: Mode, longest: Duration) -> Result<Ended, Failure> {
        let mut qemu = self.command();
        let cannot = |error| Failure(format!("cannot start qemu-system-x86_64: {error}"));
        if mode != Mode::Run {
            let status = qemu
                .args(["-serial", "mon:stdio"])
                .status()
                .map_err(cannot)?;
            return succeeded(status);
        }
        let mut child = qemu
            .args(["-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let listened = self.listen(&mut child, Instant::now() + longest);
        if !matches!(listened, Ok(Ended::PoweredOff)) {
            child
                .kill()
                .map_err(|error| Failure(format!("cannot kill QEMU: {error}")))?;
        }
        let status = child
            .wait()
            .map_err(|error| Failure(format!("waiting for QEMU: {error}")))?;
        match listened? {
            Ended::PoweredOff => succeeded(status),
            Ended::PowerCut => Ok(Ended::PowerCut),
        }
    }

    fn command(&self) -> Command {
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
        // `max` brings emulated SVM, so that there is a KVM inside, on one processor: on two, the emulator forgets whose
        // memory it looks at, within minutes (docs/decisions/test-host.md). Copies of memory are twice as fast without ERMS; Linux 6.1
        // takes FSRM without ERMS for a licence to copy short buffers with no end, over its own code. Page tables of four
        // levels are walked faster than five.
        command.args([
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "max,erms=off,fsrm=off,la57=off",
        ]);
        command.args(["-smp", "1", "-m", "6G", "-device", "virtio-rng-pci"]);
        command.arg("-kernel").arg(self.image.vmlinuz());
        command.arg("-initrd").arg(self.image.initramfs());
        // A panic ends the machine; what protects a real CPU costs an emulated one; on a busy host a check of the timer takes
        // one that is late for one that is broken.
        command.args([
            "-append",
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off no_timer_check",
        ]);
        // In the order in which the machine finds them.
        for (name, path, options) in [
            ("root", self.image.root(), "snapshot=on"),
            ("suite", self.suite, "snapshot=off"),
        ] {
            let path = option_value(path);
            command.arg("-drive");
            command.arg(format!(
                "id={name},file={path},format=raw,if=none,cache=unsafe,{options}"
            ));
            command.args(["-device", &format!("virtio-blk-pci,drive={name}")]);
        }
        match self.power {
            Some(Power::Noted(disk)) => drop(command.args(disk.arguments())),
            Some(Power::AfterCut(disk)) => drop(command.args(disk.arguments_after_a_cut())),
            None => {}
        }
        command
    }

    /// Copies the machine's console to ours, each line after the machine's name, until it is closed, which QEMU does when it
    /// ends, or until a power cut is due.
    fn listen(&self, child: &mut Child, until: Instant) -> Result<Ended, Failure> {
        let Some(mut console) = child.stdout.take() else {
            return Ok(Ended::PoweredOff);
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
        let mut line = Vec::new();
        loop {
            match said.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(text) => {
                    for part in text.split_inclusive(|byte| *byte == b'\n') {
                        line.extend_from_slice(part);
                        if part.ends_with(b"\n") {
                            show(self.name, &line)?;
                            match (&*line, self.power) {
                                (POWER_CUT, _) => return Ok(Ended::PowerCut),
                                (BEGINNING, Some(Power::Noted(disk))) => disk.note_beginning()?,
                                _ => {}
                            }
                            line.clear();
                        }
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    show(self.name, &line)?;
                    return Ok(Ended::PoweredOff);
                }
                Err(RecvTimeoutError::Timeout) => {
                    line.push(b'\n');
                    show(self.name, &line)?;
                    return Err(Failure(format!(
                        "{}the test host did not end in time and was killed; `--keep` gives a shell to look around",
                        self.name
                    )));
                }
            }
        }
    }
}

/// A path within an option of QEMU, which a comma ends unless it is doubled.
pub(super) fn option_value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn succeeded(status: ExitStatus) -> Result<Ended, Failure> {
    if status.success() {
        Ok(Ended::PoweredOff)
    } else {
        Err(Failure(format!("the test host's QEMU ended with {status}")))
    }
}

/// In one piece: another machine may have something to say, too.
fn show(name: &str, line: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(&[name.as_bytes(), line].concat())
        .and_then(|()| out.flush())
        .map_err(|error| Failure(format!("standard output: {error}")))
}
