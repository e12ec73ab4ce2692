//! A real daemon for each test, in directories and a network of its own, and a look at what it leaves.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use icebox_host::instance::Instance;
use icebox_host::skip::skip;

/// Whether this is root; if not, says that `test` does not run.
pub(crate) fn root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "it needs root");
    }
    root
}

pub(crate) fn icebox() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_icebox"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ICEBOX_") || name == "JOURNAL_STREAM" {
            command.env_remove(name);
        }
    }
    command.env("NO_COLOR", "1");
    command
}

/// Directories and settings of one installation. What it left on the host is looked at when it is dropped.
pub(crate) struct Place {
    directory: tempfile::TempDir,
    run: tempfile::TempDir,
    /// Lines of the settings file, before its sections.
    pub(crate) settings: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::under(&std::env::temp_dir())
    }

    /// With its data on the file system of `parent`.
    pub(crate) fn under(parent: &Path) -> Self {
        Self {
            directory: tempfile::tempdir_in(parent).unwrap(),
            // Short: sockets are in it.
            run: tempfile::tempdir_in("/run").unwrap(),
            settings: String::new(),
        }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The settings file, with a network that no other installation of this machine has.
    fn settings_file(&self, agent: &Path) -> PathBuf {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = std::process::id().wrapping_mul(16) + NEXT.fetch_add(1, Ordering::Relaxed);
        let file = self.path("icebox.toml");
        let text = format!(
            "data_dir = {:?}\nrun_dir = {:?}\nagent = {agent:?}\n{}\n[network]\nprefix = \"10.{}.{}.0/24\"\npool = 0\n",
            self.data(),
            self.run.path(),
            self.settings,
            128 + (number / 256) % 64,
            number % 256,
        );
        std::fs::write(&file, text).unwrap();
        file
    }

    /// `icebox serve` here, with an agent that is none: enough for everything but booting.
    pub(crate) fn serve(&self) -> Command {
        let agent = self.path("agent");
        std::fs::write(&agent, "no agent").unwrap();
        let mut command = icebox();
        command
            .args(["serve", "--config"])
            .arg(self.settings_file(&agent))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a daemon that refuses to serve, and returns what it says. One that serves is ended, and a failure.
    pub(crate) fn refused(&self, serve: &mut Command) -> String {
        let mut process = serve.spawn().unwrap();
        let mut said = String::new();
        for line in BufReader::new(process.stderr.take().unwrap()).lines() {
            said.push_str(&line.unwrap());
            said.push('\n');
            if said.contains(" is ready on ") {
                process.kill().unwrap();
            }
        }
        let status = process.wait().unwrap();
        let said = self.scrubbed(said.as_bytes());
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(!self.run.path().join("icebox.sock").exists());
        said
    }

    pub(crate) fn scrubbed(&self, text: &[u8]) -> String {
        String::from_utf8_lossy(text)
            .replace(&self.directory.path().display().to_string(), "[DIR]")
            .replace(&self.run.path().display().to_string(), "[RUN]")
    }

    pub(crate) fn start(&self, serve: Command) -> Daemon<'_> {
        Daemon::start(self, serve)
    }

    pub(crate) fn instance(&self) -> Instance {
        let data = self.data();
        Instance::of_data_directory(&data.canonicalize().unwrap_or(data))
    }

    /// The rules that this installation has on the host while a daemon serves.
    pub(crate) fn rules(&self) -> Vec<String> {
        let instance = self.instance();
        let tables = Command::new("nft").args(["list", "tables"]).output();
        let tables = String::from_utf8(tables.unwrap().stdout).unwrap();
        let ours = |table: &&str| table.contains(instance.as_str());
        tables.lines().filter(ours).map(str::to_owned).collect()
    }

    /// What sandboxes of this installation have on the host, beside its data.
    pub(crate) fn holdings(&self) -> Vec<String> {
        let data = self.data().display().to_string();
        let instance = self.instance();
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&arguments).contains(&data) {
                let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
                found.push(format!("process {arguments}"));
            }
        }
        for (kind, directory) in [
            ("namespace", "/run/netns"),
            ("link", "/sys/class/net"),
            ("cgroup", "/sys/fs/cgroup"),
            ("cgroup", "/sys/fs/cgroup/cpu"),
            ("cgroup", "/sys/fs/cgroup/memory"),
            ("cgroup", "/sys/fs/cgroup/pids"),
        ] {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.contains(instance.as_str()) {
                    found.push(format!("{kind} {name}"));
                }
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = |line: &&str| {
            line.contains(&data) || line.contains(&self.run.path().display().to_string())
        };
        found.extend(
            mounts
                .lines()
                .filter(ours)
                .map(|line| format!("mount {line}")),
        );
        for entry in std::fs::read_dir(self.run.path().join("vm"))
            .into_iter()
            .flatten()
            .flatten()
        {
            found.push(format!("runtime directory {}", entry.path().display()));
        }
        for area in ["staging", "trash", "sandboxes"] {
            for entry in std::fs::read_dir(self.data().join(area))
                .into_iter()
                .flatten()
                .flatten()
            {
                found.push(format!("{area}/{}", entry.file_name().to_string_lossy()));
            }
        }
        found
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let table = format!("icebox_{}", self.instance());
            let delete = ["delete", "table", "inet", &table];
            Command::new("nft").args(delete).output().ok();
            return;
        }
        let left = [self.rules(), self.holdings()].concat();
        assert_eq!(left, Vec::<String>::new(), "left on the host");
    }
}

/// A daemon that serves.
pub(crate) struct Daemon<'a> {
    place: &'a Place,
    process: Child,
}

impl<'a> Daemon<'a> {
    fn start(place: &'a Place, mut serve: Command) -> Self {
        let mut daemon = Self {
            place,
            process: serve.spawn().unwrap(),
        };
        let mut log = BufReader::new(daemon.process.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        for line in log.by_ref() {
            let line = line.unwrap();
            seen.push_str(&line);
            seen.push('\n');
            if line.contains(" is ready on ") {
                // Read to its end, so that the daemon never waits for us.
                std::thread::spawn(move || log.for_each(drop));
                return daemon;
            }
        }
        panic!("the daemon ended before it was ready:\n{seen}");
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = icebox();
        command
            .arg("--socket")
            .arg(self.place.run.path().join("icebox.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .current_dir(self.place.directory.path());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn get(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    /// Runs a command that fails, and returns what it says.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = self.place.scrubbed(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        said
    }

    /// As a service manager would.
    pub(crate) fn stop(mut self) {
        let sent = Command::new("kill")
            .arg(self.process.id().to_string())
            .status()
            .unwrap();
        assert!(sent.success());
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}
