//! What a real daemon refuses, and that it changes nothing by that.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use icebox_host::guest_image::fixture;

use crate::support::{Place, root};

/// The command with all its arguments, run by another program first.
pub(crate) fn under(program: &str, arguments: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(program);
    wrapped
        .args(arguments)
        .arg(command.get_program())
        .args(command.get_args())
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

#[test]
fn without_root() {
    if !root("without_root") {
        return;
    }
    let place = Place::new();
    // A user namespace without a mapping: the same files, no rights.
    let said = place.refused(&mut under("unshare", &["--user"], &place.serve()));
    assert!(
        said.contains("not running as root") && said.contains("hint:"),
        "{said}"
    );
    assert!(!place.data().exists());
}

#[test]
fn inv_26_a_vmm_that_is_missing_or_too_old() {
    if !root("inv_26_a_vmm_that_is_missing_or_too_old") {
        return;
    }
    let mut place = Place::new();
    place.settings = "qemu = \"/nonexistent/qemu\"".to_owned();
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("/nonexistent/qemu") && said.contains("8.2"),
        "{said}"
    );
    let old = place.path("qemu");
    fixture::script(&old, "#!/bin/sh\necho QEMU emulator version 7.2.15\n").unwrap();
    place.settings = format!("qemu = {old:?}");
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("7.2") && said.contains("8.2") && said.contains("backports"),
        "{said}"
    );
    // The others are new enough, and not there, or no VMM at all.
    for (settings, said_of_it) in [
        (
            "vmm = \"bochs\"",
            ["\"bochs\"", "cloud-hypervisor, firecracker"],
        ),
        (
            "firecracker = \"/nonexistent/fc\"",
            ["/nonexistent/fc", "1.14"],
        ),
        (
            "cloud_hypervisor = \"/nonexistent/ch\"",
            ["/nonexistent/ch", "52"],
        ),
    ] {
        place.settings = settings.to_owned();
        let said = place.refused(&mut place.serve());
        let is_said = said_of_it.iter().all(|word| said.contains(word));
        assert!(is_said && said.contains("hint:"), "{said}");
    }
    assert_eq!(place.holdings(), Vec::<String>::new());
}

#[test]
fn inv_26_a_volume_driver_that_cannot_work_is_not_replaced_by_another() {
    if !root("inv_26_a_volume_driver_that_cannot_work_is_not_replaced_by_another") {
        return;
    }
    // tmpfs shares no extents.
    let mut place = Place::under("/dev/shm".as_ref());
    place.settings = "volume_driver = \"reflink\"".to_owned();
    let said = place.refused(&mut place.serve());
    assert!(said.contains("reflink") && said.contains("hint:"), "{said}");
    place.settings = "volume_driver = \"floppy\"".to_owned();
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("floppy") && said.contains("zfs, reflink, qcow2"),
        "{said}"
    );
}

#[test]
fn a_network_that_overlaps_or_is_none() {
    if !root("a_network_that_overlaps_or_is_none") {
        return;
    }
    let place = Place::new();
    let mut serve = place.serve();
    let file = place.path("icebox.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let mut refused = vec![
        ("127.0.0.0/16".to_owned(), "cannot be"),
        ("10.0.0.0".to_owned(), "no IPv4 network"),
    ];
    // A network that this machine is in, if it is in any: proc_pid_net(5) has them as numbers of this machine's order.
    // Not one of other tests' sandboxes: those come and go.
    let routes = std::fs::read_to_string("/proc/net/route").unwrap();
    let mut lasting = routes
        .lines()
        .skip(1)
        .filter(|line| !line.starts_with("ibx"));
    let route = lasting.find_map(|line| {
        let number = |column: usize| {
            let text = line.split_whitespace().nth(column)?;
            u32::from_str_radix(text, 16).ok().map(u32::swap_bytes)
        };
        let (network, mask) = (number(1)?, number(7)?);
        (mask != 0).then(|| format!("{}/{}", Ipv4Addr::from_bits(network), mask.leading_ones()))
    });
    refused.extend(route.map(|route| (route, "overlaps")));
    for (prefix, word) in refused {
        let (before, _) = text.split_once("prefix").unwrap();
        std::fs::write(&file, format!("{before}prefix = \"{prefix}\"\n")).unwrap();
        let said = place.refused(&mut serve);
        assert!(said.contains(word) && said.contains("hint:"), "{said}");
    }
}

