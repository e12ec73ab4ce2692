//! How unit tests that cannot run on a machine say so.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Says by name why the test on this thread does not run here, where `cargo xtask check` reads it.
pub(crate) fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().expect("tests' threads have their names");
    eprintln!("SKIPPED {test}: {why}");
    if let Some(list) = std::env::var_os("ICEBOX_SKIPPED") {
        let mut list = OpenOptions::new()
            .append(true)
            .create(true)
            .open(list)
            .unwrap();
        // One write: tests append to it side by side.
        list.write_all(format!("{test}: {why}\n").as_bytes())
            .unwrap();
    }
}
