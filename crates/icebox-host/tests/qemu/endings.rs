//! How VMMs end: by themselves, by force, and not at all when their daemon does.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use icebox_engine::host::{Boxes, ErrorKind, Removed, VcpuState, Vmm};
use icebox_host::boxes::HostBoxes;
use icebox_host::cgroup::Cgroups;
use icebox_host::instance::Instance;
use icebox_host::launcher::{BoxSpec, Ended, OpenFile, Process, Source};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::lab::{Lab, output, qemu};

/// Nothing waits for so long, on however busy a machine.
const BOUNDED: Duration = Duration::from_secs(20);

/// Stops a VMM, and waits until it stands: a thread that is on a processor, or on its way there, can still answer before it
/// has seen the signal.
fn wedge(pid: u32) {
    output("kill", &["-STOP", &pid.to_string()]);
    let stands = |thread: fs::DirEntry| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    while !threads().all(|thread| stands(thread.unwrap())) {
        thread::yield_now();
    }
}

/// Tells when a process has ended, from the moment on that it is called.
fn end_of(pid: u32) -> thread::JoinHandle<Instant> {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    thread::spawn(move || {
        poll(&mut [PollFd::new(&process, PollFlags::IN)], None).unwrap();
        Instant::now()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_31_inv_06_a_killed_vmm_is_noticed_within_a_second() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let machine = guest.boot().await;
    let pid = machine.process().pid;
    // What a guest with so much memory takes to end is not in it.
    let end = end_of(pid);
    output("kill", &["-9", &pid.to_string()]);
    let reason = tokio::time::timeout(BOUNDED, machine.exited())
        .await
        .unwrap();
    let noticed = Instant::now();
    let after = noticed.saturating_duration_since(end.join().unwrap());
    println!("noticed after {after:?}");
    assert!(after < Duration::from_secs(1), "{after:?}");
    assert!(!reason.by_guest);
    assert_eq!(reason.detail, "QEMU was killed by signal 9");

    let began = Instant::now();
    let error = machine.probe().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(error.to_string().contains("killed by signal 9"), "{error}");
    // Without its three seconds of patience with one that lives.
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "a dead VMM fails fast"
    );
    assert_eq!(
        lab.qemu
            .kill(&guest.id, Some(&machine.process()))
            .await
            .unwrap(),
        Removed::AlreadyAbsent
    );
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_21_a_wedged_vmm_keeps_nobody_waiting() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let machine = guest.boot().await;
    wedge(machine.process().pid);
    let began = Instant::now();
    let error = machine.probe().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());
    // Others wait for the same connection, and each has its own deadline.
    let began = Instant::now();
    let (first, second) = tokio::join!(machine.probe(), machine.probe());
    assert_eq!(first.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());

    let began = Instant::now();
    assert_eq!(
        lab.qemu.kill(&guest.id, None).await.unwrap(),
        Removed::Removed
    );
    assert!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());
    assert_eq!(
        lab.qemu.kill(&guest.id, None).await.unwrap(),
        Removed::AlreadyAbsent
    );
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_was_wedged_for_a_while_answers_again() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let machine = guest.boot().await;
    let pid = machine.process().pid;
    wedge(pid);
    // The caller gives up in the middle of a command.
    let given_up = tokio::time::timeout(Duration::from_millis(500), machine.pause_vcpus()).await;
    assert!(given_up.is_err());
    output("kill", &["-CONT", &pid.to_string()]);
    // It is carried out all the same; what counts is that state can be asked and changed.
    machine.resume_vcpus().await.unwrap();
    assert_eq!(machine.probe().await.unwrap(), VcpuState::Running);
    assert_eq!(guest.sh("echo alive").await, "alive");
    lab.close().await;
}

/// reboot(2) itself, a moment after the command that asks for it has answered: small images have no programs for it.
const POWER_OFF: &str = "setsid python3 -c 'import ctypes,time; time.sleep(0.2); ctypes.CDLL(None).reboot(0x4321fedc)' >/dev/null 2>&1 &";
const RESTART: &str = "setsid python3 -c 'import ctypes,time; time.sleep(0.2); ctypes.CDLL(None).reboot(0x01234567)' >/dev/null 2>&1 &";

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_says_so() {
    let lab = Lab::open().await;
    for (what, command) in [("power off", POWER_OFF), ("restart", RESTART)] {
        let guest = lab.guest().await;
        let machine = guest.boot().await;
        guest.sh(command).await;
        let reason = tokio::time::timeout(Duration::from_secs(30), machine.exited())
            .await
            .unwrap();
        assert!(reason.by_guest, "{what}: {reason:?}");
        assert_eq!(reason.reset, what == "restart", "{reason:?}");
        assert_eq!(reason.detail, "QEMU exited", "{what}");
    }
    lab.close().await;
}

