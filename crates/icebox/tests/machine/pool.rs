//! A pool for real: a loop device, an XFS, and a daemon whose data are in it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use icebox_host::skip::skip;
use serde_json::Value;

use crate::mounts::can_mount;
use crate::refusals::under;
use crate::support::{Place, icebox, root};

/// Small, and enough for a daemon.
const SIZE: &str = "512M";
const BYTES: u64 = 512 << 20;
/// How long the kernel may take to give all back.
const PATIENCE: Duration = Duration::from_secs(20);

/// The pool of one place, and a look at what it leaves.
struct Ground {
    place: Place,
}

impl Ground {
    /// Where a pool can be tried; if nowhere here, says why `test` does not run.
    fn of(test: &str) -> Option<Self> {
        if !root(test) || !can_mount("xfs", test) {
            return None;
        }
        let place = Place::new();
        // A pool has nothing to offer there, and says so.
        let probe = |name: &str| place.path(name);
        std::fs::write(probe("from"), [1; 4096]).unwrap();
        let cloned = Command::new("cp")
            .arg("--reflink=always")
            .args([probe("from"), probe("to")])
            .output()
            .unwrap();
        if cloned.status.success() {
            skip(test, "the file system of temporary files shares extents");
            return None;
        }
        std::fs::remove_file(probe("from")).unwrap();
        std::fs::remove_file(probe("to")).unwrap_or_default();
        std::fs::write(place.path("fstab"), "# a comment\n").unwrap();
        Some(Self { place })
    }

    fn image(&self) -> PathBuf {
        self.place.path("data.xfs")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = icebox();
        command
            .arg("pool")
            .args(arguments)
            .arg("--data-dir")
            .arg(self.place.data())
            .arg("--fstab")
            .arg(self.place.path("fstab"));
        command
    }

