//! `cargo xtask gen`: what documents say of tests, from the tests themselves.
//!
//! Test programs are asked what they hold (`--list`), so that nothing is named that does not run: a function that nobody
//! registered is not there, and a test that a macro makes for each volume driver is there once for each.
//! `cargo xtask check` does the same and fails if a document says something else.

mod failures;
mod invariants;
mod listed;

use std::fs;

use crate::run::{Failure, root};
use listed::Listed;

const INVARIANTS: &str = "docs/invariants.md";
const FAILURES: &str = "docs/failure.md";

/// Writes what is generated of the documents.
pub(crate) fn generate() -> Result<(), Failure> {
    let tests = Listed::ask()?;
    let (before, after) = invariants(&tests)?;
    if before == after {
        println!("{INVARIANTS} is as it should be");
    } else {
        let path = root().join(INVARIANTS);
        fs::write(&path, after).map_err(|error| Failure(format!("{INVARIANTS}: {error}")))?;
        println!("{INVARIANTS} is written");
    }
    failures::check(&read(FAILURES)?, &tests)
}

/// Fails if a document says something else of the tests than they do themselves.
pub(crate) fn check() -> Result<(), Failure> {
    let tests = Listed::ask()?;
    let (before, after) = invariants(&tests)?;
    if before != after {
        return Err(Failure(format!(
            "{INVARIANTS} is not what the tests say: run `cargo xtask gen` and commit the result"
        )));
    }
    failures::check(&read(FAILURES)?, &tests)
}

fn invariants(tests: &Listed) -> Result<(String, String), Failure> {
    let before = read(INVARIANTS)?;
    let after = invariants::written(&before, tests)?;
    Ok((before, after))
}

fn read(document: &str) -> Result<String, Failure> {
    fs::read_to_string(root().join(document))
        .map_err(|error| Failure(format!("{document}: {error}")))
}
