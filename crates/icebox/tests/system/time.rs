//! What happens by itself and in the course of time, with real guests: sandboxes that end and begin, daemons that come
//! back, and what is remembered of it all.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::site::{Site, WARM, patience};

tests! {
    qcow2:
        inv_07_inv_39_a_pause_does_not_wait_for_who_follows_a_command,
        inv_34_a_drain_pauses_everything_and_the_daemon_leaves,
        inv_35_an_idle_sandbox_is_paused_and_woken_by_who_asks_for_it,
        inv_45_what_a_guest_uses_is_measured_from_outside;
    reflink:
        inv_46_a_command_goes_on_without_its_daemon_and_nothing_it_says_is_lost,
        inv_49_the_next_daemon_goes_on_counting_events;
}

fn inv_34_a_drain_pauses_everything_and_the_daemon_leaves(site: &mut Site) {
    let names = ["one", "two"];
    let counts = names.map(|name| {
        site.create(WARM, name);
        site.count(name)
    });
    let drained = site.get(&["drain"]);
    assert_eq!(drained["paused"], serde_json::json!(names), "{drained}");
    // It has left by itself: the signal finds nobody.
    site.end_daemon(Signal::TERM);
    site.start_daemon();
    for (name, count) in names.iter().zip(counts) {
        assert_eq!(site.state(name), "paused");
        site.get(&["resume", name]);
        site.count(name).assert_goes_on_from(&count);
        site.get(&["rm", name]);
    }
}

fn inv_35_an_idle_sandbox_is_paused_and_woken_by_who_asks_for_it(site: &mut Site) {
    let create = ["create", WARM, "--name", "sleepy", "--timeout", "3s"];
    site.get(&[&create[..], &["--auto-resume"]].concat());
    let count = site.count("sleepy");
    // What its template's start command left running is no work of anybody's; this is.
    let mut working = site
        .command(&["exec", "-n", "sleepy", "--", "sleep", "6"])
        .spawn()
        .unwrap();
    assert!(
        working.wait().unwrap().success(),
        "it was not paused under a command"
    );
    detach(site, &["sleepy", "--", "sleep", "8"]);
    let begun = Instant::now();
    let mut events = site.events();
    events.wait_for("sandbox.timed-out");
    let lasted = begun.elapsed();
    assert!(
        lasted > Duration::from_secs(5),
        "nobody follows it, and it works: {lasted:?}"
    );
    events.wait_for("sandbox.paused");
    assert_eq!(site.state("sleepy"), "paused");
    site.count("sleepy").assert_goes_on_from(&count);
    events.wait_for("sandbox.resumed");
    site.get(&["rm", "sleepy"]);
}

fn inv_45_what_a_guest_uses_is_measured_from_outside(site: &mut Site) {
    site.create(WARM, "busy");
    let history = |site: &Site| {
        let shown = site.get(&["stats", "busy", "--history"]);
        shown["metrics"].as_array().unwrap().clone()
    };
    let mut working = site
        .command(&[
            "exec",
            "-n",
            "busy",
            "--",
            "sh",
            "-c",
            // What it says goes over its network, all the time.
            "i=0; while :; do i=$((i + 1)); [ $((i % 1000)) != 0 ] || echo $i; done",
        ])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + patience(Duration::from_secs(60));
    let is_busy = |sample: &Value| {
        let rate = |key: &str| sample[key].as_u64().unwrap();
        sample["cpuUsedPct"].as_f64().unwrap() > 20.0
            && rate("networkInRate") > 0
            && rate("networkOutRate") > 0
    };
    let sample = loop {
        assert!(Instant::now() < until, "{:?}", history(site));
        if let Some(sample) = history(site).into_iter().find(is_busy) {
            break sample;
        }
    };
    working.kill().unwrap();
    working.wait().unwrap();
    let number = |key: &str| sample[key].as_u64().unwrap();
    assert!(number("memUsed") > 10 << 20, "{sample}");
    assert_eq!(number("memTotal"), 256 << 20, "{sample}");
    assert_eq!(number("seconds"), 1, "{sample}");
    site.get(&["pause", "busy"]);
    let (before, after) = (history(site), history(site));
    assert_eq!(before.len(), after.len(), "nothing runs");
    site.get(&["rm", "busy"]);
}

