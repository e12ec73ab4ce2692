//! `icebox pool create`

use std::process::ExitCode;

use icebox_engine::host::Ensured;
use icebox_engine::unit::Bytes;

use super::{Ended, Place, failed, list};
use crate::commands::size::mib;
use crate::failure::Failure;
use crate::output::Output;

/// Make a pool and mount it as the data directory, now and at every boot.
///
/// The file is allocated in full, so that the pool never finds its host full. A line in /etc/fstab mounts it at boot. Doing
/// it again finishes what was interrupted, and else changes nothing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,

    /// How large, in MiB or with a suffix: 500G, 2T.
    #[arg(long, value_name = "SIZE", value_parser = mib, allow_negative_numbers = true)]
    size: i64,

    /// Do not touch /etc/fstab: print the line that belongs there.
    #[arg(long)]
    no_fstab: bool,
}

pub(super) fn run(args: &Args, output: Output) -> Ended {
    let size = u64::try_from(args.size).ok().filter(|size| *size < 1 << 44);
    let size = size.map(Bytes::mib).ok_or_else(|| {
        Failure::new(format!("a pool cannot have {} MiB", args.size))
            .hint("ask for what the host has room for: `--size 100G`")
    })?;
    let mut pool = args.place.pool()?;
    if args.no_fstab {
        pool.fstab = None;
    }
    let ensured = pool.create(size).map_err(|error| failed(&error))?;
    let (image, data) = (pool.image.display(), pool.data.display());
    output.say(match ensured {
        Ensured::Created => format!("made {image}, and mounted it on {data}"),
        Ensured::AlreadyPresent => format!("{image} is mounted on {data} already"),
    });
    if args.no_fstab && !output.is_json() {
        output.line(pool.table_line())?;
        return Ok(ExitCode::SUCCESS);
    }
    list::show(&pool, output)?;
    Ok(ExitCode::SUCCESS)
}
