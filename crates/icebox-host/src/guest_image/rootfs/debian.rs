//! A Debian root directory, by mmdebstrap.
//!
//! Packages come from the mirror this machine itself uses, checked against the archive's keys. What the image gets to
//! see is what mmdebstrap writes by itself: no mirror, proxy or name of the build machine stays in it. Downloads are kept
//! in the cache and linked into the next build.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use icebox_engine::id::Digest;

use super::super::{
    ImageError, Io, Places, Progress, Stage,
    apt::{self, is_package_name, unknown_package},
    command::{Finished, Tool, Watch},
    digest::digest_of,
    staging::make_private_dir,
};
use crate::fs::{entries, remove_file};

/// What the cache of downloaded packages is cut down to after a build.
const CACHE_BYTES: u64 = 1 << 30;
/// Messages of apt and dpkg kept for an error.
const PROBLEMS: usize = 12;

const SETUP_HOOK: &str = include_str!("debian_setup.sh");
const EXTRACT_HOOK: &str = include_str!("debian_extract.sh");
const CUSTOMIZE_HOOK: &str = include_str!("debian_customize.sh");

/// A release and the packages to take from it; names checked.
pub(super) struct Release<'a> {
    suite: &'a str,
    include: Vec<&'a str>,
}

impl<'a> Release<'a> {
    pub(super) fn new(suite: &'a str, include: &'a [String]) -> Result<Self, ImageError> {
        if !is_suite_name(suite) {
            return Err(ImageError::InvalidSuite {
                suite: suite.to_owned(),
            });
        }
        let mut names: Vec<&str> = include.iter().map(String::as_str).collect();
        if let Some(bad) = names.iter().find(|name| !is_package_name(name)) {
            return Err(ImageError::InvalidPackage {
                package: (*bad).to_owned(),
            });
        }
        names.sort_unstable();
        names.dedup();
        Ok(Self {
            suite,
            include: names,
        })
    }

    pub(super) fn identity(&self) -> Digest {
        digest_of(format!("debian\0{}\0{}", self.suite, self.include.join(",")).as_bytes())
    }

    /// Installs the release into the new directory `tree`.
    pub(super) fn install(
        &self,
        places: &Places,
        tree: &Path,
        progress: &dyn Progress,
    ) -> Result<(), ImageError> {
        if !rustix::process::geteuid().is_root() {
            return Err(ImageError::NeedsRoot {
                op: "installing packages into an image",
            });
        }
        progress.report(Stage::Resolve, 0, None);
        let cache = places.cache.join("apt");
        make_private_dir(&cache)?;
        let mirrors = Mirrors::of_host(self.suite)?;
        let options = tree.with_extension("apt.conf");
        fs::write(&options, network_options()?).at("write", &options)?;
        let mut tool = Tool::with_descendants("mmdebstrap")
            .args([
                "--verbose",
                "--mode=root",
                "--variant=minbase",
                "--format=directory",
            ])
            // Both would empty or refuse the package cache that the hooks fill and keep.
            .args(["--skip=download/empty", "--skip=essential/unlink"])
            // A tree that a crash makes worthless needs no fsync for each of its files: half the time of a build. The
            // customise hook takes the option out again.
            .arg("--dpkgopt=force-unsafe-io")
            .arg(format!("--aptopt={}", options.display()))
            .arg(format!("--setup-hook={SETUP_HOOK}"))
            .arg(format!("--extract-hook={EXTRACT_HOOK}"))
            .arg(format!("--customize-hook={CUSTOMIZE_HOOK}"))
            .env("ICEBOX_DEB_CACHE", &cache)
            .env("ICEBOX_INCLUDE", self.include.join(" "))
            .env("ICEBOX_MIRROR", mirrors.main.unwrap_or_default())
            .env(
                "ICEBOX_SECURITY_MIRROR",
                mirrors.security.unwrap_or_default(),
            );
        if !self.include.is_empty() {
            tool = tool.arg(format!("--include={}", self.include.join(",")));
        }
        let mut log = Log::default();
        let finished = tool
            .arg(self.suite)
            .arg(tree)
            .watch(Watch::Stderr, |line| log.line(line, progress))?;
        finished.success_or(|finished| self.explain(finished, log, tree))?;
        prune(&cache, CACHE_BYTES)
    }

