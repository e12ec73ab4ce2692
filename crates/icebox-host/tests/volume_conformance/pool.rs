//! A ZFS pool in a file, for one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use icebox_engine::id::HeadId;

use crate::ground::{Disk, run};

/// Bytes of its file: more than what comes of the largest test, and little enough to be filled.
const SIZE: u64 = 256 << 20;
/// What is there before Icebox, and must be there after it.
const FOREIGN: [&str; 4] = ["other", "other/disk", "other/disk@before", "icebox/other"];

/// Opens a device as often as the kernel says, by a number that is its own, that it could not look: the first to open a
/// volume waits a second for whoever makes or imports a pool, as other tests do.
pub(crate) fn patiently<T>(open: impl Fn() -> std::io::Result<T>) -> T {
    const ERESTARTSYS: i32 = 512;
    loop {
        match open() {
            Err(error) if error.raw_os_error() == Some(ERESTARTSYS) => {}
            opened => return opened.unwrap(),
        }
    }
}

/// The pool whose name is that of a test's directory.
pub(crate) struct Pool {
    name: String,
    file: PathBuf,
}

impl Pool {
    /// The pool of the test in `directory`, whether or not there is one.
    pub(crate) fn of(directory: &Path) -> Self {
        let name = directory.file_name().unwrap().to_str().unwrap();
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        Self {
            name: format!("icebox-test-{}", letters.collect::<String>()),
            file: Self::beside(&directory.join("image")),
        }
    }

    /// Where the pool's file is that belongs to the file system in `image`.
    pub(crate) fn beside(image: &Path) -> PathBuf {
        let name = image.file_name().unwrap().to_str().unwrap();
        image.with_file_name(format!("pool-of-{name}")).join("disk")
    }

    /// Makes it, with something in it that is not ours.
    pub(crate) fn make(directory: &Path) -> Self {
        let pool = Self::of(directory);
        fs::create_dir(pool.file.parent().unwrap()).unwrap();
        let file = fs::File::create(&pool.file).unwrap();
        file.set_len(SIZE).unwrap();
        // What is written must be what is stored.
        run(Command::new("zpool")
            .args(["create", "-o", "cachefile=none", "-O", "mountpoint=none"])
            .args(["-O", "compression=off", &pool.name])
            .arg(&pool.file));
        pool.zfs(&["create", "-p", &pool.path("icebox/other")]);
        pool.zfs(&["create", "-p", "-s", "-V", "16M", &pool.path("other/disk")]);
        pool.zfs(&["snapshot", &pool.path("other/disk@before")]);
        pool
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn path(&self, below: &str) -> String {
        format!("{}/{below}", self.name)
    }

    /// What the driver is told.
    pub(crate) fn dataset(&self) -> String {
        self.path("icebox")
    }

    /// Runs `zfs`, which must work, and returns what it prints.
    pub(crate) fn zfs(&self, arguments: &[&str]) -> String {
        let output = Command::new("zfs").args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "zfs {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn zpool(&self, arguments: &[&str]) {
        run(Command::new("zpool").args(arguments));
    }

    /// The names of everything below the dataset, without it.
    pub(crate) fn names(&self) -> Vec<String> {
        let dataset = self.dataset();
        let all = self.zfs(&["list", "-H", "-r", "-t", "all", "-o", "name", &dataset]);
        let below = all.lines().filter_map(|name| name.strip_prefix(&dataset));
        let below = below.filter_map(|name| name.strip_prefix('/'));
        below.map(str::to_owned).collect()
    }

    /// The names of the volumes.
    pub(crate) fn volumes(&self) -> Vec<String> {
        let names = self.names().into_iter();
        let volumes = names.filter(|name| !name.contains('@') && name != "other");
        volumes
            .filter_map(|name| Some(name.split_once('/')?.1.to_owned()))
            .collect()
    }

    /// The full name of the volume of a head that was never frozen.
    pub(crate) fn volume_of(&self, disk: &Disk) -> String {
        let HeadId { sandbox, number } = &disk.head;
        let end = format!("/head-{sandbox}-{number}");
        let names = self.names().into_iter();
        let found: Vec<_> = names.filter(|name| name.ends_with(&end)).collect();
        assert_eq!(found.len(), 1, "{end}: {found:?}");
        format!("{}/{}", self.dataset(), found[0])
    }

    pub(crate) fn export(&self) {
        self.zpool(&["export", &self.name]);
    }

    /// Imports the pool in `file`, with further `options`.
    pub(crate) fn import(&self, file: &Path, options: &[&str]) {
        let directory = file.parent().unwrap().to_str().unwrap();
        let mut arguments = vec![
            "import",
            "-d",
            directory,
            "-f",
            "-N",
            "-o",
            "cachefile=none",
        ];
        arguments.extend(options);
        arguments.push(&self.name);
        self.zpool(&arguments);
    }

    /// The same pool as it is in another file.
    pub(crate) fn replace_by(self, file: &Path) -> Self {
        self.export();
        self.import(file, &[]);
        Self {
            file: file.to_owned(),
            ..self
        }
    }

    /// Ends it, if nothing that is not ours is missing or new.
    pub(crate) fn leave(self) {
        let all = self.zfs(&["list", "-H", "-r", "-t", "all", "-o", "name", &self.name]);
        let foreign: Vec<_> = FOREIGN.iter().map(|name| self.path(name)).collect();
        for name in &foreign {
            assert!(all.lines().any(|it| it == name), "{name} is gone: {all}");
        }
        let ours = self.dataset();
        for name in all.lines() {
            let is_known = name == self.name || foreign.iter().any(|it| it == name);
            assert!(is_known || name.starts_with(&ours), "{name} is new");
        }
        self.zpool(&["destroy", &self.name]);
    }

    /// Destroys it, if it is there.
    pub(crate) fn destroy(&self) -> bool {
        Path::new("/dev/zfs").exists()
            && Command::new("zpool")
                .args(["destroy", "-f", &self.name])
                .stderr(Stdio::null())
                .status()
                .unwrap()
                .success()
    }
}