#[test]
fn a_daemon_that_leaves_takes_its_rules_with_it_and_not_those_of_a_sandbox() {
    if !root("a_daemon_that_leaves_takes_its_rules_with_it_and_not_those_of_a_sandbox") {
        return;
    }
    let place = Place::new();
    let daemon = place.start(place.serve());
    assert_eq!(place.rules().len(), 1);
    daemon.stop();
    assert_eq!(place.rules(), Vec::<String>::new());

    // A slot that is set up, as one of a sandbox that runs on.
    let daemon = place.start(place.serve());
    let namespace = format!("ibx{}-0", place.instance());
    let ip = |arguments: &[&str]| {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?}");
    };
    ip(&["netns", "add", &namespace]);
    daemon.stop();
    let left = place.rules();
    ip(&["netns", "delete", &namespace]);
    assert_eq!(left.len(), 1, "it would be without its rules");
    // The next daemon finds no sandbox that it would belong to.
    place.start(place.serve()).stop();
}

#[test]
fn a_second_daemon_on_one_data_directory() {
    if !root("a_second_daemon_on_one_data_directory") {
        return;
    }
    let place = Place::new();
    let first = place.start(place.serve());
    let elsewhere = tempfile::tempdir().unwrap();
    let mut second = place.serve();
    second.arg("--run-dir").arg(elsewhere.path());
    let output = second.output().unwrap();
    let said = place.scrubbed(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("[DIR]/data"), "{said}");
    assert_eq!(first.get(&["ls", "--quiet"]), "", "the first goes on");
    first.stop();
}

#[test]
fn inv_44_data_of_a_newer_version_or_of_somebody_else() {
    if !root("inv_44_data_of_a_newer_version_or_of_somebody_else") {
        return;
    }
    let place = Place::new();
    std::fs::create_dir(place.data()).unwrap();
    std::fs::write(place.data().join("thesis.txt"), "precious").unwrap();
    let said = place.refused(&mut place.serve());
    assert!(said.contains("[DIR]/data"), "{said}");
    std::fs::remove_file(place.data().join("thesis.txt")).unwrap();

    place.start(place.serve()).stop();
    let template = place.data().join("templates/taaaaaaaaaaaaaaaaaaaa");
    std::fs::create_dir(&template).unwrap();
    let manifest = template.join("manifest.json");
    std::fs::write(
        &manifest,
        r#"{"format":99,"writer":"icebox 99.1","new":{}}"#,
    )
    .unwrap();
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("99") && said.contains("icebox 99.1") && said.contains("reads up to"),
        "{said}"
    );
    std::fs::write(&manifest, "{\"format\":1,\"wri").unwrap();
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("taaaaaaaaaaaaaaaaaaaa") && said.contains("damaged"),
        "{said}"
    );
    assert!(manifest.exists(), "what cannot be read is left as it is");
    std::fs::remove_dir_all(&template).unwrap();

    let format = place.data().join("format");
    std::fs::write(&format, r#"{"format":77,"writer":"icebox 99.1"}"#).unwrap();
    let said = place.refused(&mut place.serve());
    assert!(
        said.contains("77") && said.contains("icebox 99.1"),
        "{said}"
    );
    assert!(std::fs::read_to_string(format).unwrap().contains("77"));
}

