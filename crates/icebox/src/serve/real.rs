//! This machine as the ground that sandboxes run on: every part found, tried and put together once, at start.
//!
//! ```text
//!   store (lock) -> kernels -> boxes -> VMMs that run a guest -> volume drivers that work -> network
//! ```
//! The store comes first: its lock is what makes this daemon the only one that touches the rest. The network comes last:
//! its rules are on the host from then on, and a daemon that refuses to serve leaves none.

mod job;
mod workshop;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use icebox_api::types::{Check, Report};
use icebox_engine::host::{
    ErrorKind, Host, HostError, Kernels as _, Network as _, SystemClock, Vmm, VolumeDriver,
};
use icebox_engine::layout::Layout;
use icebox_host::boxes::{DEFAULT_FIRST_UID, HostBoxes};
use icebox_host::cgroup::Cgroups;
use icebox_host::guest::AgentGuests;
use icebox_host::guest_image::{self, KernelStore, Places};
use icebox_host::instance::Instance;
use icebox_host::journal::SqliteJournal;
use icebox_host::launcher::{Launcher, landlock_version};
use icebox_host::network::{NetworkConfig, NetworkSlots};
use icebox_host::store::FileStore;
use icebox_host::vmm::cloud_hypervisor::{self, CloudHypervisor, CloudHypervisorConfig};
use icebox_host::vmm::firecracker::{self, Firecracker, FirecrackerConfig};
use icebox_host::vmm::qemu::{self, Qemu, QemuConfig};
use icebox_host::volume::{DmSnapshot, Qcow2, Reflink, Scratch, Zfs, exercise};
use ipnet::Ipv4Net;

use super::config::{Accelerator, Config};
use super::{Fixtures, Ground, doctor};
use crate::failure::Failure;
use workshop::RealWorkshop;

/// The agent's file name, beside this program or where packages put it.
const AGENT: &str = "icebox-agent";
/// Where packages put the agent.
const AGENT_DIRECTORY: &str = "/usr/lib/icebox";

/// Puts this machine together.
///
/// # Errors
/// What sandboxes cannot do without is missing: named, with a hint. Nothing has been changed by then but what belongs
/// to the data directory.
pub(super) async fn ground(config: &Config, layout: &Layout) -> Result<Ground, Failure> {
    require_root().map_err(|error| failed(&error))?;
    let agent = find_agent(config).map_err(|error| failed(&error))?;
    let store = blocking({
        let layout = layout.clone();
        move || FileStore::open(layout)
    })
    .await
    .map_err(|error| failed(&error))?;
    let journal = blocking({
        let data = layout.data().to_owned();
        move || SqliteJournal::open(&data)
    })
    .await
    .map_err(|error| failed(&error))?;
    let places = Places::under(layout.data());
    let swept = places.clone();
    let swept = blocking(move || guest_image::sweep(&swept).map_err(HostError::from))
        .await
        .map_err(|error| failed(&error))?;
    if swept > 0 {
        tracing::info!(swept, "removed what interrupted builds had left");
    }
    let kernels = KernelStore::new(places.clone(), agent, None);
    let instance = instance(layout);
    let boxes = boxes(layout, &instance);
    let (vmms, mut findings) = vmms(config, layout, &boxes, &kernels).await?;
    let (volumes, unused) = volumes(config, layout, &instance).await?;
    findings.extend(unused);
    let network = NetworkSlots::open(network(config, instance)?)
        .await
        .map_err(|error| failed(&error))?;
    let network = Arc::new(network);
    let host = Host {
        store: Arc::new(store),
        volumes,
        vmms,
        journal: Arc::new(journal),
        clock: Arc::new(SystemClock),
        network: network.clone(),
        boxes: boxes.clone(),
        kernels: Arc::new(kernels),
        guest: Arc::new(AgentGuests),
    };
    let workshop = Arc::new(RealWorkshop {
        host: host.clone(),
        places,
        layout: layout.clone(),
        config: config.clone(),
        findings,
    });
    Ok(Ground {
        host,
        workshop,
        fixtures: Some(Fixtures { network, boxes }),
    })
}

