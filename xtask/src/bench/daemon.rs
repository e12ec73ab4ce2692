//! A daemon of the benchmark's own, and requests to it: HTTP over its socket, as any client would.
//!
//! By hand rather than through the command line, so that no start of a process is part of a measurement, and so that
//! the first command in a guest is the very request that `bench/floor.py` sends.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::run::Failure;

/// Building a template fetches packages.
const REQUEST: Duration = Duration::from_secs(900);
/// Not the default, so that another daemon may run meanwhile.
const PREFIX: &str = "10.238.0.0/16";
/// Its first start tries each VMM on a kernel, which takes nested ones some time.
const READY: Duration = Duration::from_secs(180);
/// How often it is asked whether it serves.
const POLL: Duration = Duration::from_millis(2);
/// The agent's port in every guest.
const AGENT_PORT: u16 = 49983;

pub(super) struct Daemon {
    icebox: PathBuf,
    process: Child,
    socket: PathBuf,
    pub(super) data: PathBuf,
    pub(super) run: PathBuf,
    /// The settings that come before all sections.
    first: String,
}

impl Daemon {
    /// Starts `icebox serve`, with these settings before all sections, and waits until it answers.
    pub(super) fn start(
        icebox: &Path,
        data: PathBuf,
        run: PathBuf,
        first: String,
    ) -> Result<Self, Failure> {
        let mut this = Self {
            icebox: icebox.to_owned(),
            process: spawn(icebox, &data, &run, &first, "")?,
            socket: run.join("icebox.sock"),
            data,
            run,
            first,
        };
        this.wait()?;
        Ok(this)
    }

    /// Ends it and starts it again, with these settings beside its own. What runs in sandboxes does not notice.
    pub(super) fn restart(&mut self, settings: &str) -> Result<(), Failure> {
        self.end()?;
        self.start_again(settings)
    }

    /// Starts it again after [`end`](Self::end).
    pub(super) fn start_again(&mut self, settings: &str) -> Result<(), Failure> {
        self.process = spawn(&self.icebox, &self.data, &self.run, &self.first, settings)?;
        self.wait()
    }

    fn wait(&mut self) -> Result<(), Failure> {
        let io = |error: std::io::Error| Failure(format!("wait for the daemon: {error}"));
        let begun = Instant::now();
        while self.request("GET", "/health", &Value::Null).is_err() {
            let ended = self.process.try_wait().map_err(io)?;
            if ended.is_some() || begun.elapsed() > READY {
                return Err(Failure(format!(
                    "the daemon does not serve; see {}",
                    log(&self.data).display()
                )));
            }
            super::idle(POLL);
        }
        Ok(())
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end, and waits.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure(format!("stop the daemon: {error}"));
        let pid = self.process.id().to_string();
        Command::new("kill").arg(pid).status().map_err(failed)?;
        let status = self.process.wait().map_err(failed)?;
        if status.success() {
            Ok(())
        } else {
            Err(Failure(format!("the daemon ended badly: {status}")))
        }
    }

    /// One request and its whole answer. `Null` stands for no body.
    pub(super) fn request(&self, method: &str, path: &str, body: &Value) -> Result<Value, Failure> {
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let answer = self.send(method, path, "application/json", "", text.as_bytes())?;
        // Streams of events are lines; their last one says how it ended.
        let last = answer
            .rsplit(|byte| *byte == b'\n')
            .find(|line| !line.is_empty());
        match last {
            None => Ok(Value::Null),
            Some(_) if path.starts_with("/events") => Ok(answer
                .split(|byte| *byte == b'\n')
                .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
                .collect()),
            Some(line) => serde_json::from_slice(line)
                .map_err(|error| Failure(format!("{method} {path}: {error}"))),
        }
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.request("POST", path, body)
    }

    /// Runs `true` in a sandbox.
    pub(super) fn exec_true(&self, sandbox: &str) -> Result<(), Failure> {
        self.exec(sandbox, "/bin/true", &[])
    }

