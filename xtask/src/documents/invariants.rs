//! `docs/invariants.md`: for each promise, the tests that prove it.
//!
//! Promises are written by hand, each a paragraph that begins with its number; what a paragraph says to wait for is not
//! promised yet. Every line of the document that begins with `|` is generated: the table of all promises, under the
//! first heading, and under each promise the table of its tests.

use std::collections::{BTreeMap, BTreeSet};

use super::listed::{Listed, Test, Tier};
use crate::run::Failure;

/// What a promise's paragraph ends with if part of it cannot be tested yet.
const WAITS: &str = "*Waits for ";
const PROMISE: &str = "**INV-";

/// The document with what tests say now.
pub(super) fn written(document: &str, tests: &Listed) -> Result<String, Failure> {
    let by_hand = by_hand(document);
    let mut numbers = BTreeSet::new();
    let mut body = Vec::new();
    let mut summary = vec![head(&[
        "",
        "unit",
        "sim",
        "cli",
        "host",
        "system",
        "waits for",
    ])];
    for paragraph in by_hand.split("\n\n") {
        body.push(paragraph.to_owned());
        let Some(number) = number(paragraph) else {
            continue;
        };
        if !numbers.insert(number) {
            return Err(Failure(format!("INV-{number:02} is promised twice")));
        }
        let proving = tests.proving(number);
        let waits = waits(paragraph);
        summary.push(row(&summed(number, &proving, waits)));
        if !proving.is_empty() {
            body.push(proofs(&proving));
        }
    }
    let unknown: Vec<_> = tests.claimed().difference(&numbers).copied().collect();
    if !unknown.is_empty() {
        return Err(Failure(format!(
            "tests prove {unknown:?}, which nobody promised"
        )));
    }
    let first = body
        .iter()
        .position(|paragraph| paragraph.starts_with("## "))
        .ok_or_else(|| Failure("there is no heading before which a table could be".into()))?;
    body.insert(first, summary.join("\n"));
    Ok(body.join("\n\n") + "\n")
}

/// The document without what is generated: paragraphs, parted by empty lines.
fn by_hand(document: &str) -> String {
    let lines = document.lines().filter(|line| !line.starts_with('|'));
    let kept = lines.collect::<Vec<_>>().join("\n");
    let paragraphs = kept.split("\n\n").map(|it| it.trim_matches('\n'));
    let paragraphs: Vec<_> = paragraphs.filter(|it| !it.is_empty()).collect();
    paragraphs.join("\n\n")
}

fn number(paragraph: &str) -> Option<u32> {
    let rest = paragraph.strip_prefix(PROMISE)?;
    rest.split("**").next()?.parse().ok()
}

/// What a promise waits for; nothing if it does not wait.
fn waits(paragraph: &str) -> &str {
    let waits = paragraph.split_once(WAITS).map(|(_, rest)| rest);
    let until = waits.and_then(|rest| rest.split([':', '.', '*']).next());
    until.unwrap_or_default()
}

/// A row of the table of promises: how many tests of each tier prove one. A test that runs with four drivers counts once.
fn summed(number: u32, proving: &[(&Test, &BTreeSet<String>)], waits: &str) -> Vec<String> {
    let of = |tier| {
        let count = proving.iter().filter(|(test, _)| test.tier == tier).count();
        if count == 0 {
            String::new()
        } else {
            count.to_string()
        }
    };
    let counts = Tier::ALL.map(of);
    let number = format!("INV-{number:02}");
    let waits = if proving.is_empty() && waits.is_empty() {
        "**a test**"
    } else {
        waits
    };
    [&[number][..], &counts, &[waits.to_owned()]].concat()
}

/// The table of a promise's tests.
fn proofs(proving: &[(&Test, &BTreeSet<String>)]) -> String {
    let mut rows = vec![head(&["tier", "where", "test"])];
    for (test, places) in proving {
        let program = if test.tier == Tier::Unit {
            format!("`{}`", test.program)
        } else {
            format!("`tests/{}`", test.program)
        };
        let places = together(places);
        let place = if places.is_empty() {
            program
        } else {
            format!("{program} {places}")
        };
        let name = format!("`{}`", test.name);
        rows.push(row(&[test.tier.name().to_owned(), place, name]));
    }
    rows.join("\n")
}

/// Places in few words: those that differ only in their last part are told together.
fn together(places: &BTreeSet<String>) -> String {
    let mut by_module: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for place in places {
        match place.rsplit_once("::") {
            Some((module, last)) => by_module.entry(module).or_default().push(last),
            None => drop(by_module.entry(place).or_default()),
        }
    }
    let told = by_module
        .into_iter()
        .map(|(module, lasts)| match lasts.as_slice() {
            [] => module.to_owned(),
            lasts => format!("{module}: {}", lasts.join(", ")),
        });
    told.collect::<Vec<_>>().join(", ")
}

fn head(columns: &[&str]) -> String {
    let rule = vec!["---".to_owned(); columns.len()];
    let columns: Vec<_> = columns.iter().map(|it| (*it).to_owned()).collect();
    // Without the spaces that no column needs.
    format!("{}\n{}", row(&columns), row(&rule).replace(' ', ""))
}

fn row(cells: &[String]) -> String {
    format!("| {} |", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# Promises\n\nFirst.\n\n| a |\n|---|\n| b |\n\n## Of life\n\n**INV-07** It lives.\n*Waits for a VMM: none.*\n\n| c |\n";

    #[test]
    fn what_is_written_by_hand_stays() {
        let kept = by_hand(DOCUMENT);
        assert_eq!(
            kept,
            "# Promises\n\nFirst.\n\n## Of life\n\n**INV-07** It lives.\n*Waits for a VMM: none.*"
        );
        assert_eq!(by_hand(&kept), kept);
    }

    #[test]
    fn a_promise_has_a_number_and_may_wait() {
        let paragraph = "**INV-07** It lives.\n*Waits for a VMM: none.*";
        assert_eq!((number(paragraph), waits(paragraph)), (Some(7), "a VMM"));
        assert_eq!((number("INV-07"), waits("It lives.")), (None, ""));
    }
}
