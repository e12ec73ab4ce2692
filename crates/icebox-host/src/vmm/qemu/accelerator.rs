//! KVM where it really runs guests, else TCG.
//!
//! `/dev/kvm` can be opened on hosts where KVM cannot run an ordinary guest: nested virtualisation that is switched off
//! in part, or hosts that emulate guest code and give up on the first instruction they do not know. Only a guest can
//! tell, so the probe runs one: the kernel that sandboxes will run, up to the point where it asks for its root file
//! system. Where no kernel has been imported yet, the machine's firmware has to do.
//!
//! That it works is remembered until the next boot: a daemon that is started again on a busy machine must not come to
//! another verdict, since what was saved under KVM does not run without. That it does not work is looked at each time.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use icebox_engine::host::{CpuFeatures, ErrorKind, HostError};
use tokio::process::Command;

use super::binary::Binary;
use super::command;
use crate::vmm::cpu;
use crate::vmm::trial::{self, SILENCE_MAX, watch};

/// What runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Which accelerator a user wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AcceleratorChoice {
    /// KVM if it works, else TCG. The reason is recorded.
    #[default]
    Auto,
    /// KVM, or nothing.
    Kvm,
    /// TCG.
    Tcg,
}

/// A choice that was made.
#[derive(Debug)]
pub(super) struct Chosen {
    /// The accelerator.
    pub(super) accelerator: Accelerator,
    /// Why, in words.
    pub(super) reason: String,
}

/// Makes the choice. What was proven goes to a file in the directory `run`.
pub(super) async fn choose(
    choice: AcceleratorChoice,
    qemu: &Binary,
    kernel: Option<&Path>,
    run: &Path,
) -> Result<Chosen, HostError> {
    if choice == AcceleratorChoice::Tcg {
        return Ok(Chosen {
            accelerator: Accelerator::Tcg,
            reason: "TCG was asked for".into(),
        });
    }
    let kvm = Path::new("/dev/kvm");
    let silence = match choice {
        AcceleratorChoice::Kvm => SILENCE_MAX_OF_ALL,
        AcceleratorChoice::Auto | AcceleratorChoice::Tcg => SILENCE_MAX,
    };
    match prove(qemu, kernel, kvm, silence, run).await {
        Ok(what) => Ok(Chosen {
            accelerator: Accelerator::Kvm,
            reason: what.into(),
        }),
        Err(why) if choice == AcceleratorChoice::Auto => Ok(Chosen {
            accelerator: Accelerator::Tcg,
            reason: why,
        }),
        Err(why) => Err(HostError::new(
            ErrorKind::Unsupported,
            format!("KVM was asked for and does not work here: {why}"),
        )
        .hint("enable (nested) virtualisation, or choose the accelerator tcg")),
    }
}

/// How long a guest may say nothing where there is nothing else to run guests with: no start is delayed for it, since there
/// would be none.
const SILENCE_MAX_OF_ALL: Duration = SILENCE_MAX.saturating_mul(3);

/// The file that remembers what KVM was proven with.
const PROVEN: &str = "kvm-works";

/// Runs a guest under KVM, unless that was done since this machine booted. Says what it did, or why KVM does not work.
async fn prove(
    qemu: &Binary,
    kernel: Option<&Path>,
    device: &Path,
    silence: Duration,
    run: &Path,
) -> Result<&'static str, String> {
    let proof = trial::Proof::of(&qemu.path, &qemu.version, kernel)?;
    if proof.is_known(run, PROVEN) {
        return Ok(what_ran(kernel));
    }
    let ran = probe(&qemu.path, kernel, device, silence).await?;
    proof.remember(run, PROVEN);
    Ok(ran)
}

fn what_ran(kernel: Option<&Path>) -> &'static str {
    match kernel {
        Some(_) => "KVM runs the sandboxes' kernel",
        None => "KVM runs the machine's firmware; no kernel was there to try",
    }
}

/// Runs a guest under KVM. Says what it did, or why KVM does not work.
async fn probe(
    qemu: &Path,
    kernel: Option<&Path>,
    device: &Path,
    silence: Duration,
) -> Result<&'static str, String> {
    trial::opens(device)?;
    let mut qemu = Command::new(qemu);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ])
    .args([
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ])
    .args(["-machine", command::PROBE_MACHINE, "-accel", "kvm"])
    .args([
        "-cpu",
        command::cpu(Accelerator::Kvm),
        "-smp",
        "1",
        "-m",
        "256M",
    ])
    .args(["-chardev", "stdio,id=out,signal=off"]);
    match kernel {
        Some(kernel) => {
            qemu.args(["-serial", "chardev:out", "-kernel"]).arg(kernel);
            qemu.args(["-append", trial::COMMAND_LINE]);
            watch(qemu, trial::NO_ROOT, silence).await?;
        }
        None => {
            qemu.args(["-device", "isa-debugcon,iobase=0x402,chardev=out"]);
            watch(qemu, b"SeaBIOS (version", silence).await?;
        }
    }
    Ok(what_ran(kernel))
}

