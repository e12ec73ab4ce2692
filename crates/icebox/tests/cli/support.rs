//! A daemon for each test, and transcripts that are the same at every run.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use icebox_host::guest_image::fixture;

/// A command of ours, with nothing of the caller's environment that could change what it does.
pub(crate) fn icebox() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_icebox"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ICEBOX_") || name == "JOURNAL_STREAM" {
            command.env_remove(name);
        }
    }
    command
        .env("NO_COLOR", "1")
        .env("COLUMNS", "100")
        .env("TERM", "xterm-256color");
    command
}

/// The token that an agent accepts before it is told another.
const BOOT: &str = "boot";

/// A running daemon with a simulated host, in a directory of its own. Stopped, and waited for, when dropped.
pub(crate) struct Daemon {
    directory: tempfile::TempDir,
    process: Child,
    agents: Vec<Child>,
    guests: Ipv4Addr,
    /// Keeps the rest of the log; ends with the daemon.
    logger: Option<JoinHandle<()>>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let guests = loopback();
        let process = spawn(directory.path(), guests, options);
        let mut daemon = Self {
            directory,
            process,
            agents: Vec::new(),
            guests,
            logger: None,
        };
        daemon.wait_until_ready();
        daemon
    }

    /// Ends a daemon without options of its own as a service manager would, and starts the next one on what it has left on
    /// disk. A simulated host is another then.
    pub(crate) fn restart(mut self) -> Self {
        signal(self.process.id(), "TERM");
        assert!(self.process.wait().unwrap().success());
        self.logger.take().unwrap().join().unwrap();
        self.process = spawn(self.directory.path(), self.guests, &[]);
        self.wait_until_ready();
        self
    }

    fn wait_until_ready(&mut self) {
        let log = BufReader::new(self.process.stderr.take().unwrap());
        let mut seen = String::new();
        let mut lines = log.lines();
        for line in lines.by_ref() {
            let line = line.unwrap();
            seen.push_str(&line);
            seen.push('\n');
            if line.contains(" is ready on ") {
                std::fs::write(self.path("early.log"), &seen).unwrap();
                let mut rest = std::fs::File::create(self.path("late.log")).unwrap();
                self.logger = Some(std::thread::spawn(move || {
                    for line in lines.map_while(Result::ok) {
                        writeln!(rest, "{line}").unwrap();
                    }
                }));
                return;
            }
        }
        panic!("the daemon ended before it was ready:\n{seen}");
    }

    /// The key that the daemon showed when it made it.
    pub(crate) fn api_key(&self) -> String {
        let log = std::fs::read_to_string(self.path("early.log")).unwrap();
        let (_, shown) = log.split_once("shown this once: ").unwrap();
        shown.split_whitespace().next().unwrap().to_owned()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Stops the daemon as a service manager would, and returns all it logged after it was ready.
    pub(crate) fn stop(mut self) -> (ExitStatus, String) {
        signal(self.process.id(), "TERM");
        let status = self.process.wait().unwrap();
        self.logger.take().unwrap().join().unwrap();
        let log = std::fs::read_to_string(self.path("late.log")).unwrap();
        (status, log)
    }

    /// A command for this daemon.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = icebox();
        command
            .arg("--socket")
            .arg(self.path("socket"))
            .args(arguments)
            .current_dir(self.directory.path());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs a command that succeeds, and returns what it printed on stdout, without the line end.
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

    /// A template called `base`.
    pub(crate) fn with_template(self) -> Self {
        self.get(&["template", "build", "base", "--from", "debian:bookworm"]);
        self
    }

    /// A sandbox called `web` in which commands can run: an agent answers at its address.
    pub(crate) fn with_guest(mut self) -> Self {
        self = self.with_template();
        self.get(&["create", "base", "--name", "web"]);
        let token = self.token_of("web");
        self.add_agent("web", Some(&token));
        self
    }

    /// An agent that answers everybody at the first sandbox's address.
    pub(crate) fn with_open_agent(mut self) -> Self {
        self.add_agent("anybody", None);
        self
    }

    /// Has an agent answer at the first sandbox's address.
    pub(crate) fn add_agent(&mut self, sandbox: &str, token: Option<&str>) {
        let agent = self.start_agent();
        self.agents.push(agent);
        self.welcome(sandbox, token);
    }

    /// Tells the agent the sandbox's token, which a simulated host does not.
    fn welcome(&self, sandbox: &str, token: Option<&str>) {
        let agent = format!("{}:49983", self.guests);
        let init = serde_json::json!({
            "origin": "boot",
            "identity": {
                "sandbox_id": sandbox,
                "template_id": "base",
                "hostname": sandbox,
                "machine_id": "0".repeat(32),
            },
            "access_token": token,
            "clock_unix_ns": 0,
            "entropy": "A".repeat(64),
        });
        let answer = request(
            &agent,
            "POST /init",
            &format!("x-access-token: {BOOT}\r\n"),
            &init.to_string(),
        );
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }

    /// The processes of the agents that were started.
    pub(crate) fn agents(&self) -> impl Iterator<Item = u32> {
        self.agents.iter().map(Child::id)
    }

    /// A sandbox's token, as the API tells it to who has the key.
    pub(crate) fn token_of(&self, sandbox: &str) -> String {
        let key = format!("x-api-key: {}\r\n", self.api_key());
        let answer = request(
            &self.address(),
            &format!("GET /sandboxes/{sandbox}"),
            &key,
            "",
        );
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let detail: serde_json::Value = serde_json::from_str(body).unwrap();
        detail["envdAccessToken"].as_str().unwrap().to_owned()
    }

    /// Where the daemon serves HTTP on TCP.
    pub(crate) fn address(&self) -> String {
        let log = std::fs::read_to_string(self.path("early.log")).unwrap();
        let (_, shown) = log.split_once(" and http").unwrap();
        let (_, shown) = shown.split_once("://").unwrap();
        shown.trim_end().to_owned()
    }

    fn start_agent(&self) -> Child {
        let parameters = self.path("cmdline");
        std::fs::write(&parameters, format!("icebox.token={BOOT}")).unwrap();
        let groups = self.path("cgroup");
        std::fs::create_dir_all(&groups).unwrap();
        let mut agent = Command::new(agent())
            .args(["serve", "--outside", "--listen"])
            .arg(format!("{}:49983", self.guests))
            .arg("--state")
            .arg(self.path("agent.json"))
            .arg("--cmdline")
            .arg(&parameters)
            .arg("--cgroup")
            .arg(&groups)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(agent.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.starts_with("listening on "), "{line}");
        agent
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for process in self.agents.iter_mut().chain([&mut self.process]) {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

fn spawn(directory: &Path, guests: Ipv4Addr, options: &[&str]) -> Child {
    serve(directory)
        .args(["--sim", "--sim-guests", &guests.to_string()])
        .args(["--listen", "127.0.0.1:0"])
        .args(options)
        .spawn()
        .unwrap()
}

/// `icebox serve` in a directory.
pub(crate) fn serve(directory: &Path) -> Command {
    let mut command = icebox();
    command
        .arg("--socket")
        .arg(directory.join("socket"))
        .arg("serve")
        .arg("--data-dir")
        .arg(directory.join("data"))
        .arg("--run-dir")
        .arg(directory.join("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Sends one HTTP request and returns all of the answer.
pub(crate) fn request(address: &str, line: &str, headers: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A Python of its own that has a package, made once.
pub(crate) fn python(package: &str) -> PathBuf {
    fixture::python(&[package]).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs a program that must succeed. If it does not, what it said is told.
pub(crate) fn succeed(command: &mut Command) {
    fixture::succeed(command).unwrap_or_else(|error| panic!("{error}"));
}

/// Sends a signal with the system's own tool.
pub(crate) fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}

/// The agent's program, built here if it is not as its source is: it belongs to another package.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        let beside = Path::new(env!("CARGO_BIN_EXE_icebox")).with_file_name("icebox-agent");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "icebox-agent"]);
        assert!(build.status().unwrap().success());
        assert!(
            beside.exists(),
            "the agent is built beside {}",
            beside.display()
        );
        beside
    })
}

/// An address in 127.0.0.0/8 that no other test of this machine uses, with free ones after it. All are equally long,
/// so that tables look the same at every run.
fn loopback() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let test = NEXT.fetch_add(1, Ordering::Relaxed);
    let number = std::process::id().wrapping_mul(64).wrapping_add(test);
    let octet = |n: u32| 100 + u8::try_from(n % 150).unwrap();
    Ipv4Addr::new(127, octet(number / 150), octet(number), 101)
}

/// Runs commands one after another and writes down what a user would see.
pub(crate) struct Transcript<'a> {
    daemon: &'a Daemon,
    text: String,
    scrub: Scrub,
}

impl<'a> Transcript<'a> {
    pub(crate) fn new(daemon: &'a Daemon) -> Self {
        let mut scrub = Scrub::default();
        let directory = daemon.directory.path().display().to_string();
        scrub.replace(&directory, "[DIR]");
        for slot in 0..8 {
            let address = Ipv4Addr::from_bits(daemon.guests.to_bits() + slot);
            scrub.replace(&address.to_string(), &format!("127.100.100.10{slot}"));
        }
        scrub.replace(&format!("pid {}", daemon.pid()), "pid [PID]");
        Self {
            daemon,
            text: String::new(),
            scrub,
        }
    }

    /// Runs `icebox <line>`, split at spaces.
    pub(crate) fn run(&mut self, line: &str) -> &mut Self {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        self.run_arguments(&arguments)
    }

    /// Runs `icebox` with these arguments, which may contain spaces or nothing.
    pub(crate) fn run_arguments(&mut self, arguments: &[&str]) -> &mut Self {
        let output = self.daemon.run(arguments);
        self.note(arguments, &output)
    }

    fn note(&mut self, arguments: &[&str], output: &Output) -> &mut Self {
        self.text.push_str(&entry(arguments, output));
        self
    }

    /// The transcript, with everything replaced that differs from run to run.
    pub(crate) fn text(&mut self) -> String {
        self.scrub.text(&self.text)
    }
}

/// One command as it is written down.
pub(crate) fn entry(arguments: &[&str], output: &Output) -> String {
    let mut text = String::from("$ icebox");
    for argument in arguments {
        let plain = !argument.is_empty()
            && argument.len() < 100
            && argument.chars().all(|c| c.is_ascii_graphic() && c != '\'');
        let shown = if plain {
            (*argument).to_owned()
        } else {
            format!("{:?}", argument.chars().take(40).collect::<String>())
        };
        text.push(' ');
        text.push_str(&shown);
    }
    text.push('\n');
    for (name, bytes) in [("", &output.stdout), ("! ", &output.stderr)] {
        for line in String::from_utf8_lossy(bytes).lines() {
            text.push_str(format!("{name}{line}").trim_end());
            text.push('\n');
        }
    }
    match output.status.code() {
        Some(0) => {}
        code => {
            let code = code.map_or("by signal".to_owned(), |code| code.to_string());
            text.push_str(&format!(
                "[exit {code}]
"
            ));
        }
    }
    text.push('\n');
    text
}

/// Replaces what differs from run to run, by the order of its first appearance.
#[derive(Default)]
pub(crate) struct Scrub {
    replacements: Vec<(String, String)>,
    ids: BTreeMap<String, String>,
}

impl Scrub {
    pub(crate) fn replace(&mut self, what: &str, with: &str) {
        self.replacements.push((what.to_owned(), with.to_owned()));
    }

    pub(crate) fn text(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for (what, with) in &self.replacements {
            text = text.replace(what.as_str(), with);
        }
        let mut result = String::new();
        let mut rest = text.as_str();
        while let Some(start) = rest.find(|c: char| c.is_ascii_alphanumeric()) {
            let (before, from) = rest.split_at(start);
            result.push_str(before);
            let end = from
                .find(|c: char| !(c.is_ascii_alphanumeric()))
                .unwrap_or(from.len());
            let (word, after) = from.split_at(end);
            if let Some(length) = timestamp(from) {
                result.push_str("[TIME]");
                rest = &from[length..];
                continue;
            }
            result.push_str(&self.word(word));
            rest = after;
        }
        result.push_str(rest);
        result.lines().map(ageless).collect()
    }

    /// Ids have a letter and 20 characters; the replacement is as long, so that tables stay aligned.
    fn word(&mut self, word: &str) -> String {
        let is_id = word.len() == 21
            && word.starts_with(['i', 't', 'l', 'm'])
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !is_id {
            return word.to_owned();
        }
        let number = self.ids.len() + 1;
        let kind = &word[..1];
        self.ids
            .entry(word.to_owned())
            .or_insert_with(|| format!("{kind}{number:020}"))
            .clone()
    }
}

/// A line whose last cell is neither an age nor a time that something took: tests take as long as they take.
fn ageless(line: &str) -> String {
    let took = |(_, number): &(&str, &str)| number.parse::<f64>().is_ok();
    if let Some(rest) = line.strip_suffix(" ms")
        && let Some((row, _)) = rest.rsplit_once(' ').filter(took)
    {
        return format!("{row} [TOOK]\n");
    }
    match line.rsplit_once("  ") {
        Some((row, age))
            if age.len() > 1
                && age.ends_with('s')
                && age[..age.len() - 1].bytes().all(|b| b.is_ascii_digit()) =>
        {
            format!("{row}  [AGE]\n")
        }
        _ => format!("{line}\n"),
    }
}

/// The length of the RFC 3339 time that `text` begins with.
fn timestamp(text: &str) -> Option<usize> {
    let shape = "0000-00-00T00:00:00";
    let head = text.get(..shape.len())?;
    let fits = head
        .bytes()
        .zip(shape.bytes())
        .all(|(found, wanted)| match wanted {
            b'0' => found.is_ascii_digit(),
            _ => found == wanted,
        });
    let zone = text.find('Z').filter(|at| *at < 32)?;
    fits.then_some(zone + 1)
}

/// Reads what a child that ends by itself printed, and its status.
pub(crate) fn finish(mut child: Child) -> (ExitStatus, String, String) {
    let mut stdout = String::new();
    let mut stderr = String::new();
    if let Some(mut stream) = child.stdout.take() {
        stream.read_to_string(&mut stdout).unwrap();
    }
    if let Some(mut stream) = child.stderr.take() {
        stream.read_to_string(&mut stderr).unwrap();
    }
    (child.wait().unwrap(), stdout, stderr)
}
