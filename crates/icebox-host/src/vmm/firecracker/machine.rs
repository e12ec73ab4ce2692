//! One running Firecracker.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use icebox_engine::host::{ExitReason, HostError, MemorySource, ProcessIdentity, SavePlan};
use serde_json::{Value, json};

use super::config::{self, Extent, SAVED_MEMORY, SAVED_STATE};
use crate::launcher::Ended;
use crate::pager::{self, state::FilledPart};
use crate::vmm::api::{Api, ApiError};
use crate::vmm::asked::{AskedMachine, FLIP_DEADLINE, Taken, Ways};
use crate::vmm::memory::{self, GuestRam, MappedPart, ProcessMemory, SaveError};
use crate::vmm::own_save::SaveArea;
use crate::vmm::watched::how_it_ended;

/// A Firecracker and the way to it.
pub(crate) type FirecrackerMachine = AskedMachine<FirecrackerWays>;

/// Memory below the devices' addresses is one piece, what is above them another: 3 GiB, as in `arch/x86_64/layout.rs` of
/// Firecracker's sources. A save checks that it is so.
const BELOW_DEVICES: u64 = 3 << 30;

/// How it is asked.
#[derive(Debug, Default)]
pub(crate) struct FirecrackerWays {
    /// What its pager says, if it has one.
    pub(super) pager_state: PathBuf,
    /// Whether it was ended since its pager had.
    pub(super) lost: Lost,
}

/// Whether a VMM was ended since its pager had.
pub(super) type Lost = Arc<AtomicBool>;

#[async_trait]
impl Ways for FirecrackerWays {
    const STATE: &'static str = "/";
    const SAVE: &'static str = "/snapshot/create";

    async fn pause(&self, api: &Api) -> Result<(), ApiError> {
        let paused = json!({ "state": "Paused" });
        api.patch("/vm", &paused, FLIP_DEADLINE).await
    }

    async fn resume(&self, api: &Api) -> Result<(), ApiError> {
        let resumed = json!({ "state": "Resumed" });
        api.patch("/vm", &resumed, FLIP_DEADLINE).await
    }

    /// It always has: what was not touched yet is in the file that its memory is mapped or filled from.
    async fn loaded(&self, _: &Api) -> Result<(), ApiError> {
        Ok(())
    }

    /// All memory if the guest was booted, what has changed since the last save if it was restored.
    fn save_request(plan: &SavePlan) -> Value {
        config::save_request(match plan.restored_from {
            Some(_) => Extent::Diff,
            None => Extent::Full,
        })
    }

    /// What has changed since the restore is not taken from its save alone, but from the guest's own pages: saves that
    /// failed, or that an earlier daemon made, are of no account.
    fn take(
        &self,
        area: &SaveArea,
        process: &ProcessIdentity,
        plan: &SavePlan,
        message: &str,
    ) -> Result<Taken, HostError> {
        let state_bytes = area.take_state(SAVED_STATE, &plan.device_state, message)?;
        let (memory, length) = area.open_memory(SAVED_MEMORY, message)?;
        let Some(MemorySource { base, .. }) = &plan.restored_from else {
            return Ok(Taken::AllBut {
                memory,
                length,
                state_bytes,
            });
        };
        let saved = save_changes((process, &self.pager_state), base, &memory, length, plan)
            .map_err(|error| error.into_host(message.to_owned()))?;
        Ok(Taken::Whole(saved.with_state(state_bytes)))
    }

    /// How it ended. It ends well only when the guest resets its machine, which is also how one is turned off.
    fn exit_reason(&self, ended: Ended, last_words: &str) -> ExitReason {
        if self.lost.load(Ordering::Acquire) {
            return without_pager(last_words);
        }
        let by_guest = ended == Ended::Exited(0);
        ExitReason {
            by_guest,
            // It may as well have been turned off: this VMM knows nothing else.
            reset: false,
            detail: if by_guest {
                "the guest reset its machine".to_owned()
            } else {
                how_it_ended(super::DIALECT.name, ended, last_words.lines())
            },
        }
    }
}

/// How it ended, if its pager did before. Its guest would wait for memory for ever.
fn without_pager(last_words: &str) -> ExitReason {
    let words: Vec<&str> = last_words.lines().collect();
    ExitReason {
        by_guest: false,
        reset: false,
        detail: format!(
            "Firecracker was ended, since what fills its guest's memory (the pager) had ended{}{}",
            if words.is_empty() { "" } else { ": " },
            words.join("; ")
        ),
    }
}

fn save_changes(
    (process, pager_state): (&ProcessIdentity, &Path),
    base: &Path,
    written: &File,
    length: u64,
    plan: &SavePlan,
) -> Result<memory::SaveOutcome, SaveError> {
    let failed = |operation, source| SaveError::File {
        operation,
        path: base.to_owned(),
        source,
    };
    let old = File::open(base).map_err(|source| failed("open", source))?;
    let bytes = old.metadata().map_err(|source| failed("look at", source))?;
    if bytes.len() != length {
        let what = format!("{length} bytes were saved");
        return Err(failed("compare", std::io::Error::other(what)));
    }
    let process = ProcessMemory::open(process)?;
    let filled = pager::state::read(pager_state, length).map_err(|source| SaveError::File {
        operation: "read",
        path: pager_state.to_owned(),
        source,
    })?;
    let parts = match filled {
        None => process.find_parts(base, &parts(length))?,
        Some(filled) => filled_parts(&process, filled)?,
    };
    memory::save_flat(&process, &parts, (&old, base), written, &plan.memory)
}

/// The pieces of a memory that a pager fills, which are to be where it has said.
fn filled_parts(
    process: &ProcessMemory,
    filled: Vec<FilledPart>,
) -> Result<Vec<MappedPart>, SaveError> {
    let mut parts = Vec::new();
    for part in filled {
        let ram = GuestRam {
            address: part.address,
            bytes: part.bytes,
        };
        process.check_anonymous(ram)?;
        parts.push(MappedPart {
            ram,
            offset: part.offset,
            replaced: part.removed,
            is_filled: true,
        });
    }
    Ok(parts)
}

/// The pieces that a guest's memory is mapped in.
fn parts(bytes: u64) -> Vec<Range<u64>> {
    let below = bytes.min(BELOW_DEVICES);
    let parts = [0..below, below..bytes];
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_devices_is_a_piece_of_its_own() {
        const GIB: u64 = 1 << 30;
        let ends = |gib: u64| {
            let parts = parts(gib * GIB);
            let ends = parts.iter().map(|part| (part.start / GIB, part.end / GIB));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(ends(1), [(0, 1)]);
        assert_eq!(ends(3), [(0, 3)]);
        assert_eq!(ends(5), [(0, 3), (3, 5)]);
    }
}
