//! Whether a VMM without privileges may have pages loaded when KVM touches them.

use std::fs;
use std::path::Path;

/// Lets a userfaultfd be had without privileges, since Linux 6.1.
pub(super) const USERFAULTFD: &str = "/dev/userfaultfd";

/// Whether it may: by the device, which its box gets, or since everybody may.
pub(super) fn is_there() -> bool {
    const EVERYBODY: &str = "/proc/sys/vm/unprivileged_userfaultfd";
    Path::new(USERFAULTFD).exists()
        || fs::read_to_string(EVERYBODY).is_ok_and(|allowed| allowed.trim() == "1")
}