    fn explain(&self, mut finished: Finished, log: Log, tree: &Path) -> ImageError {
        // The cause is often followed by more lines than the tail keeps.
        let problems = Vec::from(log.problems).join("\n");
        if !problems.is_empty() {
            finished.tail = problems;
        }
        if unknown_package(&finished.tail).is_none()
            && finished.tail.contains("does not have a Release file")
            && !finished.tail.contains("Could not resolve")
        {
            return ImageError::UnknownSuite {
                suite: self.suite.to_owned(),
            };
        }
        apt::classify(finished, tree)
    }
}

/// A code name, or one with a suffix (`bookworm-backports` has no base system, but saying so is apt's job).
fn is_suite_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Reads mmdebstrap's and apt's output for progress and for what went wrong.
#[derive(Default)]
struct Log {
    packages: u64,
    downloaded: u64,
    installed: u64,
    problems: VecDeque<String>,
}

impl Log {
    fn line(&mut self, line: &str, progress: &dyn Progress) {
        if let Some(count) = newly_installed(line) {
            self.packages += count;
        } else if line.starts_with("Get:") && self.packages > 0 {
            self.downloaded += 1;
            progress.report(
                Stage::Download,
                self.downloaded.min(self.packages),
                Some(self.packages),
            );
        } else if line.starts_with("Unpacking ") || line.starts_with("Setting up ") {
            // Each package is seen twice.
            self.installed += 1;
            progress.report(
                Stage::Install,
                (self.installed / 2).min(self.packages),
                Some(self.packages),
            );
        } else if ["E:", "Err:", "W:", "dpkg: error"]
            .iter()
            .any(|start| line.starts_with(start))
        {
            if self.problems.len() == PROBLEMS {
                self.problems.pop_front();
            }
            self.problems.push_back(line.to_owned());
        }
    }
}

/// `0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded.`
fn newly_installed(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once(" upgraded, ")?;
    rest.split_once(" newly installed")?.0.parse().ok()
}

/// How this machine's apt reaches the network and how strict it is about time, as a configuration file: mmdebstrap's apt
/// reads nothing of the host's by itself. A file and not an argument, for a proxy may have a password.
fn network_options() -> Result<String, ImageError> {
    let dump = Tool::new("apt-config")
        .args(["dump", "--format", "%F \"%v\";%n"])
        .run()?
        .success()?;
    Ok(keep_network_options(&dump.text()))
}

fn keep_network_options(dump: &str) -> String {
    const KEPT: [&str; 6] = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
        "Acquire::Retries ",
        "Acquire::ForceIP",
    ];
    dump.lines()
        .filter(|line| KEPT.iter().any(|start| line.starts_with(start)))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// The mirrors this machine takes Debian from; `None` leaves mmdebstrap's default.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mirrors {
    main: Option<String>,
    security: Option<String>,
}

impl Mirrors {
    fn of_host(suite: &str) -> Result<Self, ImageError> {
        let os_release = Path::new("/etc/os-release");
        let os = fs::read_to_string(os_release).at("read", os_release)?;
        let field = |name: &str| {
            os.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches('"'))
        };
        if field("ID") != Some("debian") {
            return Ok(Self::default());
        }
        let targets = Tool::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "$(REPO_URI) $(RELEASE) $(COMPONENT)",
                "Created-By: Packages",
            ])
            .run()?
            .success()?;
        Ok(Self::choose(
            &targets.text(),
            suite,
            field("VERSION_CODENAME").unwrap_or_default(),
        ))
    }

    /// `targets` has one `URI release component` per line. A source of the wanted suite is best, one of the host's own
    /// release has the same archive.
    fn choose(targets: &str, suite: &str, host: &str) -> Self {
        let find = |suffix: &str| {
            [suite, host, "stable"].iter().find_map(|name| {
                targets.lines().find_map(|line| {
                    let mut words = line.split(' ');
                    let (uri, release, component) = (words.next()?, words.next()?, words.next()?);
                    (release == format!("{name}{suffix}")
                        && component == "main"
                        && is_plain_uri(uri))
                    .then(|| uri.trim_end_matches('/').to_owned())
                })
            })
        };
        Self {
            main: find(""),
            security: find("-security"),
        }
    }
}

