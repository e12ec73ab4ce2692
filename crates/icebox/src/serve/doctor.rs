//! What works on this host: each thing that sandboxes need, how it was found out, and what to do if it does not.

use std::path::Path;

use icebox_api::types::{Check, CheckResult};
use icebox_engine::host::{Boxes, ErrorKind, Host, HostError, Vmm, VolumeDriver};

/// Something that works.
pub(super) fn works(name: &str, detail: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        result: CheckResult::Works,
        detail: detail.into(),
        hint: None,
    }
}

/// Something that does not work, and that sandboxes need.
pub(super) fn fails(name: &str, error: &HostError) -> Check {
    Check {
        name: name.to_owned(),
        result: CheckResult::Fails,
        detail: chain(error),
        hint: error.hint_text().map(ToOwned::to_owned),
    }
}

/// Something that does not work, and that sandboxes can do without.
pub(super) fn absent(name: &str, error: &HostError) -> Check {
    Check {
        result: CheckResult::Absent,
        ..fails(name, error)
    }
}

fn chain(error: &HostError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Something that was tried.
pub(super) fn probed(name: &str, result: Result<(), HostError>, detail: &str) -> Check {
    match result {
        Ok(()) => works(name, detail),
        Err(error) => fails(name, &error),
    }
}

/// A VMM that was found, and what runs guest code for it.
pub(super) fn vmm(vmm: &dyn Vmm) -> [Check; 2] {
    let it = vmm.identity();
    [
        works(
            &it.name,
            format!("{}, {}, CPU {}", it.version, it.machine, it.cpu),
        ),
        works(
            "accelerator",
            format!("{}: {}", it.accelerator, it.accelerator_reason),
        ),
    ]
}

/// Tries a volume driver. One that does not work leaves others.
pub(super) async fn volume(driver: &dyn VolumeDriver) -> Check {
    let name = format!("volume driver {}", driver.name());
    match driver.probe().await {
        Ok(()) => works(&name, "a scratch volume worked"),
        Err(error) => absent(&name, &error),
    }
}

/// Whether networks can be made.
pub(super) fn network(result: Result<(), HostError>) -> Check {
    let detail = "namespaces, taps and nftables rules can be made";
    probed("network", result, detail)
}

/// What boxes are limited by.
pub(super) fn limits(boxes: &dyn Boxes) -> Check {
    let limits = boxes.limits_in_force();
    Check {
        result: if limits.mechanism == "none" {
            CheckResult::Absent
        } else {
            CheckResult::Works
        },
        ..works("limits", format!("{}: {}", limits.mechanism, limits.detail))
    }
}

/// How much is free where the data are.
pub(super) fn space(data: &Path) -> Check {
    match icebox_host::fs::space(data) {
        Ok(space) => works(
            "space",
            format!("{} free at {}", space.available, data.display()),
        ),
        Err(error) => fails("space", &error),
    }
}

/// Looks at the parts that `host` is made of.
pub(super) async fn host(host: &Host, data: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    for it in &host.vmms {
        checks.extend(vmm(it.as_ref()));
    }
    for driver in &host.volumes {
        checks.push(volume(driver.as_ref()).await);
    }
    checks.push(network(host.network.probe().await));
    checks.push(limits(host.boxes.as_ref()));
    checks.push(match host.kernels.default_kernel().await {
        Ok(kernel) => match host.kernels.boot_files(&kernel).await {
            Ok(files) => works(
                "kernel and agent",
                format!("kernel {}, agent {}", kernel.short(), files.agent.short()),
            ),
            Err(error) => fails("kernel and agent", &error),
        },
        // The first build gets one.
        Err(error) if error.kind() == ErrorKind::NotFound => absent("kernel and agent", &error),
        Err(error) => fails("kernel and agent", &error),
    });
    checks.push(probed(
        "space",
        host.store.check_space().await,
        &format!("enough is free at {}", data.display()),
    ));
    checks
}
