//! `cargo xtask soak`: what takes longer than anybody waits for before a change lands. What it found last is in
//! `docs/soak.md`, which it writes.

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

Written by `cargo xtask soak`. A run that fails says how to do it again.

| what | when | what was seen |
|---|---|---|
";

pub(crate) fn soak(arguments: &[String]) -> Result<(), Failure> {
    match arguments.split_first() {
        Some((first, options)) if first == "model" => model(options),
        Some((first, [])) if first == "pairs" => pairs(),
        Some((first, options)) if first == "boots" => bench::soak(options),
        _ => bench::soak(arguments),
    }
}

/// Random verbs under random faults (`crates/icebox-sim/tests/model.rs`), with seeds that nobody has chosen.
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
            "model",
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
    for tests in ["steps::", "chains::"] {
        let mut test = cargo([
            "test",
            "--package",
            "icebox",
            "--test",
            "system",
            "--",
            tests,
        ]);
        run(tests, test.env("ICEBOX_TEST_EVERY_PAIR", "1"))?;
    }
    let took = begun.elapsed().as_secs();
    let seen = format!(
        "`steps::` with every volume driver that works there and `chains::`, none failed; {took} s"
    );
    note("pairs", &seen)
}

/// Replaces the row of `what` in the document.
fn note(what: &str, seen: &str) -> Result<(), Failure> {
    let path = root().join(DOCUMENT);
    let before = fs::read_to_string(&path).unwrap_or_else(|_| EMPTY.to_owned());
    let row = format!("| {what} | {} | {seen} |", today()?);
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
    let failed = |error: &dyn std::fmt::Display| Failure(format!("date: {error}"));
    let output = Command::new("date").args(["-u", "+%F"]).output();
    let output = output.map_err(|error| failed(&error))?;
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
}
