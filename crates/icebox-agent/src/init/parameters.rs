//! What the host says on the kernel command line.

use std::{fs, io, path::Path};

/// The parameters of the kernel command line, `name=value` separated by blanks.
pub(crate) struct KernelParameters {
    line: String,
}

/// The command line could not be read.
#[derive(Debug, thiserror::Error)]
#[error("failed to read the kernel command line from {path}")]
pub(crate) struct ParametersError {
    path: String,
    source: io::Error,
}

impl KernelParameters {
    /// Reads them from a file, normally `/proc/cmdline`.
    pub(crate) fn read(path: &Path) -> Result<Self, ParametersError> {
        let line = fs::read_to_string(path).map_err(|source| ParametersError {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self { line })
    }

    /// The value of a parameter; of several, the last.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let mut values = self
            .line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        values.next_back().filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::KernelParameters;

    #[test]
    fn names_match_whole() {
        let line =
            "console=ttyS0 icebox.root=/dev/vdb quiet icebox.rootfstype=xfs icebox.dns= a=1 a=2\n"
                .to_owned();
        let parameters = KernelParameters { line };
        assert_eq!(parameters.get("icebox.root"), Some("/dev/vdb"));
        assert_eq!(parameters.get("icebox.rootfstype"), Some("xfs"));
        assert_eq!(parameters.get("a"), Some("2"));
        for absent in ["icebox.dns", "quiet", "root", "icebox"] {
            assert_eq!(parameters.get(absent), None);
        }
    }
}
