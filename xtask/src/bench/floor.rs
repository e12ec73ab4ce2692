//! What QEMU costs by itself: `bench/floor.py`, and what it found.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::daemon::Daemon;
use super::files::{newest_with, only_directory};
use super::report::Series;
use super::{IDLE, MEMORY_MIB, Options, array, float};
use crate::run::{Failure, root};

/// What `bench/floor.py` found, both times.
#[derive(Default)]
pub(super) struct Floor {
    pub(super) boot: Series,
    pub(super) restore: Series,
    pub(super) boot_save: Series,
    pub(super) save: Series,
    pub(super) boot_changed: Series,
    pub(super) changed: Series,
}

impl Floor {
    pub(super) fn measure(
        &mut self,
        daemon: &Daemon,
        image: &Path,
        accelerator: &str,
        options: &Options,
        place: &Path,
    ) -> Result<(), Failure> {
        let half = options.repetitions().div_ceil(2).to_string();
        let kernel = only_directory(&daemon.data.join("kernels"))?;
        let mut command = Command::new("python3");
        command
            .arg(root().join("bench/floor.py"))
            .args([
                "--accelerator",
                accelerator,
                "--rounds",
                &half,
                "--boots",
                &half,
            ])
            .args(["--memory-mib", &MEMORY_MIB.to_string()])
            .args(["--idle", &IDLE.as_secs().to_string()])
            .arg("--directory")
            .arg(place)
            .arg("--image")
            .arg(image)
            .arg("--kernel")
            .arg(kernel.join("vmlinuz"))
            .arg("--initramfs")
            .arg(newest_with(&kernel, "initramfs-")?);
        let output = command
            .output()
            .map_err(|error| Failure(format!("bench/floor.py: {error}")))?;
        let found: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
            Failure(format!(
                "bench/floor.py: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ))
        })?;
        for time in array(&found["boot"]["firstExecMs"]) {
            self.boot.push(float(time));
        }
        let save = &found["boot"]["save"];
        self.boot_save.push(float(&save["ms"]["durable"]));
        self.boot_changed.push(float(&save["changedPages"]));
        for round in array(&found["restores"]) {
            self.restore.push(float(&round["firstExecMs"]));
            self.save.push(float(&round["save"]["ms"]["durable"]));
            self.changed.push(float(&round["save"]["changedPages"]));
        }
        Ok(())
    }
}
