//! A journal in memory, which survives engines as a world does.

use async_trait::async_trait;
use icebox_engine::host::{HostError, Journal, Kept};
use icebox_engine::id::SandboxId;
use icebox_engine::{Event, Sample};

use crate::world::World;

pub(crate) struct SimJournal {
    world: World,
}

impl SimJournal {
    pub(crate) fn new(world: World) -> Self {
        Self { world }
    }
}

#[async_trait]
impl Journal for SimJournal {
    async fn newest(&self) -> Result<u64, HostError> {
        Ok(self.world.lock().events.last().map_or(0, |event| event.seq))
    }

    async fn append(&self, events: &[Event]) -> Result<(), HostError> {
        self.world.lock().events.extend(events.iter().cloned());
        Ok(())
    }

    async fn read(&self, from: u64, limit: usize) -> Result<Kept, HostError> {
        let state = self.world.lock();
        let events = state.events.iter().filter(|event| event.seq >= from);
        Ok(Kept {
            events: events.take(limit).cloned().collect(),
            oldest: state.events.first().map_or(0, |event| event.seq),
        })
    }

    async fn append_samples(&self, samples: &[(SandboxId, Sample)]) -> Result<(), HostError> {
        let mut state = self.world.lock();
        for (sandbox, sample) in samples {
            let kept = state.samples.entry(sandbox.clone()).or_default();
            kept.push(*sample);
        }
        Ok(())
    }

    async fn samples(&self, sandbox: &SandboxId, since: u32) -> Result<Vec<Sample>, HostError> {
        let state = self.world.lock();
        let samples = state.samples.get(sandbox).into_iter().flatten();
        Ok(samples
            .filter(|sample| sample.at >= since)
            .copied()
            .collect())
    }

    async fn forget_samples(&self, sandbox: &SandboxId) -> Result<(), HostError> {
        self.world.lock().samples.remove(sandbox);
        Ok(())
    }
}
