//! How tests that cannot run on a machine say so: for the tests of every crate, under the feature `fixture`.
#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "for tests, which a list that cannot be written must fail"
)]

use std::fs::OpenOptions;
use std::io::Write as _;

/// Says by name why `test` does not run here: to the reader, and to the list that `cargo xtask check` prints in the end,
/// the file that `ICEBOX_SKIPPED` names.
///
/// # Panics
/// The list cannot be written.
pub fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
    if let Some(list) = std::env::var_os("ICEBOX_SKIPPED") {
        let mut list = OpenOptions::new()
            .append(true)
            .create(true)
            .open(list)
            .expect("the list of skipped tests can be opened");
        // One write: tests append to it side by side.
        list.write_all(format!("{test}: {why}\n").as_bytes())
            .expect("the list of skipped tests can be written");
    }
}

/// The same for the test on this thread.
#[cfg(test)]
pub(crate) fn skip_this(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().expect("tests' threads have their names");
    skip(test, why);
}
