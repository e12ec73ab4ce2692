//! What one installation has left on the host: the leak diff that every test ends with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use icebox_host::instance::Instance;
use icebox_host::volume::digest_of_stream;

/// Directories under the data directory whose entries are objects.
const OBJECTS: [&str; 7] = [
    "bases",
    "layers",
    "memories",
    "sandboxes",
    "staging",
    "templates",
    "trash",
];

/// Where an installation's traces are.
pub(crate) struct Traces {
    pub(crate) data: PathBuf,
    pub(crate) run: PathBuf,
    /// What of a pool it may use.
    pub(crate) dataset: Option<String>,
}

/// Everything of one installation that is on the host at one instant, in words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Marks(BTreeSet<String>);

impl Traces {
    /// What tells this installation's objects on the host from others'.
    pub(crate) fn tag(&self) -> String {
        Instance::of_data_directory(&self.data).to_string()
    }

    pub(crate) fn look(&self) -> Marks {
        let mut marks = BTreeSet::new();
        for directory in OBJECTS {
            note(&mut marks, &self.data.join(directory), |_| true);
        }
        note(&mut marks, &self.run.join("vm"), |_| true);
        let stem = format!("ibx{}-", self.tag());
        let ours = |name: &str| name.starts_with(&stem);
        note(&mut marks, Path::new("/run/netns"), ours);
        note(&mut marks, Path::new("/sys/class/net"), ours);
        for group in self.cgroups() {
            marks.insert(format!("cgroup {}", group.display()));
        }
        for (process, held) in self.processes() {
            marks.insert(format!("process {process} with {}", held.display()));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            if Path::new(mount).starts_with(&self.run) || mount.contains(&stem) {
                marks.insert(format!("mount {mount}"));
            }
        }
        let tables = Command::new("nft")
            .args(["list", "tables"])
            .output()
            .unwrap();
        let tables = String::from_utf8(tables.stdout).unwrap();
        let table = format!("icebox_{}", self.tag());
        if tables.lines().any(|line| line.ends_with(&table)) {
            marks.insert(format!("nft table {table}"));
        }
        for device in entries(Path::new("/sys/block")) {
            let backing = device.join("loop/backing_file");
            if fs::read_to_string(&backing)
                .is_ok_and(|file| Path::new(file.trim_end()).starts_with(&self.data))
            {
                marks.insert(format!("loop {}", device.display()));
            }
        }
        for device in self.mapped() {
            marks.insert(format!("device {device}"));
        }
        if let Some(dataset) = &self.dataset {
            // A snapshot moves to another volume when what it was in goes, and a volume is named by who wrote to it first.
            let mut kept = 0;
            marks.extend(list(dataset, "volume,snapshot").iter().map(|name| {
                match name.split_once('@') {
                    Some((_, snapshot)) => format!("snapshot {snapshot}"),
                    None if name.contains("/kept-") => {
                        kept += 1;
                        format!("kept volume {kept}")
                    }
                    None => format!("volume {name}"),
                }
            }));
        }
        Marks(marks)
    }

    /// Names of the device-mapper devices of this installation.
    pub(crate) fn mapped(&self) -> Vec<String> {
        let stem = format!("icebox-{}-", self.tag());
        entries(Path::new("/sys/block"))
            .iter()
            .filter_map(|device| fs::read_to_string(device.join("dm/name")).ok())
            .map(|name| name.trim_end().to_owned())
            .filter(|name| name.starts_with(&stem))
            .collect()
    }

    /// Each snapshot in the pool, with a digest of what is in it.
    pub(crate) fn volume_digests(&self) -> Vec<String> {
        let Some(dataset) = &self.dataset else {
            return Vec::new();
        };
        let digest = |name: &String| {
            let mut command = Command::new("zfs");
            let send = command.args(["send", name]).stdout(Stdio::piped());
            let mut send = send.spawn().unwrap();
            let digest = digest_of_stream(send.stdout.as_mut().unwrap()).unwrap();
            assert!(send.wait().unwrap().success(), "zfs send {name}");
            let (_, snapshot) = name.split_once('@').unwrap();
            format!("{snapshot} {digest}")
        };
        let mut digests: Vec<_> = list(dataset, "snapshot").iter().map(digest).collect();
        assert!(!digests.is_empty(), "{dataset} has no snapshots");
        digests.sort_unstable();
        digests
    }

    /// Control groups of sandboxes, of every hierarchy there is.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let name = format!("icebox-{}", self.tag());
        let root = Path::new("/sys/fs/cgroup");
        entries(root)
            .into_iter()
            .chain([root.to_owned()])
            .map(|hierarchy| hierarchy.join(&name))
            .flat_map(|parent| entries(&parent))
            .filter(|path| path.is_dir())
            .collect()
    }

    /// Processes that hold a file of this installation open, other than daemons: by pid, with the file.
    pub(crate) fn processes(&self) -> Vec<(u32, PathBuf)> {
        let mut found = Vec::new();
        for process in entries(Path::new("/proc")) {
            let Some(pid) = name(&process).parse().ok() else {
                continue;
            };
            // Those that end meanwhile are none of ours any more.
            let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
            if !program.starts_with("qemu-system") {
                continue;
            }
            let held = entries(&process.join("fd"))
                .iter()
                .filter_map(|fd| fs::read_link(fd).ok())
                .find(|file| file.starts_with(&self.data));
            found.extend(held.map(|file| (pid, file)));
        }
        found
    }
}

impl Marks {
    /// Fails if anything came or went between `self` and `after`.
    pub(crate) fn assert_same(&self, after: &Self) {
        let came: Vec<_> = after.0.difference(&self.0).collect();
        let went: Vec<_> = self.0.difference(&after.0).collect();
        assert!(
            came.is_empty() && went.is_empty(),
            "left behind: {came:#?}\nlost: {went:#?}"
        );
    }

    /// The one path with `area` in it that came between `before` and `self`.
    pub(crate) fn came_since(&self, before: &Self, area: &str) -> PathBuf {
        let new = self.0.difference(&before.0);
        let new: Vec<_> = new.filter(|mark| mark.contains(area)).collect();
        assert_eq!(new.len(), 1, "{new:?}");
        PathBuf::from(new[0])
    }

    /// Fails if there is anything.
    pub(crate) fn assert_none(&self) {
        assert!(self.0.is_empty(), "left behind: {:#?}", self.0);
    }
}

fn note(marks: &mut BTreeSet<String>, directory: &Path, ours: impl Fn(&str) -> bool) {
    for entry in entries(directory) {
        if ours(&name(&entry)) {
            marks.insert(entry.display().to_string());
        }
    }
}

/// What is in a directory; nothing if there is none.
pub(crate) fn entries(directory: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(directory).into_iter().flatten();
    listed
        .map_while(Result::ok)
        .map(|entry| entry.path())
        .collect()
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The names of all datasets of these kinds below one.
fn list(dataset: &str, kinds: &str) -> Vec<String> {
    let listed = Command::new("zfs")
        .args(["list", "-H", "-o", "name", "-t", kinds, "-r", dataset])
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).unwrap();
    names.lines().map(str::to_owned).collect()
}
