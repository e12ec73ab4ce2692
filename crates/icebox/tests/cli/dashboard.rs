//! The dashboard as its users meet it: `dashboard/dashboard.py` clicks each of its actions in Debian's Chromium, and keeps
//! what it looks like in `target/dashboard`, in light and dark.
//!
//! What drives the browser comes from where this machine's pip takes packages, once, and is kept beside the fixtures.

use std::path::Path;
use std::process::Command;

use crate::support::{Daemon, python, succeed};

const PLAYWRIGHT: &str = "playwright==1.65.2";
const CHROMIUM: &str = "/usr/bin/chromium";

#[test]
fn every_action_of_the_dashboard_works_when_it_is_clicked() {
    assert!(
        Path::new(CHROMIUM).exists(),
        "{CHROMIUM} is needed: scripts/setup installs it"
    );
    let daemon = Daemon::start().with_guest();
    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("dashboard");
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/dashboard");
    let mut program = Command::new(python(PLAYWRIGHT).join("bin/python"));
    program
        .arg("-B")
        .arg(programs.join("dashboard.py"))
        .env("ICEBOX_URL", format!("http://{}", daemon.address()))
        .env("ICEBOX_KEY", daemon.api_key())
        .env("ICEBOX_CHROMIUM", CHROMIUM)
        .env("ICEBOX_PICTURES", &pictures)
        .current_dir(daemon.path(""));
    succeed(&mut program);
}
