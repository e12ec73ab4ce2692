//! Long copies give way to guests.
//!
//! A copy that writes as fast as the disk takes it leaves a guest on the same disk a fifth to a half of what it had alone.
//! So a copy looks now and then whether a guest did I/O meanwhile. If none did, it goes on at full speed. If one did, it waits
//! until the disk has what it wrote, and then rests for three times as long as that took: three quarters of the time are the
//! guest's alone, and the copy takes about four times as long.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use icebox_engine::layout::Layout;

use crate::fs::write_out;
use crate::vmm::read_pid_file;

/// How much is copied between two looks.
const STRETCH: u64 = 8 << 20;
/// What guests at rest read and write: so many bytes in a second, and so many at once. Logs and timers, nobody who waits.
const AT_REST_PER_SECOND: f64 = 1e6;
const AT_REST: u64 = 32 << 10;
/// How much longer a rest is than the work before it.
const REST: u32 = 3;
/// The longest rest. A disk that took this long for a stretch has other worries.
const REST_MAX: Duration = Duration::from_secs(2);
/// How often to look for guests that were not there before.
const LIST_INTERVAL: Duration = Duration::from_secs(1);

/// The pace of one copy.
pub(crate) struct Pace {
    guests: Guests,
    done: u64,
    since: Instant,
}

impl Pace {
    /// Of a copy that begins now, beside the guests whose VMMs have a directory in `layout`.
    pub(crate) fn beside_guests(layout: &Layout) -> Self {
        let mut guests = Guests {
            directory: layout.run().join("vm"),
            counters: Vec::new(),
            listed: None,
            seen: 0,
        };
        guests.moved();
        Self {
            guests,
            done: 0,
            since: Instant::now(),
        }
    }

    /// Of a copy where there are no guests.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        Self::beside_guests(&Layout::new("/nonexistent", "/nonexistent"))
    }

    /// `bytes` more have been written to `out`. Blocks for a rest, if one is due.
    pub(crate) fn wrote(&mut self, out: &File, bytes: u64) -> io::Result<()> {
        self.done += bytes;
        if self.done < STRETCH {
            return Ok(());
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let moved = self.guests.moved();
        if moved > AT_REST && moved as f64 > AT_REST_PER_SECOND * seconds {
            write_out(out)?;
            rest((self.since.elapsed() * REST).min(REST_MAX));
        } else {
            // The disk works while the next stretch is read, and nobody else's pages go for ones that nobody reads.
            rustix::fs::fadvise(out, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        self.done = 0;
        self.since = Instant::now();
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "there is nothing to wait for")]
fn rest(duration: Duration) {
    std::thread::sleep(duration);
}

/// What all guests read and write.
struct Guests {
    directory: PathBuf,
    /// `/proc/<pid>/io` of each VMM.
    counters: Vec<File>,
    listed: Option<Instant>,
    seen: u64,
}

impl Guests {
    /// Bytes since the last time. Guests that came or went in between may count for all that they ever did.
    fn moved(&mut self) -> u64 {
        if self
            .listed
            .is_none_or(|then| then.elapsed() > LIST_INTERVAL)
        {
            self.counters = self.list();
            self.listed = Some(Instant::now());
        }
        let now = self.counters.iter().filter_map(bytes).sum();
        let before = std::mem::replace(&mut self.seen, now);
        now.abs_diff(before)
    }

    /// What cannot be read has gone, or is nobody's guest.
    fn list(&self) -> Vec<File> {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let counters = entries.filter_map(|entry| {
            let identity = read_pid_file(&entry.ok()?.path()).ok()??;
            File::open(format!("/proc/{}/io", identity.pid)).ok()
        });
        counters.collect()
    }
}

/// Read and written through system calls, proc(5): whatever a page cache made of it.
fn bytes(counter: &File) -> Option<u64> {
    let mut text = [0; 256];
    let length = counter.read_at(&mut text, 0).ok()?;
    let text = str::from_utf8(&text[..length]).ok()?;
    let fields = text.lines().filter_map(|line| line.split_once(": "));
    let moved = fields.filter(|(name, _)| matches!(*name, "rchar" | "wchar"));
    Some(
        moved
            .filter_map(|(_, value)| value.parse::<u64>().ok())
            .sum(),
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::vmm::PID_FILE;

    /// A process that writes much when it is told to, and then an end.
    fn writer() -> Child {
        Command::new("sh")
            .args([
                "-c",
                "while read -r _; do printf '%01000000d' 0; printf E; done",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_copy_rests_while_a_guest_is_at_work_and_at_no_other_time() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path().join("data"), directory.path().join("run"));
        let vm = layout.run().join("vm/some-sandbox");
        fs::create_dir_all(&vm).unwrap();
        let mut guest = writer();
        let identity = crate::launcher::identity_of(guest.id()).unwrap();
        fs::write(vm.join(PID_FILE), serde_json::to_vec(&identity).unwrap()).unwrap();

        let out = File::create(directory.path().join("out")).unwrap();
        let mut pace = Pace::beside_guests(&layout);
        assert_eq!(pace.guests.counters.len(), 1);
        let mut stretch = |worked: Duration| {
            pace.since = Instant::now().checked_sub(worked).unwrap();
            let begun = Instant::now();
            pace.wrote(&out, STRETCH - 1).unwrap();
            assert!(begun.elapsed() < worked, "not yet");
            pace.wrote(&out, 1).unwrap();
            begun.elapsed()
        };
        let worked = Duration::from_millis(200);
        assert!(stretch(worked) < worked);
        guest.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let mut said = vec![0; 1_000_001];
        let stdout = guest.stdout.as_mut().unwrap();
        stdout.read_exact(&mut said).unwrap();
        assert!(stretch(worked) >= worked * REST);
        assert!(stretch(worked) < worked);
        // The end of its input is its end.
        drop(guest.stdin.take());
        guest.wait().unwrap();
        // Its end may look like work, once.
        stretch(worked);
        assert!(stretch(worked) < worked);
    }
}
