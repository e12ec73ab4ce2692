//! What a VMM can reach, and what a guest can do to the host through it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use icebox_engine::host::{BlockDevice, Boxes as _, Machine, Vmm};
use icebox_host::launcher::{Bind, BoxSpec, landlock_version};
use icebox_host::skip::skip;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::lab::{DISK_SIZE, Lab, launcher, output};

fn digest(path: &PathBuf) -> Vec<u8> {
    Sha256::digest(fs::read(path).unwrap()).to_vec()
}

/// Tries to change every file that a process has open read-only, as that process's own uid: what code could do that has
/// taken over the VMM. Prints what worked.
const ATTACK: &str = r#"
import ctypes, os, sys
pid, uid = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
pidfd = os.pidfd_open(pid)
tried = 0
for number in os.listdir(f"/proc/{pid}/fd"):
    path = f"/proc/{pid}/fd/{number}"
    try:
        target = os.readlink(path)
        flags = int(open(f"/proc/{pid}/fdinfo/{number}").read().split("flags:")[1].split()[0], 8)
    except OSError: continue
    if not any(name in target for name in sys.argv[3:]): continue
    tried += 1
    if flags & os.O_ACCMODE != os.O_RDONLY: print("WRITABLE", target)
    for mode in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try: os.open(path, mode); print("OPENED", target)
        except OSError: pass
    fd = libc.syscall(438, pidfd, int(number), 0)        # pidfd_getfd: the very same open file
    if fd < 0: print("NOT TRIED", os.strerror(ctypes.get_errno()), target); continue
    for name, attempt in {
        "WRITTEN": lambda: os.pwrite(fd, b"x", 0),
        "TRUNCATED": lambda: os.ftruncate(fd, 0),
    }.items():
        try: attempt(); print(name, target)
        except OSError: pass
    for mode in (1 | 2, 0):                              # punch a hole, allocate
        if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)) == 0: print("PUNCHED", target)
for path in sys.argv[3:]:
    if path.startswith("/"):
        try: os.open(f"/proc/{pid}/root{path}", os.O_RDWR); print("OPENED", path)
        except OSError: pass
        try: os.truncate(f"/proc/{pid}/root{path}", 0); print("TRUNCATED", path)
        except OSError: pass
print("tried", tried)
"#;

fn attack(machine: &dyn Machine, uid: u32, names: &[&str]) -> String {
    let pid = machine.process().pid.to_string();
    let uid = uid.to_string();
    let mut arguments = vec!["-c", ATTACK, &pid, &uid];
    arguments.extend(names);
    output("python3", &arguments).trim().to_owned()
}

