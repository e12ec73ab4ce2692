//! What holds in the life of sandboxes that nothing happens to but their verbs.

use std::io::Read as _;
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::Value;

use crate::conductor::Conductor;
use crate::site::{COLD, Driver, Site, WARM, kill};

tests! {
    every:
        inv_23_a_paused_sandbox_is_snapshotted_without_being_revived,
        inv_26_what_was_used_is_shown_and_what_is_not_here_is_refused,
        inv_37_inv_38_forks_differ_and_share_nothing,
        inv_50_destroy_comes_through_whatever_is_under_way,
        a_sandbox_boots_stops_and_starts_with_its_disk;
    qcow2:
        inv_17_addresses_survive_a_pause_and_are_never_shared,
        inv_20_a_client_that_goes_away_changes_nothing,
        inv_22_a_name_that_exists_is_never_overwritten,
        inv_37_connections_from_before_a_fork_are_closed_in_it,
        inv_41_bad_names_are_refused_at_the_edge;
    reflink:
        inv_19_equal_verbs_are_one_and_others_take_turns,
        inv_29_pages_that_were_zeroed_are_zero,
        inv_36_commands_run_the_instant_that_create_returns,
        inv_30_inv_37_who_creates_gets_what_waits_as_a_sandbox_of_its_own,
        inv_39_every_exit_code_and_every_byte_is_right;
}

/// Where a test's files are in a guest: on its disk.
pub(crate) const SUMS: &str = "cd /root && sha256sum data-*";

pub(crate) fn write(site: &Site, sandbox: &str, name: &str) {
    let script =
        format!("dd if=/dev/urandom of=/root/data-{name} bs=64k count=16 status=none && sync");
    site.exec(sandbox, &script);
}

pub(crate) fn path_of<'a>(value: &'a Value, keys: &[&str]) -> &'a str {
    keys.iter()
        .fold(value, |value, key| &value[key])
        .as_str()
        .unwrap()
}

fn inv_17_addresses_survive_a_pause_and_are_never_shared(site: &mut Site) {
    site.create(WARM, "first");
    let address = site.inspect("first")["address"].clone();
    assert!(address.is_string(), "{address}");
    site.get(&["pause", "first"]);
    site.create(WARM, "second");
    let other = site.inspect("second")["address"].clone();
    assert_ne!(other, address);
    site.get(&["resume", "first"]);
    assert_eq!(site.inspect("first")["address"], address);
    site.exec("first", "true");
    site.get(&["rm", "first", "second"]);
}

fn inv_20_a_client_that_goes_away_changes_nothing(site: &mut Site) {
    let conductor = Conductor::at(&site.conductor());
    let leave_during = |verb: &[&str], step: &'static [&'static str], event: &str| {
        let mut events = site.events();
        let client = site.command(verb).spawn().unwrap();
        let pid = client.id();
        conductor.hold(step, client);
        kill(pid, Signal::KILL);
        let ended = conductor.go_on();
        assert_eq!(ended.signal(), Some(Signal::KILL.as_raw()), "{verb:?}");
        events.wait_for(event);
    };
    let create = ["create", WARM, "--name", "alone"];
    leave_during(&create, &["vmm.launch"], "sandbox.created");
    let count = site.count("alone");
    let step = &["machine.pause_vcpus"];
    leave_during(&["pause", "alone"], step, "sandbox.paused");
    site.get(&["resume", "alone"]);
    site.count("alone").assert_goes_on_from(&count);
    site.get(&["rm", "alone"]);
}

