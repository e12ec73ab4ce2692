//! What works on this host: each thing that sandboxes need, how it was found out, and what to do if it does not.

use std::io;
use std::sync::Arc;

use icebox_api::types::{Check, CheckResult};
use icebox_engine::host::{Boxes, ErrorKind, Host, HostError, Space, Vmm};
use icebox_engine::unit::Bytes;
use icebox_host::launcher::LANDLOCK_NEWEST;

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

/// A VMM by its name, and the VMM if it works.
pub(super) type TriedVmm = (&'static str, Result<Arc<dyn Vmm>, HostError>);

/// What looking for VMMs came to, in the order of preference. One that is not there leaves others, unless it is among
/// those that the settings ask for or none is left.
pub(super) fn vmms(tried: Vec<TriedVmm>, named: &[&str]) -> Vec<Check> {
    let some_work = tried.iter().any(|(_, result)| result.is_ok());
    let mut checks = Vec::new();
    for (name, result) in tried {
        match result {
            Ok(it) => checks.extend(vmm(it.as_ref())),
            Err(error) if some_work && !named.contains(&name) => {
                checks.push(absent(name, &error));
            }
            Err(error) => checks.push(fails(name, &error)),
        }
    }
    checks
}

/// A volume driver by its name, and whether it worked.
pub(super) type Tried = (&'static str, Result<(), HostError>);

/// What trying the volume drivers came to, in the order of preference. The default is the one that the settings name,
/// or the first that works. One that does not leaves others, unless it was named or none is left.
pub(super) fn volumes(tried: Vec<Tried>, named: Option<&str>) -> Vec<Check> {
    let first = tried
        .iter()
        .find_map(|(name, result)| result.is_ok().then_some(*name));
    let default = named.or(first);
    tried
        .into_iter()
        .map(|(driver, result)| {
            let name = format!("volume driver {driver}");
            let is_default = default == Some(driver);
            match result {
                Ok(()) => {
                    let role = if is_default { "; the default" } else { "" };
                    let detail = "a scratch disk was written, frozen, forked and removed";
                    works(&name, format!("{detail}{role}"))
                }
                Err(error) if is_default || first.is_none() => fails(&name, &error),
                Err(error) => absent(&name, &error),
            }
        })
        .collect()
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

/// Whether boxes are also enforced by Landlock, and how much of them.
pub(super) fn landlock(version: io::Result<u32>) -> Check {
    match version {
        Ok(version) if version < LANDLOCK_NEWEST => works(
            "landlock",
            format!("version {version}; boxes would use what {LANDLOCK_NEWEST} adds"),
        ),
        Ok(version) => works("landlock", format!("version {version}")),
        Err(error) => {
            let error = HostError::io("ask the kernel for Landlock", error).hint(
                "boxes do without; if the kernel has it, put landlock first in its parameter lsm=",
            );
            absent("landlock", &error)
        }
    }
}

/// How much is free in a place where data are kept. Below `mark`, what is new is refused.
pub(super) fn space(space: &Space, mark: Bytes) -> Check {
    let detail = format!(
        "{} of {} free on {}; below {mark} nothing new begins",
        space.available, space.total, space.place
    );
    if space.available >= mark {
        return works("space", detail);
    }
    let error = HostError::new(ErrorKind::Exhausted, detail).hint(
        "free some space: `icebox stats` shows what takes how much, then `icebox rm` and `icebox template rm`",
    );
    fails("space", &error)
}

/// Looks at the parts that `host` is made of.
pub(super) async fn host(host: &Host, tried: Vec<Tried>, named: Option<&str>) -> Vec<Check> {
    let mut checks = Vec::new();
    for it in &host.vmms {
        checks.extend(vmm(it.as_ref()));
    }
    checks.extend(volumes(tried, named));
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
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    use CheckResult::{Absent, Fails, Works};

    #[test]
    fn inv_26_the_default_is_the_first_that_works_and_a_named_one_is_never_replaced() {
        let broken = || Err(HostError::new(ErrorKind::Unsupported, "no").hint("do"));
        let results = |tried, named| {
            let checks: Vec<Check> = volumes(tried, named);
            let shown = checks.into_iter().map(|check| {
                let default = check.detail.contains("default");
                assert_eq!(check.hint.is_some(), check.result != Works);
                (check.result, default)
            });
            shown.collect::<Vec<_>>()
        };
        let tried = || vec![("a", broken()), ("b", Ok(())), ("c", Ok(()))];
        assert_eq!(
            results(tried(), None),
            [(Absent, false), (Works, true), (Works, false)]
        );
        assert_eq!(
            results(tried(), Some("c")),
            [(Absent, false), (Works, false), (Works, true)]
        );
        assert_eq!(
            results(tried(), Some("a")),
            [(Fails, false), (Works, false), (Works, false)]
        );
        assert_eq!(results(vec![("a", broken())], None), [(Fails, false)]);
    }
}