#[test]
fn images_archives_and_kernels_that_are_none() {
    if !root("images_archives_and_kernels_that_are_none") {
        return;
    }
    let place = Place::new();
    let daemon = place.start(place.serve());
    std::fs::write(place.path("garbage"), vec![0x5a; 1 << 20]).unwrap();
    for (arguments, words) in [
        (
            &["template", "build", "x", "--from-image", "garbage"][..],
            "not an ext4 image",
        ),
        (
            &["template", "build", "x", "--from-image", "nothing"],
            "nothing",
        ),
        (
            &["template", "build", "x", "--from-tar", "garbage"],
            "archive",
        ),
        (
            &["template", "build", "x", "--from-dir", "garbage"],
            "not a directory",
        ),
        (
            &["template", "build", "x", "--from", "debian:../etc"],
            "../etc",
        ),
        (
            &[
                "template",
                "build",
                "x",
                "--from-dir",
                "/etc",
                "--size",
                "1",
            ],
            "MiB",
        ),
        (&["kernel", "import", "garbage"], "not a Linux kernel"),
        (&["kernel", "import", "nothing"], "nothing"),
    ] {
        let said = daemon.fails(arguments);
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    assert_eq!(daemon.get(&["template", "ls", "--quiet"]), "");
    assert_eq!(place.holdings(), Vec::<String>::new());
    daemon.stop();
}

#[test]
fn inv_28_no_room_for_new_work() {
    if !root("inv_28_no_room_for_new_work") {
        return;
    }
    let mut place = Place::new();
    let small = place.data();
    std::fs::create_dir(&small).unwrap();
    // In a mount namespace of its own, so that nothing of it stays.
    let script = format!(
        "mount -t tmpfs -o size=2m none {} && exec \"$0\" \"$@\"",
        small.display()
    );
    let serve = under("unshare", &["--mount", "sh", "-c", &script], &place.serve());
    std::fs::write(place.path("garbage"), vec![0x5a; 8 << 20]).unwrap();
    let daemon = place.start(serve);
    let said = daemon.fails(&["template", "build", "x", "--from-image", "garbage"]);
    assert!(
        said.contains("not an ext4 image") || said.contains("space"),
        "{said}"
    );
    let tree = place.path("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("big"), vec![1; 8 << 20]).unwrap();
    let said = daemon.fails(&[
        "template",
        "build",
        "x",
        "--from-dir",
        "tree",
        "--size",
        "64",
    ]);
    assert!(said.contains("space") && said.contains("hint:"), "{said}");
    assert_eq!(daemon.get(&["template", "ls", "--quiet"]), "");
    daemon.stop();

    // Below the low-water mark a build does not begin.
    place.settings = "[space]\nkeep_free_mib = 8".to_owned();
    let serve = under("unshare", &["--mount", "sh", "-c", &script], &place.serve());
    let daemon = place.start(serve);
    let build = ["template", "build", "x", "--from-dir", "tree"];
    let said = daemon.fails(&build);
    assert!(
        said.contains("less than the 8.0 MiB") && said.contains("hint:"),
        "{said}"
    );
    let report = daemon.run(&["doctor"]);
    assert_eq!(report.status.code(), Some(1), "doctor says so, too");
    daemon.stop();
}

#[test]
fn a_build_whose_client_goes_leaves_nothing() {
    if !root("a_build_whose_client_goes_leaves_nothing") {
        return;
    }
    let place = Place::new();
    let daemon = place.start(place.serve());
    // A pipe that nobody writes to: the worker waits for it, and would for ever.
    let pipe = place.path("pipe");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .unwrap();
    let mut client = daemon
        .command(&["template", "build", "x", "--from-tar", "pipe"])
        .spawn()
        .unwrap();
    // Opening for writing returns when the worker has opened for reading: it is in the middle of its work.
    let mut writer = std::fs::File::options().write(true).open(&pipe).unwrap();
    client.kill().unwrap();
    client.wait().unwrap();
    // It is gone when the pipe has no reader any more.
    let mut poll = [rustix::event::PollFd::new(
        &writer,
        rustix::event::PollFlags::ERR,
    )];
    let timeout = rustix::event::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut poll, Some(&timeout)),
        Ok(1),
        "the worker lives on"
    );
    use std::io::Write as _;
    assert!(writer.write(b"x").is_err());
    // The daemon removes what it left once it has noticed too; a round trip later than that is not known, so wait.
    let gone = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !place.holdings().is_empty() {
        assert!(std::time::Instant::now() < gone, "{:?}", place.holdings());
        daemon.get(&["ls"]);
    }
    daemon.stop();
}