/// One that can stand in a source list and in a shell script's variable without quoting.
fn is_plain_uri(uri: &str) -> bool {
    ["http://", "https://", "file:/"]
        .iter()
        .any(|scheme| uri.starts_with(scheme))
        && uri
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~:/%+@[]".contains(&b))
}

/// Removes the packages that were used longest ago until at most `limit` bytes are left.
fn prune(cache: &Path, limit: u64) -> Result<(), ImageError> {
    let mut debs: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in entries(cache)? {
        // Another build may be pruning too.
        if let Ok(metadata) = entry.metadata() {
            let used = metadata.modified().at("look at", &entry.path())?;
            debs.push((used, metadata.len(), entry.path()));
        }
    }
    debs.sort_by(|a, b| b.cmp(a));
    let mut total = 0;
    for (_, length, path) in debs {
        total += length;
        if total > limit {
            remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_image::Silent;

    #[test]
    fn only_names_reach_mmdebstrap() {
        for bad in [
            "",
            "-x",
            "../x",
            "Bookworm",
            "book worm",
            "/etc",
            "a,b",
            &"x".repeat(65),
        ] {
            assert!(
                matches!(Release::new(bad, &[]), Err(ImageError::InvalidSuite { .. })),
                "{bad}"
            );
        }
        let include = vec!["git".to_owned(), "--hook=evil".to_owned()];
        assert!(matches!(
            Release::new("bookworm", &include),
            Err(ImageError::InvalidPackage { .. })
        ));
        let a = ["git".to_owned(), "curl".to_owned(), "git".to_owned()];
        let b = ["curl".to_owned(), "git".to_owned()];
        assert_eq!(
            Release::new("bookworm", &a).unwrap().identity(),
            Release::new("bookworm", &b).unwrap().identity()
        );
    }

    #[test]
    fn only_what_reaches_the_network_is_taken_from_the_hosts_apt() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://p.example:3128\";\n\
                    DPkg::Post-Invoke:: \"rm -f x\";\nAcquire::Check-Valid-Until \"false\";\n\
                    Acquire::Languages \"none\";\n";
        assert_eq!(
            keep_network_options(dump),
            "Acquire::http::Proxy \"http://p.example:3128\";\nAcquire::Check-Valid-Until \"false\";\n"
        );
    }

    #[test]
    fn the_mirror_of_another_suite_is_the_hosts() {
        let targets = "http://other.example/cloud cloud-bookworm main\n\
                       http://m.example/debian/ bookworm main\n\
                       http://m.example/debian/ bookworm contrib\n\
                       http://m.example/debian-security/ bookworm-security main\n";
        let expected = Mirrors {
            main: Some("http://m.example/debian".to_owned()),
            security: Some("http://m.example/debian-security".to_owned()),
        };
        assert_eq!(Mirrors::choose(targets, "trixie", "bookworm"), expected);
        assert_eq!(Mirrors::choose(targets, "bookworm", "bookworm"), expected);
        assert_eq!(
            Mirrors::choose("", "trixie", "bookworm"),
            Mirrors::default()
        );
        assert_eq!(
            Mirrors::choose(
                "http://m.example/$(x) bookworm main",
                "bookworm",
                "bookworm"
            ),
            Mirrors::default()
        );
    }

    #[test]
    fn the_cache_keeps_what_was_used_last() {
        let dir = tempfile::tempdir().unwrap();
        for (name, age) in [("old.deb", 300), ("older.deb", 400), ("new.deb", 1)] {
            let path = dir.path().join(name);
            fs::write(&path, [0; 100]).unwrap();
            let time = SystemTime::now() - std::time::Duration::from_secs(age);
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_modified(time)
                .unwrap();
        }
        prune(dir.path(), 250).unwrap();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["new.deb", "old.deb"]);
    }

    #[test]
    fn the_cause_survives_a_long_log() {
        let mut log = Log::default();
        log.line("E: Unable to locate package nosuch", &Silent);
        for n in 0..500 {
            log.line(&format!("Setting up thing{n}"), &Silent);
        }
        assert_eq!(log.problems, ["E: Unable to locate package nosuch"]);
        assert_eq!(
            newly_installed("0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded."),
            Some(69)
        );
    }
}
