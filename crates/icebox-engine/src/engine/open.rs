//! Opening the engine: from what is on disk to sandboxes that rest where their manifests say.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{AT_ONCE, Config, Engine};
use crate::catalog::Catalog;
use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::event::Events;
use crate::gate::Gate;
use crate::host::Host;
use crate::id::{GenerationNo, SandboxId};
use crate::layout::Object;
use crate::ledger::Ledger;
use crate::manifest::v1::{self, Generation};
use crate::manifest::{self, ManifestError};
use crate::sandbox::{Fate, QUEUE, Sandbox, Shared};

impl Engine {
    /// Opens the store, brings every sandbox to where its manifest says it rests, and removes what nothing holds.
    ///
    /// # Errors
    /// The store cannot be read, or a manifest is damaged or newer than this build: nothing is touched then.
    pub async fn open(host: Host, config: Config) -> Result<Self, Error> {
        let found = within(
            deadline::STORE,
            "reading the data directory",
            host.store.load(),
        )
        .await?;
        let catalog = Catalog::new(host.network.capacity());
        let events = Events::default();
        let shared = Arc::new(Shared {
            host,
            catalog,
            events,
            config,
            collecting: tokio::sync::Mutex::new(()),
        });
        let engine = Self { shared };
        let mut records = Vec::new();
        let mut generations: BTreeMap<SandboxId, BTreeMap<GenerationNo, Generation>> =
            BTreeMap::new();
        let mut strays = Vec::new();
        let catalog = &engine.shared.catalog;
        for document in found {
            let (object, bytes) = (&document.object, document.manifest.as_deref());
            match object {
                Object::Kernel(_) => {}
                Object::Base(_) => catalog.add_base(manifest::decode(object, bytes)?.1),
                Object::Layer(_) => catalog.add_layer(manifest::decode(object, bytes)?.1),
                Object::Memory(_) => catalog.add_memory(manifest::decode(object, bytes)?.1),
                Object::Template(_) => catalog.add_template(manifest::decode(object, bytes)?.1),
                Object::Generation(sandbox, number) => {
                    let (_, generation) = manifest::decode(object, bytes)?;
                    generations
                        .entry(sandbox.clone())
                        .or_default()
                        .insert(*number, generation);
                }
                Object::Sandbox(_) => match manifest::decode::<v1::Sandbox>(object, bytes) {
                    Ok(record) => records.push(record),
                    // The directory is made just before the first manifest is put into it.
                    Err(ManifestError::Missing { .. }) => strays.push(object.clone()),
                    Err(error) => return Err(error.into()),
                },
            }
        }
        engine.recover(records, generations, strays).await?;
        Ok(engine)
    }

    async fn recover(
        &self,
        records: Vec<(u64, v1::Sandbox)>,
        mut generations: BTreeMap<SandboxId, BTreeMap<GenerationNo, Generation>>,
        mut strays: Vec<Object>,
    ) -> Result<(), Error> {
        let shared = &self.shared;
        let mut recovering = JoinSet::new();
        for (revision, record) in records {
            let mut listed = generations.remove(&record.id).unwrap_or_default();
            // One that no commit has listed does not exist: the pause that wrote it did not happen.
            let unlisted: Vec<_> = listed
                .keys()
                .filter(|number| !record.generations.contains(number))
                .copied()
                .collect();
            for number in unlisted {
                listed.remove(&number);
                strays.push(Object::Generation(record.id.clone(), number));
            }
            let (gate, (mailbox, requests)) = (Gate::default(), mpsc::channel(QUEUE));
            shared
                .catalog
                .restore(record.clone(), listed, gate.clone(), mailbox);
            let ledger = Ledger::found(Arc::clone(&shared.host.store), revision, record);
            let mut sandbox = Sandbox::new(Arc::clone(shared), ledger, gate);
            if recovering.len() >= AT_ONCE {
                joined(recovering.join_next().await);
            }
            recovering.spawn(async move {
                if sandbox.bring_back().await == Fate::Lives {
                    tokio::spawn(sandbox.run(requests));
                }
            });
        }
        while let Some(done) = recovering.join_next().await {
            joined(Some(done));
        }
        collect::sweep(shared, strays).await;
        self.make_slots_ready();
        self.collect(false).await.map(drop)
    }
}

/// A task that panicked has been reported by the runtime; the others go on.
fn joined(done: Option<Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = done {
        tracing::error!(%error, "a sandbox could not be recovered");
    }
}
