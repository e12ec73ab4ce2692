//! Opening the engine: from what is on disk to sandboxes that rest where their manifests say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::{AT_ONCE, Config, Engine, warm};
use crate::catalog::Catalog;
use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::event::{self, Events};
use crate::gate::Gate;
use crate::host::Host;
use crate::id::{GenerationNo, SandboxId};
use crate::layout::Object;
use crate::ledger::Ledger;
use crate::manifest::v1::{self, Generation};
use crate::manifest::{self, Document, ManifestError};
use crate::merge;
use crate::metrics::{self, Metrics};
use crate::sandbox::{Chained, Fate, QUEUE, Sandbox, Shared};
use crate::steps::Steps;
use crate::team::Scope;
use crate::wake::Wakes;

impl Engine {
    /// Opens the store, brings every sandbox to where its manifest says it rests, and removes what nothing holds.
    ///
    /// # Errors
    /// The store cannot be read, a manifest is newer than this build, or that of a sandbox or a template is damaged:
    /// nothing is touched then. What lies below them may be damaged or missing: whatever needs it cannot be used, and is
    /// kept (`template.unusable`, `sandbox.generation-unusable` among the [events](Self::events)).
    pub async fn open(host: Host, config: Config) -> Result<Self, Error> {
        let found = within(
            deadline::STORE,
            "reading the data directory",
            host.store.load(),
        )
        .await?;
        let catalog = Catalog::new(host.network.capacity());
        let newest = host.journal.newest();
        let newest = within(deadline::STORE, "reading the journal", newest).await?;
        let (clock, journal) = (Arc::clone(&host.clock), Arc::clone(&host.journal));
        let events = Events::new(clock, journal, newest);
        let shared = Arc::new(Shared {
            host,
            catalog,
            events,
            metrics: Metrics::default(),
            wakes: Wakes::default(),
            draining: AtomicBool::new(false),
            config,
            collecting: tokio::sync::Mutex::new(()),
            publishing: tokio::sync::Mutex::new(()),
            warming: tokio::sync::Mutex::new(()),
            warmth: watch::Sender::new(()),
        });
        tokio::spawn(event::keep_written(Arc::downgrade(&shared)));
        if shared.config.measures {
            tokio::spawn(metrics::measure(Arc::downgrade(&shared)));
        }
        let engine = Self {
            shared,
            scope: Scope::Everything,
        };
        let mut records = Vec::new();
        let mut generations: BTreeMap<SandboxId, BTreeMap<GenerationNo, Generation>> =
            BTreeMap::new();
        let mut strays = Vec::new();
        let catalog = &engine.shared.catalog;
        for document in found {
            let (object, bytes) = (&document.object, document.manifest.as_deref());
            match object {
                Object::Kernel(_) => {}
                Object::Base(_) => or_flawed(catalog, object, bytes, |catalog, _, base| {
                    catalog.add_base(base);
                })?,
                Object::Layer(_) => or_flawed(catalog, object, bytes, Catalog::add_layer)?,
                Object::Memory(_) => or_flawed(catalog, object, bytes, |catalog, _, memory| {
                    catalog.add_memory(memory);
                })?,
                Object::Template(_) => {
                    let (revision, template) = manifest::decode(object, bytes)?;
                    catalog.add_template(revision, template);
                }
                Object::Generation(sandbox, number) => {
                    let listed = generations.entry(sandbox.clone()).or_default();
                    or_flawed(catalog, object, bytes, |_, _, generation| {
                        listed.insert(*number, generation);
                    })?;
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
        crate::watch::begin(&engine.shared);
        Ok(engine)
    }

    async fn recover(
        &self,
        records: Vec<(u64, v1::Sandbox)>,
        mut generations: BTreeMap<SandboxId, BTreeMap<GenerationNo, Generation>>,
        mut strays: Vec<Object>,
    ) -> Result<(), Error> {
        let shared = &self.shared;
        let mut sandboxes = Vec::new();
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
            sandboxes.push((Sandbox::new(Arc::clone(shared), ledger, gate), requests));
        }
        shared.catalog.find_missing();
        self.report_flaws();
        let mut recovering = JoinSet::new();
        for (mut sandbox, requests) in sandboxes {
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
        self.collect(false).await?;
        tokio::spawn(merge::keep_chains_short(Arc::downgrade(shared)));
        tokio::spawn(warm::keep(Arc::downgrade(shared)));
        Ok(())
    }

    /// Says what there is and cannot be used.
    fn report_flaws(&self) {
        let Shared {
            catalog, events, ..
        } = &*self.shared;
        for (template, why) in self.unusable_templates() {
            let detail = format!("{}: {why}", template.name);
            let (team, kind) = (&template.team, "template.unusable");
            events.emit(Some(team), None, kind, detail, &Steps::default());
        }
        for entry in catalog.sandboxes() {
            for (number, why) in catalog.generation_flaws(&entry.record) {
                let (of, kind) = (&entry.record, "sandbox.generation-unusable");
                let detail = format!("generation {number}: {why}");
                let team = Some(&of.spec.team);
                events.emit(team, Some(&of.id), kind, detail, &Steps::default());
            }
        }
    }
}

/// Reads a manifest, or notes why it cannot be read.
fn or_flawed<T: Document>(
    catalog: &Catalog,
    object: &Object,
    bytes: Option<&[u8]>,
    add: impl FnOnce(&Catalog, u64, T),
) -> Result<(), Error> {
    match manifest::decode(object, bytes) {
        Ok((revision, document)) => add(catalog, revision, document),
        // Whoever wrote it knows what it means.
        Err(error @ (ManifestError::TooNew { .. } | ManifestError::Unknown { .. })) => {
            return Err(error.into());
        }
        Err(error) => {
            let why = Chained(&error.into()).to_string();
            tracing::error!(%object, why, "cannot be used");
            catalog.add_flawed(object.clone(), why);
        }
    }
    Ok(())
}

/// A task that panicked has been reported by the runtime; the others go on.
fn joined(done: Option<Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = done {
        tracing::error!(%error, "a sandbox could not be recovered");
    }
}