/// INV-46: what a daemon started goes on without it, and the next daemon takes over.
#[test]
fn inv_46_a_vmm_outlives_its_daemon_and_is_adopted() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let first = runtime();
    let lab = first.block_on(Lab::open());
    let guest = first.block_on(lab.guest());
    let process = first.block_on(async {
        let machine = guest.boot().await;
        guest.sh("echo 'before the restart' > /dev/ttyS0").await;
        machine.process()
    });
    // The daemon dies: its tasks, sockets and pipes with it.
    first.shutdown_background();

    let second = runtime();
    second.block_on(async {
        assert!(fs::metadata(format!("/proc/{}", process.pid)).is_ok());
        guest.sh("echo 'while nobody listened' > /dev/ttyS0").await;
        let boxes = Arc::new(HostBoxes::new(
            lab.layout.clone(),
            Cgroups::detect(&Instance::of_data_directory(lab.layout.data())),
            0,
        ));
        let next = qemu(&lab.layout, &boxes).await;
        // By the manifest, by the pid file, by the cgroup.
        let machine = next
            .adopt(&guest.id, Some(&process))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(machine.process(), process);
        drop(machine);
        assert!(next.adopt(&guest.id, None).await.unwrap().is_some());
        fs::remove_file(lab.layout.vm(&guest.id).join("pid")).unwrap();
        let machine = next.adopt(&guest.id, None).await.unwrap().unwrap();

        machine.pause_vcpus().await.unwrap();
        assert_eq!(machine.probe().await.unwrap(), VcpuState::Paused);
        machine.resume_vcpus().await.unwrap();
        assert_eq!(guest.sh("echo alive").await, "alive");
        // The console goes on, with what was said while nobody listened.
        let log = lab.layout.console_log(&guest.id);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !fs::read_to_string(&log)
            .unwrap()
            .contains("while nobody listened")
        {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(
            fs::read_to_string(&log)
                .unwrap()
                .contains("before the restart")
        );

        guest.sh(POWER_OFF).await;
        let reason = tokio::time::timeout(Duration::from_secs(30), machine.exited())
            .await
            .unwrap();
        assert!(
            reason.by_guest,
            "an adopted guest's end is heard too: {reason:?}"
        );
        assert!(
            next.adopt(&guest.id, Some(&process))
                .await
                .unwrap()
                .is_none()
        );
        // A later process with the same pid is never taken for it.
        let mut impostor = process.clone();
        impostor.pid = std::process::id();
        assert_eq!(
            next.kill(&guest.id, Some(&impostor)).await.unwrap(),
            Removed::AlreadyAbsent
        );
    });
    drop(guest);
    // The test is still its parent, as a daemon that died would not be.
    let pid = Pid::from_raw(process.pid.cast_signed());
    rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
    second.block_on(lab.close());
}

/// A launcher as a daemon starts it, which the test plays.
struct Launch {
    control: BufReader<UnixStream>,
    process: Process,
}

