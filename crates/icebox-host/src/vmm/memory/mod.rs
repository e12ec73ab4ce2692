//! Guest memory seen from outside the VMM.
//!
//! A VMM maps the immutable base of a memory privately: the kernel loads pages when the guest touches them, shares
//! them between all guests on the same base, and gives a page that the guest *writes* a copy of its own. Those copies
//! are exactly the anonymous pages of the mapping, and `/proc/<pid>/pagemap` tells them from the others. A save
//! therefore needs no help from the VMM, finds what changed in time proportional to the size of the page table, and
//! never sees a page that was not loaded yet as zero: such a page simply is not changed (INV-08).
//!
//! ```text
//!   base   file, as long as the guest's memory, sparse, mapped privately            (shared by everything on it)
//!   diff   pages that differ from the base, all of them: cumulative, never a chain  (written before a restore)
//! ```

mod diff;
mod flat;
mod process;
mod save;

pub(crate) use diff::{Diff, DiffError};
pub(crate) use flat::save_flat;
pub(crate) use process::{GuestRam, MappedPart, ProcessMemory, ProcessMemoryError};
pub(crate) use save::{SaveError, SaveOutcome, save, save_file};

use icebox_engine::unit::PAGE_SIZE;

/// What an untouched page holds.
static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The page size as a file offset.
const PAGE: u64 = PAGE_SIZE as u64;