/// The CPU that guests see.
pub(super) fn cpu_model(accelerator: Accelerator) -> io::Result<String> {
    match accelerator {
        Accelerator::Tcg => Ok(command::cpu(accelerator).to_owned()),
        Accelerator::Kvm => cpu::host_model(),
    }
}

/// What of its features depends on the host. What TCG emulates does not: QEMU's version says it.
pub(super) fn cpu_features(accelerator: Accelerator) -> io::Result<CpuFeatures> {
    match accelerator {
        Accelerator::Tcg => Ok(CpuFeatures::default()),
        Accelerator::Kvm => cpu::offered_by_kvm(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::guest_image::fixture;

    const SILENCE: Duration = Duration::from_secs(10);
    const PANIC: &str =
        "echo 'Linux version 6'; echo 'Kernel panic - not syncing: VFS: no root'; exec sleep 60";

    /// A stand-in for QEMU that behaves in one way.
    fn stand_in(qemu: &Path, script: &str) {
        fixture::script(qemu, &format!("#!/bin/sh\n{script}\n")).unwrap();
    }

    async fn probed(script: &str, kernel: Option<&Path>) -> Result<&'static str, String> {
        let directory = tempfile::tempdir().unwrap();
        let qemu = directory.path().join("qemu");
        stand_in(&qemu, script);
        probe(&qemu, kernel, Path::new("/dev/null"), SILENCE).await
    }

    #[tokio::test]
    async fn inv_26_only_a_guest_that_runs_is_proof() {
        let kernel = Some(Path::new("/boot/vmlinuz"));
        let began = Instant::now();
        assert_eq!(
            probed(PANIC, kernel).await.unwrap(),
            "KVM runs the sandboxes' kernel"
        );
        assert!(began.elapsed() < SILENCE, "proof ends the probe");

        let early = "echo 'Linux version 6'; exec sleep 60";
        let error = probed(early, kernel).await.unwrap_err();
        assert_eq!(
            error,
            "a guest under KVM stopped after saying \"Linux version 6\""
        );
        let error = probed("echo 'failed to set MSR 0x10a' >&2; exit 1", kernel)
            .await
            .unwrap_err();
        assert_eq!(error, "the VMM gave up on KVM: failed to set MSR 0x10a");
        let internal = "echo 'KVM internal error. Suberror: 1' >&2; exec sleep 60";
        assert!(
            probed(internal, kernel)
                .await
                .unwrap_err()
                .contains("internal error")
        );

        let firmware = "echo 'SeaBIOS (version 1.16)'; exec sleep 60";
        assert!(probed(firmware, None).await.unwrap().contains("no kernel"));
        assert!(
            probed(firmware, kernel).await.is_err(),
            "firmware is no proof if there is a kernel"
        );
    }

    #[tokio::test]
    async fn inv_26_what_was_proven_holds_until_something_else_is_to_be_run() {
        let run = tempfile::tempdir().unwrap();
        let mut qemu = Binary {
            path: run.path().join("qemu"),
            version: "10.0".into(),
        };
        let prove = async |qemu: &Binary, kernel: &str| {
            let kernel = Some(Path::new(kernel));
            prove(qemu, kernel, Path::new("/dev/null"), SILENCE, run.path()).await
        };
        stand_in(&qemu.path, "exit 1");
        prove(&qemu, "/a").await.unwrap_err();
        stand_in(&qemu.path, PANIC);
        let ran = prove(&qemu, "/a").await.unwrap();
        // A bad moment.
        stand_in(&qemu.path, "exit 1");
        assert_eq!(prove(&qemu, "/a").await.unwrap(), ran);
        prove(&qemu, "/b").await.unwrap_err();
        qemu.version = "10.1".into();
        prove(&qemu, "/a").await.unwrap_err();
    }

    #[tokio::test]
    async fn inv_26_kvm_that_was_asked_for_is_not_replaced() {
        let run = tempfile::tempdir().unwrap();
        let missing = Binary {
            path: "/nonexistent/qemu".into(),
            version: "10.0".into(),
        };
        let error = choose(AcceleratorChoice::Kvm, &missing, None, run.path())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.hint_text().unwrap().contains("tcg"));
        let chosen = choose(AcceleratorChoice::Auto, &missing, None, run.path())
            .await
            .unwrap();
        assert_eq!(chosen.accelerator, Accelerator::Tcg);
        assert!(!chosen.reason.is_empty());
    }
}
