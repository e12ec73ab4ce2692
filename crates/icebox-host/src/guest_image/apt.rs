//! Gets single packages from the host's own package sources without installing anything.
//!
//! apt resolves and checks signatures and hashes; we only read what it says. The host's package lists are used as they
//! are. When they are missing or so old that the mirror no longer has what they name, fresh lists are taken into a
//! directory of our own: the host's state is never changed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{
    ImageError, Io, Progress, Stage,
    command::{Finished, Tool, Watch},
    staging::make_private_dir,
};

/// One exact package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// Raw `Depends` field, empty when it has none.
    depends: String,
}

impl Package {
    /// The packages it depends on with exactly one version, as Debian's metapackages and split packages do.
    pub(super) fn exact_dependencies(&self) -> Vec<(String, String)> {
        self.depends.split(',').filter_map(exact).collect()
    }
}

/// `name (= version)`, and nothing else.
fn exact(dependency: &str) -> Option<(String, String)> {
    let (name, rest) = dependency.trim().split_once(' ')?;
    let version = rest.trim().strip_prefix("(=")?.strip_suffix(')')?.trim();
    (!version.contains('|')).then(|| (name.to_owned(), version.to_owned()))
}

/// The host's package sources, with its lists or with ours.
pub(super) struct Apt {
    own_lists: PathBuf,
    fresh: Option<Fresh>,
}

/// Lists of our own are in use.
struct Fresh {
    /// What apt said if it could not get all of them. It still exits with 0 then.
    complaint: Option<String>,
}

impl Apt {
    pub(super) fn new(cache: &Path) -> Self {
        Self {
            own_lists: cache.join("apt-lists"),
            fresh: None,
        }
    }

    /// Does `work` with the host's package lists; if that fails, once more with fresh ones.
    pub(super) fn with_lists<T>(
        &mut self,
        progress: &dyn Progress,
        work: impl Fn(&Self) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        match work(self) {
            Err(ImageError::UnknownPackage { .. } | ImageError::Network { .. })
                if self.fresh.is_none() =>
            {
                self.refresh(progress)?;
                work(self)
            }
            other => other,
        }
    }

    fn tool(&self, name: &str) -> Tool {
        // The files are ours and root's: handing the directory to apt's own user would be the wider permission.
        let mut tool = Tool::new(name).args(["-o", "APT::Sandbox::User=root"]);
        if self.fresh.is_some() {
            tool = tool.args([
                "-o",
                &format!("Dir::State::Lists={}", self.own_lists.display()),
            ]);
        }
        tool
    }

    fn refresh(&mut self, progress: &dyn Progress) -> Result<(), ImageError> {
        progress.report(Stage::Resolve, 0, None);
        make_private_dir(&self.own_lists.join("partial"))?;
        // apt fails where it finds its own lock taken; ours waits.
        let lock = self.own_lists.join("refresh.lock");
        let _lock = File::create(&lock)
            .and_then(|file| file.lock().map(|()| file))
            .at("lock", &lock)?;
        // Hooks of the host's configuration act on the host's own state; they have no business with a private copy.
        let config = self.own_lists.join("apt.conf");
        fs::write(
            &config,
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n",
        )
        .at("write", &config)?;
        self.fresh = Some(Fresh { complaint: None });
        let finished = self
            .tool("apt-get")
            .args(["-q", "-c"])
            .arg(&config)
            .arg("update")
            .run()?;
        if !finished.status.success() {
            return Err(classify(finished, &self.own_lists));
        }
        let complaint = finished
            .tail
            .contains("Failed to fetch")
            .then_some(finished.tail);
        self.fresh = Some(Fresh { complaint });
        Ok(())
    }

    /// What the sources offer as `package` (the candidate), or one exact version of it.
    pub(super) fn resolve(
        &self,
        package: &str,
        version: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Package, ImageError> {
        if !is_package_name(package) {
            return Err(ImageError::InvalidPackage {
                package: package.to_owned(),
            });
        }
        progress.report(Stage::Resolve, 0, None);
        let unknown = || match &self.fresh {
            Some(Fresh {
                complaint: Some(complaint),
            }) => ImageError::Network {
                tail: complaint.clone(),
            },
            _ => ImageError::UnknownPackage {
                package: package.to_owned(),
            },
        };
        let wanted = version.map_or_else(
            || package.to_owned(),
            |version| format!("{package}={version}"),
        );
        let finished = self
            .tool("apt-cache")
            .args(["--no-all-versions", "show", &wanted])
            .run()?;
        if !finished.status.success() {
            return Err(unknown());
        }
        let text = finished.text();
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(|value| value.trim().to_owned())
        };
        match (field("Package"), field("Version")) {
            (Some(name), Some(version)) if name == package => Ok(Package {
                name,
                version,
                depends: field("Depends").unwrap_or_default(),
            }),
            _ => Err(unknown()),
        }
    }