/// Starts a command that nobody follows. Whatever comes after its `--` is its own.
fn detach(site: &Site, arguments: &[&str]) -> Value {
    let output = site.run(&[&["exec", "--detach", "--json"], arguments].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Says a number every 20 ms, and every tenth on its other stream.
const NUMBERS: &str = "i=0; while [ $i -lt 300 ]; do \
    if [ $((i % 10)) = 0 ]; then echo $i >&2; else echo $i; fi; i=$((i+1)); sleep 0.02; done; exit 7";

fn numbers(of: impl Fn(u32) -> bool) -> String {
    let numbers = (0..300).filter(|n| of(*n));
    numbers.map(|n| format!("{n}\n")).collect()
}

fn inv_46_a_command_goes_on_without_its_daemon_and_nothing_it_says_is_lost(site: &mut Site) {
    site.create(WARM, "talker");
    let mut following = site
        .command(&["exec", "-n", "talker", "--", "sh", "-c", NUMBERS])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(following.stdout.take().unwrap());
    let mut first = String::new();
    said.read_line(&mut first).unwrap();
    let alone = ["--tag", "alone", "talker", "--", "sh", "-c", NUMBERS];
    let started = detach(site, &alone);
    let pid = started["pid"].as_u64().unwrap();
    site.end_daemon(Signal::KILL);
    site.start_daemon();

    // Who followed it goes on at the very byte.
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(first + &rest, numbers(|n| n % 10 != 0));
    let mut errors = String::new();
    let told = following.stderr.take().unwrap();
    BufReader::new(told).read_to_string(&mut errors).unwrap();
    assert_eq!(errors, numbers(|n| n % 10 == 0));
    assert_eq!(following.wait().unwrap().code(), Some(7));

    // Whom nobody followed is listed, and found by its tag or its number.
    let listed = site.get(&["ps", "talker"]);
    let tagged = |process: &&Value| process["tag"] == "alone";
    let alone = listed.as_array().unwrap().iter().find(tagged);
    if let Some(alone) = alone {
        assert_eq!(alone["pid"].as_u64(), Some(pid), "{listed}");
    }
    for which in ["alone", &pid.to_string()] {
        let attached = site.run(&["attach", "-n", "talker", which]);
        assert_eq!(attached.status.code(), Some(7));
        let said = String::from_utf8(attached.stdout).unwrap();
        assert_eq!(said, numbers(|n| n % 10 != 0));
    }
    site.get(&["rm", "talker"]);
}

fn inv_07_inv_39_a_pause_does_not_wait_for_who_follows_a_command(site: &mut Site) {
    // One that is resumed for whoever comes must not be for who was cut off by its pause.
    let create = ["create", WARM, "--name", "followed", "--auto-resume"];
    site.get(&create);
    let follow = |arguments: &[&str]| {
        let mut command = site.command(arguments);
        let mut following = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(following.stdout.take().unwrap());
        let mut first = String::new();
        said.read_line(&mut first).unwrap();
        (following, said, first)
    };
    let (mut following, mut said, mut first) =
        follow(&["exec", "-n", "followed", "--", "sh", "-c", NUMBERS]);
    let silent = ["exec", "-n", "followed", "--", "sh", "-c"];
    let (mut silent, ..) = follow(&[&silent[..], &["echo here; exec sleep 1000"]].concat());

    let paused = site.get(&["pause", "followed"]);
    let steps = paused["sandbox"]["lastVerb"]["steps"].as_array().unwrap();
    let drain = steps.iter().find(|it| it["step"] == "drain").unwrap();
    let took = Duration::from_micros(drain["micros"].as_u64().unwrap());
    assert!(took < patience(Duration::from_secs(4)), "{took:?}");

    said.read_to_string(&mut first).unwrap();
    let told = |following: &mut Child| {
        let mut told = String::new();
        let stderr = following.stderr.take().unwrap();
        BufReader::new(stderr).read_to_string(&mut told).unwrap();
        assert_eq!(following.wait().unwrap().code(), Some(125), "{told}");
        told
    };
    let (told, told_silent) = (told(&mut following), told(&mut silent));
    for told in [&told, &told_silent] {
        assert!(told.contains("sandbox followed was paused"), "{told}");
    }
    assert_eq!(site.state("followed"), "paused", "nobody has woken it");

    // What the hint says works, and nothing is lost.
    let commands: Vec<_> = told.split('`').skip(1).step_by(2).collect();
    let [resume, attach] = commands[..] else {
        panic!("{told}");
    };
    let as_said = |command: &str| {
        let words = command.strip_prefix("icebox ").unwrap().split(' ');
        site.run(&words.collect::<Vec<_>>())
    };
    let output = as_said(resume);
    assert!(output.status.success(), "{output:?}");
    let output = as_said(attach);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let rest = String::from_utf8(output.stdout).unwrap();
    assert_eq!(first + &rest, numbers(|n| n % 10 != 0));
    let listed = site.get(&["ps", "followed"]);
    let sleeps = |process: &Value| process.to_string().contains("sleep 1000");
    assert!(listed.as_array().unwrap().iter().any(sleeps), "{listed}");
    site.get(&["rm", "followed"]);
}

fn inv_49_the_next_daemon_goes_on_counting_events(site: &mut Site) {
    site.create(WARM, "counted");
    let newest = site.newest_event();
    for signal in [Signal::KILL, Signal::TERM] {
        site.end_daemon(signal);
        site.start_daemon();
    }
    site.get(&["pause", "counted"]);
    let happened = site.happened(newest);
    assert!(
        happened.contains(&"sandbox.paused".to_owned()),
        "{happened:?}"
    );
    let count = u64::try_from(happened.len()).unwrap();
    assert_eq!(site.newest_event(), newest + count, "without holes");
    site.get(&["rm", "counted"]);
}
