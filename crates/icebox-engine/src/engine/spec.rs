//! What a new sandbox will be: what was asked for, what its template says and what this host can do, put together.

use crate::engine::{CreateRequest, Engine, check_history};
use crate::error::Error;
use crate::host::{Host, LiveFreeze, VolumeDriver};
use crate::manifest::v1::{Spec, Template, TemplateContent};
use crate::sandbox::{find_vmm, find_volume_driver};
use crate::unit::{Bytes, Geometry};

/// The largest disk: what ext4 has with blocks of 4 KiB unless it is made otherwise, and qcow2 with clusters of 128 KiB.
const MAX_DISK: Bytes = Bytes::mib(16 << 20);

impl Engine {
    /// Refuses a VMM that does not run sandboxes here.
    ///
    /// # Errors
    /// There is none of this name that works: with those that do.
    pub fn require_vmm(&self, name: &str) -> Result<(), Error> {
        find_vmm(&self.shared.host, name).map(drop)
    }

    pub(super) fn spec(&self, template: &Template, request: &CreateRequest) -> Result<Spec, Error> {
        let host = &self.shared.host;
        let first_vmm = || {
            host.vmms
                .first()
                .map(|vmm| vmm.identity().name.clone())
                .unwrap_or_default()
        };
        let (captured_vmm, captured_driver) = match &template.content {
            TemplateContent::Image { .. } => (None, None),
            TemplateContent::Snapshot { capture } => {
                let driver = self.shared.catalog.layer_driver(&capture.layer)?;
                let vmm = (!request.cold).then(|| capture.machine.vmm.name.clone());
                (vmm, Some(driver))
            }
        };
        let vmm = request
            .vmm
            .clone()
            .or_else(|| captured_vmm.clone())
            .unwrap_or_else(first_vmm);
        let found = find_vmm(host, &vmm).map_err(|error| {
            let is_missing = request.vmm.is_none() && captured_vmm.is_some();
            if is_missing {
                Error::Incompatible {
                    what: format!("template {}", template.name),
                    field: "VMM",
                    captured: vmm.clone(),
                    here: names(host),
                }
            } else {
                error
            }
        })?;
        let can_freeze = |driver: &dyn VolumeDriver| {
            found.capabilities().disk_switch
                || matches!(driver.live_freeze(), LiveFreeze::ByHost(_))
        };
        let first_that_can = || {
            let mut drivers = host.volumes.iter();
            drivers.find(|driver| can_freeze(driver.as_ref()))
        };
        let first_driver = || {
            first_that_can()
                .or(host.volumes.first())
                .map(|driver| driver.name().to_owned())
                .unwrap_or_default()
        };
        let volume_driver = request
            .volume_driver
            .clone()
            .or_else(|| captured_driver.clone())
            .unwrap_or_else(first_driver);
        let driver = find_volume_driver(host, &volume_driver)?;
        if !can_freeze(driver.as_ref()) {
            return Err(Error::Invalid {
                message: format!(
                    "{vmm} cannot switch disks while a guest runs, which volume driver {volume_driver} needs"
                ),
                hint: match first_that_can() {
                    Some(driver) => {
                        format!("choose volume driver {}, or another VMM", driver.name())
                    }
                    None => "choose another VMM: `icebox vmm ls` shows what each can do".to_owned(),
                },
            });
        }
        if let Some(captured) = captured_driver
            && captured != volume_driver
        {
            return Err(Error::Incompatible {
                what: format!("template {}", template.name),
                field: "volume driver",
                captured,
                here: volume_driver,
            });
        }
        let geometry = Geometry {
            vcpus: request.vcpus.unwrap_or(template.geometry.vcpus),
            mem_mib: request.mem_mib.unwrap_or(template.geometry.mem_mib),
        };
        check_geometry(
            geometry,
            found.capabilities().max_vcpus,
            self.shared.config.max_mem_mib,
        )?;
        let disk_size = request.disk_size.unwrap_or(template.disk_size);
        if disk_size > MAX_DISK {
            return Err(Error::Invalid {
                message: format!("a sandbox cannot have a disk of {disk_size}"),
                hint: format!("ask for at most {MAX_DISK}"),
            });
        }
        if disk_size < template.disk_size || !disk_size.0.is_multiple_of(512) {
            return Err(Error::Invalid {
                message: format!(
                    "a disk of {disk_size} cannot hold the template's {}",
                    template.disk_size
                ),
                hint: "ask for at least the template's size, in whole sectors of 512 bytes".into(),
            });
        }
        require_same_machine(template, request.cold, geometry, disk_size)?;
        check_history(&request.history)?;
        let mut env = template.env.clone();
        env.extend(request.env.clone());
        Ok(Spec {
            team: self.scope.team(),
            template: template.id.clone(),
            template_name: template.name.to_string(),
            geometry,
            disk_size,
            volume_driver,
            vmm,
            kernel: template.kernel.clone(),
            egress: request.egress,
            env,
            login: template.login.clone(),
            doors: request.doors,
            metadata: request.metadata.clone(),
            history: request.history.clone(),
        })
    }
}

/// Refuses a machine that a snapshot cannot go on in: another, or, if only its disk is booted, one with another disk.
fn require_same_machine(
    template: &Template,
    is_cold: bool,
    geometry: Geometry,
    disk_size: Bytes,
) -> Result<(), Error> {
    let is_snapshot = matches!(template.content, TemplateContent::Snapshot { .. });
    let fits = disk_size == template.disk_size && (is_cold || geometry == template.geometry);
    if !is_snapshot || fits {
        return Ok(());
    }
    Err(Error::Invalid {
        message: format!(
            "template {} is a snapshot of a machine with {} vCPUs, {} MiB and a disk of {}: it cannot become another",
            template.name, template.geometry.vcpus, template.geometry.mem_mib, template.disk_size
        ),
        hint: "leave CPUs, memory and disk size out; `--cold` boots its disk with other CPUs and memory; for another disk, `icebox flatten` a sandbox made from it and create from that template".into(),
    })
}

/// The VMMs that there are, in words.
fn names(host: &Host) -> String {
    let names = host.vmms.iter().map(|vmm| vmm.identity().name.clone());
    names.collect::<Vec<_>>().join(", ")
}

pub(super) fn check_geometry(
    geometry: Geometry,
    max_vcpus: u8,
    max_mem_mib: u32,
) -> Result<(), Error> {
    /// Less does not boot a kernel and an agent.
    const MIN_MEM_MIB: u32 = 64;
    let Geometry { vcpus, mem_mib } = geometry;
    if vcpus == 0 || vcpus > max_vcpus {
        return Err(Error::Invalid {
            message: format!("cannot give a sandbox {vcpus} vCPUs"),
            hint: format!("ask for 1 to {max_vcpus}"),
        });
    }
    if mem_mib < MIN_MEM_MIB || mem_mib > max_mem_mib {
        return Err(Error::Invalid {
            message: format!("cannot give a sandbox {mem_mib} MiB of memory"),
            hint: format!("ask for {MIN_MEM_MIB} to {max_mem_mib}"),
        });
    }
    Ok(())
}
