//! `cargo xtask check`: everything that must hold before a change lands.
//!
//! Tests that cannot run on a machine say so by appending a line, `<test>: <why>`, to the file that
//! `ICEBOX_SKIPPED` names; they are listed at the end, never counted as passed in silence.

use std::fs;

use crate::documents;
use crate::run::{Failure, build_agent, cargo, root, run};

pub(crate) fn check() -> Result<(), Failure> {
    let skipped = root().join("target/skipped-tests");
    let io = |error| Failure(format!("{}: {error}", skipped.display()));
    fs::create_dir_all(root().join("target")).map_err(io)?;
    fs::write(&skipped, "").map_err(io)?;

    run("format", &mut cargo(["fmt", "--all", "--check"]))?;
    let mut lints = cargo([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    run("lints", &mut lints)?;
    build_agent()?;
    let mut tests = cargo(["test", "--quiet", "--workspace", "--no-fail-fast"]);
    let tested = run("tests", tests.env("ICEBOX_SKIPPED", &skipped));

    let list = fs::read_to_string(&skipped).map_err(io)?;
    let mut lines: Vec<&str> = list.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() {
        println!("\nskipped: nothing");
    } else {
        println!("\nskipped, and why:");
        for line in lines {
            println!("  {line}");
        }
    }
    tested?;
    documents::check()
}
