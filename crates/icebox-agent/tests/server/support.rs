//! A server of one's own per test, and a check that it leaves nothing behind.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use icebox_agent_api::{
    Token,
    client::AgentClient,
    control::{Identity, Init, Origin},
};
use tempfile::TempDir;

pub(crate) const BOOT_TOKEN: &str = "boot-token";
/// Generous: the machine may be busy, and no test waits for it to pass.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// A server, killed and checked when it goes.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) directory: TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join("cmdline"),
            format!("quiet icebox.token={BOOT_TOKEN}\n"),
        )
        .unwrap();
        let (child, address) = spawn(directory.path());
        Self {
            child,
            address,
            directory,
        }
    }

    /// Kills the server and starts another with what it left.
    pub(crate) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        (self.child, self.address) = spawn(self.directory.path());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory it ever had, in KiB.
    pub(crate) fn peak_rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }

    pub(crate) fn client(&self) -> AgentClient {
        AgentClient::tcp(self.address).with_token(&Token::new(BOOT_TOKEN))
    }
}

fn spawn(directory: &Path) -> (Child, SocketAddr) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_icebox-agent"))
        .args(["serve", "--outside", "--listen", "127.0.0.1:0", "--state"])
        .arg(directory.join("state.json"))
        .arg("--cmdline")
        .arg(directory.join("cmdline"))
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line
        .trim()
        .strip_prefix("listening on ")
        .unwrap()
        .parse()
        .unwrap();
    (child, address)
}

impl Drop for Server {
    fn drop(&mut self) {
        // What was killed last may not have been waited for yet.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut left = children_of(self.pid());
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
            left = children_of(self.pid());
        }
        self.child.kill().ok();
        self.child.wait().ok();
        if !std::thread::panicking() {
            assert!(
                left.is_empty(),
                "the server left processes behind: {left:?}"
            );
        }
    }
}

/// Pids of the direct children of a process.
pub(crate) fn children_of(pid: u32) -> Vec<u32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

pub(crate) fn init(access_token: Option<&str>) -> Init {
    Init {
        origin: Origin::Boot,
        identity: Identity {
            sandbox_id: "itest".into(),
            template_id: "template".into(),
            hostname: "itest".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
        },
        access_token: access_token.map(Token::new),
        env: BTreeMap::from([("FROM_SANDBOX".into(), "yes".into())]),
        clock_unix_ns: 1,
        entropy: vec![7; 32],
        default_user: None,
        default_workdir: None,
        close_connections: true,
    }
}
