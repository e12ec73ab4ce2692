//! The icebox command: the daemon and its command line.

fn main() {}
