//! Quantities whose unit is part of the type.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

use serde::{Deserialize, Serialize};

/// The page size of every guest and every memory object.
pub const PAGE_SIZE: usize = 4096;

/// A number of bytes. Reported sizes are allocated bytes unless a field says otherwise (INV-27).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self(0), Add::add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        // One decimal of a displayed quantity: the rounding of f64 is far below it.
        #[allow(clippy::cast_precision_loss, reason = "display only")]
        let mut value = self.0 as f64;
        let mut unit = "";
        for next in UNITS {
            if value < 1024.0 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        write!(f, "{value:.1} {unit}")
    }
}

/// What a guest sees of the machine: fixed for the life of a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Geometry {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
}

impl Geometry {
    /// Guest memory in bytes.
    #[must_use]
    pub const fn memory(self) -> Bytes {
        Bytes::mib(self.mem_mib as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes::mib(512).to_string(), "512.0 MiB");
        assert_eq!(Bytes(5 << 40).to_string(), "5.0 TiB");
    }
}
