//! The guest agent: process 1 of every sandbox, and the server that runs commands and serves files.

fn main() {}
