//! An installation of its own: a data directory on a file system that its volume driver works on, a daemon, and what
//! tests ask of both.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use icebox_engine::layout::Layout;
use icebox_host::guest_image::fixture;
use icebox_host::store::FileStore;
use icebox_sim::fault::CONDUCTOR;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) use crate::ground::Driver;
use crate::ground::Ground;
use crate::marks::{Marks, Traces, entries};
use crate::monitor::Monitor;

/// How many times slower than others a machine is that says so.
const SLOWNESS: &str = "ICEBOX_TEST_SLOWNESS";
/// How many sandboxes a site has room for.
pub(crate) const SLOTS: u32 = 128;
/// The template of sandboxes that boot, which a test builds if it needs it.
pub(crate) const COLD: &str = "cold";
/// The template of sandboxes that are restored, with a process that counts in them.
pub(crate) const WARM: &str = "warm";

/// Counts in its memory every [`TICK`], and shows its pid, the count and a checksum of a MiB of its memory in a file.
pub(crate) const COUNTER: &str = r#"exec python3 -c '
import os, time, zlib
memory = bytearray(os.urandom(1 << 20))
count = 0
while True:
    count += 1
    with open("/tmp/count.new", "w") as file:
        file.write(f"{os.getpid()} {count} {zlib.crc32(memory)}")
    os.rename("/tmp/count.new", "/tmp/count")
    time.sleep(TICK)
'"#;
/// How often something happens in a guest that is never at rest. Longer where a guest that does anything takes all of the
/// processor from the others.
const TICK: Duration = Duration::from_millis(50);

/// A script for a guest, with how often is often here in place of `TICK`.
pub(crate) fn ticking(script: &str) -> String {
    script.replace("TICK", &patience(TICK).as_secs_f64().to_string())
}

/// What a guest's counter showed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) pid: u32,
    pub(crate) count: u64,
    pub(crate) memory: u32,
}

impl Count {
    /// What a counter's file says.
    #[track_caller]
    pub(crate) fn of(shown: &str) -> Self {
        let fields: Vec<_> = shown.split(' ').collect();
        let [pid, count, memory] = fields[..] else {
            panic!("the counter shows {shown:?}")
        };
        Self {
            pid: pid.parse().unwrap(),
            count: count.parse().unwrap(),
            memory: memory.parse().unwrap(),
        }
    }

    /// `self` is a later state of the process that showed `earlier`.
    pub(crate) fn assert_goes_on_from(&self, earlier: &Self) {
        assert_eq!(
            (self.pid, self.memory),
            (earlier.pid, earlier.memory),
            "another process"
        );
        assert!(
            self.count >= earlier.count,
            "{self:?} is before {earlier:?}"
        );
    }
}

pub(crate) struct Site {
    pub(crate) driver: Driver,
    pub(crate) traces: Traces,
    directory: PathBuf,
    agent: PathBuf,
    /// The first three numbers of its addresses.
    network: String,
    daemon: Option<Child>,
    url: Option<String>,
    // In the order in which they go.
    _ground: Ground,
    _temporary: Option<tempfile::TempDir>,
    /// Held while this site uses its network.
    _lock: UnixListener,
}

