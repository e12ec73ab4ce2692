//! The daemon's settings: one TOML file, overridden by the environment, overridden by options.
//!
//! A setting that nobody reads is a mistake of the user's that nobody tells them about; so unknown keys are refused by
//! name, and every key exists because something here uses it.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use icebox_engine::host::Egress;
use icebox_engine::unit::Bytes;
use icebox_host::vmm::qemu::AcceleratorChoice;

use super::log::Format;
use crate::failure::Failure;

/// Read if it exists and no other is named.
const DEFAULT_FILE: &str = "/etc/icebox/icebox.toml";

/// Which accelerator a user wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Accelerator {
    /// KVM if it really runs guests here, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG.
    Tcg,
}

impl From<Accelerator> for AcceleratorChoice {
    fn from(wanted: Accelerator) -> Self {
        match wanted {
            Accelerator::Auto => Self::Auto,
            Accelerator::Kvm => Self::Kvm,
            Accelerator::Tcg => Self::Tcg,
        }
    }
}

/// Where things are: what every command needs that looks at this machine itself.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Settings {
    /// The settings file [default: /etc/icebox/icebox.toml, if it exists].
    #[arg(
        long,
        env = "ICEBOX_CONFIG",
        value_name = "FILE",
        hide_env_values = true
    )]
    config: Option<PathBuf>,

    /// Where sandboxes, templates and kernels are kept [default: /var/lib/icebox].
    #[arg(
        long,
        env = "ICEBOX_DATA_DIR",
        value_name = "DIR",
        hide_env_values = true
    )]
    data_dir: Option<PathBuf>,

    /// Where sockets are, until the next boot [default: /run/icebox].
    #[arg(
        long,
        env = "ICEBOX_RUN_DIR",
        value_name = "DIR",
        hide_env_values = true
    )]
    run_dir: Option<PathBuf>,

    /// The guest agent, a static binary [default: icebox-agent beside this program].
    #[arg(
        long,
        env = "ICEBOX_AGENT",
        value_name = "FILE",
        hide_env_values = true
    )]
    agent: Option<PathBuf>,
}

/// Serve sandboxes: the daemon that every other command talks to.
///
/// Runs in the foreground until SIGTERM or SIGINT; sandboxes keep running. Prints what it does on stderr.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: Settings,

    /// Serve HTTP on this TCP address too. REST then needs an API key: the one in ICEBOX_API_KEY, one that
    /// `icebox key create` made, or while there is none, one that is made and shown once.
    #[arg(
        long,
        env = "ICEBOX_LISTEN",
        value_name = "ADDRESS:PORT",
        hide_env_values = true
    )]
    listen: Option<SocketAddr>,

    /// Serve HTTPS there: with this certificate, PEM, followed by those that it is signed by.
    #[arg(
        long,
        env = "ICEBOX_TLS_CERT",
        value_name = "FILE",
        hide_env_values = true
    )]
    tls_cert: Option<PathBuf>,

    /// The certificate's key, PEM.
    #[arg(
        long,
        env = "ICEBOX_TLS_KEY",
        value_name = "FILE",
        hide_env_values = true
    )]
    tls_key: Option<PathBuf>,

    /// Serve HTTPS there: with a certificate of this host's own authority, which `icebox ca` prints.
    #[arg(long, env = "ICEBOX_TLS_LOCAL", conflicts_with_all = ["tls_cert", "tls_key"], hide_env_values = true)]
    tls_local: bool,

    /// What to log: error, warn, info, debug, trace, or a filter by module [default: info].
    #[arg(
        long,
        env = "ICEBOX_LOG",
        value_name = "FILTER",
        hide_env_values = true
    )]
    log: Option<String>,

    /// How to log.
    #[arg(
        long,
        env = "ICEBOX_LOG_FORMAT",
        value_name = "FORMAT",
        hide_env_values = true
    )]
    log_format: Option<Format>,

    /// Simulate: sandboxes that exist in memory only, for trying the interfaces out.
    #[arg(long)]
    pub(super) sim: bool,

    /// With --sim: the address of the first sandbox's guest; the others have those after it.
    #[arg(long, hide = true, requires = "sim", value_name = "ADDRESS")]
    pub(super) sim_guests: Option<Ipv4Addr>,
}