/// Asks the guest to shrink to `bytes`, as no driver does, and waits until it has.
fn balloon(monitor: &Path, bytes: u64) {
    let mut commands = UnixStream::connect(monitor).unwrap();
    commands
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answers = BufReader::new(commands.try_clone().unwrap());
    let mut until = |wanted: &str| {
        let mut line = String::new();
        while !line.contains(wanted) {
            line.clear();
            assert_ne!(answers.read_line(&mut line).unwrap(), 0);
        }
    };
    until("QMP");
    for (command, answer) in [
        (
            r#"{"execute":"qmp_capabilities"}"#.to_owned(),
            "return".to_owned(),
        ),
        (
            format!(r#"{{"execute":"balloon","arguments":{{"value":{bytes}}}}}"#),
            format!(r#""actual": {bytes}"#),
        ),
    ] {
        commands.write_all(command.as_bytes()).unwrap();
        until(&answer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_25_a_hostile_vmm_cannot_change_what_others_run_on() {
    let lab = Lab::open().await;
    let mut guest = lab.guest().await;
    let machine = guest.boot().await;
    guest.pause(machine).await;
    let machine = guest.restore().await;

    let memory = guest.memory.clone().unwrap().base;
    let BlockDevice::Qcow2 { layers, base, .. } = guest.disk().await else {
        unreachable!()
    };
    let base = fs::canonicalize(base).unwrap();
    let shared = [memory.clone(), layers[0].clone(), base.clone()];
    let before: Vec<_> = shared.iter().map(digest).collect();

    let uid = lab.boxes.uid(guest.slot);
    let layer_name = layers[0].file_name().unwrap().to_str().unwrap();
    let base_name = base.file_name().unwrap().to_str().unwrap();
    let result = attack(
        &*machine,
        uid,
        &[
            &format!("/{layer_name}"),
            base_name,
            "/run/icebox/box/memory",
        ],
    );
    // Two descriptors of layer and base (the fdset's and the node's), one of the memory.
    assert_eq!(result, "tried 5", "nothing may have worked");

    // A guest that gives memory back makes QEMU discard it: from the process, never from the file under it.
    guest.sh("fstrim / || true").await;
    drop(machine);
    balloon(&lab.layout.vm(&guest.id).join("qmp.sock"), 160 << 20);
    assert_eq!(before, shared.iter().map(digest).collect::<Vec<_>>());
    assert_eq!(guest.sh("echo alive").await, "alive");
    let machine = lab.qemu.adopt(&guest.id, None).await.unwrap().unwrap();
    // The very test would notice: the head is writable.
    let head = guest.head_path();
    let result = attack(
        &*machine,
        uid,
        &[&format!(
            "heads/{}",
            head.file_name().unwrap().to_str().unwrap()
        )],
    );
    assert!(result.contains("WRITABLE"), "{result}");
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_box_holds_what_its_vmm_needs_and_no_more() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let machine = guest.boot().await;
    let pid = machine.process().pid;

    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':')
            .unwrap()
            .1
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    let uid = lab.boxes.uid(guest.slot).to_string();
    assert_eq!(field("Uid"), [&*uid; 4].join(" "));
    assert_eq!(field("Gid"), [&*uid; 4].join(" "));
    assert_eq!(field("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");

    let namespace =
        |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let pid_text = pid.to_string();
    for kind in ["mnt", "net", "ipc", "uts"] {
        assert_ne!(
            namespace(&pid_text, kind),
            namespace("self", kind),
            "{kind}"
        );
    }
    let list = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(format!("/proc/{pid}/root{path}"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let root = list("/");
    assert!(
        root.iter()
            .all(|name| ["dev", "etc", "lib", "lib32", "lib64", "run", "usr"]
                .contains(&name.as_str())),
        "{root:?}"
    );
    assert_eq!(list("/dev"), ["null", "urandom", "zero"]);
    assert_eq!(
        list("/run/icebox/box"),
        ["boot.conf", "initramfs", "kernel"]
    );
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    for mount in mounts.lines() {
        let options = mount.split(' ').nth(3).unwrap();
        assert!(options.starts_with("ro,nosuid"), "{mount}");
    }
    // Nothing of it is mounted on the host.
    assert!(
        !fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains("/run/icebox/box")
    );

    // What no control group limits: its disk with some room, few files, no dump of the guest's memory.
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let mut numbers = line[name.len()..].split_whitespace();
        let soft = numbers.next().unwrap().to_owned();
        assert_eq!(numbers.next().unwrap(), soft, "{line}");
        soft.parse::<u64>().unwrap()
    };
    assert_eq!(limit("Max core file size"), 0);
    assert_eq!(limit("Max open files"), 1024);
    let file = limit("Max file size");
    assert!(
        (DISK_SIZE.0..DISK_SIZE.0 + (64 << 20)).contains(&file),
        "{file}"
    );
    // SIGXFSZ, 25, would end it: proc_pid_status(5) has a bit for each ignored signal, from 1 on.
    let ignored = u64::from_str_radix(&field("SigIgn"), 16).unwrap();
    assert_ne!(ignored & 1 << (25 - 1), 0);

    // In its cgroup, where this host has any; in a session of its own.
    let pids = lab.boxes.cgroups().pids(&guest.id).unwrap();
    assert!(
        pids == [pid] || lab.boxes.cgroups().join_files(&guest.id).is_empty(),
        "{pids:?}"
    );
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(session, pid_text);

    // INV-43: the agent's first token is not for everybody who can list processes.
    let command_line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command_line.contains("microvm") && !command_line.contains(guest.token.expose()));
    let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert_eq!(environment, "");
    lab.close().await;
}

/// What a VMM that was taken over might try from inside its box, and what came of it.
const TRAPS: &str = r#"
import errno, json, os, socket, sys
save, other = "/run/icebox/box/save/", int(sys.argv[1])
def tcp():
    it = socket.socket(socket.AF_INET)
    it.setblocking(False)
    it.connect(("127.0.0.1", 9))
def create(path):
    with open(path, "w") as file: file.write("x")
seen = {}
for name, attempt in {
    "file": lambda: create(save + "file"),
    "directory": lambda: os.mkdir(save + "directory"),
    "unlink": lambda: os.unlink(save + "file"),
    "socket": lambda: socket.socket(socket.AF_UNIX).bind(save + "socket"),
    "null": lambda: create("/dev/null"),
    "symlink": lambda: os.symlink("/", save + "symlink"),
    "fifo": lambda: os.mkfifo(save + "fifo"),
    "tcp": tcp,
    "signal": lambda: os.kill(other, 0),
}.items():
    try: attempt(); seen[name] = "done"
    except OSError as error: seen[name] = errno.errorcode[error.errno]
with open(save + "seen", "w") as file: json.dump(seen, file)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn inv_25_a_box_makes_no_traps_for_root_and_reaches_nobody() {
    const TEST: &str = "inv_25_a_box_makes_no_traps_for_root_and_reaches_nobody";
    let Ok(landlock) = landlock_version() else {
        return skip(TEST, "this kernel has no Landlock");
    };
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let runtime = lab.layout.vm(&guest.id);
    let uid = lab.boxes.uid(guest.slot);
    output("mkfifo", &[runtime.join("stderr").to_str().unwrap()]);
    let save = runtime.join("save");
    fs::create_dir(&save).unwrap();
    chown(&save, Some(uid), Some(uid)).unwrap();
    // It says when it is of the box's uid.
    let mut other = Command::new("setpriv")
        .args(["--reuid", &uid.to_string()])
        .args(["sh", "-c", "echo; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(other.stdout.take().unwrap());
    said.read_line(&mut String::new()).unwrap();
    let spec = BoxSpec {
        program: "/usr/bin/python3".into(),
        pager: false,
        arguments: vec!["-c".into(), TRAPS.into(), other.id().to_string()],
        cgroup_procs: lab.boxes.cgroups().join_files(&guest.id),
        pid_file: runtime.join("pid"),
        network_namespace: Some(guest.network.namespace.clone()),
        uid,
        file_bytes_max: 4096,
        files: Vec::new(),
        stdout: None,
        stderr: runtime.join("stderr"),
        binds: vec![Bind::writable(&save, "/run/icebox/box/save")],
        devices: Vec::new(),
    };
    launcher().launch(&spec).await.unwrap().ended().await;
    other.kill().unwrap();
    other.wait().unwrap();
    let seen: Value = serde_json::from_slice(&fs::read(save.join("seen")).unwrap()).unwrap();
    for allowed in ["file", "directory", "unlink", "socket", "null"] {
        assert_eq!(seen[allowed], "done", "{allowed}: {seen}");
    }
    // With the version of Landlock that knows of it.
    for (attempt, since, refusal) in [
        ("symlink", 1, "EACCES"),
        ("fifo", 1, "EACCES"),
        ("tcp", 4, "EACCES"),
        ("signal", 6, "EPERM"),
    ] {
        if landlock >= since {
            assert_eq!(seen[attempt], refusal, "{attempt}: {seen}");
        }
    }
    fs::remove_file(runtime.join("pid")).unwrap();
    lab.boxes.release(&guest.id).await.unwrap();
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_fill_the_host_with_its_console() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let _machine = guest.boot().await;
    guest.sh("timeout 10 sh -c 'yes 0123456789012345678901234567890123456789012345678901234567890 > /dev/ttyS0' || true; echo the-end > /dev/ttyS0").await;
    let log = lab.layout.console_log(&guest.id);
    for _ in 0..1000 {
        if fs::read_to_string(&log).unwrap().contains("the-end") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("the-end"));
    println!("console log: {} bytes", text.len());
    assert!(text.len() <= 1 << 20);
    lab.close().await;
}
