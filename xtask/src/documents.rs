//! `cargo xtask gen`: what documents say of tests, from the tests themselves.
//!
//! Test programs are asked what they hold (`--list`), so that nothing is named that does not run: a function that nobody
//! registered is not there, and a test that a macro makes for each volume driver is there once for each.
//! `cargo xtask check` does the same and fails if a document says something else. What VMMs do with volume drivers is not asked
//! again, since that takes a test host and their programs: it is what was recorded.

mod conformance;
mod failures;
mod invariants;
mod listed;

use std::fs;

use crate::run::{Failure, root};
use listed::Listed;

const INVARIANTS: &str = "docs/invariants.md";
const FAILURES: &str = "docs/failure.md";
const CONFORMANCE: &str = "docs/conformance.md";
const CONFORMANCE_RECORD: &str = "docs/conformance.json";

/// Writes what is generated of the documents.
pub(crate) fn generate() -> Result<(), Failure> {
    let tests = Listed::ask()?;
    let (before, after) = invariants(&tests)?;
    if before == after {
        println!("{INVARIANTS} is as it should be");
    } else {
        write(INVARIANTS, &after)?;
        println!("{INVARIANTS} is written");
    }
    write_conformance()?;
    failures::check(&read(FAILURES)?, &tests)
}

/// Adds to the record of conformance what a run has seen, and writes the document from it.
pub(crate) fn record(seen: &str) -> Result<(), Failure> {
    let record = conformance::merged(&read(CONFORMANCE_RECORD)?, seen)?;
    write(CONFORMANCE_RECORD, &record)?;
    write_conformance()
}

fn write_conformance() -> Result<(), Failure> {
    let before = read(CONFORMANCE)?;
    let after = conformance::written(&before, &read(CONFORMANCE_RECORD)?)?;
    write(CONFORMANCE, &after)
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
    let conformance = read(CONFORMANCE)?;
    if conformance != conformance::written(&conformance, &read(CONFORMANCE_RECORD)?)? {
        return Err(Failure(format!(
            "{CONFORMANCE} is not what {CONFORMANCE_RECORD} says: run `cargo xtask gen` and commit the result"
        )));
    }
    failures::check(&read(FAILURES)?, &tests)
}

fn invariants(tests: &Listed) -> Result<(String, String), Failure> {
    let before = read(INVARIANTS)?;
    let after = invariants::written(&before, tests)?;
    Ok((before, after))
}

fn write(document: &str, text: &str) -> Result<(), Failure> {
    fs::write(root().join(document), text).map_err(|error| Failure(format!("{document}: {error}")))
}

fn read(document: &str) -> Result<String, Failure> {
    fs::read_to_string(root().join(document))
        .map_err(|error| Failure(format!("{document}: {error}")))
}