/// The settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    listen: Option<SocketAddr>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    #[serde(default)]
    tls_local: bool,
    domain: Option<String>,
    agent: Option<PathBuf>,
    qemu: Option<PathBuf>,
    cloud_hypervisor: Option<PathBuf>,
    firecracker: Option<PathBuf>,
    #[serde(default)]
    firecracker_pager: bool,
    vmm: Option<String>,
    accelerator: Option<Accelerator>,
    volume_driver: Option<String>,
    drain_on_stop: Option<bool>,
    #[serde(default)]
    zfs: ZfsSection,
    #[serde(default)]
    log: LogSection,
    #[serde(default)]
    network: NetworkSection,
    #[serde(default)]
    defaults: DefaultsSection,
    #[serde(default)]
    space: SpaceSection,
    #[serde(default)]
    history: HistorySection,
    #[serde(default)]
    metrics: MetricsSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricsSection {
    enabled: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ZfsSection {
    dataset: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogSection {
    filter: Option<String>,
    format: Option<Format>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkSection {
    prefix: Option<String>,
    pool: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DefaultsSection {
    cpus: Option<u8>,
    memory_mib: Option<u32>,
    internet: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceSection {
    keep_free_mib: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HistorySection {
    keep: Option<NonZeroU32>,
    keep_for: Option<Length>,
}

/// A length of time, as people write it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct Length(Duration);

impl TryFrom<String> for Length {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let seconds = crate::duration::seconds(&text)?;
        let seconds = u64::try_from(seconds).map_err(|_| "a length of time cannot be negative")?;
        Ok(Self(Duration::from_secs(seconds)))
    }
}

/// The settings, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) data_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) listen: Option<SocketAddr>,
    /// What that place shows who it is with.
    pub(crate) tls: Option<Tls>,
    pub(crate) domain: Option<String>,
    pub(crate) agent: Option<PathBuf>,
    pub(crate) qemu: Option<PathBuf>,
    pub(crate) cloud_hypervisor: Option<PathBuf>,
    pub(crate) firecracker: Option<PathBuf>,
    /// Whether memory that Firecracker restores is filled by a process of its own.
    pub(crate) firecracker_pager: bool,
    pub(crate) vmm: Option<String>,
    pub(crate) accelerator: Accelerator,
    pub(crate) volume_driver: Option<String>,
    pub(crate) drain_on_stop: bool,
    pub(crate) zfs_dataset: Option<String>,
    pub(crate) log_filter: String,
    pub(crate) log_format: Format,
    pub(crate) network_prefix: String,
    pub(crate) network_pool: usize,
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) internet: bool,
    pub(crate) keep_free: Option<Bytes>,
    pub(crate) keep: usize,
    pub(crate) keep_for: Option<Duration>,
    pub(crate) metrics: bool,
}

impl Config {
    /// The settings that `args` (with the environment) and the file they name make; `socket` is the global option.
    ///
    /// # Errors
    /// The file cannot be read or understood, with the line and what was expected there.
    pub(crate) fn load(args: &Args, socket: Option<&Path>) -> Result<Self, Failure> {
        let mut config = Self::of_machine(&args.settings, socket)?;
        config.listen = args.listen.or(config.listen);
        if args.tls_cert.is_some() || args.tls_key.is_some() {
            config.tls = tls(args.tls_cert.clone(), args.tls_key.clone(), false)?;
        }
        if args.tls_local {
            config.tls = Some(Tls::Local);
        }
        config.log_filter = args.log.clone().unwrap_or(config.log_filter);
        config.log_format = args.log_format.unwrap_or(config.log_format);
        Ok(config)
    }

    /// What sandboxes may reach whose creation does not say.
    pub(crate) fn egress(&self) -> Egress {
        match self.internet {
            true => Egress::Internet,
            false => Egress::Deny,
        }
    }

    /// What the engine is to know of them, on this machine.
    pub(crate) fn engine(&self) -> icebox_engine::Config {
        let total = rustix::system::sysinfo();
        let bytes = u128::from(total.totalram) * u128::from(total.mem_unit);
        icebox_engine::Config {
            max_mem_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
            keep_free: self.keep_free,
            keep: self.keep,
            keep_for: self.keep_for,
            measures: self.metrics,
            warm_egress: self.egress(),
            ..icebox_engine::Config::default()
        }
    }

    /// As [`load`](Self::load), for commands that serve nothing.
    pub(crate) fn of_machine(settings: &Settings, socket: Option<&Path>) -> Result<Self, Failure> {
        let file = match &settings.config {
            Some(path) => read(path)?,
            None if Path::new(DEFAULT_FILE).exists() => read(Path::new(DEFAULT_FILE))?,
            None => File::default(),
        };
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).map_err(|error| {
                Failure::because(format!("cannot use path {}", path.display()), &error)
            })
        };
        let data_dir = settings.data_dir.clone().or(file.data_dir);
        let run_dir = absolute(
            settings
                .run_dir
                .clone()
                .or(file.run_dir)
                .unwrap_or_else(|| "/run/icebox".into()),
        )?;
        let socket = socket
            .map(Path::to_owned)
            .or(file.socket)
            .unwrap_or_else(|| run_dir.join("icebox.sock"));
        Ok(Self {
            data_dir: absolute(data_dir.unwrap_or_else(|| "/var/lib/icebox".into()))?,
            socket: absolute(socket)?,
            run_dir,
            listen: file.listen,
            tls: tls(file.tls_cert, file.tls_key, file.tls_local)?,
            domain: file.domain,
            agent: settings
                .agent
                .clone()
                .or(file.agent)
                .map(absolute)
                .transpose()?,
            qemu: file.qemu,
            cloud_hypervisor: file.cloud_hypervisor,
            firecracker: file.firecracker,
            firecracker_pager: file.firecracker_pager,
            vmm: file.vmm,
            accelerator: file.accelerator.unwrap_or_default(),
            volume_driver: file.volume_driver,
            drain_on_stop: file.drain_on_stop.unwrap_or(false),
            zfs_dataset: file.zfs.dataset,
            log_filter: file.log.filter.unwrap_or_else(|| "info".to_owned()),
            log_format: file.log.format.unwrap_or_default(),
            network_prefix: file
                .network
                .prefix
                .unwrap_or_else(|| "10.213.0.0/16".to_owned()),
            network_pool: file.network.pool.unwrap_or(4),
            cpus: file.defaults.cpus.unwrap_or(1),
            memory_mib: file.defaults.memory_mib.unwrap_or(512),
            internet: file.defaults.internet.unwrap_or(false),
            keep_free: file.space.keep_free_mib.map(|mib| Bytes::mib(mib.into())),
            keep: file.history.keep.map_or_else(
                || icebox_engine::Config::default().keep,
                |keep| keep.get() as usize,
            ),
            keep_for: file.history.keep_for.map(|length| length.0),
            metrics: file.metrics.enabled.unwrap_or(true),
        })
    }
}

fn read(path: &Path) -> Result<File, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::because(
            format!("cannot read the settings file {}", path.display()),
            &error,
        )
    })?;
    toml::from_str(&text).map_err(|error| {
        Failure::new(format!(
            "the settings file {} is not understood\n{}",
            path.display(),
            error.to_string().trim_end()
        ))
        .hint("docs/icebox.toml has every key, with its default")
    })
}