    #[track_caller]
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        said(&output)
    }

    #[track_caller]
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(1),
            "{arguments:?}: {}",
            said(&output)
        );
        let said = said(&output);
        assert!(said.contains("hint:"), "{said}");
        said
    }

    fn listed(&self) -> Value {
        let output = self.command(&["ls", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn fstab(&self) -> String {
        std::fs::read_to_string(self.place.path("fstab")).unwrap()
    }

    /// Loop devices and mounts of this place.
    fn left(&self) -> Vec<String> {
        let directory = self.place.path("");
        let ours = |text: &str| text.contains(directory.to_str().unwrap());
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = mounts.lines().filter(|line| ours(line)).map(str::to_owned);
        let devices = std::fs::read_dir("/sys/block").unwrap().flatten();
        let loops = devices.filter_map(|device| {
            let backing = device.path().join("loop/backing_file");
            std::fs::read_to_string(backing)
                .ok()
                .filter(|file| ours(file))
        });
        mounts.chain(loops).collect()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let unmount = Command::new("umount")
                .arg("--lazy")
                .arg(self.place.data())
                .output();
            unmount.map(drop).unwrap_or_default();
            return;
        }
        // A process that another test starts may still hold the mount in a namespace that it leaves at once.
        let begun = Instant::now();
        while !self.left().is_empty() && begun.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        assert_eq!(self.left(), Vec::<String>::new(), "left on the host");
    }
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

#[test]
fn a_pool_is_made_used_by_reflink_and_removed() {
    let Some(mut ground) = Ground::of("a_pool_is_made_used_by_reflink_and_removed") else {
        return;
    };
    let before = ground.fstab();
    ground.done(&["create", "--size", SIZE]);
    let image = std::fs::metadata(ground.image()).unwrap();
    assert_eq!(image.len(), BYTES);
    assert!(
        image.blocks() * 512 >= BYTES,
        "allocated in full: {}",
        image.blocks() * 512
    );
    let pools = ground.listed();
    assert_eq!(pools[0]["path"], ground.image().to_str().unwrap());
    assert_eq!(pools[0]["mountedOn"], ground.place.data().to_str().unwrap());
    assert_eq!(pools[0]["atBoot"], true);
    let line = ground.fstab();
    let line = line.lines().last().unwrap();
    assert!(
        line.contains("nofail") && line.contains(" xfs loop,"),
        "{line}"
    );
    let mode = std::fs::metadata(ground.place.data()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);

    // Again: nothing happens, and nothing else is made of it.
    assert!(ground.done(&["create", "--size", SIZE]).contains("already"));
    assert!(
        ground
            .refused(&["create", "--size", "600M"])
            .contains("512.0 MiB instead of 600.0")
    );
    assert_eq!(ground.fstab().lines().count(), 2);

    ground.place.settings = "volume_driver = \"reflink\"".to_owned();
    let daemon = ground.place.start(ground.place.serve());
    let doctor: Value = serde_json::from_str(&daemon.get(&["--json", "doctor"])).unwrap();
    let checks = doctor["checks"].as_array().unwrap();
    let tried = |check: &&Value| check["name"] == "volume driver reflink";
    let reflink = checks.iter().find(tried).expect("it was tried");
    assert_eq!(reflink["result"], "works", "{reflink}");
    let said = reflink["detail"].as_str().unwrap();
    assert!(said.ends_with("the default"), "{said}");
    assert!(ground.refused(&["rm"]).contains("a daemon uses"));
    daemon.stop();

    // What is in it goes only if that is said.
    let template = ground.place.data().join("templates/taaaaaaaaaaaaaaaaaaaa");
    std::fs::create_dir(template).unwrap();
    assert!(ground.refused(&["rm"]).contains("1 templates"));
    ground.done(&["rm", "--force"]);
    assert_eq!(ground.listed(), Value::Array(Vec::new()));
    assert_eq!(ground.fstab(), before);
    assert!(!ground.image().exists() && is_empty(&ground.place.data()));
    assert!(ground.refused(&["rm"]).contains("has no pool"));
}

#[test]
fn a_pool_that_is_not_mounted_is_no_data_directory_and_is_mounted_again() {
    const TEST: &str = "a_pool_that_is_not_mounted_is_no_data_directory_and_is_mounted_again";
    let Some(ground) = Ground::of(TEST) else {
        return;
    };
    // What an interrupted call has left.
    std::fs::write(ground.place.path("data.xfs.new"), "half").unwrap();
    ground.done(&["create", "--size", SIZE]);
    assert!(!ground.place.path("data.xfs.new").exists());
    std::fs::write(ground.place.data().join("kept"), "x").unwrap();
    let unmounted = Command::new("umount")
        .arg(ground.place.data())
        .status()
        .unwrap();
    assert!(unmounted.success());

    // As after a boot at which it could not be mounted.
    let said = ground.place.refused(&mut ground.place.serve());
    assert!(
        said.contains("pool") && said.contains("not mounted") && said.contains("hint:"),
        "{said}"
    );
    assert_eq!(ground.listed()[0]["mountedOn"], Value::Null);
    assert!(
        ground
            .refused(&["create", "--size", "600M"])
            .contains("exists already")
    );
    ground.done(&["create", "--size", SIZE]);
    assert!(
        ground.place.data().join("kept").exists(),
        "it is the same one"
    );
    assert_eq!(ground.fstab().lines().count(), 2);
    std::fs::remove_file(ground.place.data().join("kept")).unwrap();
    ground.done(&["rm"]);
}

#[test]
fn pools_that_cannot_be() {
    let Some(ground) = Ground::of("pools_that_cannot_be") else {
        return;
    };
    let before = ground.fstab();
    let data = ground.place.data();
    assert!(
        ground
            .refused(&["create", "--size", "100M"])
            .contains("too small")
    );
    assert!(
        ground
            .refused(&["create", "--size", "-1"])
            .contains("-1 MiB")
    );
    assert!(
        ground
            .refused(&["create", "--size", "900T"])
            .contains("does not fit")
    );
    let elsewhere = ["create", "--size", SIZE, "--path", "/nonexistent/pool"];
    assert!(ground.refused(&elsewhere).contains("/nonexistent"));
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("thesis.txt"), "precious").unwrap();
    assert!(
        ground
            .refused(&["create", "--size", SIZE])
            .contains("not empty")
    );
    std::fs::remove_file(data.join("thesis.txt")).unwrap();

    let create = ground.command(&["create", "--size", SIZE]);
    let mut without_root = under("unshare", &["--user"], &create);
    let said_without = said(&without_root.output().unwrap());
    assert!(
        said_without.contains("only root") && said_without.contains("hint:"),
        "{said_without}"
    );
    // Without mkfs.xfs: nothing is in any of its places.
    let hidden = under(
        "unshare",
        &["--mount", "sh", "-c", "for d in /usr/local/sbin /usr/sbin /sbin; do mount -t tmpfs none $d 2>/dev/null; done; exec \"$0\" \"$@\""],
        &create,
    )
    .output()
    .unwrap();
    let said_hidden = said(&hidden);
    assert!(
        said_hidden.contains("mkfs.xfs is not installed") && said_hidden.contains("xfsprogs"),
        "{said_hidden}"
    );

    assert_eq!(ground.fstab(), before);
    assert!(is_empty(&data), "nothing is left");
    assert!(!ground.image().exists());
}
