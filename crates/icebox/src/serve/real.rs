//! This machine as the ground that sandboxes run on.
//!
//! ```text
//!   store (lock) -> boxes -> network -> volume drivers that work -> QEMU and its accelerator -> kernels, guests
//! ```
//! The store comes first: its lock is what makes this daemon the only one that touches the rest.

mod job;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use icebox_api::types::{
    BuildEvent, BuildSource, Check, Kernel, KernelEvent, KernelSource, Report,
};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::host::{Host, HostError, Kernels, Network, VolumeDriver};
use icebox_engine::id::Digest;
use icebox_engine::layout::{Layout, Object};
use icebox_engine::unit::Bytes;
use icebox_host::boxes::{DEFAULT_FIRST_UID, HostBoxes};
use icebox_host::cgroup::Cgroups;
use icebox_host::guest::AgentGuests;
use icebox_host::guest_image::{KernelStore, Places, kernel, sweep};
use icebox_host::instance::Instance;
use icebox_host::launcher::Launcher;
use icebox_host::network::{NetworkConfig, NetworkSlots};
use icebox_host::store::FileStore;
use icebox_host::vmm::qemu::{AcceleratorChoice, Qemu, QemuConfig};
use icebox_host::volume::{Qcow2, Reflink};
use tokio::sync::mpsc;

use super::config::Config;
use super::workshop::{RootImage, Workshop};
use super::{Ground, doctor, host_error};
use crate::failure::Failure;
use crate::worker::Work;

/// Where packages put the agent.
const INSTALLED_AGENT: &str = "/usr/lib/icebox/icebox-agent";

/// Brings up everything that sandboxes need here.
pub(super) async fn ground(config: &Config, layout: &Layout) -> Result<Ground, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            "icebox serve needs to be root: for namespaces, taps, cgroups and other uids",
        )
        .hint("run it with sudo, or try the interfaces out with --sim"));
    }
    let store = FileStore::open(layout.clone()).map_err(failed("cannot use the data directory"))?;
    let data = layout
        .data()
        .canonicalize()
        .map_err(|error| Failure::because("cannot find the data directory again", &error))?;
    let places = Places::under(&data);
    sweep(&places).map_err(|error| {
        failed("cannot clean up what earlier builds left")(HostError::from(error))
    })?;

    let instance = Instance::of_data_directory(&data);
    let boxes = Arc::new(HostBoxes::new(
        layout.clone(),
        Cgroups::detect(&instance),
        DEFAULT_FIRST_UID,
    ));
    let network = network(config, instance).await?;
    let drivers = drivers(layout);
    let mut volumes = Vec::new();
    for driver in &drivers {
        match driver.probe().await {
            Ok(()) => volumes.push(Arc::clone(driver)),
            Err(error) => tracing::info!(driver = driver.name(), %error, "not usable here"),
        }
    }
    let kernels = Arc::new(KernelStore::new(places.clone(), agent(config)?, None));
    let probe_kernel = probe_kernel(&kernels).await;
    let qemu = QemuConfig {
        program: config.qemu.clone(),
        accelerator: AcceleratorChoice::Auto,
        probe_kernel,
        launcher: Launcher::this_program(),
    };
    let qemu = Qemu::find(qemu, layout.clone(), Arc::clone(&boxes))
        .await
        .map_err(failed("cannot run guests here"))?;
    let host = Host {
        store: Arc::new(store),
        volumes,
        vmms: vec![Arc::new(qemu)],
        network,
        boxes,
        kernels,
        guest: Arc::new(AgentGuests),
    };
    let workshop = Arc::new(RealWorkshop {
        host: host.clone(),
        drivers,
        places,
        data,
    });
    Ok(Ground { host, workshop })
}

