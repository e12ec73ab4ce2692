//! I/O through a driver, as a share of the same on the raw base, and what one changed chunk costs below.

use std::fs;
use std::process::Command;

use icebox_engine::host::BlockDevice;
use serde_json::Value;

use crate::Options;
use crate::ground::{Ground, blockdev, run};
use crate::table::{Table, number};

pub(crate) const COLUMNS: &[&str] = &[
    "driver",
    "sequential read",
    "sequential write, first",
    "… again",
    "4 KiB reads",
    "4 KiB writes, first",
    "… again",
    "disk writes and reads for a first 4 KiB write",
    "… again",
    "raw",
    "KiB to the disk for a first 4 KiB write",
];

const BLOCK: u64 = 4096;
const RUN: u64 = 1 << 20;
/// From one small operation to the next: never in the same chunk, block or cluster of any driver.
const STRIDE: u64 = (128 << 10) + BLOCK;

/// One kind of access, by `qemu-img bench`.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) count: u64,
    pub(crate) size: u64,
    pub(crate) step: u64,
    pub(crate) write: bool,
    /// One at a time, each on the disk before the next.
    pub(crate) durable: bool,
}

impl Load {
    pub(crate) fn command(self, disk: &Value) -> Command {
        let mut command = Command::new("qemu-img");
        // Without the host's page cache, or memory would be measured.
        command.args(["bench", "-t", "none"]);
        for (option, value) in [("-c", self.count), ("-s", self.size), ("-S", self.step)] {
            command.args([option, &value.to_string()]);
        }
        command.args(["-d", if self.durable { "1" } else { "8" }]);
        if self.write {
            command.args(["-w", "--pattern=90"]);
        }
        if self.durable {
            command.arg("--flush-interval=1");
        }
        command.arg(format!("json:{disk}"));
        command
    }

    /// Seconds that it took.
    pub(crate) fn seconds(self, disk: &Value) -> f64 {
        seconds(&run(&mut self.command(disk)))
    }
}

/// What `qemu-img bench` says that it took.
pub(crate) fn seconds(said: &str) -> f64 {
    let time = said
        .split_once("Run completed in ")
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .unwrap_or_else(|| panic!("qemu-img bench said {said:?}"));
    time.parse().unwrap()
}

pub(crate) async fn measure(ground: &mut Ground, options: &Options, table: &mut Table) {
    let base = ground.base(options.disk, 100).await;
    let chain = ground.on_base(&base, options.disk);
    let volume = ground.volume(&chain).await;
    let device = ground.attach(&volume).await;
    let disk = blockdev(&device);

    let raw_path = ground.scratch("raw");
    run(Command::new("cp")
        .arg(ground.layout.base_image(&base))
        .arg(&raw_path));
    run(Command::new("sync").arg(&raw_path));
    let mut writable = fs::metadata(&raw_path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut writable, 0o600);
    fs::set_permissions(&raw_path, writable).unwrap();
    let raw = blockdev(&BlockDevice::Raw {
        path: raw_path.clone(),
    });

    let sequential = |write| Load {
        count: options.disk / RUN / 2,
        size: RUN,
        step: RUN,
        write,
        durable: false,
    };
    let scattered = |write| Load {
        count: options.disk / STRIDE,
        size: BLOCK,
        step: STRIDE,
        write,
        durable: false,
    };
    let share = |load: Load| load.seconds(&raw) / load.seconds(&disk);

    // What is there already is read before anything is written.
    let reads = [share(sequential(false)), share(scattered(false))];
    let small = [share(scattered(true)), share(scattered(true))];
    let large = [share(sequential(true)), share(sequential(true))];

    // On a new head, so that each is a first one.
    let fresh = ground.volume(&chain).await;
    let fresh_disk = blockdev(&ground.attach(&fresh).await);
    let durable = Load {
        count: u64::from(options.operations).min(options.disk / STRIDE),
        durable: true,
        ..scattered(true)
    };
    let below = |disk: &Value| {
        let before = ground.accesses();
        durable.seconds(disk);
        let after = ground.accesses();
        let each = |count: u64| count as f64 / durable.count as f64;
        (
            format!(
                "{} + {}",
                number(each(after.writes - before.writes)),
                number(each(after.reads - before.reads))
            ),
            number(each(after.bytes - before.bytes) / 1024.0),
        )
    };
    let (first, bytes) = below(&fresh_disk);
    let (again, _) = below(&fresh_disk);
    let (plain, _) = below(&raw);
    ground.remove(&fresh).await;
    ground.remove(&volume).await;
    fs::remove_file(raw_path).unwrap();

    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    table.push(vec![
        ground.name.to_owned(),
        percent(reads[0]),
        percent(large[0]),
        percent(large[1]),
        percent(reads[1]),
        percent(small[0]),
        percent(small[1]),
        first,
        again,
        plain,
        bytes,
    ]);
}
