//! Flatten beside what people copy disks with, and what a guest that runs meanwhile notices of it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use icebox_engine::host::BlockDevice;
use icebox_engine::id::SandboxId;
use icebox_host::launcher::identity_of;
use icebox_host::vmm::PID_FILE;

use crate::Options;
use crate::ground::{Ground, Volume, blockdev, run};
use crate::io::{Load, seconds};
use crate::table::{Table, median, ms, number};

pub(crate) const COLUMNS: &[&str] = &[
    "driver",
    "allocated",
    "flatten",
    "cp --sparse=always",
    "dd conv=sparse",
    "qemu-img convert",
    "of the best",
    "a guest's writes meanwhile",
];

const MIB: u64 = 1 << 20;

pub(crate) async fn measure(ground: &mut Ground, options: &Options, table: &mut Table) {
    for percent in [1, 10, 100] {
        let base = ground.base(options.disk, percent).await;
        let chain = ground.on_base(&base, options.disk);
        let mut volume = ground.volume(&chain).await;
        // A quarter of what is allocated is changed by the layer.
        let changes = (options.disk / MIB * percent / 100 / 4).max(1);
        Load {
            count: changes,
            size: MIB,
            step: MIB,
            write: true,
            durable: false,
        }
        .seconds(&blockdev(&ground.attach(&volume).await));
        ground.freeze(&mut volume).await;
        let device = ground.attach(&volume).await;
        compare(ground, &volume, &device, percent, options, table).await;
        ground.remove(&volume).await;
    }
}

async fn compare(
    ground: &Ground,
    volume: &Volume,
    device: &BlockDevice,
    percent: u64,
    options: &Options,
    table: &mut Table,
) {
    let out = ground.scratch("out");
    let disk = blockdev(device);
    let rounds = if options.repetitions < 10 { 3 } else { 5 };
    let (mut ours, mut cp, mut dd, mut convert) = (vec![], vec![], vec![], vec![]);
    // In turn, so that what else happens on the machine happens to all of them; durable, all of them.
    for _ in 0..rounds {
        let begun = Instant::now();
        ground.driver.flatten(&volume.chain, &out).await.unwrap();
        durable(&out);
        ours.push(ms(begun.elapsed()));
        fs::remove_file(&out).unwrap();

        let tool = |command: &mut Command, times: &mut Vec<f64>| {
            let begun = Instant::now();
            run(command);
            durable(&out);
            times.push(ms(begun.elapsed()));
            fs::remove_file(&out).unwrap();
        };
        if let BlockDevice::Raw { path } = device {
            tool(
                Command::new("cp")
                    .args(["--sparse=always", "--reflink=never"])
                    .args([path, &out]),
                &mut cp,
            );
            let (from, to) = (
                format!("if={}", path.display()),
                format!("of={}", out.display()),
            );
            tool(
                Command::new("dd").args([&from, &to, "bs=1M", "conv=sparse", "status=none"]),
                &mut dd,
            );
        }
        tool(
            Command::new("qemu-img")
                .args(["convert", "-O", "raw"])
                .arg(format!("json:{disk}"))
                .arg(&out),
            &mut convert,
        );
    }
    let slowed = guest_meanwhile(ground, volume, &out).await;
    let ours = median(&mut ours);
    let tools = [median(&mut cp), median(&mut dd), median(&mut convert)];
    let best = tools.iter().copied().fold(f64::NAN, f64::min);
    let mut row = vec![ground.name.to_owned(), format!("{percent} %"), number(ours)];
    row.extend(tools.map(number));
    row.push(format!("{} ×", number(ours / best)));
    row.push(format!("{:.0} %", slowed * 100.0));
    table.push(row);
}

fn durable(file: &Path) {
    File::open(file).unwrap().sync_all().unwrap();
}

/// The share of its writes that a guest on the same layer still gets done while the layer is flattened over and over.
async fn guest_meanwhile(ground: &Ground, volume: &Volume, out: &Path) -> f64 {
    let guest = ground.volume(&volume.chain).await;
    let disk = blockdev(&ground.attach(&guest).await);
    let load = Load {
        count: 2000,
        size: 4096,
        step: 4096 * 3,
        write: true,
        durable: false,
    };
    // The first time its chunks are new; then they are its own.
    load.seconds(&disk);
    let alone = load.seconds(&disk);
    let mut command = load.command(&disk);
    let guest_at_work = command.stdout(Stdio::piped()).spawn().unwrap();
    // Where a copy looks for guests.
    let vm = ground.layout.vm(&SandboxId::random());
    fs::create_dir_all(&vm).unwrap();
    let identity = identity_of(guest_at_work.id()).unwrap();
    fs::write(vm.join(PID_FILE), serde_json::to_vec(&identity).unwrap()).unwrap();
    let running = tokio::task::spawn_blocking(move || guest_at_work.wait_with_output().unwrap());
    while !running.is_finished() {
        ground.driver.flatten(&volume.chain, out).await.unwrap();
        fs::remove_file(out).unwrap();
    }
    let output = running.await.unwrap();
    fs::remove_dir_all(vm).unwrap();
    assert!(output.status.success(), "{output:?}");
    let meanwhile = seconds(&String::from_utf8(output.stdout).unwrap());
    ground.remove(&guest).await;
    alone / meanwhile
}