fn failed(what: &'static str) -> impl FnOnce(HostError) -> Failure {
    move |error| {
        let hint = error.hint_text().map(ToOwned::to_owned);
        let failure = Failure::because(what, &error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// All drivers, in order of preference.
fn drivers(layout: &Layout) -> Vec<Arc<dyn VolumeDriver>> {
    vec![
        Arc::new(Reflink::new(layout.clone())),
        Arc::new(Qcow2::new(layout.clone())),
    ]
}

async fn network(config: &Config, instance: Instance) -> Result<Arc<dyn Network>, Failure> {
    let mut settings = NetworkConfig::new(instance);
    settings.prefix = config.network_prefix.parse().map_err(|error| {
        Failure::because(
            format!(
                "network.prefix {:?} is no IPv4 network",
                config.network_prefix
            ),
            &error,
        )
        .hint("write it like 10.213.0.0/16")
    })?;
    settings.pool_size = config.network_pool;
    let slots = NetworkSlots::open(settings).await;
    Ok(Arc::new(
        slots.map_err(failed("cannot set up sandboxes' networks"))?,
    ))
}

/// The agent that goes into guests: the one asked for, or beside this program, or where packages put it.
fn agent(config: &Config) -> Result<PathBuf, Failure> {
    if let Some(path) = &config.agent {
        return if path.is_file() {
            Ok(path.clone())
        } else {
            Err(
                Failure::new(format!("there is no guest agent at {}", path.display())).hint(
                    "`--agent`, ICEBOX_AGENT or `agent` in the settings file say where it is",
                ),
            )
        };
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|program| program.with_file_name("icebox-agent"));
    let candidates = beside.into_iter().chain([PathBuf::from(INSTALLED_AGENT)]);
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Failure::new(format!(
                "the guest agent is neither beside this program nor at {INSTALLED_AGENT}"
            ))
            .hint("build it with `make build`, or say where it is with --agent")
        })
}

/// A kernel to find out with whether KVM really runs guests.
async fn probe_kernel(kernels: &KernelStore) -> Option<PathBuf> {
    let digest = kernels.default_kernel().await.ok()?;
    let files = kernels.boot_files(&digest).await.ok()?;
    Some(files.kernel)
}

struct RealWorkshop {
    host: Host,
    /// Also those that do not work here.
    drivers: Vec<Arc<dyn VolumeDriver>>,
    places: Places,
    data: PathBuf,
}

impl RealWorkshop {
    async fn describe(&self, kernel: &kernel::Kernel, default: Option<&Digest>) -> Kernel {
        let digest = kernel.digest();
        let object = Object::Kernel(digest.clone());
        let allocated = self.host.store.allocated(&object).await.unwrap_or_default();
        let origin = match &kernel.info().source {
            kernel::KernelSource::Package { name, version } => format!("package {name} {version}"),
            kernel::KernelSource::Imported => "imported from a file".to_owned(),
        };
        Kernel {
            digest: digest.to_string(),
            version: kernel.info().release.clone(),
            origin,
            allocated_bytes: allocated.0,
            default: default == Some(digest),
        }
    }

    async fn fetch<E>(
        &self,
        source: KernelSource,
        events: &mpsc::Sender<E>,
        event: fn(job::Step) -> E,
    ) -> Result<Kernel, ApiError> {
        let digest = job::run(&self.places, Work::Kernel(source), events, event).await?;
        let digest: Digest = digest
            .and_then(|digest| digest.parse().ok())
            .ok_or_else(|| ApiError::new(ErrorCode::Internal, "the worker named no kernel"))?;
        let opened = kernel::Kernel::open(&self.places, &digest)
            .map_err(|error| host_error(&HostError::from(error)))?;
        let default = self.host.kernels.default_kernel().await.ok();
        Ok(self.describe(&opened, default.as_ref()).await)
    }
}

#[async_trait]
impl Workshop for RealWorkshop {
    async fn kernel(&self, events: &mpsc::Sender<BuildEvent>) -> Result<Digest, ApiError> {
        if kernel::list(&self.places).is_ok_and(|kernels| kernels.is_empty()) {
            let event = |step: job::Step| step.into_build_event("kernel: ");
            self.fetch(KernelSource::Debian, events, event).await?;
        }
        let default = self.host.kernels.default_kernel().await;
        default.map_err(|error| host_error(&error))
    }

    async fn image(
        &self,
        source: BuildSource,
        size: Option<Bytes>,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<RootImage, ApiError> {
        let directory = job::directory(&self.places)?;
        let out = directory.path().join("image");
        let work = Work::Image {
            source,
            size: size.map(|size| size.0),
            out: out.clone(),
        };
        let event = |step: job::Step| step.into_build_event("");
        job::run_in(&self.places, directory.path(), work, events, event).await?;
        Ok(RootImage::new(directory, out))
    }

    async fn kernels(&self) -> Result<Vec<Kernel>, ApiError> {
        let found =
            kernel::list(&self.places).map_err(|error| host_error(&HostError::from(error)))?;
        let default = self.host.kernels.default_kernel().await.ok();
        let mut kernels = Vec::new();
        for kernel in &found {
            kernels.push(self.describe(kernel, default.as_ref()).await);
        }
        Ok(kernels)
    }

    async fn import_kernel(
        &self,
        source: KernelSource,
        events: &mpsc::Sender<KernelEvent>,
    ) -> Result<Kernel, ApiError> {
        self.fetch(source, events, job::Step::into_kernel_event)
            .await
    }

    async fn doctor(&self) -> Report {
        let mut checks = doctor::host(&self.host, &self.data).await;
        let working: Vec<&str> = self
            .host
            .volumes
            .iter()
            .map(|driver| driver.name())
            .collect();
        for driver in self
            .drivers
            .iter()
            .filter(|driver| !working.contains(&driver.name()))
        {
            checks.push(absent(driver).await);
        }
        Report { checks }
    }
}

/// A driver that did not work when the daemon started, and why.
async fn absent(driver: &Arc<dyn VolumeDriver>) -> Check {
    let name = format!("volume driver {}", driver.name());
    match driver.probe().await {
        Ok(()) => doctor::works(&name, "works now: restart the daemon to use it"),
        Err(error) => Check {
            result: icebox_api::types::CheckResult::Absent,
            ..doctor::fails(&name, &error)
        },
    }
}