fn inv_22_a_name_that_exists_is_never_overwritten(site: &mut Site) {
    let id = site.create(WARM, "taken");
    assert!(
        site.refused(&["create", WARM, "--name", "taken"])
            .contains("taken")
    );
    let warm = site.get(&["template", "inspect", WARM]);
    site.refused(&["snapshot", "taken", "--name", WARM]);
    assert_eq!(
        site.get(&["template", "inspect", WARM])["templateID"],
        warm["templateID"]
    );
    assert_eq!(site.inspect("taken")["sandboxID"], id.as_str());

    site.create(WARM, "rival");
    let race = ["taken", "rival"].map(|sandbox| {
        let mut command = site.command(&["snapshot", sandbox, "--name", "won"]);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let won = race.map(|racer| racer.wait_with_output().unwrap().status.success());
    assert_ne!(won[0], won[1], "exactly one wins");
    site.create("won", "winner");
    site.get(&["rm", "taken", "rival", "winner"]);
    site.get(&["template", "rm", "won"]);
}

fn inv_23_a_paused_sandbox_is_snapshotted_without_being_revived(site: &mut Site) {
    let id = site.create(WARM, "asleep");
    write(site, "asleep", "x");
    let (count, sums) = (site.count("asleep"), site.exec("asleep", SUMS));
    let before = site.traces.look();
    site.get(&["pause", "asleep"]);
    let paused = site.traces.look();
    let own = site.traces.data.join("sandboxes").join(&id);
    let written = [
        own.join("generations"),
        paused.came_since(&before, "/layers/"),
        paused.came_since(&before, "/memories/"),
    ];
    let kept = written.each_ref().map(|path| digests(path));
    site.get(&["snapshot", "asleep", "--name", "of-asleep"]);
    assert_eq!(site.state("asleep"), "paused");
    assert_eq!(written.each_ref().map(|path| digests(path)), kept);
    site.create("of-asleep", "copy");
    assert_eq!(site.exec("copy", SUMS), sums);
    site.count("copy").assert_goes_on_from(&count);
    site.get(&["resume", "asleep"]);
    assert_eq!(site.exec("asleep", SUMS), sums);
    site.count("asleep").assert_goes_on_from(&count);
    site.get(&["rm", "asleep", "copy"]);
    site.get(&["template", "rm", "of-asleep"]);
}

/// Every file below `directory` but locks, with a digest of its data. Zeros are passed over: images are mostly that. Whether
/// they are holes is not asked: where they are is the file system's affair, and ZFS changes its mind.
pub(crate) fn digests(directory: &Path) -> Vec<String> {
    let script = "find \"$0\" -type f ! -name 'lock*' | sort | while read -r file; do \
                  echo \"$file $(tar -cPS --hole-detection=raw --mtime=@0 \"$file\" | sha256sum)\"; done";
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn inv_36_commands_run_the_instant_that_create_returns(site: &mut Site) {
    for n in 0..10 {
        let name = format!("instant-{n}");
        site.create(WARM, &name);
        assert_eq!(site.exec(&name, "echo ready"), "ready");
        site.get(&["rm", &name]);
    }
}

fn inv_37_inv_38_forks_differ_and_share_nothing(site: &mut Site) {
    site.create(WARM, "origin");
    site.exec("origin", "echo before >/root/data-own; sync");
    let count = site.count("origin");
    let forks = site.get(&["fork", "origin", "-n", "2"]);
    let ids: Vec<_> = (0..2)
        .map(|n| path_of(&forks[n], &["sandbox", "sandboxID"]).to_owned())
        .collect();
    let all = [ids[0].as_str(), ids[1].as_str(), "origin"];
    for what in [
        "head -c 16 /dev/urandom | sha256sum",
        "cat /proc/sys/kernel/random/uuid",
        "cat /etc/machine-id",
        "hostname",
    ] {
        let said = all.map(|sandbox| site.exec(sandbox, what));
        assert!(
            said[0] != said[1] && said[1] != said[2] && said[0] != said[2],
            "{what}: {said:?}"
        );
    }
    let host = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs()
    };
    for sandbox in all {
        let begun = host();
        let guest: u64 = site.exec(sandbox, "date +%s").parse().unwrap();
        let ended = host();
        assert!(
            (begun - 1..=ended + 1).contains(&guest),
            "{sandbox}: {guest} in the guest, {begun} to {ended} on the host"
        );
        site.count(sandbox).assert_goes_on_from(&count);
    }
    for sandbox in all {
        assert_eq!(site.exec(sandbox, "cat /root/data-own"), "before");
        site.exec(sandbox, &format!("echo {sandbox} >/root/data-own; sync"));
    }
    site.get(&["rm", "origin", all[0]]);
    assert_eq!(
        site.exec(
            all[1],
            "echo 3 >/proc/sys/vm/drop_caches; cat /root/data-own"
        ),
        all[1]
    );
    site.get(&["rm", all[1]]);
}

fn inv_30_inv_37_who_creates_gets_what_waits_as_a_sandbox_of_its_own(site: &mut Site) {
    let since = site.newest_event();
    let mut events = site.events();
    site.get(&["template", "warm", WARM, "1"]);
    for name in ["first", "second"] {
        events.wait_for("template.warmed");
        assert_eq!(site.get(&["template", "inspect", WARM])["waiting"], 1);
        site.create(WARM, name);
        assert_eq!(site.exec(name, "hostname"), name);
    }
    let taken = site.happened(since);
    let taken = taken.iter().filter(|it| *it == "sandbox.created").count();
    assert_eq!(taken, 2, "of what waits nobody hears");
    for what in ["cat /proc/sys/kernel/random/uuid", "cat /etc/machine-id"] {
        let said = ["first", "second"].map(|sandbox| site.exec(sandbox, what));
        assert_ne!(said[0], said[1], "{what}");
    }
    let count = site.count("first");
    events.wait_for("template.warmed");
    // What was taken runs on; what waits is made anew.
    drop(events);
    let since = site.newest_event();
    site.end_daemon(Signal::KILL);
    site.start_daemon();
    site.count("first").assert_goes_on_from(&count);
    site.events_after(since).wait_for("template.warmed");
    site.get(&["pause", "first"]);
    site.get(&["resume", "first"]);
    site.count("first").assert_goes_on_from(&count);
    site.get(&["template", "warm", WARM, "0"]);
    site.get(&["rm", "first", "second"]);
}

fn inv_39_every_exit_code_and_every_byte_is_right(site: &mut Site) {
    site.create(WARM, "busy");
    for code in [0, 1, 2, 42, 77, 124, 125, 200, 255] {
        let output = site.run(&[
            "exec",
            "-n",
            "busy",
            "--",
            "sh",
            "-c",
            &format!("echo {code}; exit {code}"),
        ]);
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(output.stdout, format!("{code}\n").into_bytes());
    }
    let code = |words: &[&str]| {
        let arguments = [&["exec", "-n", "busy", "--"], words].concat();
        site.run(&arguments).status.code()
    };
    assert_eq!(code(&["/no/such/program"]), Some(127));
    assert_eq!(code(&["/etc/passwd"]), Some(126));
    assert_eq!(code(&["sh", "-c", "kill -TERM $$"]), Some(128 + 15));
    assert_eq!(code(&["sh", "-c", "kill -KILL $$"]), Some(128 + 9));
    for n in 0..60 {
        let output = site.run(&[
            "exec",
            "-n",
            "busy",
            "--",
            "sh",
            "-c",
            &format!("printf {n}; exit {n}"),
        ]);
        assert_eq!(
            (output.status.code(), output.stdout),
            (Some(n), n.to_string().into_bytes())
        );
    }
    let flood = site.run(&[
        "exec",
        "-n",
        "busy",
        "--",
        "sh",
        "-c",
        "yes 0123456789abcde | head -c 10485760; exit 3",
    ]);
    assert_eq!(flood.status.code(), Some(3));
    assert_eq!(flood.stdout.len(), 10 << 20);
    assert!(
        flood
            .stdout
            .chunks(16)
            .all(|line| line == b"0123456789abcde\n")
    );
    site.get(&["rm", "busy"]);
}

fn inv_19_equal_verbs_are_one_and_others_take_turns(site: &mut Site) {
    site.create(WARM, "one");
    let count = site.count("one");
    let together = |verbs: &[&[&str]]| {
        let clients: Vec<_> = verbs
            .iter()
            .map(|verb| {
                let mut client = site.command(verb);
                client.stdout(Stdio::null()).stderr(Stdio::piped());
                client.spawn().unwrap()
            })
            .collect();
        for (client, verb) in clients.into_iter().zip(verbs) {
            let said = client.wait_with_output().unwrap();
            assert!(said.status.success(), "{verb:?}: {said:?}");
        }
    };
    let since = site.newest_event();
    for verb in [["pause", "one"], ["resume", "one"]] {
        together(&[&verb[..]; 4]);
        site.get(&verb);
    }
    assert_eq!(site.happened(since), ["sandbox.paused", "sandbox.resumed"]);
    site.count("one").assert_goes_on_from(&count);

    // Any order will do, and none may fail.
    together(&[
        &["pause", "one"],
        &["snapshot", "one", "--name", "meanwhile"],
        &["fork", "one"],
    ]);
    assert_eq!(site.state("one"), "paused");
    site.get(&["resume", "one"]);
    site.count("one").assert_goes_on_from(&count);
    let all = site.get(&["ls"]);
    let ids = all.as_array().unwrap().iter();
    for id in ids.map(|sandbox| path_of(sandbox, &["sandboxID"])) {
        site.count(id).assert_goes_on_from(&count);
        site.get(&["rm", id]);
    }
    site.get(&["template", "rm", "meanwhile"]);
}

fn inv_26_what_was_used_is_shown_and_what_is_not_here_is_refused(site: &mut Site) {
    let shown = |site: &Site| {
        let detail = site.inspect("plain");
        let vmm = ["name", "version", "accelerator", "acceleratorReason"]
            .map(|key| detail["vmm"][key].clone());
        (
            detail["volumeDriver"].clone(),
            detail["kernel"].clone(),
            vmm,
        )
    };
    site.create(WARM, "plain");
    let used = shown(site);
    assert_eq!(used.0, site.driver.name());
    assert!(used.1.is_string());
    assert_eq!(used.2[0], "qemu");
    assert!(used.2.iter().all(Value::is_string), "{used:?}");
    site.get(&["pause", "plain"]);
    assert_eq!(shown(site), used);
    // A pool that no setting names, or one that a site of another driver has.
    let elsewhere = match site.driver {
        Driver::Zfs => "reflink",
        Driver::DmSnapshot | Driver::Reflink | Driver::Qcow2 => "zfs",
    };
    for asked in [["--driver", elsewhere], ["--vmm", "firecracker"]] {
        let said = site.refused(&[&["create", WARM, "--name", "other"], &asked[..]].concat());
        assert!(said.contains(asked[1]) && said.contains("hint:"), "{said}");
        site.refused(&["inspect", "other"]);
    }
    site.get(&["rm", "plain"]);
}

fn inv_29_pages_that_were_zeroed_are_zero(site: &mut Site) {
    site.create(WARM, "forgetful");
    let pages = "/dev/shm/pages";
    let zeros = format!("cmp -n 16777216 {pages} /dev/zero");
    site.exec("forgetful", &format!("head -c 16M /dev/urandom >{pages}"));
    let sum = site.exec("forgetful", &format!("sha256sum {pages}"));
    site.get(&["pause", "forgetful"]);
    site.get(&["resume", "forgetful"]);
    assert_eq!(site.exec("forgetful", &format!("sha256sum {pages}")), sum);
    // In place: the pages that held something are the ones that hold nothing now.
    let zero = format!("dd if=/dev/zero of={pages} bs=1M count=16 conv=notrunc status=none");
    site.exec("forgetful", &zero);
    site.get(&["snapshot", "forgetful", "--name", "blank"]);
    site.create("blank", "copy");
    site.exec("copy", &zeros);
    for _ in 0..2 {
        site.get(&["pause", "forgetful"]);
        site.get(&["resume", "forgetful"]);
        site.exec("forgetful", &zeros);
    }
    site.get(&["rm", "forgetful", "copy"]);
    site.get(&["template", "rm", "blank"]);
}

fn inv_37_connections_from_before_a_fork_are_closed_in_it(site: &mut Site) {
    // Ends when its one connection does.
    const SERVER: &str = r#"python3 -c '
import os, socket
server = socket.create_server(("", 8000))
if os.fork():
    raise SystemExit
os.setsid()
for standard in range(3):
    os.dup2(os.open("/dev/null", os.O_RDWR), standard)
with open("/tmp/server", "w") as file:
    file.write(str(os.getpid()))
connection, _ = server.accept()
connection.sendall(b"welcome")
try:
    connection.recv(1)
except OSError:
    pass
'"#;
    site.create(WARM, "called");
    site.exec("called", SERVER);
    let address = site.address("called");
    let mut connection = TcpStream::connect((address, 8000)).unwrap();
    let mut greeting = [0; 7];
    connection.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"welcome");

    let forks = site.get(&["fork", "called"]);
    let fork = path_of(&forks[0], &["sandbox", "sandboxID"]).to_owned();
    site.exec(
        &fork,
        "timeout 20 tail -f /dev/null --pid=$(cat /tmp/server)",
    );
    site.get(&["rm", "called", &fork]);
}

fn inv_41_bad_names_are_refused_at_the_edge(site: &mut Site) {
    let long = "x".repeat(300);
    for name in [
        "",
        "..",
        ".",
        "a/b",
        "../../etc",
        "näme",
        "a b",
        "-x",
        "a\nb",
        &long,
    ] {
        let said = site.refused(&["create", WARM, &format!("--name={name}")]);
        assert!(!said.is_empty());
        site.refused(&["inspect", name]);
        site.refused(&["create", name]);
    }
    assert_eq!(site.get(&["ls"]), Value::Array(Vec::new()));
}

fn inv_50_destroy_comes_through_whatever_is_under_way(site: &mut Site) {
    let mut create = site.command(&["create", WARM, "--name", "unborn"]);
    let mut create = create
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !site.run(&["inspect", "unborn"]).status.success() {
        let ended = create.try_wait().unwrap();
        assert!(ended.is_none_or(|ended| ended.success()), "{ended:?}");
    }
    site.get(&["rm", "unborn"]);
    create.wait().unwrap();
    site.refused(&["inspect", "unborn"]);

    for verb in [
        &["pause", "doomed"][..],
        &["resume", "doomed"],
        &["snapshot", "doomed", "--name", "late"],
        &["fork", "doomed"],
    ] {
        site.create(WARM, "doomed");
        if verb[0] == "resume" {
            site.get(&["pause", "doomed"]);
        }
        let mut under_way = site.command(verb);
        let mut under_way = under_way
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while site.inspect("doomed")["verb"].is_null() && under_way.try_wait().unwrap().is_none() {}
        site.get(&["rm", "doomed"]);
        under_way.wait().unwrap();
        site.refused(&["inspect", "doomed"]);
    }
    // Forks that were made before that live.
    for fork in site.get(&["ls"]).as_array().unwrap() {
        site.get(&["rm", path_of(fork, &["sandboxID"])]);
    }
    if site.run(&["template", "inspect", "late"]).status.success() {
        site.get(&["template", "rm", "late"]);
    }
}

fn a_sandbox_boots_stops_and_starts_with_its_disk(site: &mut Site) {
    site.build(COLD, &[]);
    site.create(COLD, "classic");
    write(site, "classic", "c");
    let sums = site.exec("classic", SUMS);
    site.get(&["stop", "classic"]);
    assert_eq!(site.state("classic"), "stopped");
    site.get(&["start", "classic"]);
    assert_eq!(site.exec("classic", SUMS), sums);
    site.get(&["pause", "classic"]);
    site.get(&["resume", "classic"]);
    assert_eq!(site.exec("classic", SUMS), sums);
    site.get(&["rm", "classic"]);
    site.get(&["template", "rm", COLD]);
}