    /// Runs a command in a sandbox, by the agent's own protocol. An error unless it succeeds.
    pub(super) fn exec(&self, sandbox: &str, program: &str, args: &[&str]) -> Result<(), Failure> {
        let process = json!({"cmd": program, "args": args, "envs": {}});
        let message = json!({"process": process, "stdin": false}).to_string();
        // Connect, "Enveloped messages": a byte of flags, the length, the message.
        let mut body = vec![0];
        body.extend(
            u32::try_from(message.len())
                .unwrap_or_default()
                .to_be_bytes(),
        );
        body.extend(message.as_bytes());
        let headers = format!(
            "Connect-Protocol-Version: 1\r\nAuthorization: Basic cm9vdDo=\r\n\
             E2b-Sandbox-Id: {sandbox}\r\nE2b-Sandbox-Port: {AGENT_PORT}\r\n"
        );
        let answer = self.send(
            "POST",
            "/process.Process/Start",
            "application/connect+json",
            &headers,
            &body,
        )?;
        let text = String::from_utf8_lossy(&answer);
        // JSON of protocol buffers leaves out an exit code of 0.
        let failed = text.contains("\"error\"") || text.contains("\"exitCode\"");
        if text.contains("\"exited\":true") && !failed {
            Ok(())
        } else {
            Err(Failure(format!(
                "{program} did not succeed in sandbox {sandbox}: {text}"
            )))
        }
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        headers: &str,
        body: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let failed = |error: std::io::Error| Failure(format!("{method} {path}: {error}"));
        let mut stream = UnixStream::connect(&self.socket).map_err(failed)?;
        stream.set_read_timeout(Some(REQUEST)).map_err(failed)?;
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: icebox\r\nConnection: close\r\nPrefer: return=representation\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        )
        .into_bytes();
        request.extend(body);
        stream.write_all(&request).map_err(failed)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(failed)?;
        parse(&answer).map_err(|why| Failure(format!("{method} {path}: {why}")))
    }
}

/// Where it logs. Each start adds to it.
fn log(data: &Path) -> PathBuf {
    data.with_extension("log")
}

fn spawn(
    icebox: &Path,
    data: &Path,
    run: &Path,
    first: &str,
    settings: &str,
) -> Result<Child, Failure> {
    let io = |error| Failure(format!("start {}: {error}", icebox.display()));
    std::fs::create_dir_all(data).map_err(io)?;
    let config = data.with_extension("toml");
    let settings = format!("{first}[network]\nprefix = \"{PREFIX}\"\n{settings}");
    std::fs::write(&config, settings).map_err(io)?;
    let log = File::options().create(true).append(true).open(log(data));
    Command::new(icebox)
        .arg("serve")
        .arg("--config")
        .arg(&config)
        .arg("--data-dir")
        .arg(data)
        .arg("--run-dir")
        .arg(run)
        .env_remove("ICEBOX_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_err(io)?)
        .spawn()
        .map_err(io)
}

/// The body of a successful answer.
fn parse(answer: &[u8]) -> Result<Vec<u8>, String> {
    let end = find(answer, b"\r\n\r\n").ok_or("the answer has no end of its head")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let mut rest = &answer[end + 4..];
    let mut body = Vec::new();
    if head.contains("transfer-encoding: chunked") {
        loop {
            let line = find(rest, b"\r\n").ok_or("the answer was cut off")?;
            let size = std::str::from_utf8(&rest[..line])
                .ok()
                .and_then(|text| usize::from_str_radix(text.trim(), 16).ok())
                .ok_or("the answer has a bad chunk")?;
            if size == 0 {
                break;
            }
            let chunk = rest.get(line + 2..line + 2 + size);
            body.extend(chunk.ok_or("the answer was cut off")?);
            rest = rest
                .get(line + 4 + size..)
                .ok_or("the answer was cut off")?;
        }
    } else {
        body.extend(rest);
    }
    match head.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(body),
        _ => Err(String::from_utf8_lossy(&body).into_owned()),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn answers_are_understood() {
        let plain = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(parse(plain), Ok(b"{}".to_vec()));
        let chunked =
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(parse(chunked), Ok(b"abc0123456789".to_vec()));
        assert_eq!(
            parse(b"HTTP/1.1 404 Not Found\r\n\r\nno such"),
            Err("no such".into())
        );
        assert!(parse(&chunked[..60]).is_err());
    }
}
