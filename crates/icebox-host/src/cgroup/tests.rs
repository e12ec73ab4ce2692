//! Groups on a real kernel, in whatever version this host has, and the files of version 2 by name.

use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use icebox_engine::unit::Geometry;

use super::*;
use crate::skip::skip_this;

/// Groups of an installation of their own, gone without a trace at the end.
struct Lab {
    cgroups: Cgroups,
    sandbox: SandboxId,
    runtime: tokio::runtime::Runtime,
}

fn fresh_instance() -> Instance {
    let unique = SandboxId::random();
    Instance::of_data_directory(Path::new(unique.as_str()))
}

/// A lab on this host, unless it cannot limit `controller`, which is said.
fn lab(controller: Controller) -> Option<Lab> {
    let lab = lab_with(Cgroups::detect(&fresh_instance()));
    if !rustix::process::geteuid().is_root() {
        skip_this("control groups need root");
        return None;
    }
    if lab.cgroups.group_of(controller, &lab.sandbox).is_none() {
        let in_force = lab.cgroups.limits_in_force();
        skip_this(&format!("no {controller} controller: {}", in_force.detail));
        return None;
    }
    Some(lab)
}

fn lab_with(cgroups: Cgroups) -> Lab {
    Lab {
        cgroups,
        sandbox: SandboxId::random(),
        runtime: tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap(),
    }
}

fn limits(mem_mib: u32, pids_max: u32) -> Limits {
    Limits {
        geometry: Geometry { vcpus: 1, mem_mib },
        pids_max,
    }
}

impl Lab {
    fn ensure(&self, limits: Limits) -> Ensured {
        let overhead = Bytes(0);
        self.cgroups
            .ensure(&self.sandbox, limits, overhead)
            .unwrap()
    }

    /// A shell command that joins the group first, as a launcher does.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "for f; do echo 0 > $f; done; unset f; eval \"$SCRIPT\"",
                "sh",
            ])
            .args(self.cgroups.join_files(&self.sandbox))
            .env("SCRIPT", script);
        command
    }

    fn run(&self, script: &str) -> Output {
        self.command(script).output().unwrap()
    }

    /// A process in the group that stays until its input is closed.
    fn resident(&self) -> Child {
        let mut child = self
            .command("echo in; exec cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It has joined when it speaks.
        let mut word = [0; 3];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut word)
            .unwrap();
        child
    }

    fn release(&self) -> Result<Removed, HostError> {
        self.runtime.block_on(self.cgroups.release(&self.sandbox))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let removed = self.release();
        if std::thread::panicking() {
            return;
        }
        removed.unwrap();
        for root in self.cgroups.roots() {
            let parent = root.join(&self.cgroups.group);
            assert!(!parent.exists(), "{} is left", parent.display());
        }
    }
}

#[test]
fn memory_beyond_the_limit_kills() {
    let Some(lab) = lab(Controller::Memory) else {
        return;
    };
    lab.ensure(limits(64, 32));
    // The shell's own limit is there for the host's sake, should the group's not work.
    let hog = lab.run("ulimit -v 1000000; exec tail /dev/zero");
    assert_eq!(hog.status.signal(), Some(9), "{hog:?}");
    assert_eq!(lab.cgroups.usage(&lab.sandbox).unwrap().oom_kills, Some(1));
    // What needs less lives.
    let modest = lab.run("head -c 8000000 /dev/zero | tail -c 1 | wc -c");
    assert!(modest.status.success(), "{modest:?}");
}

#[test]
fn more_processes_than_the_limit_are_refused() {
    let Some(lab) = lab(Controller::Pids) else {
        return;
    };
    // The shell itself is one.
    lab.ensure(limits(64, 1));
    let refused = lab.run("/bin/true; echo survived");
    assert!(!refused.status.success(), "{refused:?}");
    assert_eq!(lab.ensure(limits(64, 2)), Ensured::AlreadyPresent);
    let allowed = lab.run("/bin/true; echo survived");
    assert!(allowed.status.success(), "{allowed:?}");
}

#[test]
fn cpu_beyond_the_quota_waits() {
    let Some(lab) = lab(Controller::Cpu) else {
        return;
    };
    let a_fifth = Quota {
        cpu_us_per_period: CPU_PERIOD_US / 5,
        memory: Bytes::mib(64),
        pids: 8,
    };
    lab.cgroups.ensure_quota(&lab.sandbox, a_fifth).unwrap();
    let group = lab.cgroups.group_of(Controller::Cpu, &lab.sandbox).unwrap();
    let start = Instant::now();
    loop {
        let busy = lab.run("timeout 1 sh -c 'while :; do :; done'");
        let wall = start.elapsed();
        assert_eq!(busy.status.code(), Some(124), "{busy:?}");
        let used = lab.cgroups.usage(&lab.sandbox).unwrap().cpu.unwrap();
        let ratio = used.as_secs_f64() / wall.as_secs_f64();
        assert!(ratio < 0.35, "{used:?} of {wall:?}");
        // It was the quota, and not a busy host, which may have had no more to give.
        let stat = fs::read_to_string(group.join("cpu.stat")).unwrap();
        if keyed(&stat, "nr_throttled").unwrap() > 0 {
            break;
        }
        assert!(wall < Duration::from_mins(1), "{stat}");
    }
}