    /// Downloads one package into `dir` and returns the file.
    pub(super) fn download(
        &self,
        package: &Package,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<PathBuf, ImageError> {
        self.tool("apt-get")
            .args([
                "-q",
                "-o",
                "APT::Status-Fd=1",
                "download",
                &format!("{}={}", package.name, package.version),
            ])
            .current_dir(dir)
            .watch(Watch::Stdout, |line| {
                if let Some(percent) = download_percent(line) {
                    progress.report(Stage::Download, percent, Some(100));
                }
            })?
            .success_or(|finished| classify(finished, dir))?;
        // apt escapes the colon of an epoch in the file's name; looking for the file is simpler than knowing how.
        let prefix = format!("{}_", package.name);
        for entry in fs::read_dir(dir).at("read the directory", dir)? {
            let entry = entry.at("read the directory", dir)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(&prefix) && name.ends_with(".deb") {
                return Ok(entry.path());
            }
        }
        Err(ImageError::Network {
            tail: format!("apt-get reported success but there is no {prefix}*.deb"),
        })
    }
}

/// The percentage in one of apt's status lines (`dlstatus:<n>:<percent>:<text>`).
fn download_percent(line: &str) -> Option<u64> {
    let (whole, _) = line
        .strip_prefix("dlstatus:")?
        .split(':')
        .nth(1)?
        .split_once('.')?;
    whole.parse().ok()
}

/// Gives the ways apt usually fails their names.
pub(super) fn classify(finished: Finished, dir: &Path) -> ImageError {
    let tail = &finished.tail;
    if tail.contains("No space left on device") || tail.contains("don't have enough free space") {
        return ImageError::NoSpace {
            path: dir.to_owned(),
        };
    }
    if let Some(package) = unknown_package(tail) {
        return ImageError::UnknownPackage { package };
    }
    let unreachable = [
        "Failed to fetch",
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
    ];
    if unreachable.iter().any(|symptom| tail.contains(symptom)) {
        return ImageError::Network {
            tail: finished.tail,
        };
    }
    finished.error()
}

/// The package apt could not find, from its message.
pub(super) fn unknown_package(stderr: &str) -> Option<String> {
    stderr.lines().find_map(|line| {
        let name = line
            .split_once("Unable to locate package ")
            .map(|(_, name)| name)
            .or_else(|| {
                line.split_once("Package '")?
                    .1
                    .split_once("' has no installation candidate")
                    .map(|(name, _)| name)
            })?;
        name.split_whitespace().next().map(ToOwned::to_owned)
    })
}

/// Debian policy 5.6.1, with an optional `:architecture`. Keeps options and patterns out of apt's argument list.
pub(super) fn is_package_name(name: &str) -> bool {
    let (name, arch) = name
        .split_once(':')
        .map_or((name, None), |(name, arch)| (name, Some(arch)));
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() >= 2
        && name.len() <= 128
        && name.bytes().next().is_some_and(lower)
        && name.bytes().all(|b| lower(b) || b"+-.".contains(&b))
        && arch.is_none_or(|arch| !arch.is_empty() && arch.bytes().all(|b| lower(b) || b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_package_names_reach_apt() {
        for good in ["git", "g++", "python3.11", "libc6:i386", "0ad"] {
            assert!(is_package_name(good), "{good}");
        }
        for bad in [
            "",
            "g",
            "-o",
            "--force",
            "Git",
            "a b",
            "a,b",
            "../x",
            "?essential",
            "git=1",
            "git/sid",
            "git:",
        ] {
            assert!(!is_package_name(bad), "{bad}");
        }
    }

    #[test]
    fn exact_dependencies_are_found_and_others_are_not() {
        let package = Package {
            name: "meta".into(),
            version: "1".into(),
            depends: "linux-image-6.1-cloud (= 6.1.2-1), kmod, libc6 (>= 2), linux-modules-6.1 (= 6.1.2-1)".into(),
        };
        assert_eq!(
            package.exact_dependencies(),
            [
                ("linux-image-6.1-cloud".to_owned(), "6.1.2-1".to_owned()),
                ("linux-modules-6.1".to_owned(), "6.1.2-1".to_owned())
            ]
        );
    }

    #[test]
    fn apts_own_words_are_understood() {
        assert_eq!(
            download_percent("dlstatus:1:33.7111:Retrieving file 1 of 1"),
            Some(33)
        );
        assert_eq!(download_percent("Get:1 some file"), None);
        assert_eq!(
            unknown_package("E: Unable to locate package nosuch"),
            Some("nosuch".to_owned())
        );
        assert_eq!(
            unknown_package("x\nE: Package 'ghost' has no installation candidate"),
            Some("ghost".to_owned())
        );
        assert_eq!(unknown_package("E: something else"), None);
    }
}
