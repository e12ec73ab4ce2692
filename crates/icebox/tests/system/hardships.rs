//! What guests go through and come out of: no memory, an agent that dies at a bad moment, a clock that somebody set, and
//! relatives that go.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use crate::conductor::Conductor;
use crate::lifecycle::{SUMS, path_of, write};
use crate::site::{COLD, Site, WARM, patience, run};

tests! {
    every:
        inv_24_inv_38_forks_of_forks_outlive_whoever_goes;
    qcow2:
        inv_05_inv_10_a_guest_without_memory_is_paused_and_resumed,
        inv_37_a_guest_whose_clock_was_set_has_the_hosts_after_a_resume;
    reflink:
        inv_01_inv_05_an_agent_that_is_killed_in_a_capture_is_back_after_it,
        inv_05_an_agent_that_is_stopped_goes_on,
        inv_05_inv_16_a_guest_whose_agent_stays_wedged_is_resumed_and_told_of,
        inv_16_inv_31_inv_44_a_memory_that_cannot_be_read_costs_the_guest_and_not_its_disk;
}

fn begin(site: &Site, words: &[&str]) -> Child {
    site.command(words)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn inv_05_inv_10_a_guest_without_memory_is_paused_and_resumed(site: &mut Site) {
    /// Takes all the memory there is, again and again, and is killed for it.
    const GREEDY: &str = r#"setsid sh -c 'while :; do
        python3 -c "
taken = []
while True:
    taken.append(bytearray(b\"x\" * (1 << 20)))
"; echo killed >>/root/killed; done' </dev/null >/dev/null 2>&1 &
        until [ -s /root/killed ]; do sleep 0.1; done"#;
    site.create(WARM, "greedy");
    write(site, "greedy", "g");
    let sums = site.exec("greedy", SUMS);
    let mut count = site.count("greedy");
    site.exec("greedy", GREEDY);
    for _ in 0..3 {
        site.get(&["pause", "greedy"]);
        assert_eq!(site.state("greedy"), "paused");
        site.get(&["resume", "greedy"]);
        let now = site.count("greedy");
        now.assert_goes_on_from(&count);
        count = now;
    }
    assert_eq!(site.exec("greedy", SUMS), sums);
    site.get(&["rm", "greedy"]);
}

/// Waits in a guest for a connection, and does to the agent what it says: sends it a signal, or freezes it, which
/// process 1 of the guest cannot undo as it does a stop, or lets it go on.
const ASSASSIN: &str = r#"cat >/tmp/assassin.py <<'END'
import os, signal, socket
def find():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as words:
                if words.read().split(b"\0")[1:2] == [b"serve"]:
                    return int(pid)
        except OSError:
            pass
server = socket.create_server(("0.0.0.0", 7070))
open("/tmp/ready", "w").close()
while True:
    connection, _ = server.accept()
    name, agent = connection.recv(16).decode(), find()
    group = "/sys/fs/cgroup/wedged"
    if name == "FREEZE":
        os.makedirs(group, exist_ok=True)
        open(group + "/cgroup.procs", "w").write(str(agent))
        open(group + "/cgroup.freeze", "w").write("1")
    elif name == "THAW":
        open(group + "/cgroup.freeze", "w").write("0")
    else:
        os.kill(agent, getattr(signal, "SIG" + name))
    connection.sendall(b"done")
    connection.close()
END
setsid python3 /tmp/assassin.py </dev/null >/dev/null 2>&1 &
until [ -e /tmp/ready ]; do sleep 0.1; done"#;

/// Does something to a sandbox's agent, which nobody asks about it.
fn strike(site: &Site, address: (std::net::Ipv4Addr, u16), signal: &str) {
    let mut guest = TcpStream::connect(address).unwrap();
    guest
        .set_read_timeout(Some(patience(Duration::from_secs(20))))
        .unwrap();
    guest.write_all(signal.as_bytes()).unwrap();
    let mut said = [0; 4];
    let heard = guest.read_exact(&mut said);
    assert!(heard.is_ok(), "{heard:?}\n{}", site.said());
}

/// Pauses a sandbox, and sends a signal to its agent when this step is about to be taken.
fn pause_and_strike(site: &Site, sandbox: &str, step: &'static [&'static str], signal: &str) {
    let address = (site.address(sandbox), 7070);
    let conductor = Conductor::at(&site.conductor());
    conductor.hold(step, begin(site, &["pause", sandbox]));
    strike(site, address, signal);
    let status = conductor.go_on();
    assert!(
        status.success(),
        "{signal} before {step:?}\n{}",
        site.said()
    );
    assert_eq!(site.state(sandbox), "paused");
}

fn inv_01_inv_05_an_agent_that_is_killed_in_a_capture_is_back_after_it(site: &mut Site) {
    site.create(WARM, "frail");
    write(site, "frail", "f");
    let sums = site.exec("frail", SUMS);
    let mut count = site.count("frail");
    site.exec("frail", ASSASSIN);
    for step in [&["guest.prepare"][..], &["machine.pause_vcpus"]] {
        pause_and_strike(site, "frail", step, "KILL");
        site.get(&["resume", "frail"]);
        let now = site.count("frail");
        now.assert_goes_on_from(&count);
        count = now;
        assert_eq!(site.exec("frail", SUMS), sums, "killed before {step:?}");
    }
    site.get(&["rm", "frail"]);
}

fn inv_05_an_agent_that_is_stopped_goes_on(site: &mut Site) {
    site.create(WARM, "mute");
    write(site, "mute", "m");
    let sums = site.exec("mute", SUMS);
    let count = site.count("mute");
    site.exec("mute", ASSASSIN);
    strike(site, (site.address("mute"), 7070), "STOP");
    assert_eq!(site.exec("mute", SUMS), sums);
    pause_and_strike(site, "mute", &["machine.pause_vcpus"], "STOP");
    site.get(&["resume", "mute"]);
    site.count("mute").assert_goes_on_from(&count);
    assert_eq!(site.exec("mute", SUMS), sums);
    site.get(&["rm", "mute"]);
}

fn inv_05_inv_16_a_guest_whose_agent_stays_wedged_is_resumed_and_told_of(site: &mut Site) {
    site.create(WARM, "deaf");
    write(site, "deaf", "d");
    let sums = site.exec("deaf", SUMS);
    let count = site.count("deaf");
    site.exec("deaf", ASSASSIN);
    let address = (site.address("deaf"), 7070);
    strike(site, address, "FREEZE");
    let begun = Instant::now();
    site.get(&["pause", "deaf"]);
    // 5 s for its preparations.
    let took = begun.elapsed();
    assert!(took < patience(Duration::from_secs(25)), "{took:?}");
    let begun = Instant::now();
    let mut events = site.events();
    let resumed = site.get(&["resume", "deaf"]);
    // 30 s for its answer.
    let took = begun.elapsed();
    assert!(took < patience(Duration::from_secs(90)), "{took:?}");
    let told = path_of(&resumed, &["sandbox", "unanswering"]);
    assert!(told.contains("has not answered"), "{told}");
    events.wait_for("sandbox.unanswering");
    let listed = String::from_utf8(site.run(&["ls"]).stdout).unwrap();
    assert!(listed.contains("running (does not answer)"), "{listed}");
    // Another daemon knows as much. What else runs in it answers, and the agent as soon as it can.
    site.end_daemon(Signal::KILL);
    site.start_daemon();
    assert!(site.inspect("deaf")["unanswering"].is_string());
    let mut events = site.events();
    strike(site, address, "THAW");
    events.wait_for("sandbox.answering");
    assert!(site.inspect("deaf")["unanswering"].is_null());
    site.count("deaf").assert_goes_on_from(&count);
    assert_eq!(site.exec("deaf", SUMS), sums);
    site.get(&["rm", "deaf"]);
}

/// A file that is cut short until this is dropped.
struct Cut {
    file: PathBuf,
    aside: PathBuf,
}

impl Cut {
    fn short(file: PathBuf) -> Self {
        let aside = file.with_extension("whole");
        run(Command::new("cp")
            .args(["-a", "--sparse=always"])
            .args([&file, &aside]));
        // Whoever has it mapped has nothing there any more.
        let length = fs::metadata(&file).unwrap().len();
        let open = File::options().write(true).open(&file).unwrap();
        open.set_len(length / 8 / 4096 * 4096).unwrap();
        Self { file, aside }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        fs::rename(&self.aside, &self.file).unwrap();
    }
}

fn inv_16_inv_31_inv_44_a_memory_that_cannot_be_read_costs_the_guest_and_not_its_disk(
    site: &mut Site,
) {
    site.build(COLD, &[]);
    let before = site.traces.look();
    site.create(COLD, "amnesic");
    write(site, "amnesic", "a");
    let sums = site.exec("amnesic", SUMS);
    site.get(&["pause", "amnesic"]);
    let memory = site.traces.look().came_since(&before, "/memories/");
    {
        let _cut = Cut::short(memory.join("base"));
        let said = site.refused(&["resume", "amnesic"]);
        assert_eq!(site.state("amnesic"), "paused", "{said}");
    }
    site.get(&["resume", "amnesic"]);
    assert_eq!(site.exec("amnesic", SUMS), sums);
    let mut events = site.events();
    {
        // As with a device that cannot be read any more, its VMM is killed by a signal as soon as the guest needs a page.
        let _cut = Cut::short(memory.join("base"));
        let read = "echo 3 >/proc/sys/vm/drop_caches; cat /usr/bin/* >/dev/null";
        let client = begin(
            site,
            &[
                "exec", "-n", "-u", "root", "amnesic", "--", "sh", "-c", read,
            ],
        );
        events.wait_for("sandbox.crashed");
        client.wait_with_output().unwrap();
        assert_eq!(site.state("amnesic"), "stopped");
        site.get(&["start", "amnesic"]);
        assert_eq!(site.exec("amnesic", SUMS), sums);
        site.get(&["stop", "amnesic"]);
    }
    // It was never anything but the file.
    site.get(&["resume", "amnesic", "--generation", "1"]);
    assert_eq!(site.exec("amnesic", SUMS), sums);
    site.get(&["rm", "amnesic"]);
    site.get(&["template", "rm", COLD]);
}

fn inv_37_a_guest_whose_clock_was_set_has_the_hosts_after_a_resume(site: &mut Site) {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let shown = || site.exec("late", "date +%s").parse::<u64>().unwrap();
    site.create(WARM, "late");
    let count = site.count("late");
    for set in ["2001-09-09", "2035-01-01"] {
        site.exec("late", &format!("date -s {set}"));
        assert!(shown().abs_diff(now()) > 1_000_000);
        site.get(&["pause", "late"]);
        site.get(&["resume", "late"]);
        let apart = shown().abs_diff(now());
        assert!(
            apart <= patience(Duration::from_secs(5)).as_secs(),
            "{apart} s apart"
        );
    }
    site.count("late").assert_goes_on_from(&count);
    site.get(&["rm", "late"]);
}

fn inv_24_inv_38_forks_of_forks_outlive_whoever_goes(site: &mut Site) {
    let fork = |of: &str| {
        let forks = site.get(&["fork", of, "-n", "1"]);
        path_of(&forks[0], &["sandbox", "sandboxID"]).to_owned()
    };
    let check = |sandbox: &str, sums: &str, gone: &str| {
        site.get(&["gc"]);
        site.get(&["pause", sandbox]);
        site.get(&["resume", sandbox]);
        let read = format!("echo 3 >/proc/sys/vm/drop_caches; {SUMS}");
        assert_eq!(site.exec(sandbox, &read), sums, "without {gone}");
    };
    site.create(WARM, "grandmother");
    write(site, "grandmother", "g");
    let (mother, aunt) = (fork("grandmother"), fork("grandmother"));
    write(site, &mother, "m");
    let (child, cousin) = (fork(&mother), fork(&aunt));
    write(site, &child, "c");
    write(site, &cousin, "c");
    let sums = site.exec(&child, SUMS);
    assert_eq!(sums.lines().count(), 3, "{sums}");
    let cousins = site.exec(&cousin, SUMS);
    // The one in between, then the first, then one that others come from last.
    site.get(&["rm", &mother]);
    check(&child, &sums, "its mother");
    site.get(&["rm", "grandmother"]);
    check(&child, &sums, "both");
    check(&cousin, &cousins, "its grandmother");
    let aunts = site.exec(&aunt, SUMS);
    site.get(&["rm", &cousin]);
    check(&aunt, &aunts, "its child");
    site.get(&["rm", &child, &aunt]);
}
