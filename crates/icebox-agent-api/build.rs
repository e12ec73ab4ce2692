//! Compiles the service definitions without `protoc`: protox makes the descriptors, connectrpc-build the Rust.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let files = ["process.proto", "filesystem.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let set = out.join("services.bin");
    fs::write(&set, descriptors.encode_to_vec())?;
    connectrpc_build::Config::new()
        .files(&files)
        .descriptor_set(&set)
        .emit_rerun_directives(false)
        .include_file("services.rs")
        .compile()?;
    Ok(())
}
