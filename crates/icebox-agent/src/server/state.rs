//! What the server knows about its sandbox.
//!
//! The settings that `/init` brought are also in a file only root reads, on a file system that ends with the guest:
//! a server that crashed and was restarted goes on under the same token, and never accepts the boot token again,
//! which anyone in the guest can read from the kernel command line.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::{PoisonError, RwLock},
};

use icebox_agent_api::{Token, control::Init};
use serde::{Deserialize, Serialize};

use super::{machine::Machine, metrics::CpuMeter, process::Registry};
use crate::{cgroup::Cgroups, users::User};

/// Runs commands in images that have it: E2B's user, and that of the images that we build.
const USER: &str = "user";

/// The state of the server, shared by all requests.
pub(super) struct Agent {
    pub(super) machine: Machine,
    pub(super) cgroups: Cgroups,
    pub(super) processes: Registry,
    pub(super) cpu: CpuMeter,
    /// Held while the machine becomes another sandbox, by one call at a time. Not by a preparation: one that was under
    /// way when the guest was captured must not keep the restored guest from its new life.
    pub(super) init: tokio::sync::Mutex<()>,
    settings: RwLock<Settings>,
    settings_file: PathBuf,
}

/// What `/init` set.
#[derive(Clone, Serialize, Deserialize)]
struct Settings {
    /// Opens the host's calls. None matches nothing.
    host_token: Option<Token>,
    access: Access,
    env: BTreeMap<String, String>,
    default_user: Option<String>,
    default_workdir: Option<PathBuf>,
}

/// Who may use the sandbox.
#[derive(Clone, Serialize, Deserialize)]
enum Access {
    /// Whoever has the host's token.
    Token,
    /// Whoever reaches the port.
    Open,
}

/// The settings could not be read or kept.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation} the settings in {}", path.display())]
pub(super) struct SettingsError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Agent {
    /// Starts from the settings of a server before this one, or else from the token of the kernel command line.
    pub(super) fn open(
        machine: Machine,
        cgroups: Cgroups,
        settings_file: PathBuf,
        boot_token: Option<&str>,
    ) -> Result<Self, SettingsError> {
        let failed = |source| SettingsError {
            operation: "read",
            path: settings_file.clone(),
            source,
        };
        let settings = match fs::read(&settings_file) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| failed(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Settings {
                host_token: boot_token.map(Token::new),
                access: Access::Token,
                env: BTreeMap::new(),
                default_user: None,
                default_workdir: None,
            },
            Err(error) => return Err(failed(error)),
        };
        Ok(Self {
            machine,
            cgroups,
            processes: Registry::default(),
            cpu: CpuMeter::default(),
            init: tokio::sync::Mutex::new(()),
            settings: RwLock::new(settings),
            settings_file,
        })
    }

    /// Whether `token` opens the calls of SDKs and the command line.
    pub(super) fn allows_access(&self, token: Option<&[u8]>) -> bool {
        matches!(self.settings().access, Access::Open) || self.is_host(token)
    }

    /// Whether `token` opens the host's calls.
    pub(super) fn is_host(&self, token: Option<&[u8]>) -> bool {
        match (&self.settings().host_token, token) {
            (Some(expected), Some(token)) => expected.matches(token),
            _ => false,
        }
    }

    /// The access token, unless the sandbox is open.
    pub(super) fn access_token(&self) -> Option<Token> {
        let settings = self.settings();
        match settings.access {
            Access::Token => settings.host_token,
            Access::Open => None,
        }
    }

    /// Who runs what names nobody: whom the sandbox says, else [`USER`] where there is one.
    pub(super) fn default_user(&self) -> String {
        let said = self.settings().default_user;
        said.unwrap_or_else(|| match User::find(USER) {
            Ok(user) => user.name,
            Err(_) => "root".to_owned(),
        })
    }

    /// Where the processes of `user` start and relative paths begin, if the sandbox says so.
    pub(super) fn workdir(&self, user: &User) -> PathBuf {
        self.settings()
            .default_workdir
            .unwrap_or_else(|| user.home.clone())
    }

    /// The environment every process gets.
    pub(super) fn env(&self) -> BTreeMap<String, String> {
        self.settings().env
    }

    /// Takes over what `/init` brought; on error nothing has changed.
    pub(super) fn adopt(&self, init: &Init) -> Result<(), SettingsError> {
        let mut settings = self.settings();
        match &init.access_token {
            Some(token) => {
                settings.host_token = Some(token.clone());
                settings.access = Access::Token;
            }
            None => settings.access = Access::Open,
        }
        settings.env = [
            ("E2B_SANDBOX", "true"),
            ("E2B_SANDBOX_ID", init.identity.sandbox_id.as_str()),
            ("E2B_TEMPLATE_ID", init.identity.template_id.as_str()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(init.env.clone())
        .collect();
        settings.default_user = init.default_user.clone();
        settings.default_workdir = init.default_workdir.as_ref().map(PathBuf::from);
        self.save(&settings)?;
        *self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner) = settings;
        Ok(())
    }

    fn settings(&self) -> Settings {
        self.settings
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn save(&self, settings: &Settings) -> Result<(), SettingsError> {
        let failed = |source| SettingsError {
            operation: "keep",
            path: self.settings_file.clone(),
            source,
        };
        let temporary = self.settings_file.with_extension("new");
        let text = serde_json::to_vec(settings).map_err(|error| failed(error.into()))?;
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        fs::rename(&temporary, &self.settings_file).map_err(failed)
    }
}
