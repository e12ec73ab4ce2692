//! A guest of one's own per test.

use std::{
    cell::RefCell,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::LazyLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use icebox_agent_api::{
    AGENT_PORT, Token,
    client::{AgentClient, AgentError, Command as GuestCommand, Output},
    control::{Identity, Init, Origin},
};
use icebox_host::guest_image::fixture;
use tempfile::TempDir;

pub(crate) const BOOT_TOKEN: &str = "boot-token";
pub(crate) const TOKEN: &str = "sandbox-token";
/// Generous: without acceleration, and on a busy machine, a boot can take long.
pub(crate) const BOOT: Duration = Duration::from_secs(120);
pub(crate) const CALL: Duration = Duration::from_secs(60);
/// The host's end of the link, where a guest reaches this machine's loopback interface.
pub(crate) const HOST: &str = "169.254.0.22";

/// A kernel parameter with which it finds no timer.
pub(crate) const WITHOUT_TIMER: &str = "nolapic_timer";
/// What the agent says of that.
pub(crate) const NO_TIMER: &str = "the kernel has found no timer";

/// What every guest boots from. Made once for all tests of this process.
struct Parts {
    kernel: PathBuf,
    initramfs: PathBuf,
    image: PathBuf,
}

static PARTS: LazyLock<Parts> = LazyLock::new(|| Parts {
    kernel: fixture::kernel().unwrap().image(),
    initramfs: fixture::initramfs().unwrap().path,
    image: fixture::debian_image().unwrap(),
});

/// How a guest differs from the usual.
#[derive(Default)]
pub(crate) struct Options {
    /// A raw image to write to instead of an overlay on the fixture's.
    pub(crate) disk: Option<PathBuf>,
    /// No disk at all.
    pub(crate) diskless: bool,
    /// Appended to the kernel command line.
    pub(crate) parameters: &'static str,
}

/// A running guest, killed when it goes.
pub(crate) struct Guest {
    command: RefCell<Command>,
    /// Whether it was told to find no timer.
    keeps_resetting: bool,
    child: RefCell<Child>,
    address: SocketAddr,
    directory: TempDir,
}

impl Guest {
    pub(crate) fn start(options: &Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let parts = &*PARTS;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-machine", "microvm,acpi=on,pit=off,pic=off,rtc=off", "-accel", "tcg", "-cpu", "max,-la57"])
            // Room for a second CPU, as sandboxes have it and for the same reason: without it, a guest's disk may stand still
            // for ever (docs/decisions/virtual-machines.md).
            .args(["-smp", "1,maxcpus=2"])
            .args(["-m", "256", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-kernel"])
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet reboot=t panic=-1 mitigations=off possible_cpus=1 tsc=reliable tsc_early_khz={} icebox.token={BOOT_TOKEN} icebox.dns=192.0.2.53 {}",
                host_khz(),
                options.parameters
            ))
            .arg("-netdev")
            .arg(format!(
                "user,id=net,net=169.254.0.0/24,host={HOST},hostfwd=tcp:{address}-169.254.0.21:{AGENT_PORT}"
            ))
            .args(["-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]);
        if !options.diskless {
            let (file, format) = match &options.disk {
                Some(disk) => (disk.clone(), "raw"),
                None => (overlay(directory.path(), &parts.image), "qcow2"),
            };
            command
                .arg("-drive")
                .arg(format!(
                    "id=root,if=none,format={format},discard=unmap,file={}",
                    file.display()
                ))
                .args(["-device", "virtio-blk-device,drive=root"]);
        }
        let console = File::create(directory.path().join("console")).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("these tests need qemu-system-x86_64: {error}"));
        Self {
            command: RefCell::new(command),
            keeps_resetting: options.parameters == WITHOUT_TIMER,
            child: RefCell::new(child),
            address,
            directory,
        }
    }

    /// A guest of the usual kind that was initialised.
    pub(crate) async fn ready() -> (Self, AgentClient) {
        let guest = Self::start(&Options::default());
        let client = guest.booted().await;
        client.init(&init("guest-1", 1), CALL).await.unwrap();
        (guest, client.with_token(&Token::new(TOKEN)))
    }

    /// Waits until the agent answers. The client carries the token of the kernel command line.
    pub(crate) async fn booted(&self) -> AgentClient {
        let client = AgentClient::tcp(self.address).with_token(&Token::new(BOOT_TOKEN));
        let deadline = Instant::now() + BOOT;
        loop {
            match client.health(Duration::from_secs(5)).await {
                Ok(()) => return client,
                Err(AgentError::Unreachable { .. } | AgentError::TimedOut { .. })
                    if Instant::now() < deadline =>
                {
                    self.boot_again();
                    // The forwarder of QEMU accepts connections before the guest does: there is no event to wait for.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}; console:\n{}", self.console()),
            }
        }
    }

    /// Starts it again, as a daemon does, if its kernel found no timer: that happens on a busy machine.
    fn boot_again(&self) {
        let console = self.directory.path().join("console");
        let is_without = fs::read_to_string(&console).is_ok_and(|said| said.contains(NO_TIMER));
        let mut child = self.child.borrow_mut();
        if is_without && !self.keeps_resetting && child.try_wait().unwrap().is_some() {
            fs::write(console, "").unwrap();
            *child = self.command.borrow_mut().spawn().unwrap();
        }
    }

    /// What the guest wrote to its console so far.
    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join("console")).unwrap())
            .into_owned()
    }

    /// Waits until the guest turned itself off.
    pub(crate) async fn is_off(&mut self) -> ExitStatus {
        let deadline = Instant::now() + BOOT;
        loop {
            self.boot_again();
            if let Some(status) = self.child.borrow_mut().try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the guest is still on; console:\n{}",
                self.console()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let child = self.child.get_mut();
        child.kill().ok();
        child.wait().ok();
        if std::thread::panicking() {
            eprintln!("console:\n{}", self.console());
        }
    }
}

pub(crate) async fn sh(client: &AgentClient, script: &str) -> Output {
    client
        .run(GuestCommand::new("/bin/sh").args(["-c", script]))
        .await
        .unwrap()
}

/// The output of a script that must succeed, without the last line's end.
pub(crate) async fn text(client: &AgentClient, script: &str) -> String {
    let output = sh(client, script).await;
    assert!(
        output.exit.shell_code() == 0,
        "{script}: {:?}: {}",
        output.exit,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .trim_end()
        .to_owned()
}

pub(crate) fn init(hostname: &str, number: u8) -> Init {
    Init {
        origin: Origin::Boot,
        identity: Identity {
            sandbox_id: format!("i{number}"),
            template_id: "debian".into(),
            hostname: hostname.into(),
            machine_id: format!("{number:032x}"),
        },
        access_token: Some(Token::new(TOKEN)),
        env: [("GREETING".to_owned(), "hello there".to_owned())].into(),
        clock_unix_ns: now_ns(),
        entropy: vec![number; 48],
        default_user: Some("user".into()),
        default_workdir: None,
        close_connections: true,
    }
}

pub(crate) fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos()
        .try_into()
        .unwrap()
}

/// A disk that can be written to and costs only what is written.
fn overlay(directory: &Path, image: &Path) -> PathBuf {
    let path = directory.join("disk.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([image, &path])
        .status()
        .unwrap();
    assert!(status.success());
    path
}

/// The clock rate of this machine: without it, a guest's kernel measures its own, and can hang in that.
fn host_khz() -> u64 {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz"));
    let mhz = line.and_then(|line| {
        line.split_once(':')?
            .1
            .trim()
            .split('.')
            .next()?
            .parse::<u64>()
            .ok()
    });
    mhz.unwrap_or(2000) * 1000
}