/// Looks at everything that [`ground`] needs, and goes on where that would stop: for a machine without a daemon.
pub(super) async fn survey(config: &Config) -> Report {
    let layout = Layout::new(&config.data_dir, &config.run_dir);
    let mut checks = vec![doctor::probed("root", require_root(), "yes")];
    let agent = find_agent(config);
    checks.push(match &agent {
        Ok(path) => doctor::works("agent", path.display().to_string()),
        Err(error) => doctor::fails("agent", error),
    });
    let kernels = KernelStore::new(
        Places::under(layout.data()),
        agent.unwrap_or_default(),
        None,
    );
    checks.push(match kernels.default_kernel().await {
        Ok(kernel) => doctor::works("kernel", kernel.short()),
        // The first build gets one.
        Err(error) if error.kind() == ErrorKind::NotFound => doctor::absent("kernel", &error),
        Err(error) => doctor::fails("kernel", &error),
    });
    let instance = instance(&layout);
    let boxes = boxes(&layout, &instance);
    checks.push(doctor::limits(boxes.as_ref()));
    checks.push(doctor::landlock(landlock_version()));
    let tried = try_vmms(config, &layout, &boxes, &kernels).await;
    checks.extend(doctor::vmms(tried, &named_vmms(config)));
    if let Err(error) = require_known_vmm(config) {
        checks.push(doctor::fails("vmm", &error));
    }
    let volumes = all_volumes(config, &layout, &instance);
    let network = async {
        let config = network(config, instance).map_err(|failure| {
            HostError::new(ErrorKind::Invalid, failure.body().message.clone())
        })?;
        let slots = NetworkSlots::open(config).await?;
        let probed = slots.probe().await;
        slots.close().await?;
        probed
    };
    checks.push(doctor::network(network.await));
    if layout.data().is_dir() {
        match volumes {
            Ok(volumes) => {
                let mut tried = Vec::new();
                for driver in volumes {
                    let works = try_volume(driver.as_ref(), config, &layout).await;
                    tried.push((driver.name(), works));
                }
                checks.extend(doctor::volumes(tried, config.volume_driver.as_deref()));
            }
            Err(error) => checks.push(doctor::fails("volume drivers", &error)),
        }
        checks.push(match icebox_host::fs::space(layout.data()) {
            Ok(space) => doctor::space(&space, config.engine().low_water_mark(&space)),
            Err(error) => doctor::fails("space", &error),
        });
    } else {
        checks.push(doctor::works(
            "data directory",
            format!("{} will be made", layout.data().display()),
        ));
    }
    Report { checks }
}

fn failed(error: &HostError) -> Failure {
    let failure = Failure::of(error);
    match error.hint_text() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| {
            Err(HostError::new(ErrorKind::Other, "a blocking call panicked").caused_by(panic))
        })
}

fn require_root() -> Result<(), HostError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(
        HostError::new(ErrorKind::Unsupported, "the daemon is not running as root").hint(
            "run it with sudo: boxes need namespaces, taps and control groups; or try the interfaces out with --sim",
        ),
    )
}

fn find_agent(config: &Config) -> Result<PathBuf, HostError> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.join(AGENT)));
    let places: Vec<PathBuf> = match &config.agent {
        Some(named) => vec![named.clone()],
        None => beside
            .into_iter()
            .chain([Path::new(AGENT_DIRECTORY).join(AGENT)])
            .collect(),
    };
    if let Some(found) = places.iter().find(|place| place.is_file()) {
        return Ok(found.clone());
    }
    let looked: Vec<String> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    Err(HostError::new(
        ErrorKind::NotFound,
        format!("the guest agent is not at {}", looked.join(" or ")),
    )
    .hint("build it with `make build`, or say where it is with --agent or ICEBOX_AGENT"))
}

/// Tells this installation's objects on the host from those of others.
fn instance(layout: &Layout) -> Instance {
    let data = layout.data();
    Instance::of_data_directory(&data.canonicalize().unwrap_or_else(|_| data.to_owned()))
}

