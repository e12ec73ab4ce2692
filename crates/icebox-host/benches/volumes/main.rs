//! What each volume driver costs, beside the raw disk and beside the tools that people would use instead.
//!
//! ```text
//!   cargo bench -p icebox-host --bench volumes [-- --quick] [--driver NAME]… [--directory DIR]
//! ```
//!
//! Every driver gets a file system or pool of its own on a loop device, so that what reaches the "disk" can be counted
//! there. I/O is done by `qemu-img bench`, through the block layer that guests' I/O goes through. Drivers that cannot run
//! here are named, with the reason. Prints Markdown: `docs/volumes.md` holds a run of it.
#![allow(
    clippy::unwrap_used,
    clippy::exit,
    reason = "a measurement that cannot be made ends the run"
)]

mod costs;
mod flatten;
mod ground;
mod io;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use ground::{Driver, Ground};
use table::Table;

/// What is asked for, and how much of it.
pub(crate) struct Options {
    drivers: Vec<Driver>,
    directory: PathBuf,
    /// Repetitions of short operations.
    pub(crate) repetitions: u32,
    /// Heads on one base, at most.
    pub(crate) heads: u32,
    /// Bytes of the disks that I/O and flattening are measured on.
    pub(crate) disk: u64,
    /// 4 KiB operations that wait for the disk, at most.
    pub(crate) operations: u32,
}

impl Options {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            drivers: Vec::new(),
            directory: std::env::temp_dir(),
            repetitions: 20,
            heads: 200,
            disk: 512 << 20,
            operations: 1000,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                // What cargo says to every benchmark.
                "--bench" => {}
                "--quick" => {
                    options.repetitions = 5;
                    options.heads = 20;
                    options.disk = 64 << 20;
                    options.operations = 200;
                }
                "--driver" => options.drivers.push(value()?.parse()?),
                "--directory" => options.directory = value()?.into(),
                _ => {
                    return Err(format!(
                        "unknown option {argument}; there are --quick, --driver NAME, --directory DIR"
                    ));
                }
            }
        }
        if options.drivers.is_empty() {
            options.drivers = Driver::ALL.to_vec();
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("volumes are made of loop devices, file systems and pools: run this as root");
        return ExitCode::from(2);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut costs = Table::new(costs::COLUMNS);
    let mut numbers = Table::new(io::COLUMNS);
    let mut flattened = Table::new(flatten::COLUMNS);
    for &driver in &options.drivers {
        if let Some(why) = driver.missing() {
            println!("left out: {}: {why}", driver.name());
            continue;
        }
        eprintln!("── {}", driver.name());
        runtime.block_on(async {
            let mut ground = Ground::new(driver, &options.directory);
            costs::measure(&mut ground, &options, &mut costs).await;
            io::measure(&mut ground, &options, &mut numbers).await;
            flatten::measure(&mut ground, &options, &mut flattened).await;
        });
    }
    println!(
        "\nprocessors: {}, load: {}",
        std::thread::available_parallelism().map_or(0, usize::from),
        std::fs::read_to_string("/proc/loadavg")
            .unwrap_or_default()
            .trim()
    );
    println!("\n## Operations, in ms\n\n{costs}");
    println!("\n## I/O, as a share of the raw disk's\n\n{numbers}");
    println!("\n## Flatten, in ms\n\n{flattened}");
    ExitCode::SUCCESS
}
