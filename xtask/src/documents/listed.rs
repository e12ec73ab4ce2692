//! The tests that there are, by their own word.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::run::{Built, Failure, built_by, cargo, target};

/// Where tests name those that they leave out, with the reason (`icebox_host::skip`).
const SKIPPED: &str = "ICEBOX_SKIPPED";

/// Every test of the workspace.
pub(super) struct Listed {
    /// The functions: by crate, test program and name, where each of them is found: modules before the name, and what is
    /// tested after it.
    tests: BTreeMap<Test, BTreeSet<String>>,
}

/// A test function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    pub(super) tier: Tier,
    /// The test program, or the crate of a unit test.
    pub(super) program: String,
    pub(super) name: String,
}

/// What a test needs, from nothing at all to a machine with real guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tier {
    Unit,
    Sim,
    Cli,
    Host,
    System,
}

impl Tier {
    pub(super) const ALL: [Self; 5] = [Self::Unit, Self::Sim, Self::Cli, Self::Host, Self::System];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Sim => "sim",
            Self::Cli => "cli",
            Self::Host => "host",
            Self::System => "system",
        }
    }

    /// The tier of a test program of a crate; `None` for one without tests.
    fn of(package: &str, kind: &str, program: &str) -> Option<Self> {
        match (package, kind, program) {
            (_, "lib" | "bin", _) => Some(Self::Unit),
            ("icebox-sim", "test", _) => Some(Self::Sim),
            ("icebox", "test", "cli") => Some(Self::Cli),
            ("icebox", "test", "system" | "machine") => Some(Self::System),
            (_, "test", _) => Some(Self::Host),
            _ => None,
        }
    }
}

impl Listed {
    /// Builds the test programs, unless they are built, and asks each of them.
    pub(super) fn ask() -> Result<Self, Failure> {
        let built = built_by(&mut cargo(["test", "--quiet", "--workspace", "--no-run"]))?;
        let mut listed = Self {
            tests: BTreeMap::new(),
        };
        for program in built.iter().filter_map(Program::of) {
            listed.add(&program)?;
        }
        Ok(listed)
    }

    fn add(&mut self, program: &Program) -> Result<(), Failure> {
        let skipped = target().join("listed-tests");
        let failed = |error: &dyn std::fmt::Display| {
            Failure(format!("{} --list: {error}", program.path.display()))
        };
        fs::write(&skipped, "").map_err(|error| failed(&error))?;
        let output = Command::new(&program.path)
            .arg("--list")
            .current_dir(&program.directory)
            .env(SKIPPED, &skipped)
            .output()
            .map_err(|error| failed(&error))?;
        if !output.status.success() {
            return Err(failed(&output.status));
        }
        let listed = String::from_utf8_lossy(&output.stdout);
        let listed = listed
            .lines()
            .filter_map(|line| line.strip_suffix(": test"));
        // What cannot be run by this program alone, and says so, is a test too.
        let apart = fs::read_to_string(&skipped).map_err(|error| failed(&error))?;
        let apart = apart.lines().filter_map(|line| line.split_once(": "));
        for path in listed.chain(apart.map(|(name, _)| name)) {
            let (name, place) = parted(path);
            let test = Test {
                tier: program.tier,
                program: program.name.clone(),
                name: name.to_owned(),
            };
            self.tests.entry(test).or_default().insert(place);
        }
        fs::remove_file(&skipped).map_err(|error| failed(&error))
    }

    /// The tests that prove an invariant, with where each of them is found.
    pub(super) fn proving(&self, number: u32) -> Vec<(&Test, &BTreeSet<String>)> {
        let word = format!("inv_{number:02}_");
        let proves = |test: &Test| test.name.contains(&word);
        self.tests.iter().filter(|(test, _)| proves(test)).collect()
    }

    /// The invariants that tests claim to prove.
    pub(super) fn claimed(&self) -> BTreeSet<u32> {
        let of = |test: &Test| -> Vec<u32> {
            let numbers = test.name.split("inv_").skip(1);
            numbers
                .filter_map(|rest| rest.split('_').next()?.parse().ok())
                .collect()
        };
        self.tests.keys().flat_map(of).collect()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tests.keys().any(|test| test.name == name)
    }
}

/// The function's name in a test's path, and the rest of the path: modules, without those that only hold tests, or what
/// the function is tested with.
fn parted(path: &str) -> (&str, String) {
    let segments: Vec<_> = path.split("::").collect();
    let last = segments.len() - 1;
    let named = |segment: &&str| segment.starts_with("inv_");
    let at = segments.iter().position(named);
    // Names of drivers have no underscores; names of tests have.
    let guess = if segments[last].contains('_') {
        last
    } else {
        last.saturating_sub(1)
    };
    let at = at.unwrap_or(guess);
    let place: Vec<_> = segments
        .iter()
        .enumerate()
        .filter(|(index, segment)| *index != at && **segment != "tests")
        .map(|(_, segment)| *segment)
        .collect();
    (segments[at], place.join("::"))
}

/// A test program.
struct Program {
    path: PathBuf,
    directory: PathBuf,
    tier: Tier,
    name: String,
}

impl Program {
    /// One that runs tests, of a tier.
    fn of(built: &Built) -> Option<Self> {
        if !built.is_test {
            return None;
        }
        let package = built.directory.file_name()?.to_str()?;
        let tier = Tier::of(package, &built.kind, &built.name)?;
        let name = if tier == Tier::Unit {
            package
        } else {
            &built.name
        };
        Some(Self {
            path: built.executable.clone(),
            directory: built.directory.clone(),
            tier,
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::parted;

    #[test]
    fn a_path_is_a_name_and_a_place() {
        for (path, name, place) in [
            ("phase::tests::inv_19_a", "inv_19_a", "phase"),
            (
                "drivers::inv_03_b::dm-snapshot",
                "inv_03_b",
                "drivers::dm-snapshot",
            ),
            ("zfs_on_ext4::inv_25_c", "inv_25_c", "zfs_on_ext4"),
            ("crash::a_second_one::qcow2", "a_second_one", "crash::qcow2"),
            ("inv_01_d", "inv_01_d", ""),
        ] {
            assert_eq!(parted(path), (name, place.to_owned()));
        }
    }
}