fn network(config: &Config, instance: Instance) -> Result<NetworkConfig, Failure> {
    let prefix: Ipv4Net = config.network_prefix.parse().map_err(|error| {
        Failure::because(
            format!(
                "network.prefix {:?} is no IPv4 network",
                config.network_prefix
            ),
            &error,
        )
        .hint("write it as 10.213.0.0/16")
    })?;
    let first = prefix.network();
    if first.is_loopback()
        || first.is_link_local()
        || first.is_multicast()
        || first.is_unspecified()
    {
        return Err(Failure::new(format!(
            "network.prefix {prefix} cannot be the addresses of sandboxes"
        ))
        .hint("use a private network, as 10.213.0.0/16"));
    }
    Ok(NetworkConfig {
        prefix,
        pool_size: config.network_pool,
        ..NetworkConfig::new(instance)
    })
}

fn boxes(layout: &Layout, instance: &Instance) -> Arc<HostBoxes> {
    let cgroups = Cgroups::detect(instance);
    Arc::new(HostBoxes::new(layout.clone(), cgroups, DEFAULT_FIRST_UID))
}

/// The VMMs that there are, the default first, and which of them work.
async fn try_vmms(
    config: &Config,
    layout: &Layout,
    boxes: &Arc<HostBoxes>,
    kernels: &KernelStore,
) -> Vec<doctor::TriedVmm> {
    // A real kernel shows what a stub does not: some hosts' KVM runs the first instructions and fails later.
    let imported = match kernels.default_kernel().await {
        Ok(kernel) => kernels.boot_files(&kernel).await.ok(),
        Err(_) => None,
    };
    let probe_kernel = imported.map(|files| files.kernel).or_else(host_kernel);
    let qemu = QemuConfig {
        program: config.qemu.clone(),
        accelerator: config.accelerator.clone().into(),
        probe_kernel: probe_kernel.clone(),
        launcher: Launcher::this_program(),
    };
    let qemu = Qemu::find(qemu, layout.clone(), Arc::clone(boxes)).await;
    let other = CloudHypervisorConfig {
        program: config.cloud_hypervisor.clone(),
        probe_kernel: probe_kernel.clone(),
        launcher: Launcher::this_program(),
    };
    let other = CloudHypervisor::find(other, layout.clone(), Arc::clone(boxes)).await;
    let third = FirecrackerConfig {
        program: config.firecracker.clone(),
        probe_kernel,
        launcher: Launcher::this_program(),
        pager: config.firecracker_pager,
    };
    let third = Firecracker::find(third, layout.clone(), Arc::clone(boxes)).await;
    let mut tried = vec![
        (
            qemu::NAME,
            qemu.map(|found| Arc::new(found) as Arc<dyn Vmm>),
        ),
        (
            cloud_hypervisor::NAME,
            other.map(|found| Arc::new(found) as Arc<dyn Vmm>),
        ),
        (
            firecracker::NAME,
            third.map(|found| Arc::new(found) as Arc<dyn Vmm>),
        ),
    ];
    // The default first.
    tried.sort_by_key(|(name, _)| config.vmm.as_deref() != Some(name));
    tried
}

/// Every VMM that sandboxes could ask for, in the order of preference.
const VMMS: [&str; 3] = [qemu::NAME, cloud_hypervisor::NAME, firecracker::NAME];

/// Refuses a default that is none of the VMMs that there are.
fn require_known_vmm(config: &Config) -> Result<(), HostError> {
    match &config.vmm {
        Some(wanted) if !VMMS.contains(&wanted.as_str()) => {
            let message = format!("there is no VMM {wanted:?}");
            let error = HostError::new(ErrorKind::Invalid, message);
            Err(error.hint(format!("there are {}", VMMS.join(", "))))
        }
        _ => Ok(()),
    }
}

/// The VMMs that the settings ask for.
fn named_vmms(config: &Config) -> Vec<&'static str> {
    let asks_for_qemu = config.qemu.is_some() || config.accelerator != Accelerator::default();
    let named = [
        (asks_for_qemu, qemu::NAME),
        (config.cloud_hypervisor.is_some(), cloud_hypervisor::NAME),
        (config.firecracker.is_some(), firecracker::NAME),
    ];
    let named = named.into_iter();
    named
        .filter_map(|(is_named, name)| {
            let is_default = config.vmm.as_deref() == Some(name);
            (is_named || is_default).then_some(name)
        })
        .collect()
}