/// Where a certificate for TLS comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tls {
    /// The operator's own, and its key.
    Files { chain: PathBuf, key: PathBuf },
    /// This host's authority.
    Local,
}

/// A certificate and its key, or this host's own authority, or neither.
fn tls(chain: Option<PathBuf>, key: Option<PathBuf>, local: bool) -> Result<Option<Tls>, Failure> {
    if local {
        return match (chain, key) {
            (None, None) => Ok(Some(Tls::Local)),
            _ => Err(Failure::new("two certificates for TLS were given")
                .hint("leave out tls_local, or tls_cert and tls_key")),
        };
    }
    match (chain, key) {
        (Some(chain), Some(key)) => Ok(Some(Tls::Files { chain, key })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(
            Failure::new("a certificate for TLS was given without its key")
                .hint("name the key's file, too: --tls-key, or tls_key in the settings file"),
        ),
        (None, Some(_)) => Err(
            Failure::new("a key for TLS was given without its certificate").hint(
                "name the certificate's file, too: --tls-cert, or tls_cert in the settings file",
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(config: Option<PathBuf>) -> Args {
        Args {
            settings: Settings {
                config,
                ..Settings::default()
            },
            listen: None,
            tls_cert: None,
            tls_key: None,
            tls_local: false,
            log: None,
            log_format: None,
            sim: false,
            sim_guests: None,
        }
    }

    fn load(text: &str) -> Result<Config, Failure> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("write");
        Config::load(&args(Some(file.path().to_owned())), None)
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let failure = load("data_dir = \"/srv\"\n[network]\nprefx = \"x\"\n").expect_err("a typo");
        let message = &failure.body().message;
        assert!(
            message.contains("prefx") && message.contains("prefix"),
            "{message}"
        );
    }

    #[test]
    fn options_win_over_the_file_and_the_file_over_defaults() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "data_dir = \"/a\"\nrun_dir = \"/b\"\n").expect("write");
        let mut args = args(Some(file.path().to_owned()));
        args.settings.data_dir = Some("/c".into());
        let config = Config::load(&args, None).expect("valid");
        assert_eq!(config.data_dir, Path::new("/c"));
        assert_eq!(config.socket, Path::new("/b/icebox.sock"));
        assert_eq!(config.memory_mib, 512);
    }

    #[test]
    fn the_documented_file_says_the_defaults() {
        let documented = include_str!("../../../../docs/icebox.toml");
        // Every key in it is commented out; with the comments removed it must still parse, and change nothing.
        let active: String = documented
            .lines()
            .map(|line| match line.strip_prefix("#") {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => {
                    format!("{rest}\n")
                }
                _ => String::new(),
            })
            .collect();
        let mut config = load(&active).expect("the documented file is valid");
        assert_eq!(
            config.listen.take(),
            Some("127.0.0.1:3000".parse().expect("an address"))
        );
        let tls = |file| Path::new("/etc/icebox").join(file);
        let (chain, key) = (tls("tls.pem"), tls("tls.key"));
        assert_eq!(config.tls.take(), Some(Tls::Files { chain, key }));
        assert_eq!(config.domain.take().as_deref(), Some("icebox.localhost"));
        assert_eq!(
            config.agent.take().as_deref(),
            Some(Path::new("/usr/lib/icebox/icebox-agent"))
        );
        assert_eq!(
            config.qemu.take().as_deref(),
            Some(Path::new("/usr/bin/qemu-system-x86_64"))
        );
        assert_eq!(
            config.cloud_hypervisor.take().as_deref(),
            Some(Path::new("/usr/local/bin/cloud-hypervisor"))
        );
        assert_eq!(
            config.firecracker.take().as_deref(),
            Some(Path::new("/usr/local/bin/firecracker"))
        );
        assert_eq!(config.vmm.take().as_deref(), Some("qemu"));
        assert_eq!(config.volume_driver.take().as_deref(), Some("qcow2"));
        assert_eq!(config.zfs_dataset.take().as_deref(), Some("tank/icebox"));
        assert_eq!(config.keep_free.take(), Some(Bytes::mib(1024)));
        let month = Duration::from_hours(30 * 24);
        assert_eq!(config.keep_for.take(), Some(month));
        assert_eq!(config, load("").expect("nothing is valid"));
    }
}
