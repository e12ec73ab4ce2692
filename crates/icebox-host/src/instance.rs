//! Which installation a host object belongs to.
//!
//! Two daemons with different data directories may run on one host. Everything they make outside their directories
//! (network namespaces, interfaces, nftables tables, cgroups) carries the tag below, so neither lists, reuses or
//! removes what belongs to the other.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Bytes of the hash in a tag: the longest that fits an interface name of 15 characters beside a slot number.
const TAG_BYTES: usize = 3;

/// The tag of one installation: six hexadecimal digits of the SHA-256 of its data directory's path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Instance(String);

impl Instance {
    /// The tag of the installation with this data directory. Pure: give it the canonical path, since two spellings
    /// of one directory are two tags.
    #[must_use]
    pub fn of_data_directory(path: &Path) -> Self {
        let hash = Sha256::digest(path.as_os_str().as_bytes());
        Self(
            hash.iter()
                .take(TAG_BYTES)
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }

    /// The tag as text: `[0-9a-f]{6}`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_stable_and_tells_directories_apart() {
        let default = Instance::of_data_directory(Path::new("/var/lib/icebox"));
        // Names on running hosts depend on it: it must never change.
        assert_eq!(default.as_str(), "1596b0");
        assert_ne!(
            default,
            Instance::of_data_directory(Path::new("/srv/icebox"))
        );
    }
}
