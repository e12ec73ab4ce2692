//! `docs/failure.md`: what happens to a sandbox in each failure. Every row of its tables ends with the tests that show it.

use super::listed::Listed;
use crate::run::Failure;

/// Fails if a row names no test, or one that does not exist.
pub(super) fn check(document: &str, tests: &Listed) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for (number, row) in rows(document) {
        let named = names(row);
        if named.is_empty() {
            wrong.push(format!("line {number} names no test"));
        }
        let missing = named.into_iter().filter(|name| !tests.has(name));
        wrong.extend(missing.map(|name| format!("line {number}: there is no test {name}")));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failure(format!("docs/failure.md: {}", wrong.join("\n"))))
}

/// The rows of tables, heads left out, by line.
fn rows(document: &str) -> Vec<(usize, &str)> {
    let lines: Vec<_> = (1..).zip(document.lines()).collect();
    let rules = |line: &str| line.starts_with("|--");
    let is_row = |at: usize| {
        let line = lines[at].1;
        let heads = lines.get(at + 1).is_some_and(|(_, next)| rules(next));
        line.starts_with('|') && !rules(line) && !heads
    };
    (0..lines.len())
        .filter(|at| is_row(*at))
        .map(|at| lines[at])
        .collect()
}

/// The names in code quotes in a row's last cell.
fn names(row: &str) -> Vec<&str> {
    let last = row.trim_end().trim_end_matches('|').rsplit('|').next();
    last.unwrap_or_default()
        .split('`')
        .skip(1)
        .step_by(2)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_names_its_tests_at_its_end() {
        let document = "| what | shown by |\n|---|---|\n| `a` | `inv_01_b`, `c_d` |\n";
        let rows = rows(document);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].0, names(rows[0].1)), (3, vec!["inv_01_b", "c_d"]));
    }
}
