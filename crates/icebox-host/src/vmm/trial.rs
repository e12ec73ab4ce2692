//! Whether a VMM runs a guest here: only a guest can tell.
//!
//! That it does is remembered until the next boot, for this program, version and kernel. That it does not is looked at
//! each time.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::fs::{read_bounded, replace_file};
use crate::launcher;

/// How long a guest may say nothing. A host that stops to run it without an error is only known by that. The longest
/// silence of one that does run is while its kernel unpacks itself: 0.1 s on hardware, seconds where KVM is emulated.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How much is read of what a guest says: a kernel's whole boot.
const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// Bytes of a proof that is remembered. Far above what is in it.
const PROOF_BYTES_MAX: u64 = 16 << 10;

/// The command line of a kernel that is tried: it says everything.
pub(crate) const COMMAND_LINE: &str =
    "console=ttyS0 earlyprintk=ttyS0 reboot=t panic=-1 cryptomgr.notests";
/// What it says when it has come as far as it can.
pub(crate) const NO_ROOT: &[u8] = b"not syncing: VFS";

/// What was tried, and when.
#[derive(Debug)]
pub(crate) struct Proof(String);

impl Proof {
    /// Of a program with a kernel, since this machine booted.
    ///
    /// # Errors
    /// The machine does not say when that was, in words.
    pub(crate) fn of(program: &Path, version: &str, kernel: Option<&Path>) -> Result<Self, String> {
        let boot = launcher::boot_id().map_err(|error| format!("no boot id: {error}"))?;
        let proof = serde_json::json!({
            "boot": boot,
            "program": program,
            "version": version,
            "kernel": kernel,
        });
        Ok(Self(proof.to_string()))
    }

    /// Whether it is what the file `name` in the directory `run` remembers.
    pub(crate) fn is_known(&self, run: &Path, name: &str) -> bool {
        let known = read_bounded(&run.join(name), PROOF_BYTES_MAX);
        known.is_ok_and(|known| known == self.0.as_bytes())
    }

    /// Has the file remember it.
    pub(crate) fn remember(&self, run: &Path, name: &str) {
        // Without it, the next daemon looks again.
        if let Err(error) = replace_file(run, name, self.0.as_bytes()) {
            tracing::warn!(%error, "that KVM works cannot be remembered");
        }
    }
}

/// Whether KVM can be opened, in words if not.
pub(crate) fn kvm_opens() -> Result<(), String> {
    opens(Path::new("/dev/kvm"))
}

/// Whether a device can be opened, in words if not.
pub(crate) fn opens(device: &Path) -> Result<(), String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map(drop)
        .map_err(|error| format!("{} cannot be opened: {error}", device.display()))
}

/// Runs a guest until it says `proof`.
pub(crate) async fn watch(vmm: Command, proof: &[u8], silence: Duration) -> Result<(), String> {
    watch_and_ask(vmm, proof, silence, drop).await
}

/// Runs a guest until it says `proof`, and then looks at its VMM by its pid.
pub(crate) async fn watch_and_ask<T>(
    mut vmm: Command,
    proof: &[u8],
    silence: Duration,
    ask: impl FnOnce(Option<u32>) -> T,
) -> Result<T, String> {
    let (mut output, mut guest) = io::pipe()
        .and_then(|(reading, writing)| {
            let stderr = writing.try_clone()?;
            vmm.stdin(Stdio::null()).stdout(writing).stderr(stderr);
            let reading = tokio::net::unix::pipe::Receiver::from_owned_fd(reading.into())?;
            Ok((reading, vmm.kill_on_drop(true).spawn()?))
        })
        .map_err(|error| format!("it cannot be started: {error}"))?;
    // This process's copies of the writing end: without them, the end of the VMM is the end of the pipe.
    drop(vmm);
    let verdict = listen(&mut output, proof, silence).await;
    let verdict = verdict.map(|()| ask(guest.id()));
    if let Err(error) = guest.kill().await {
        tracing::warn!(%error, "the guest that probed KVM cannot be ended");
    }
    verdict
}

async fn listen(
    output: &mut tokio::net::unix::pipe::Receiver,
    proof: &[u8],
    silence: Duration,
) -> Result<(), String> {
    let mut said = Vec::new();
    loop {
        let read = tokio::time::timeout(silence, output.read_buf(&mut said)).await;
        if said.windows(proof.len()).any(|window| window == proof) {
            return Ok(());
        }
        let last = last_line(&said);
        match read {
            Err(_) if last.is_empty() => {
                return Err(format!("a guest under KVM said nothing within {silence:?}"));
            }
            Err(_) => {
                return Err(format!("a guest under KVM stopped after saying {last:?}"));
            }
            Ok(Err(error)) => return Err(format!("a guest under KVM cannot be heard: {error}")),
            Ok(Ok(0)) => return Err(format!("the VMM gave up on KVM: {last}")),
            Ok(Ok(_)) if last.contains("KVM internal error") => return Err(last),
            Ok(Ok(_)) if said.len() > OUTPUT_BYTES_MAX => {
                return Err("a guest under KVM does not stop talking".into());
            }
            Ok(Ok(_)) => {}
        }
    }
}

fn last_line(said: &[u8]) -> String {
    String::from_utf8_lossy(said)
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .map(|line| line.trim().chars().take(200).collect())
        .unwrap_or_default()
}