#[test]
fn limits_are_exactly_those_asked_for() {
    let Some(lab) = lab(Controller::Memory) else {
        return;
    };
    let overhead = Bytes::mib(3);
    let limits = Limits {
        geometry: Geometry {
            vcpus: 2,
            mem_mib: 61,
        },
        pids_max: 17,
    };
    let ensure = || lab.cgroups.ensure(&lab.sandbox, limits, overhead).unwrap();
    assert_eq!(ensure(), Ensured::Created);
    assert_eq!(ensure(), Ensured::AlreadyPresent);
    let expected = Quota {
        cpu_us_per_period: 200_000,
        memory: Bytes::mib(64),
        pids: 17,
    };
    for (file, value) in lab.cgroups.settings(&lab.sandbox, expected) {
        let found = fs::read_to_string(&file).unwrap();
        assert_eq!(found.trim(), value, "{}", file.display());
    }
}

#[test]
fn a_group_with_processes_is_not_removed_and_names_them() {
    let Some(lab) = lab(Controller::Pids) else {
        return;
    };
    lab.ensure(limits(64, 8));
    assert_eq!(
        lab.cgroups.list().unwrap(),
        std::slice::from_ref(&lab.sandbox)
    );
    let mut child = lab.resident();
    assert_eq!(lab.cgroups.pids(&lab.sandbox).unwrap(), [child.id()]);
    assert_eq!(lab.cgroups.usage(&lab.sandbox).unwrap().pids, Some(1));
    let error = lab.release().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let named = format!("processes [{}] are in it", child.id());
    assert!(error.to_string().contains(&named), "{error}");
    drop(child.stdin.take());
    child.wait().unwrap();
    assert_eq!(lab.release().unwrap(), Removed::Removed);
    assert_eq!(lab.release().unwrap(), Removed::AlreadyAbsent);
    assert_eq!(lab.cgroups.list().unwrap(), []);
    assert!(lab.cgroups.pids(&lab.sandbox).unwrap().is_empty());
    let error = lab.cgroups.usage(&lab.sandbox).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn release_waits_for_what_is_exiting() {
    let Some(lab) = lab(Controller::Pids) else {
        return;
    };
    const ROUNDS: usize = 20;
    let mut waited = 0;
    for _ in 0..ROUNDS {
        lab.ensure(limits(64, 8));
        let mut child = lab.resident();
        child.kill().unwrap();
        // Not waited for: it may still be on its way out, on a busy host for longer than is worth waiting.
        match lab.release() {
            Ok(removed) => {
                assert_eq!(removed, Removed::Removed);
                waited += 1;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
        }
        child.wait().unwrap();
        lab.release().unwrap();
    }
    assert!(waited > ROUNDS / 2, "{waited} of {ROUNDS}");
}

#[test]
fn a_group_that_cannot_be_limited_is_not_left_behind() {
    let Some(lab) = lab(Controller::Memory) else {
        return;
    };
    let impossible = Quota {
        cpu_us_per_period: 1, // The kernel's minimum is a millisecond.
        memory: Bytes::mib(64),
        pids: 8,
    };
    if lab
        .cgroups
        .group_of(Controller::Cpu, &lab.sandbox)
        .is_none()
    {
        skip_this("no cpu controller to refuse a quota");
        return;
    }
    let error = lab
        .cgroups
        .ensure_quota(&lab.sandbox, impossible)
        .unwrap_err();
    assert!(error.to_string().starts_with("set /"), "{error}");
    for root in lab.cgroups.roots() {
        assert!(!root.join(&lab.cgroups.group).exists());
    }
}

#[test]
fn strangers_in_our_parent_are_not_listed() {
    let Some(lab) = lab(Controller::Pids) else {
        return;
    };
    lab.ensure(limits(64, 8));
    let root = lab.cgroups.roots().next().unwrap();
    let stranger = root.join(&lab.cgroups.group).join("not-a-sandbox");
    fs::create_dir(&stranger).unwrap();
    assert_eq!(
        lab.cgroups.list().unwrap(),
        std::slice::from_ref(&lab.sandbox)
    );
    fs::remove_dir(stranger).unwrap();
}

#[test]
fn version_2_is_limited_by_its_files() {
    let root = tempfile::tempdir().unwrap();
    let controllers = [Controller::Cpu, Controller::Memory, Controller::Pids];
    let cgroups = Cgroups::with(
        &Instance::of_data_directory(Path::new("/var/lib/icebox")),
        Mechanism::V2 {
            root: root.path().to_owned(),
            controllers: controllers.into(),
        },
    );
    let sandbox = SandboxId::random();
    let limits = Limits {
        geometry: Geometry {
            vcpus: 2,
            mem_mib: 512,
        },
        pids_max: 64,
    };
    cgroups.ensure(&sandbox, limits, OVERHEAD_TCG).unwrap();
    let parent = root.path().join("icebox-1596b0");
    let group = parent.join(sandbox.as_str());
    let enabled = "+cpu +memory +pids";
    for (file, content) in [
        (root.path().join("cgroup.subtree_control"), enabled),
        (parent.join("cgroup.subtree_control"), enabled),
        (group.join("cpu.max"), "200000 100000"),
        (group.join("memory.max"), "939524096"),
        (group.join("memory.oom.group"), "1"),
        (group.join("pids.max"), "64"),
    ] {
        assert_eq!(fs::read_to_string(&file).unwrap(), content, "{file:?}");
    }
    assert_eq!(cgroups.join_files(&sandbox), [group.join("cgroup.procs")]);
    for (file, content) in [
        (
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
        ),
        ("memory.current", "4096\n"),
        (
            "memory.events",
            "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 1\n",
        ),
        ("pids.current", "3\n"),
        ("cgroup.procs", "12\n0\n7\n"),
    ] {
        fs::File::create(group.join(file))
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .unwrap();
    }
    assert_eq!(
        cgroups.usage(&sandbox).unwrap(),
        Usage {
            cpu: Some(Duration::from_micros(1500)),
            memory: Some(Bytes(4096)),
            pids: Some(3),
            oom_kills: Some(1),
        }
    );
    assert_eq!(cgroups.pids(&sandbox).unwrap(), [7, 12]);
    assert_eq!(
        cgroups.limits_in_force(),
        LimitsInForce {
            mechanism: "cgroup v2".to_owned(),
            detail: "limited: CPU, memory, processes".to_owned(),
        }
    );
}

/// The unified hierarchy of a hybrid host has none of our controllers, but groups are made, joined and removed there
/// as on any other.
#[test]
fn version_2_groups_come_and_go_on_a_real_kernel() {
    if !rustix::process::geteuid().is_root() {
        skip_this("control groups need root");
        return;
    }
    let Some(root) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
    else {
        skip_this("no unified hierarchy is mounted");
        return;
    };
    let mechanism = Mechanism::V2 {
        root,
        controllers: BTreeSet::new(),
    };
    let lab = lab_with(Cgroups::with(&fresh_instance(), mechanism));
    assert_eq!(lab.ensure(limits(64, 8)), Ensured::Created);
    assert_eq!(lab.ensure(limits(64, 8)), Ensured::AlreadyPresent);
    let mut child = lab.resident();
    assert_eq!(lab.cgroups.pids(&lab.sandbox).unwrap(), [child.id()]);
    let usage = lab.cgroups.usage(&lab.sandbox).unwrap();
    assert!(usage.cpu.is_some());
    assert_eq!(usage.memory, None);
    assert_eq!(lab.release().unwrap_err().kind(), ErrorKind::Busy);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert_eq!(lab.release().unwrap(), Removed::Removed);
}

#[test]
fn a_host_without_control_groups_says_so_and_works() {
    let reason = "no control groups are mounted".to_owned();
    let cgroups = Cgroups::with(&fresh_instance(), Mechanism::None { reason });
    let lab = lab_with(cgroups);
    lab.ensure(limits(64, 8));
    assert!(lab.cgroups.join_files(&lab.sandbox).is_empty());
    assert_eq!(lab.cgroups.list().unwrap(), []);
    assert!(lab.cgroups.pids(&lab.sandbox).unwrap().is_empty());
    assert_eq!(lab.cgroups.usage(&lab.sandbox).unwrap(), Usage::default());
    assert_eq!(
        lab.cgroups.limits_in_force(),
        LimitsInForce {
            mechanism: "none".to_owned(),
            detail: "nothing is limited: no control groups are mounted".to_owned(),
        }
    );
}

#[test]
fn a_missing_controller_is_named() {
    let roots = [(Controller::Memory, PathBuf::from("/nowhere"))];
    let mechanism = Mechanism::V1 {
        roots: roots.into(),
    };
    let cgroups = Cgroups::with(&fresh_instance(), mechanism);
    assert_eq!(
        cgroups.limits_in_force().detail,
        "limited: memory; not limited, because this host does not offer the controller: CPU, processes"
    );
}
