//! What works on this host: each thing that sandboxes need, how it was found out, and what to do if it does not.

use std::path::Path;

use icebox_api::types::{Check, CheckResult};
use icebox_engine::host::{Host, HostError};

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

fn probed(name: &str, result: Result<(), HostError>, detail: &str) -> Check {
    match result {
        Ok(()) => works(name, detail),
        Err(error) => fails(name, &error),
    }
}

/// Looks at the parts that `host` is made of.
pub(super) async fn host(host: &Host, data: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    for vmm in &host.vmms {
        let it = vmm.identity();
        checks.push(works(
            &it.name,
            format!("{}, {}, CPU {}", it.version, it.machine, it.cpu),
        ));
        checks.push(works(
            "accelerator",
            format!("{}: {}", it.accelerator, it.accelerator_reason),
        ));
    }
    for driver in &host.volumes {
        let name = format!("volume driver {}", driver.name());
        checks.push(probed(
            &name,
            driver.probe().await,
            "a scratch volume worked",
        ));
    }
    checks.push(probed(
        "network",
        host.network.probe().await,
        "namespaces, taps and nftables rules can be made",
    ));
    let limits = host.boxes.limits_in_force();
    checks.push(Check {
        result: if limits.mechanism == "none" {
            CheckResult::Absent
        } else {
            CheckResult::Works
        },
        ..works("limits", format!("{}: {}", limits.mechanism, limits.detail))
    });
    checks.push(match host.kernels.default_kernel().await {
        Ok(kernel) => match host.kernels.boot_files(&kernel).await {
            Ok(files) => works(
                "kernel and agent",
                format!("kernel {}, agent {}", kernel.short(), files.agent.short()),
            ),
            Err(error) => fails("kernel and agent", &error),
        },
        Err(error) => fails("kernel and agent", &error),
    });
    checks.push(probed(
        "space",
        host.store.check_space().await,
        &format!("enough is free at {}", data.display()),
    ));
    checks
}
