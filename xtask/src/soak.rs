//! `cargo xtask soak`: what takes longer than anybody waits for before a change lands. What it found last is in
//! `docs/soak.md`, which it writes.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::bench;
use crate::run::{Failure, cargo, root, run};

const DOCUMENT: &str = "docs/soak.md";
const USAGE: &str = "\
usage: cargo xtask soak [boots] [-n BOOTS] [-j AT_ONCE]
       cargo xtask soak model [-n RUNS] [--steps STEPS] [--seed FIRST]
       cargo xtask soak pairs";

/// The document without a result.
const EMPTY: &str = "\
# What soaking found last

What takes longer than anybody waits for before a change lands. `cargo xtask soak` does it and writes the row below when
nothing failed; a run that fails says how to do it again, and leaves the row of the last one that did not. All of it needs
what the tests need, and takes hours.

- `cargo xtask soak model`: random verbs under random faults on twenty simulated sandboxes, against a model of what users were
  told (`crates/icebox-sim/tests/sim/model`), with seeds that nobody has chosen, once for each way to freeze a disk. In the end
  every sandbox runs once more with what it should hold, and the host holds nothing. To do one run again:
  `ICEBOX_MODEL_SEED=… ICEBOX_MODEL_STEPS=… cargo test -p icebox-sim --test sim model::`.
- `cargo xtask soak boots`: real guests booted, two at a time, each with all of its devices.
- `cargo xtask soak pairs`: real sandboxes with every volume driver that works on the machine; the daemon and the VMM are
  killed at every step of pause, resume, snapshot, fork and rm, and a life of thirty rounds is gone through.

| what | when | what was seen |
|---|---|---|
";

pub(crate) fn soak(arguments: &[String]) -> Result<(), Failure> {
    match arguments.split_first() {
        Some((first, options)) if first == "model" => model(options),
        Some((first, [])) if first == "pairs" => pairs(),
        Some((first, options)) if first == "boots" => boots(options),
        _ => boots(arguments),
    }
}

fn boots(options: &[String]) -> Result<(), Failure> {
    note("boots", &bench::soak(options)?)
}

/// Random verbs under random faults (`crates/icebox-sim/tests/sim/model`), with seeds that nobody has chosen.
fn model(options: &[String]) -> Result<(), Failure> {
    let (mut runs, mut steps, mut first) = (20_u64, 5_000_u64, None);
    let mut words = options.iter();
    while let Some(word) = words.next() {
        let value = words.next().and_then(|value| value.parse::<u64>().ok());
        let value = value.ok_or_else(|| Failure(format!("{word} needs a number\n{USAGE}")))?;
        match word.as_str() {
            "-n" => runs = value,
            "--steps" => steps = value,
            "--seed" => first = Some(value),
            _ => return Err(Failure(format!("{word} is not understood\n{USAGE}"))),
        }
    }
    let first = first.map_or_else(random, Ok)?;
    let begun = Instant::now();
    for seed in first..first.saturating_add(runs) {
        let mut test = cargo([
            "test",
            "--quiet",
            "--package",
            "icebox-sim",
            "--test",
            "sim",
            "model::",
        ]);
        test.env("ICEBOX_MODEL_SEED", seed.to_string())
            .env("ICEBOX_MODEL_STEPS", steps.to_string());
        let what = format!("ICEBOX_MODEL_SEED={seed} ICEBOX_MODEL_STEPS={steps}");
        run(&what, &mut test)?;
    }
    let took = begun.elapsed().as_secs();
    let seen = format!(
        "{runs} runs of {steps} verbs each with both ways to freeze, seeds {first} to {}, none failed; {took} s",
        first.saturating_add(runs) - 1
    );
    note("model", &seen)
}

