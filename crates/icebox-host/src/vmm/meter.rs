//! What a VMM uses, as the kernel counts it for its process.
//!
//! Four files of `/proc/<pid>` that stay open and are read again and again: four system calls for each look. The
//! descriptors mean the process that had the pid when they were opened, so nobody else is ever measured for it. The
//! VMM lives in its slot's network namespace, and so `net/dev` is that one's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use icebox_engine::host::{Counters, ErrorKind, HostError, Meter, ProcessIdentity};
use icebox_engine::unit::{Bytes, PAGE_SIZE};

use crate::launcher::identity_of;
use crate::network::TAP;

/// Each of the files is shorter, unless a namespace has more devices than ours ever do.
const BUFFER: usize = 4096;

/// A process that is measured.
pub(crate) struct ProcessMeter {
    pid: u32,
    stat: File,
    statm: File,
    io: File,
    devices: File,
    ticks_per_second: u64,
}

impl ProcessMeter {
    /// Opens the meters of exactly this process.
    pub(crate) fn open(process: &ProcessIdentity) -> Result<Self, HostError> {
        let pid = process.pid;
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).map_err(|error| HostError::io(format!("open {path}"), error))
        };
        let meter = Self {
            pid,
            stat: open("stat")?,
            statm: open("statm")?,
            io: open("io")?,
            devices: open("net/dev")?,
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
        };
        match identity_of(pid) {
            Ok(now) if now == *process => Ok(meter),
            _ => Err(HostError::new(
                ErrorKind::Gone,
                format!("measure process {pid}: it has ended"),
            )),
        }
    }

    /// Reads one of the files from its beginning, and takes numbers out of it.
    fn take<T>(
        &self,
        file: &File,
        name: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, HostError> {
        let mut buffer = [0; BUFFER];
        let read = read_all(file, &mut buffer).map_err(|error| {
            HostError::io(format!("read {name} of process {}", self.pid), error)
        })?;
        let text = std::str::from_utf8(&buffer[..read]).ok();
        text.and_then(parse).ok_or_else(|| {
            let message = format!("{name} of process {} is not understood", self.pid);
            HostError::new(ErrorKind::Other, message)
        })
    }
}

/// Reads until the file says that there is no more: some of the kernel's come in pieces.
fn read_all(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    loop {
        let rest = &mut buffer[filled..];
        let read = file.read_at(rest, filled as u64)?;
        filled += read;
        if read == 0 || filled == buffer.len() {
            return Ok(filled);
        }
    }
}

impl Meter for ProcessMeter {
    fn read(&mut self) -> Result<Counters, HostError> {
        let ticks = self.take(&self.stat, "stat", cpu_ticks)?;
        let pages = self.take(&self.statm, "statm", resident_pages)?;
        let (disk_read, disk_written) = self.take(&self.io, "io", disk_bytes)?;
        let (received, sent) = self.take(&self.devices, "net/dev", tap_bytes)?;
        Ok(Counters {
            cpu: Duration::from_millis(ticks.saturating_mul(1000) / self.ticks_per_second),
            memory: Bytes(pages.saturating_mul(PAGE_SIZE as u64)),
            disk_read: Bytes(disk_read),
            disk_written: Bytes(disk_written),
            // What our side of the tap receives is what the guest sends.
            network_in: Bytes(sent),
            network_out: Bytes(received),
        })
    }
}

/// User and system time: fields 14 and 15 of `/proc/<pid>/stat`, proc_pid_stat(5). The name before them may contain
/// anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()?.saturating_add(next()?))
}

/// Field 2 of `/proc/<pid>/statm`, proc_pid_statm(5).
fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// What went to and came from storage, proc_pid_io(5).
fn disk_bytes(io: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    Some((field("read_bytes:")?, field("write_bytes:")?))
}

/// Bytes that the tap has received and sent, columns 1 and 9 of `/proc/<pid>/net/dev`, proc_pid_net(5).
fn tap_bytes(devices: &str) -> Option<(u64, u64)> {
    let line = devices.lines().find_map(|line| {
        let (name, columns) = line.split_once(':')?;
        (name.trim() == TAP).then_some(columns)
    });
    // A VMM that runs without its network has sent nothing.
    let Some(line) = line else {
        return Some((0, 0));
    };
    let mut columns = line.split_ascii_whitespace();
    let received = columns.next()?.parse().ok()?;
    let sent = columns.nth(7)?.parse().ok()?;
    Some((received, sent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 3 4 20 0 3 0 12345 1 2";
        assert_eq!(cpu_ticks(stat), Some(200));
        assert_eq!(resident_pages("100 42 7 1 0 9 0\n"), Some(42));
        let io = "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n";
        assert_eq!(disk_bytes(io), Some((4096, 8192)));
        let devices = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n    \
             lo:  5 0 0 0 0 0 0 0  6 0 0 0 0 0 0 0\n  tap0: 70 1 0 0 0 0 0 0 80 1 0 0 0 0 0 0\n";
        assert_eq!(tap_bytes(devices), Some((70, 80)));
        assert_eq!(tap_bytes("lo: 5"), Some((0, 0)));
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_is_measured_and_another_of_its_number_is_not() {
        let identity = identity_of(std::process::id()).unwrap();
        let mut meter = ProcessMeter::open(&identity).unwrap();
        let first = meter.read().unwrap();
        assert!(first.memory > Bytes::mib(1), "{first:?}");
        let begun = std::time::Instant::now();
        while meter.read().unwrap().cpu == first.cpu {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "no time is counted"
            );
        }
        let other = ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        let error = ProcessMeter::open(&other).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Gone);
    }
}
