//! What is seen of a VMM with a volume driver, verb by verb, for `docs/conformance.md`.
//!
//! Each sighting is a line in the file that `ICEBOX_CONFORMANCE` names, a JSON document, written when it was seen: a test that
//! fails later has seen it nevertheless, and a verb that nobody saw is not there. Without the variable nothing is written.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::site::Site;

const VARIABLE: &str = "ICEBOX_CONFORMANCE";

/// Of one pair.
pub(crate) struct Record {
    driver: &'static str,
    vmm: Value,
}

impl Record {
    /// Of a VMM as `icebox vmm ls` lists it, run from this program, or from the QEMU that is installed.
    pub(crate) fn of(site: &Site, listed: &Value, program: Option<PathBuf>) -> Self {
        let program = program.unwrap_or_else(|| "/usr/bin/qemu-system-x86_64".into());
        let sum = Command::new("sha256sum").arg(&program).output().unwrap();
        let sum = String::from_utf8(sum.stdout).unwrap();
        let kernel = rustix::system::uname();
        let vmm = json!({
            "name": listed["name"],
            "version": listed["version"],
            "sha256": sum.split(' ').next(),
            "accelerator": listed["accelerator"],
            "kernel": kernel.release().to_string_lossy(),
        });
        Self {
            driver: site.driver.name(),
            vmm,
        }
    }

    /// These verbs did what they are for.
    pub(crate) fn saw(&self, verbs: &[&str]) {
        self.note(&json!({"vmm": self.vmm, "driver": self.driver, "verbs": verbs}));
    }

    /// With this driver there is none of it, and why.
    pub(crate) fn never(&self, driver: &str, why: &str) {
        self.note(&json!({"vmm": self.vmm, "driver": driver, "never": why}));
    }

    fn note(&self, line: &Value) {
        let Some(file) = std::env::var_os(VARIABLE) else {
            return;
        };
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(file)
            .unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}
