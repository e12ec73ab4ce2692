//! Which control groups this host has: a pure reading of `/proc/self/mountinfo`, and of which controllers the unified
//! hierarchy offers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A controller that one of our limits or readings needs.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    strum::EnumIter,
    strum::EnumString,
    strum::Display,
)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Controller {
    Cpu,
    /// Version 1 only: in version 2 every group accounts for its CPU time.
    CpuAcct,
    Memory,
    Pids,
}

/// How limits are enforced here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mechanism {
    /// The unified hierarchy, mounted at `root`, with these controllers.
    V2 {
        root: PathBuf,
        controllers: BTreeSet<Controller>,
    },
    /// One hierarchy per controller or group of controllers, each mounted somewhere.
    V1 {
        roots: BTreeMap<Controller, PathBuf>,
    },
    /// Not at all.
    None { reason: String },
}

/// What this host has. Never fails: what cannot be read is not there.
pub(super) fn detect() -> Mechanism {
    match fs::read_to_string("/proc/self/mountinfo") {
        Ok(mounts) => choose(&mounts, |root| {
            fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default()
        }),
        Err(error) => Mechanism::None {
            reason: format!("/proc/self/mountinfo cannot be read: {error}"),
        },
    }
}

/// Chooses from the mounts in `mountinfo` (proc_pid_mountinfo(5)). `offered` tells the content of
/// `cgroup.controllers` in the root of a unified hierarchy.
///
/// The unified hierarchy is used if it offers any of our controllers: one that is bound to version 1 is not offered
/// there (cgroups(7)), so on a hybrid host this ends at version 1.
fn choose(mountinfo: &str, offered: impl Fn(&Path) -> String) -> Mechanism {
    let mut unified = None;
    let mut roots = BTreeMap::new();
    let mut read_only = false;
    for mount in mountinfo.lines().filter_map(Mount::parse) {
        if mount.read_only {
            read_only = true;
        } else if mount.kind == "cgroup2" {
            unified.get_or_insert(mount.at);
        } else {
            for controller in mount
                .options
                .split(',')
                .filter_map(|name| name.parse().ok())
            {
                roots.entry(controller).or_insert_with(|| mount.at.clone());
            }
        }
    }
    if let Some(root) = &unified {
        let controllers: BTreeSet<_> = offered(root)
            .split_whitespace()
            .filter_map(|name| name.parse().ok())
            .collect();
        if !controllers.is_empty() {
            return Mechanism::V2 {
                root: root.clone(),
                controllers,
            };
        }
    }
    if !roots.is_empty() {
        return Mechanism::V1 { roots };
    }
    let reason = match unified {
        Some(root) => format!(
            "cgroup v2 at {} offers none of the controllers cpu, memory and pids",
            root.display()
        ),
        None if read_only => "control groups are mounted read-only".to_owned(),
        None => "no control groups are mounted".to_owned(),
    };
    Mechanism::None { reason }
}

/// A mount of control groups.
struct Mount<'a> {
    kind: &'a str,
    at: PathBuf,
    options: &'a str,
    read_only: bool,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(4);
        let (at, flags) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let (kind, _source, options) = (filesystem.next()?, filesystem.next()?, filesystem.next()?);
        let is_ro = |options: &str| options.split(',').any(|option| option == "ro");
        matches!(kind, "cgroup" | "cgroup2").then(|| Self {
            kind,
            at: PathBuf::from(at),
            options,
            read_only: is_ro(flags) || is_ro(options),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strum::IntoEnumIterator as _;

    fn v1(pairs: &[(Controller, &str)]) -> Mechanism {
        Mechanism::V1 {
            roots: pairs
                .iter()
                .map(|(controller, root)| (*controller, PathBuf::from(root)))
                .collect(),
        }
    }

    #[test]
    fn a_unified_host_is_version_2() {
        let mounts = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let found = choose(mounts, |root| {
            assert_eq!(root, Path::new("/sys/fs/cgroup"));
            "cpuset cpu io memory hugetlb pids rdma misc\n".to_owned()
        });
        let expected = [Controller::Cpu, Controller::Memory, Controller::Pids];
        assert_eq!(
            found,
            Mechanism::V2 {
                root: "/sys/fs/cgroup".into(),
                controllers: expected.into(),
            }
        );
    }

    #[test]
    fn a_unified_host_with_fewer_controllers_is_known_as_such() {
        let mounts = "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        let found = choose(mounts, |_| "memory pids".to_owned());
        let expected = [Controller::Memory, Controller::Pids];
        assert_eq!(
            found,
            Mechanism::V2 {
                root: "/sys/fs/cgroup".into(),
                controllers: expected.into(),
            }
        );
    }

    #[test]
    fn a_hybrid_host_is_version_1() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        assert_eq!(
            choose(mounts, |_| "hugetlb\n".to_owned()),
            v1(&[
                (Controller::Cpu, "/sys/fs/cgroup/cpu,cpuacct"),
                (Controller::CpuAcct, "/sys/fs/cgroup/cpu,cpuacct"),
                (Controller::Memory, "/sys/fs/cgroup/memory"),
                (Controller::Pids, "/sys/fs/cgroup/pids"),
            ])
        );
    }

    #[test]
    fn nothing_usable_says_why() {
        let reason = |mounts: &str| match choose(mounts, |_| String::new()) {
            Mechanism::None { reason } => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            reason("22 27 0:21 / /proc rw,relatime - proc proc rw"),
            "no control groups are mounted"
        );
        // As in a container that was not given its own.
        assert_eq!(
            reason(
                "35 31 0:32 /docker/1 /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory"
            ),
            "control groups are mounted read-only"
        );
        assert_eq!(
            reason("29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"),
            "cgroup v2 at /sys/fs/cgroup offers none of the controllers cpu, memory and pids"
        );
    }

    #[test]
    fn controllers_are_called_what_the_kernel_calls_them() {
        let names: Vec<_> = Controller::iter().map(|c| c.to_string()).collect();
        assert_eq!(names, ["cpu", "cpuacct", "memory", "pids"]);
    }
}