/// The VMMs that work here, the default first; and what is to be said of the others.
async fn vmms(
    config: &Config,
    layout: &Layout,
    boxes: &Arc<HostBoxes>,
    kernels: &KernelStore,
) -> Result<(Vec<Arc<dyn Vmm>>, Vec<Check>), Failure> {
    require_known_vmm(config).map_err(|error| failed(&error))?;
    let named = named_vmms(config);
    let (mut working, mut findings, mut first_failure) = (Vec::new(), Vec::new(), None);
    for (name, tried) in try_vmms(config, layout, boxes, kernels).await {
        match tried {
            Ok(vmm) => working.push(vmm),
            // What was asked for and does not work is no reason to take something else (INV-26).
            Err(error) if named.contains(&name) => return Err(failed(&error)),
            Err(error) => {
                findings.push(doctor::absent(name, &error));
                first_failure.get_or_insert(error);
            }
        }
    }
    match first_failure {
        Some(error) if working.is_empty() => Err(failed(&error)),
        _ => Ok((working, findings)),
    }
}

/// The kernel that this machine booted, where distributions leave it.
fn host_kernel() -> Option<PathBuf> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let path = Path::new("/boot").join(format!("vmlinuz-{}", release.trim()));
    path.is_file().then_some(path)
}

/// Every volume driver there is, the default first.
///
/// # Errors
/// A setting names something that no driver could use.
fn all_volumes(
    config: &Config,
    layout: &Layout,
    instance: &Instance,
) -> Result<Vec<Arc<dyn VolumeDriver>>, HostError> {
    let zfs = Zfs::new(layout.clone(), instance, config.zfs_dataset.as_deref())?;
    Ok(vec![
        Arc::new(DmSnapshot::new(layout.clone(), instance)),
        Arc::new(zfs),
        Arc::new(Reflink::new(layout.clone())),
        Arc::new(Qcow2::new(layout.clone())),
    ])
}

/// Whether a volume driver of `layout` works: whether it has what it needs, and then whether a twin of it does on a
/// scratch disk beside the data what sandboxes need of it. One that keeps disks elsewhere tries that itself.
async fn try_volume(
    driver: &dyn VolumeDriver,
    config: &Config,
    layout: &Layout,
) -> Result<(), HostError> {
    driver.probe().await?;
    if driver.space().await?.is_some() {
        return Ok(());
    }
    let data = layout.data().to_owned();
    let scratch = blocking(move || Scratch::new(&data)).await?;
    let instance = instance(scratch.layout());
    let twins = all_volumes(config, scratch.layout(), &instance)?;
    let twin = twins.into_iter().find(|twin| twin.name() == driver.name());
    match twin {
        Some(twin) => exercise(twin.as_ref(), &scratch).await,
        None => Ok(()),
    }
}

/// The volume drivers that work here, the one that the settings name first; and what is to be said of the others.
async fn volumes(
    config: &Config,
    layout: &Layout,
    instance: &Instance,
) -> Result<(Vec<Arc<dyn VolumeDriver>>, Vec<Check>), Failure> {
    let mut working = Vec::new();
    let mut findings = Vec::new();
    let mut all = all_volumes(config, layout, instance).map_err(|error| failed(&error))?;
    if let Some(wanted) = &config.volume_driver {
        let names: Vec<_> = all.iter().map(|driver| driver.name()).collect();
        if !names.contains(&wanted.as_str()) {
            return Err(
                Failure::new(format!("there is no volume driver {wanted:?}"))
                    .hint(format!("there are {}", names.join(", "))),
            );
        }
        all.sort_by_key(|driver| driver.name() != wanted);
    }
    for driver in all {
        match try_volume(driver.as_ref(), config, layout).await {
            Ok(()) => working.push(driver),
            // Not known, for want of room to try it in. Sandboxes that are there need it, and nothing new begins now.
            Err(error) if error.kind() == ErrorKind::Exhausted => {
                tracing::warn!(driver = driver.name(), %error, "a volume driver was not tried");
                working.push(driver);
            }
            // What was asked for and does not work is no reason to take something else (INV-26).
            Err(error) if config.volume_driver.as_deref() == Some(driver.name()) => {
                return Err(failed(&error));
            }
            Err(error) => {
                let name = format!("volume driver {}", driver.name());
                findings.push(doctor::absent(&name, &error));
            }
        }
    }
    if working.is_empty() {
        return Err(Failure::new("no volume driver works here").hint("`icebox doctor` says why"));
    }
    Ok((working, findings))
}