/// The daemon and the VMM killed at every step, with every volume driver that works here, and a life of thirty rounds.
fn pairs() -> Result<(), Failure> {
    let begun = Instant::now();
    let mut seen = Vec::new();
    for tests in ["steps::", "chains::"] {
        let test = |listing: &[&str]| {
            let test = ["test", "--package", "icebox", "--test", "system", "--"];
            let mut test = cargo([&test[..], listing, &[tests]].concat());
            test.env("ICEBOX_TEST_EVERY_PAIR", "1");
            test
        };
        let listed = test(&["--list"]).output();
        let listed = listed.map_err(|error| Failure(format!("{tests} --list: {error}")))?;
        let listed = String::from_utf8_lossy(&listed.stdout);
        let drivers = by_driver(&listed);
        if drivers.is_empty() {
            return Err(Failure(format!("there is nothing in {tests}")));
        }
        run(tests, &mut test(&[]))?;
        let drivers = drivers
            .iter()
            .map(|(driver, count)| format!("{count} with {driver}"));
        let drivers: Vec<_> = drivers.collect();
        seen.push(format!("`{tests}` {}", drivers.join(", ")));
    }
    let took = begun.elapsed().as_secs();
    note(
        "pairs",
        &format!("{}: none failed; {took} s", seen.join("; ")),
    )
}

/// How many tests there are for each volume driver, in a list of `<suite>::<driver>::<name>: test`.
fn by_driver(listed: &str) -> BTreeMap<&str, usize> {
    let mut drivers = BTreeMap::new();
    let tests = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"));
    for driver in tests.filter_map(|test| test.split("::").nth(1)) {
        *drivers.entry(driver).or_default() += 1;
    }
    drivers
}

/// Replaces the row of `what` in the document.
fn note(what: &str, seen: &str) -> Result<(), Failure> {
    let path = root().join(DOCUMENT);
    let before = fs::read_to_string(&path).unwrap_or_else(|_| EMPTY.to_owned());
    let commit = output("git", &["rev-parse", "--short", "HEAD"])?;
    let today = today()?;
    let row = format!("| {what} | {today}, at {commit} | {seen} |");
    fs::write(&path, with_row(&before, what, &row))
        .map_err(|error| Failure(format!("{DOCUMENT}: {error}")))?;
    println!("{row}");
    Ok(())
}

fn with_row(document: &str, what: &str, row: &str) -> String {
    let own = format!("| {what} |");
    let others = document.lines().filter(|line| !line.starts_with(&own));
    let lines: Vec<_> = others.chain([row]).collect();
    lines.join("\n") + "\n"
}

/// The date, as in `2026-01-31`.
pub(crate) fn today() -> Result<String, Failure> {
    output("date", &["-u", "+%F"])
}

fn output(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure(format!("{program}: {error}"));
    let mut command = Command::new(program);
    let output = command.args(arguments).current_dir(root()).output();
    let output = output.map_err(|error| failed(&error))?;
    if !output.status.success() {
        return Err(failed(&output.status));
    }
    let said = String::from_utf8(output.stdout).map_err(|error| failed(&error))?;
    Ok(said.trim().to_owned())
}

/// A seed that nobody has chosen, small enough to be typed.
fn random() -> Result<u64, Failure> {
    let failed = |error| Failure(format!("/dev/urandom: {error}"));
    let mut file = fs::File::open("/dev/urandom").map_err(failed)?;
    let mut bytes = [0; 4];
    std::io::Read::read_exact(&mut file, &mut bytes).map_err(failed)?;
    Ok(u32::from_le_bytes(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_takes_the_place_of_the_one_before() {
        let once = with_row(EMPTY, "model", "| model | then | a |");
        let both = with_row(&once, "pairs", "| pairs | then | b |");
        let again = with_row(&both, "model", "| model | now | c |");
        assert!(
            again.ends_with("| pairs | then | b |\n| model | now | c |\n"),
            "{again}"
        );
    }

    #[test]
    fn a_pair_is_counted_where_it_runs() {
        let listed = "SKIPPED steps::zfs::a: there is no ZFS here\n\
            steps::qcow2::a: test\nsteps::reflink::a: test\nsteps::qcow2::b: test\n3 tests\n";
        let counted = by_driver(listed);
        assert_eq!(counted, [("qcow2", 2), ("reflink", 1)].into());
        assert!(by_driver("0 tests\n").is_empty());
    }
}