impl Site {
    /// A running daemon with a kernel and no templates.
    pub(crate) fn new(driver: Driver) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let ground = Ground::make(driver, temporary.path());
        let run = temporary.path().join("run");
        let mut site = Self::on(ground, driver, temporary.path(), run);
        site._temporary = Some(temporary);
        site
    }

    /// The same in a directory that outlives this machine, with what does not in `run`.
    pub(crate) fn make_in(directory: &Path, driver: Driver, run: PathBuf) -> Self {
        Self::on(Ground::make(driver, directory), driver, directory, run)
    }

    /// What was made there before the machine was started anew.
    pub(crate) fn take_up(directory: &Path, driver: Driver, run: PathBuf) -> Self {
        Self::on(Ground::open(driver, directory), driver, directory, run)
    }

    fn on(ground: Ground, driver: Driver, directory: &Path, run_dir: PathBuf) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "sandboxes need namespaces, taps and control groups: run this test as root"
        );
        let kernel = fixture::kernel().unwrap();
        let agent = fixture::agent().unwrap();
        let traces = Traces {
            data: ground.data(),
            run: run_dir,
            dataset: ground.dataset(),
        };
        // The kernel is there already, so that no test fetches one.
        drop(FileStore::open(Layout::new(&traces.data, &traces.run)).unwrap());
        let kernels = traces.data.join("kernels");
        fs::create_dir_all(&kernels).unwrap();
        let cached = fixture::cache_dir()
            .join("kernels")
            .join(kernel.digest().as_str());
        run(Command::new("cp").arg("-a").args([&cached, &kernels]));
        let (lock, network) = network(&directory.join("network"));
        let mut site = Self {
            driver,
            traces,
            directory: directory.to_owned(),
            agent,
            network,
            daemon: None,
            url: None,
            _ground: ground,
            _temporary: None,
            _lock: lock,
        };
        site.configure(SLOTS);
        site.start_daemon();
        site
    }

    /// With the template [`WARM`].
    pub(crate) fn with_templates(driver: Driver) -> Self {
        let site = Self::new(driver);
        site.build(
            WARM,
            &[
                "--start-cmd",
                &ticking(COUNTER),
                "--ready-cmd",
                "test -s /tmp/count",
            ],
        );
        site
    }

    /// Builds a template from the image that all tests use.
    #[track_caller]
    pub(crate) fn build(&self, template: &str, options: &[&str]) {
        let image = fixture::debian_image().unwrap();
        let from = ["template", "build", template, "--from-image"];
        self.get(&[&from, &[image.to_str().unwrap()][..], options].concat());
    }

    // The daemon.

    /// Writes the settings of daemons that start from now on, with room for so many sandboxes.
    pub(crate) fn configure(&self, slots: u32) {
        // Each has two addresses.
        let bits = 32 - (slots * 2).ilog2();
        let mut settings = format!(
            "data_dir = {:?}\nrun_dir = {:?}\nagent = {:?}\nvolume_driver = {:?}\n\
             [network]\nprefix = \"{}.0/{bits}\"\npool = 0\n[defaults]\nmemory_mib = 256\n",
            self.traces.data,
            self.traces.run,
            self.agent,
            self.driver.name(),
            self.network,
        );
        // Where guests are known to run under KVM, nothing else will do.
        if let Ok(accelerator) = std::env::var("ICEBOX_TEST_ACCELERATOR") {
            settings.insert_str(0, &format!("accelerator = {accelerator:?}\n"));
        }
        for (setting, program) in crate::vmms::programs() {
            settings.insert_str(0, &format!("{setting} = {program:?}\n"));
        }
        if let Some(dataset) = &self.traces.dataset {
            settings.push_str(&format!("[zfs]\ndataset = {dataset:?}\n"));
        }
        fs::write(self.scratch("icebox.toml"), settings).unwrap();
    }

    /// Adds a line to the settings of daemons that start from now on.
    pub(crate) fn set(&self, setting: &str) {
        let file = self.scratch("icebox.toml");
        let settings = fs::read_to_string(&file).unwrap();
        fs::write(file, format!("{setting}\n{settings}")).unwrap();
    }

    /// Starts the daemon again, to listen on a TCP address, too.
    pub(crate) fn listen(&mut self) {
        // Between this and the daemon's start, any connection from 127.0.0.1 might be given its port.
        let address = TcpListener::bind("127.217.0.1:0").unwrap().local_addr();
        let address = address.unwrap().to_string();
        self.end_daemon(Signal::TERM);
        self.set(&format!("listen = {address:?}"));
        self.start_daemon();
        self.url = Some(format!("http://{address}"));
    }

    /// Where the daemon listens.
    pub(crate) fn url(&self) -> &str {
        self.url.as_deref().unwrap()
    }

    /// The API key, which the first daemon that listened has shown.
    pub(crate) fn key(&self) -> String {
        let said = self.said();
        let key = said.split_once("API key, shown this once: ").unwrap().1;
        key.lines().next().unwrap().to_owned()
    }

    /// Starts the daemon and waits until it is ready.
    pub(crate) fn start_daemon(&mut self) {
        self.try_daemon()
            .unwrap_or_else(|said| panic!("the daemon ended before it was ready:\n{said}"));
    }

    /// Starts the daemon, or returns what it said when it could not.
    pub(crate) fn try_daemon(&mut self) -> Result<(), String> {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let mut daemon = self.serve().spawn().unwrap();
        let mut lines = BufReader::new(daemon.stderr.take().unwrap()).lines();
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        let mut said = String::new();
        for line in lines.by_ref() {
            let line = line.unwrap();
            writeln!(log, "{line}").unwrap();
            if line.contains(" is ready on ") {
                // Ends with the daemon.
                std::thread::spawn(move || {
                    for line in lines.map_while(Result::ok) {
                        writeln!(log, "{line}").unwrap_or_default();
                    }
                });
                self.daemon = Some(daemon);
                return Ok(());
            }
            said.push_str(&line);
            said.push('\n');
        }
        daemon.wait().unwrap();
        Err(said)
    }

    /// The command that starts this site's daemon.
    pub(crate) fn serve(&self) -> Command {
        let mut command = icebox();
        command
            .args(["serve", "--config"])
            .arg(self.scratch("icebox.toml"))
            .env(CONDUCTOR, self.conductor())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// Where daemons look for who conducts them. Nobody does, unless a test listens there.
    pub(crate) fn conductor(&self) -> PathBuf {
        self.scratch("conductor")
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Ends the daemon and waits until it has gone.
    pub(crate) fn end_daemon(&mut self, signal: Signal) {
        let mut daemon = self.daemon.take().unwrap();
        kill(daemon.id(), signal);
        let status = daemon.wait().unwrap();
        assert!(
            signal == Signal::KILL || status.success(),
            "{status}\n{}",
            self.said()
        );
    }

    fn log(&self) -> PathBuf {
        self.directory.join("daemon.log")
    }

    /// What the daemons of this site have logged.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// A file of the test's own, outside the data directory.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    // The command line.

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = icebox();
        command
            .arg("--socket")
            .arg(self.traces.run.join("icebox.sock"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The last document that a command printed, which must succeed.
    #[track_caller]
    pub(crate) fn get(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output().unwrap();
        assert!(
            output.status.success(),
            "icebox {}: {}\nthe daemon's log:\n{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr),
            self.said()
        );
        let printed = String::from_utf8(output.stdout).unwrap();
        printed
            .lines()
            .last()
            .map_or(Value::Null, |line| serde_json::from_str(line).unwrap())
    }

    /// Why a command was refused: message, causes and hint in one text.
    #[track_caller]
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            !output.status.success(),
            "icebox {} succeeded",
            arguments.join(" ")
        );
        String::from_utf8(output.stderr).unwrap()
    }

    /// Creates a sandbox called `name`, and returns its id.
    #[track_caller]
    pub(crate) fn create(&self, template: &str, name: &str) -> String {
        let made = self.get(&["create", template, "--name", name]);
        made["sandboxID"].as_str().unwrap().to_owned()
    }

    /// Runs a shell command in a sandbox; it must succeed. Returns what it printed, without the line end.
    #[track_caller]
    pub(crate) fn exec(&self, sandbox: &str, script: &str) -> String {
        let output = self.run(&[
            "exec", "-n", "-u", "root", sandbox, "--", "sh", "-c", script,
        ]);
        assert!(
            output.status.success(),
            "{script} in {sandbox}: {}: {}{}\nthe daemon's log:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.said()
        );
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    #[track_caller]
    pub(crate) fn inspect(&self, sandbox: &str) -> Value {
        self.get(&["inspect", sandbox])
    }

    #[track_caller]
    pub(crate) fn state(&self, sandbox: &str) -> String {
        self.inspect(sandbox)["state"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(crate) fn vmm_pid(&self, sandbox: &str) -> u32 {
        let pid = self.inspect(sandbox)["pid"].as_u64();
        pid.and_then(|pid| pid.try_into().ok())
            .expect("a VMM runs it")
    }

    /// The process that fills a sandbox's memory.
    #[track_caller]
    pub(crate) fn pager_pid(&self, sandbox: &str) -> u32 {
        let shown = self.get(&["inspect", sandbox]);
        let id = crate::lifecycle::path_of(&shown, &["sandboxID"]);
        let file = self.traces.run.join("vm").join(id).join("pager.pid");
        let identity: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        identity["pid"].as_u64().unwrap().try_into().unwrap()
    }

    /// Where the host reaches a sandbox.
    #[track_caller]
    pub(crate) fn address(&self, sandbox: &str) -> Ipv4Addr {
        let address = self.inspect(sandbox)["address"].clone();
        address.as_str().unwrap().parse().unwrap()
    }

    /// Restarts the daemon, with a [`Monitor`] between it and the VMM that runs `sandbox`, whose id this is.
    pub(crate) fn monitor(&mut self, id: &str) -> Monitor {
        self.end_daemon(Signal::TERM);
        let socket = self.traces.run.join("vm").join(id).join("qmp.sock");
        let monitor = Monitor::at(&socket, self.scratch(id));
        self.start_daemon();
        monitor
    }

    /// What the counter in a sandbox from [`WARM`] shows.
    #[track_caller]
    pub(crate) fn count(&self, sandbox: &str) -> Count {
        Count::of(&self.exec(sandbox, "cat /tmp/count"))
    }

    /// The kinds of what has happened after event `since`, oldest first.
    pub(crate) fn happened(&self, since: u64) -> Vec<String> {
        let since = since.to_string();
        let output = self.run(&["events", "--no-follow", "--json", "--since", &since]);
        let lines = String::from_utf8(output.stdout).unwrap();
        lines
            .lines()
            .map(|line| {
                let event: Value = serde_json::from_str(line).unwrap();
                event["event"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    /// The number of the newest event.
    pub(crate) fn newest_event(&self) -> u64 {
        let newest = self.get(&["events", "--no-follow"]);
        newest["sequence"].as_u64().unwrap_or_default()
    }

    /// What happens from now on.
    pub(crate) fn events(&self) -> Events {
        self.events_after(self.newest_event())
    }

    /// What has happened after event `since`, and what happens from now on.
    pub(crate) fn events_after(&self, since: u64) -> Events {
        let since = since.to_string();
        let mut process = self
            .command(&["events", "--since", &since, "--json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap());
        Events { process, lines }
    }

    // What is below.

    /// Copies the disk that a base is.
    pub(crate) fn copy_base(&self, digest: &str, to: &Path) {
        let image = self.traces.data.join("bases").join(digest).join("image");
        run(Command::new("cp").arg("--sparse=always").args([&image, to]));
    }

    // What is left.

    /// What of this site is on the host, after a collection.
    pub(crate) fn marks(&self) -> Marks {
        self.get(&["gc"]);
        self.traces.look()
    }

    /// Removes the templates of a site without sandboxes, and ends its daemon. Nothing of it may be left on the host.
    pub(crate) fn finish(mut self) {
        let templates = self.get(&["template", "ls"]);
        for template in templates.as_array().unwrap() {
            self.get(&["template", "rm", template["templateID"].as_str().unwrap()]);
        }
        self.get(&["gc"]);
        self.end_daemon(Signal::TERM);
        self.traces.look().assert_none();
    }
}

impl Drop for Site {
    /// Removes what a failed test left too.
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            kill(daemon.id(), Signal::KILL);
            daemon.wait().map(drop).unwrap_or_default();
        }
        if std::thread::panicking() && std::env::var_os("ICEBOX_TEST_KEEP").is_some() {
            eprintln!("the daemon's log:\n{}", self.said());
        }
        for (vmm, _) in self.traces.processes() {
            kill(vmm, Signal::KILL);
        }
        let table = format!("icebox_{}", self.traces.tag());
        quietly(Command::new("nft").args(["delete", "table", "inet", &table]));
        let stem = format!("ibx{}-", self.traces.tag());
        for namespace in entries(Path::new("/run/netns")) {
            let name = namespace.file_name().unwrap_or_default();
            if name.to_string_lossy().starts_with(&stem) {
                quietly(Command::new("ip").args(["netns", "delete"]).arg(name));
            }
        }
        for group in self.traces.cgroups() {
            fs::remove_dir(&group).unwrap_or_default();
        }
        // Those that others stand on go in a later round.
        for _ in 0..3 {
            for device in self.traces.mapped() {
                quietly(Command::new("dmsetup").args(["remove", &device]));
            }
        }
    }
}

/// What happens, in order.
pub(crate) struct Events {
    process: Child,
    lines: BufReader<ChildStdout>,
}

impl Events {
    /// The next event of this kind, with those before it passed over.
    pub(crate) fn wait_for(&mut self, kind: &str) -> Value {
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).unwrap();
            assert!(read > 0, "the daemon ended before {kind}");
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == kind {
                return event;
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        kill(self.process.id(), Signal::KILL);
        self.process.wait().map(drop).unwrap_or_default();
    }
}

/// A command of ours, with nothing of the caller's environment that could change what it does.
fn icebox() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_icebox"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ICEBOX_") {
            command.env_remove(name);
        }
    }
    command.env("NO_COLOR", "1");
    command
}

/// A network of 256 addresses that no other site on this machine uses while the socket is open; the one that `chosen`
/// names, if that is a file.
fn network(chosen: &Path) -> (UnixListener, String) {
    let before = fs::read_to_string(chosen).ok();
    let numbers = before.map_or(0..250, |number| {
        let number = number.parse::<u8>().unwrap();
        number..number + 1
    });
    for number in numbers {
        let name = format!("icebox-test-network-{number}");
        let lock = SocketAddr::from_abstract_name(name).unwrap();
        if let Ok(lock) = UnixListener::bind_addr(&lock) {
            fs::write(chosen, number.to_string()).unwrap();
            return (lock, format!("10.217.{number}"));
        }
    }
    panic!("250 sites run on this machine");
}

/// How long something that must be quick may take: `limit`, or what that is on a machine which says that it is slow.
pub(crate) fn patience(limit: Duration) -> Duration {
    let slowness = std::env::var(SLOWNESS);
    limit * slowness.map_or(1, |times| times.parse().unwrap())
}

/// Whether this is such a machine.
pub(crate) fn is_slow() -> bool {
    std::env::var_os(SLOWNESS).is_some()
}

/// Runs a tool to its end; its output is part of the failure.
pub(crate) fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} is needed: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a tool whose failure does not matter.
pub(crate) fn quietly(command: &mut Command) {
    command.output().map(drop).unwrap_or_default();
}

/// Stops a process. A thread of it may do something yet after the signal was sent, so this waits until none can.
pub(crate) fn wedge(pid: u32) {
    kill(pid, Signal::STOP);
    let until = Instant::now() + patience(Duration::from_secs(20));
    let is_stopped = |thread: &Path| {
        // A thread that ended since it was listed does nothing, either.
        let stat = fs::read_to_string(thread.join("stat")).ok();
        stat.is_none_or(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
    };
    let threads = PathBuf::from(format!("/proc/{pid}/task"));
    while !entries(&threads).iter().all(|thread| is_stopped(thread)) {
        assert!(Instant::now() < until, "{pid} does not stop");
    }
}

/// Signals a process of this site; one that has gone already is as good.
pub(crate) fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap_or_default();
}
