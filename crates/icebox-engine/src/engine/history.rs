//! History: every point that a sandbox can go back to, and what each occupies.

use std::sync::Arc;

use futures_util::StreamExt as _;

use super::{AT_ONCE, Engine};
use crate::deadline::{self, within};
use crate::error::Error;
use crate::id::{GenerationNo, LayerId};
use crate::layout::Object;
use crate::manifest::v1::{self, Branch, Generation};
use crate::sandbox::{Chained, find_volume_driver};
use crate::unit::Bytes;

/// A sandbox's past.
#[derive(Clone, Debug)]
pub struct History {
    /// The sandbox: where it rests, and after which generation.
    pub record: Arc<v1::Sandbox>,
    /// Its generations, oldest first.
    pub generations: Vec<PastGeneration>,
    /// Its branches, oldest first.
    pub branches: Vec<PastBranch>,
    /// Allocated bytes of what was written to its disk since the last freeze. `None` if it has no newer disk than the
    /// generation at which it is paused, or if that cannot be measured.
    pub newest_disk: Option<Bytes>,
}

/// A generation in a history.
#[derive(Clone, Debug)]
pub struct PastGeneration {
    /// Its number.
    pub number: GenerationNo,
    /// What it holds. `None` if its manifest is missing or cannot be read.
    pub generation: Option<Generation>,
    /// Allocated bytes of its layer, without those under it. `None` if that cannot be measured.
    pub disk: Option<Bytes>,
    /// Why it cannot be resumed, if so.
    pub unusable: Option<String>,
}

/// A branch in a history.
#[derive(Clone, Debug)]
pub struct PastBranch {
    /// The branch.
    pub branch: Branch,
    /// Allocated bytes of its layer, without those under it. `None` if that cannot be measured.
    pub disk: Option<Bytes>,
}

impl Engine {
    /// Every point that a sandbox can go back to. Looks at the files of each.
    ///
    /// # Errors
    /// There is no such sandbox.
    pub async fn history(&self, wanted: &str) -> Result<History, Error> {
        let catalog = &self.shared.catalog;
        let entry = catalog.sandbox(&self.scope, wanted)?;
        let record = Arc::clone(&entry.record);
        let mut unusable = catalog.generation_flaws(&record);
        let numbers = record.generations.iter();
        let generations: Vec<_> = numbers
            .map(|number| {
                let generation = entry.generations.get(number).cloned();
                (*number, generation, unusable.remove(number))
            })
            .collect();
        let generations = generations
            .into_iter()
            .map(async |(number, generation, unusable)| {
                let layer = generation.as_ref().map(|it| it.capture.layer.clone());
                PastGeneration {
                    number,
                    disk: self.layer_size(layer).await,
                    generation,
                    unusable,
                }
            });
        let generations = futures_util::stream::iter(generations).buffered(AT_ONCE);
        let branches = record.branches.clone().into_iter();
        let branches = branches.map(async |branch| PastBranch {
            disk: self.layer_size(Some(branch.layer.clone())).await,
            branch,
        });
        let branches = futures_util::stream::iter(branches).buffered(AT_ONCE);
        Ok(History {
            generations: generations.collect().await,
            branches: branches.collect().await,
            newest_disk: self.head_size(&record).await,
            record,
        })
    }

    async fn layer_size(&self, layer: Option<LayerId>) -> Option<Bytes> {
        let size = self.size(&Object::Layer(layer?), None).await;
        if let Err(error) = &size {
            tracing::debug!(error = %Chained(error), "not measured");
        }
        size.ok()
    }

    async fn head_size(&self, record: &v1::Sandbox) -> Option<Bytes> {
        let head = record.head()?;
        let driver = find_volume_driver(&self.shared.host, &record.spec.volume_driver).ok()?;
        let size = driver.head_usage(&head);
        let size = within(deadline::DISK, "measuring a head", size).await;
        size.ok()
    }
}
