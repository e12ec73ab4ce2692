//! The QEMU of this host: where it is, and whether it is new enough.

use std::path::{Path, PathBuf};
use std::time::Duration;

use icebox_engine::host::{ErrorKind, HostError};
use tokio::process::Command;

/// The oldest that can map a file read-only and still use it as RAM (`readonly=on,rom=off`). Before, QEMU opens a
/// guest's memory read-write, and a balloon punches holes into what other guests run on.
const OLDEST: (u32, u32) = (8, 2);
/// Where distributions put it.
const USUAL: [&str; 2] = [
    "/usr/bin/qemu-system-x86_64",
    "/usr/local/bin/qemu-system-x86_64",
];
const DEADLINE: Duration = Duration::from_secs(10);

const HINT: &str = "install QEMU 8.2 or newer (Debian 12: from bookworm-backports; Debian 13 and Ubuntu 24.04 have it)";

/// An emulator that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binary {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its version, as it says it: saved state is bound to exactly this text.
    pub(super) version: String,
}

impl Binary {
    /// Looks at the given program, or for one in the usual places.
    pub(super) async fn find(configured: Option<&Path>) -> Result<Self, HostError> {
        let path = match configured {
            Some(path) => path.to_owned(),
            None => USUAL
                .iter()
                .map(PathBuf::from)
                .find(|path| path.exists())
                .ok_or_else(|| {
                    HostError::new(
                        ErrorKind::Unsupported,
                        "QEMU (qemu-system-x86_64) is not installed",
                    )
                    .hint(HINT)
                })?,
        };
        let message = || format!("ask {} for its version", path.display());
        let output = tokio::time::timeout(
            DEADLINE,
            Command::new(&path)
                .arg("--version")
                .kill_on_drop(true)
                .output(),
        )
        .await
        .map_err(|_| HostError::new(ErrorKind::Timeout, message()))?
        .map_err(|error| HostError::io(message(), error).hint(HINT))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("QEMU emulator version "))
            .ok_or_else(|| {
                HostError::new(
                    ErrorKind::Unsupported,
                    format!("{} is not QEMU", path.display()),
                )
                .hint(HINT)
            })?;
        check(version)?;
        Ok(Self {
            version: version.to_owned(),
            path,
        })
    }
}

fn check(version: &str) -> Result<(), HostError> {
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => Ok(()),
        _ => Err(HostError::new(
            ErrorKind::Unsupported,
            format!(
                "QEMU {version} is too old: {}.{} is needed",
                OLDEST.0, OLDEST.1
            ),
        )
        .hint(HINT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_26_an_old_qemu_is_refused_with_what_to_do() {
        let error = check("7.2.13 (Debian 1:7.2+dfsg-7+deb12u7)").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("8.2 is needed"), "{error}");
        assert!(error.hint_text().unwrap().contains("bookworm-backports"));
        assert!(check("8.1.5").is_err());
        assert!(check("nonsense").is_err());
        for good in [
            "8.2.0",
            "10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)",
            "9.0",
        ] {
            check(good).unwrap();
        }
    }

    #[tokio::test]
    async fn inv_26_what_is_not_qemu_is_refused() {
        let error = Binary::find(Some(Path::new("/bin/true")))
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("/bin/true is not QEMU"),
            "{error}"
        );
        let error = Binary::find(Some(Path::new("/nonexistent/qemu")))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.hint_text().is_some());
    }
}
