//! What everything occupies, and who shares it.
//!
//! Bytes are counted once, at the object that stores them. Who needs an object is derived from the manifests, as the
//! collector does it: what one sandbox or template needs alone is its own, and goes with it; the rest is shared.
//!
//! ```text
//!   sandbox a ── head ── layer 1 ──┐
//!       └─ generation ── memory    ├── base        a: head, layer 1, memory, its directory are its own
//!   template ──────────────────────┘                  the base is shared with the template
//! ```
//! A volume driver whose files share blocks with each other counts what each file stores alone, so blocks that only some
//! of a sandbox's own files share are in no sum. The free space of the file system is the whole truth.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::StreamExt as _;

use super::{AT_ONCE, Engine};
use crate::catalog::{OTHERS, Owner};
use crate::deadline::{self, within};
use crate::error::Error;
use crate::layout::Object;
use crate::sandbox::{Chained, find_volume_driver};
use crate::team::Scope;
use crate::unit::Bytes;

/// What a sandbox or a template occupies, in allocated bytes (INV-27).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What people call it: `sandbox a`.
    pub name: String,
    /// What nothing else needs.
    pub own: Bytes,
    /// What others need, too.
    pub shared: Bytes,
    /// What it consists of, itself first.
    pub parts: Vec<Part>,
    /// Whether something could not be measured and is left out.
    pub incomplete: bool,
}

/// One object that something needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which one.
    pub object: Object,
    /// Its allocated bytes.
    pub allocated: Bytes,
    /// Who else needs it: `sandbox a`, `template python`.
    pub shared_with: Vec<String>,
}

/// What everything occupies.
#[derive(Clone, Debug, Default)]
pub struct Usages {
    /// By sandbox and template.
    pub owners: BTreeMap<Object, Usage>,
    /// The objects of each kind: how many, and what they occupy together.
    pub kinds: BTreeMap<&'static str, (usize, Bytes)>,
    /// What nothing needs: the next collection removes it.
    pub unneeded: Bytes,
}

/// The kind of an object, as a heading.
fn kind(object: &Object) -> &'static str {
    match object {
        Object::Kernel(_) => "kernels",
        Object::Base(_) => "bases",
        Object::Layer(_) => "layers",
        Object::Memory(_) => "memories",
        Object::Template(_) => "templates",
        Object::Sandbox(_) | Object::Generation(..) => "sandboxes",
    }
}

/// Everything that is needed, with who needs it.
struct Needs {
    owners: Vec<Owner>,
    users: BTreeMap<Object, Vec<usize>>,
    scope: Scope,
}

impl Needs {
    fn new(owners: Vec<Owner>, scope: Scope) -> Self {
        let mut users = BTreeMap::<_, Vec<_>>::new();
        for (number, owner) in owners.iter().enumerate() {
            for object in owner.needs.iter().chain([&owner.object]) {
                users.entry(object.clone()).or_default().push(number);
            }
        }
        Self {
            owners,
            users,
            scope,
        }
    }

    /// What an owner is called to whoever asks.
    fn name_of(&self, number: usize) -> String {
        let owner = &self.owners[number];
        match self.scope.owns(&owner.team) {
            true => owner.name.clone(),
            false => OTHERS.to_owned(),
        }
    }

    fn usage(&self, number: usize, sizes: &BTreeMap<Object, Option<Bytes>>) -> Usage {
        let owner = &self.owners[number];
        let mut usage = Usage {
            name: owner.name.clone(),
            ..Usage::default()
        };
        for object in std::iter::once(&owner.object).chain(&owner.needs) {
            let Some(allocated) = sizes.get(object).copied().flatten() else {
                usage.incomplete = true;
                continue;
            };
            let users = self.users.get(object).into_iter().flatten();
            let others = users.filter(|user| **user != number);
            let mut shared_with: Vec<_> = others.map(|other| self.name_of(*other)).collect();
            shared_with.dedup();
            let sum = if shared_with.is_empty() {
                &mut usage.own
            } else {
                &mut usage.shared
            };
            *sum = *sum + allocated;
            usage.parts.push(Part {
                object: object.clone(),
                allocated,
                shared_with,
            });
        }
        usage
    }
}

impl Engine {
    /// What a sandbox or template occupies.
    ///
    /// # Errors
    /// There is no such thing.
    pub async fn usage(&self, of: &Object) -> Result<Usage, Error> {
        let needs = Needs::new(self.shared.catalog.owners(), self.scope.clone());
        let number = needs.owners.iter().position(|owner| owner.object == *of);
        let Some(number) = number else {
            return Err(Error::Unknown {
                kind: "object",
                wanted: of.to_string(),
                hint: "it was removed meanwhile".into(),
            });
        };
        let owner = &needs.owners[number];
        let wanted = owner.needs.iter().chain([&owner.object]).cloned();
        let sizes = self.sizes(&needs, wanted.collect()).await;
        Ok(needs.usage(number, &sizes))
    }

    /// What everything occupies. Looks at every object's files.
    pub async fn usages(&self) -> Usages {
        let needs = Needs::new(self.shared.catalog.owners(), self.scope.clone());
        let mut wanted: BTreeSet<Object> = needs.users.keys().cloned().collect();
        let unneeded = self.shared.catalog.unreachable();
        wanted.extend(unneeded.iter().cloned());
        let sizes = self.sizes(&needs, wanted).await;
        let mut usages = Usages::default();
        for (number, owner) in needs.owners.iter().enumerate() {
            let usage = needs.usage(number, &sizes);
            usages.owners.insert(owner.object.clone(), usage);
        }
        for (object, size) in &sizes {
            let size = size.unwrap_or_default();
            let (count, sum) = usages.kinds.entry(kind(object)).or_default();
            (*count, *sum) = (*count + 1, *sum + size);
            if unneeded.contains(object) {
                usages.unneeded = usages.unneeded + size;
            }
        }
        usages
    }

    /// Allocated bytes of these objects; `None` for one that cannot be measured.
    async fn sizes(
        &self,
        needs: &Needs,
        objects: BTreeSet<Object>,
    ) -> BTreeMap<Object, Option<Bytes>> {
        let sizes = objects.into_iter().map(|object| async move {
            let owner = needs.owners.iter().find(|owner| owner.object == object);
            let size = self.size(&object, owner).await;
            if let Err(error) = &size {
                tracing::debug!(%object, error = %Chained(error), "not measured");
            }
            (object, size.ok())
        });
        futures_util::stream::iter(sizes)
            .buffer_unordered(AT_ONCE)
            .collect()
            .await
    }

    pub(super) async fn size(
        &self,
        object: &Object,
        owner: Option<&Owner>,
    ) -> Result<Bytes, Error> {
        const STEP: &str = "measuring an object";
        let host = &self.shared.host;
        if let Object::Layer(layer) = object
            && let Ok(driver) = self.shared.catalog.layer_driver(layer)
            && let Ok(driver) = find_volume_driver(host, &driver)
        {
            return within(deadline::DISK, STEP, driver.layer_usage(layer)).await;
        }
        let files = within(deadline::DISK, STEP, host.store.allocated(object)).await?;
        let Some((driver, head)) = owner.and_then(|owner| owner.head.as_ref()) else {
            return Ok(files);
        };
        let driver = find_volume_driver(host, driver)?;
        let head = within(deadline::DISK, STEP, driver.head_usage(head)).await?;
        Ok(files + head)
    }
}