impl Launch {
    fn start(spec: &BoxSpec) -> Self {
        let (mut control, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_box-launch"))
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let process = Process::watch_child(child).unwrap();
        let json = serde_json::to_vec(spec).unwrap();
        control
            .write_all(&u32::try_from(json.len()).unwrap().to_le_bytes())
            .unwrap();
        control.write_all(&json).unwrap();
        let control = BufReader::new(control);
        Self { control, process }
    }

    fn report(&mut self) -> String {
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn go(&mut self) {
        self.control.get_mut().write_all(b"g").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_46_a_launcher_whose_daemon_dies_starts_no_vmm() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let runtime = lab.layout.vm(&guest.id);
    let proof = lab.path().join("proof");
    output("mkfifo", &[runtime.join("stderr").to_str().unwrap()]);
    let spec = |program: &str, arguments: &[&str]| BoxSpec {
        program: program.into(),
        pager: false,
        arguments: arguments
            .iter()
            .map(|argument| (*argument).to_owned())
            .collect(),
        cgroup_procs: lab.boxes.cgroups().join_files(&guest.id),
        pid_file: runtime.join("pid"),
        network_namespace: Some(guest.network.namespace.clone()),
        uid: lab.boxes.uid(guest.slot),
        file_bytes_max: 0,
        files: Vec::new(),
        stdout: None,
        stderr: runtime.join("stderr"),
        binds: Vec::new(),
        devices: Vec::new(),
    };
    let mut launch = Launch::start(&spec("/usr/bin/touch", &[proof.to_str().unwrap()]));
    assert_eq!(launch.report(), r#""ready""#);
    // From here on a daemon that dies leaves something that the next one finds.
    let pids = lab.boxes.cgroups().pids(&guest.id).unwrap();
    assert!(pids.is_empty() || pids == [launch.process.identity().pid]);
    assert!(runtime.join("pid").exists());
    drop(launch.control);
    tokio::time::timeout(Duration::from_secs(5), launch.process.ended())
        .await
        .unwrap();
    assert!(!proof.exists());

    // Errors name the step and the thing.
    let mut missing = spec("/usr/bin/true", &[]);
    missing.network_namespace = Some("/run/netns/there-is-none".into());
    let report = Launch::start(&missing).report();
    assert!(
        report.contains("enter network namespace /run/netns/there-is-none"),
        "{report}"
    );
    let mut root = spec("/usr/bin/true", &[]);
    root.uid = 0;
    let report = Launch::start(&root).report();
    assert!(
        report.contains("become uid 0") && report.contains("never runs as root"),
        "{report}"
    );
    let mut launch = Launch::start(&spec("/usr/bin/there-is-none", &[]));
    launch.report();
    launch.go();
    assert!(launch.report().contains("execute /usr/bin/there-is-none"));

    fs::remove_file(runtime.join("pid")).unwrap();
    lab.boxes.release(&guest.id).await.unwrap();
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inv_44_a_pager_is_confined_and_serves_nobody_of_another_box() {
    let lab = Lab::open().await;
    let guest = lab.guest().await;
    let runtime = lab.layout.vm(&guest.id);
    let stderr = runtime.join("stderr");
    output("mkfifo", &[stderr.to_str().unwrap()]);
    let memory = lab.path().join("memory");
    fs::write(&memory, [7; 4096]).unwrap();
    let (socket, state) = (runtime.join("pager.sock"), runtime.join("pager-state"));
    fs::write(&state, "").unwrap();
    let file = |name: &str, source| OpenFile {
        name: name.to_owned(),
        source,
    };
    let spec = BoxSpec {
        program: "".into(),
        pager: true,
        arguments: Vec::new(),
        cgroup_procs: lab.boxes.cgroups().join_files(&guest.id),
        pid_file: runtime.join("pager.pid"),
        network_namespace: Some(guest.network.namespace.clone()),
        uid: lab.boxes.uid(guest.slot),
        file_bytes_max: 1 << 20,
        files: vec![
            file("memory", Source::Read(memory)),
            file("socket", Source::Listen(socket.clone())),
            file("state", Source::ReadWrite(state)),
        ],
        stdout: None,
        stderr: stderr.clone(),
        binds: Vec::new(),
        devices: Vec::new(),
    };
    let mut said = fs::File::options()
        .read(true)
        .write(true)
        .open(stderr)
        .unwrap();
    let mut launch = Launch::start(&spec);
    assert_eq!(launch.report(), r#""ready""#);
    launch.go();
    // It lets go of the daemon, as a program that was executed would.
    assert_eq!(launch.report(), "");
    let pid = launch.process.identity().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = spec.uid;
    assert!(
        status.contains(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n")),
        "{status}"
    );
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");

    // The test is root, and in no box.
    drop(UnixStream::connect(&socket).unwrap());
    let ended = tokio::time::timeout(Duration::from_secs(20), launch.process.ended());
    assert_eq!(ended.await.unwrap(), Ended::Exited(1));
    let mut words = [0; 256];
    let count = said.read(&mut words).unwrap();
    let words = String::from_utf8_lossy(&words[..count]);
    assert_eq!(words, "pager: who asks for a memory is not of its box\n");

    for left in ["pager.pid", "pager.sock", "pager-state"] {
        fs::remove_file(runtime.join(left)).unwrap();
    }
    lab.boxes.release(&guest.id).await.unwrap();
    lab.close().await;
}

/// Two at a time, as on a machine with two cores: boots hang when timers are calibrated badly.
async fn boots(count: usize) {
    let lab = Lab::open().await;
    let one = async |lane: usize| {
        let guest = lab.guest().await;
        for _ in (lane..count).step_by(2) {
            let machine = guest.boot().await;
            // Every device is there and driven.
            let seen = guest.sh("ls /sys/bus/virtio/drivers/*/ -d; ls /sys/block /sys/class/net; dd if=/dev/hwrng of=/dev/null bs=16 count=1 2>&1").await;
            for device in [
                "virtio_blk",
                "virtio_net",
                "virtio_rng",
                "virtio_balloon",
                "vda",
                "eth0",
            ] {
                assert!(seen.contains(device), "no {device} in {seen}");
            }
            lab.qemu
                .kill(&guest.id, Some(&machine.process()))
                .await
                .unwrap();
        }
    };
    tokio::join!(one(0), one(1));
    lab.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn boots_do_not_hang_20_times() {
    boots(20).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a quarter of an hour: run it by name"]
async fn boots_do_not_hang_200_times() {
    boots(200).await;
}
