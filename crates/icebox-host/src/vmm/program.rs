//! Where a VMM's program is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command as StdCommand;
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError};
use tokio::process::Command;

/// Where packages of Icebox put programs that only it uses.
const OURS: &str = "/usr/lib/icebox";
/// A program that has not said its version by then is none of those that are looked for.
const DEADLINE: Duration = Duration::from_secs(10);

/// Looks for a program: where the settings say, else in `PATH`, else in `/usr/lib/icebox`.
///
/// # Errors
/// It is nowhere ([`ErrorKind::NotFound`]).
pub(crate) fn find(configured: Option<&Path>, name: &str) -> Result<PathBuf, HostError> {
    if let Some(path) = configured {
        if path.is_file() {
            return Ok(path.to_owned());
        }
        return Err(HostError::new(
            ErrorKind::NotFound,
            format!("{} is not there", path.display()),
        ));
    }
    let search = env::var_os("PATH").unwrap_or_default();
    find_in(env::split_paths(&search).chain([OURS.into()]), name).ok_or_else(|| {
        HostError::new(
            ErrorKind::NotFound,
            format!("{name} is neither in PATH nor in {OURS}"),
        )
    })
}

/// In relative directories nothing is found: which those are is not the daemon's to say.
fn find_in(directories: impl Iterator<Item = PathBuf>, name: &str) -> Option<PathBuf> {
    directories
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// What a program says when it is asked for its version. Waits for it, for at most ten seconds.
///
/// # Errors
/// It cannot be started, or does not end.
pub(crate) async fn version(program: &Path) -> Result<String, HostError> {
    answer(program, "--version").await
}

/// What a program says to a question. Waits for it, for at most ten seconds.
///
/// # Errors
/// It cannot be started, or does not end.
pub(crate) async fn answer(program: &Path, question: &str) -> Result<String, HostError> {
    let message = || format!("ask {} {question}", program.display());
    let mut command = StdCommand::new(program);
    command.arg(question);
    let output = Command::from(command).kill_on_drop(true).output();
    let output = tokio::time::timeout(DEADLINE, output)
        .await
        .map_err(|_| HostError::new(ErrorKind::Timeout, message()))?
        .map_err(|error| HostError::io(message(), error))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first two numbers of a version.
pub(crate) fn major_and_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_26_a_program_is_where_it_is_said_to_be_or_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().join("here");
        std::fs::create_dir(&here).unwrap();
        let program = here.join("vmm");
        std::fs::write(&program, "").unwrap();
        assert_eq!(find(Some(&program), "other").unwrap(), program);
        // What was asked for is never replaced by what is found elsewhere.
        let error = find(Some(&here.join("missing")), "sh").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("missing is not there"));
        assert!(find(None, "sh").unwrap().ends_with("sh"));
        let error = find(None, "no-such-vmm").unwrap_err();
        assert!(error.to_string().contains("neither in PATH nor in"));

        let places = || [PathBuf::from("."), directory.path().into(), here.clone()];
        assert_eq!(find_in(places().into_iter(), "vmm"), Some(program));
        assert_eq!(find_in(places().into_iter(), "here"), None, "a directory");
    }

    #[test]
    fn versions_begin_with_two_numbers() {
        assert_eq!(major_and_minor("53.0.0"), Some((53, 0)));
        assert_eq!(major_and_minor("10.0.2 (Debian 1:10.0.2)"), Some((10, 0)));
        assert_eq!(major_and_minor("53"), None);
        assert_eq!(major_and_minor("next"), None);
    }
}
