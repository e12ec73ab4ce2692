//! What exists, in memory: an index over the manifests, and the one place that knows who needs what.
//!
//! References are *derived* from the records here, never counted (INV-52): an object is needed if a template, a
//! sandbox or a [`Pin`] reaches it. A pin is how work in flight keeps what it has looked up or is about to publish.
//! One lock orders everything: looking an object up and pinning it is one step, and so is finding it unreachable and
//! forgetting it, so nothing can be collected between its look-up and its use. No lock is held across an await.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::error::Error;
use crate::gate::Gate;
use crate::host::{Chain, HostError};
use crate::id::{
    Digest, GenerationNo, HeadId, LayerId, MemoryId, Name, SandboxId, Slot, Team, TemplateId,
};
use crate::layout::Object;
use crate::manifest::v1::{
    Base, Capture, Generation, Hold, Intent, Layer, Memory, Rest, Sandbox, Spec, Template,
    TemplateContent, Under,
};
use crate::sandbox::Mailbox;
use crate::steps::LastVerb;
use crate::team::{Holdings, Quota, Scope};
use crate::unit::Bytes;

/// What is said of the things of other teams.
pub(crate) const OTHERS: &str = "another team";

pub(crate) struct Catalog {
    slots: u16,
    inner: Arc<Mutex<Inner>>,
    unpinned: Arc<Notify>,
    layers_added: watch::Sender<()>,
}

#[derive(Default)]
struct Inner {
    bases: BTreeMap<Digest, Base>,
    layers: BTreeMap<LayerId, StoredLayer>,
    memories: BTreeMap<MemoryId, Memory>,
    templates: BTreeMap<TemplateId, StoredTemplate>,
    sandboxes: BTreeMap<SandboxId, Entry>,
    names_in_making: BTreeSet<(&'static str, Team, Name)>,
    pins: BTreeMap<u64, BTreeSet<Object>>,
    quotas: BTreeMap<Team, Quota>,
    /// Sandboxes that do not run yet and count as if they did, and how often.
    starting: BTreeMap<SandboxId, u32>,
    /// What a start could not read, or did not find though something refers to it, and why. Nothing that needs one of
    /// these is used, and while something does, nothing is collected: what they need themselves is not known.
    flawed: BTreeMap<Object, String>,
    /// Forgotten, and not removed yet: nobody can come to need them, and every collection tries again.
    condemned: BTreeSet<Object>,
    next_pin: u64,
}

/// A sandbox, as everybody but its own task sees it.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) record: Arc<Sandbox>,
    pub(crate) generations: BTreeMap<GenerationNo, Generation>,
    /// What its task is doing, in words.
    pub(crate) busy: Option<&'static str>,
    /// The last verb that had something to do with it.
    pub(crate) last_verb: Option<Arc<LastVerb>>,
    /// A head that was lost while it was written to, and why.
    lost: Option<(u32, String)>,
    /// Whether its guest stands still for want of room.
    pub(crate) stalled: bool,
    /// Whether somebody is to get it, of those that it waits for.
    claimed: bool,
    pub(crate) gate: Gate,
    pub(crate) mailbox: Mailbox,
}

/// A sandbox, with what is only known of everything together.
pub(crate) struct Seen {
    pub(crate) entry: Entry,
    /// How many layers lie under its disk.
    pub(crate) layers: usize,
    /// See [`Catalog::generation_flaws`].
    pub(crate) unusable: BTreeMap<GenerationNo, String>,
}

impl Entry {
    /// Whether nobody is to see it. What is broken is for somebody to remove.
    fn is_hidden(&self) -> bool {
        self.record.waits && self.record.broken.is_none()
    }

    /// Whether it waits for somebody who wants this. What its guest does not depend on may be anything.
    fn waits_for(&self, wanted: &Spec) -> bool {
        let (it, can_be_had) = (&self.record, !self.claimed && self.busy.is_none());
        if !it.waits || !can_be_had || self.is_spoilt() || self.stalled {
            return false;
        }
        let as_asked = Spec {
            env: wanted.env.clone(),
            doors: wanted.doors,
            metadata: wanted.metadata.clone(),
            history: wanted.history.clone(),
            ..it.spec.clone()
        };
        as_asked == *wanted
    }

    /// Whether nobody can get it any more, though it waits.
    pub(crate) fn is_spoilt(&self) -> bool {
        let runs = self.record.rests == Rest::Running && self.record.broken.is_none();
        self.busy.is_none() && (self.claimed || !runs)
    }

    /// Why the sandbox's newest disk is lost, if it is.
    pub(crate) fn disk_lost(&self) -> Option<&str> {
        let (lost, why) = self.lost.as_ref()?;
        let is_held = |hold: &Hold| matches!(hold, Hold::Head { number, .. } if number == lost);
        self.record
            .holds
            .iter()
            .any(is_held)
            .then_some(why.as_str())
    }
}

/// A layer, and how often its manifest has been committed.
#[derive(Clone)]
pub(crate) struct StoredLayer {
    pub(crate) layer: Layer,
    pub(crate) revision: u64,
}

/// A template, and how often its manifest has been committed.
struct StoredTemplate {
    template: Template,
    revision: u64,
}

impl Deref for StoredTemplate {
    type Target = Template;

    fn deref(&self) -> &Template {
        &self.template
    }
}

/// A chain all of whose layers are kept, also when somebody makes the chain of the same disk a shorter one meanwhile.
pub(crate) struct PinnedChain {
    pub(crate) chain: Chain,
    _pin: Pin,
}

impl Deref for PinnedChain {
    type Target = Chain;

    fn deref(&self) -> &Chain {
        &self.chain
    }
}

/// A layer of a chain that is too deep.
pub(crate) struct Link {
    pub(crate) stored: StoredLayer,
    /// Whether something needs it other than the layer above it in the chain: it stays when that one goes by.
    pub(crate) shared: bool,
}

/// A chain that is too deep, newest layer first, all of it kept.
pub(crate) struct DeepChain {
    pub(crate) links: Vec<Link>,
    _pin: Pin,
}

/// A sandbox or template, and what it needs.
pub(crate) struct Owner {
    pub(crate) object: Object,
    /// What people call it: `sandbox a`.
    pub(crate) name: String,
    pub(crate) team: Team,
    /// The head that it holds, and whose that is.
    pub(crate) head: Option<(String, HeadId)>,
    /// Bases, layers and memories, the newest first.
    pub(crate) needs: Vec<Object>,
}

/// Keeps objects from the collector until it is dropped.
pub(crate) struct Pin {
    inner: Arc<Mutex<Inner>>,
    unpinned: Arc<Notify>,
    number: u64,
}

/// Has a sandbox count as running for its team, until its record says whether it does.
pub(crate) struct PowerTurn {
    inner: Arc<Mutex<Inner>>,
    sandbox: SandboxId,
}

/// A name that is taken by a template in the making, or by a sandbox that is to get it.
pub(crate) struct NameReservation {
    inner: Arc<Mutex<Inner>>,
    taken: (&'static str, Team, Name),
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // The index is changed by single inserts and removes: a panic elsewhere leaves it whole.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Pin {
    fn drop(&mut self) {
        lock(&self.inner).pins.remove(&self.number);
        self.unpinned.notify_waiters();
    }
}

impl Drop for PowerTurn {
    fn drop(&mut self) {
        let mut inner = lock(&self.inner);
        if let Some(turns) = inner.starting.get_mut(&self.sandbox) {
            *turns -= 1;
            if *turns == 0 {
                inner.starting.remove(&self.sandbox);
            }
        }
    }
}

impl Drop for NameReservation {
    fn drop(&mut self) {
        lock(&self.inner).names_in_making.remove(&self.taken);
    }
}

impl Catalog {
    pub(crate) fn new(slots: u16) -> Self {
        Self {
            slots,
            inner: Arc::default(),
            unpinned: Arc::default(),
            layers_added: watch::Sender::new(()),
        }
    }

    pub(crate) fn pin(&self, objects: impl IntoIterator<Item = Object>) -> Pin {
        self.pin_in(&mut lock(&self.inner), objects)
    }

    /// [`pin`](Self::pin), in one step with whatever looked the objects up.
    fn pin_in(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        objects: impl IntoIterator<Item = Object>,
    ) -> Pin {
        inner.next_pin += 1;
        let number = inner.next_pin;
        inner.pins.insert(number, objects.into_iter().collect());
        Pin {
            inner: Arc::clone(&self.inner),
            unpinned: Arc::clone(&self.unpinned),
            number,
        }
    }

    pub(crate) fn is_pinned(&self, object: &Object) -> bool {
        let inner = lock(&self.inner);
        inner.pins.values().any(|pinned| pinned.contains(object))
    }

    /// Completes when nothing keeps a generation of the sandbox any more.
    pub(crate) async fn generations_unpinned(&self, sandbox: &SandboxId) {
        let is_one = |object: &Object| matches!(object, Object::Generation(id, _) if id == sandbox);
        loop {
            let mut unpinned = pin!(self.unpinned.notified());
            // From here on no end of a pin is missed.
            unpinned.as_mut().enable();
            if !lock(&self.inner).pins.values().flatten().any(is_one) {
                return;
            }
            unpinned.await;
        }
    }

    // Immutable objects.

    pub(crate) fn add_base(&self, base: Base) {
        lock(&self.inner).bases.insert(base.digest.clone(), base);
    }

    /// The length of a base's image.
    pub(crate) fn base_size(&self, base: &Digest) -> Result<Bytes, Error> {
        let inner = lock(&self.inner);
        let size = inner.bases.get(base).map(|base| base.size);
        size.ok_or_else(|| inner.absent("base", &Object::Base(base.clone()), base.as_str()))
    }

    /// A layer that is new, or whose manifest has been committed again.
    pub(crate) fn add_layer(&self, revision: u64, layer: Layer) {
        let (id, stored) = (layer.id.clone(), StoredLayer { layer, revision });
        lock(&self.inner).layers.insert(id, stored);
        self.layers_added.send_replace(());
    }

    /// Changes whenever a layer is added, since a chain may be too deep then. Closed when there is no catalog any more.
    pub(crate) fn layers_added(&self) -> watch::Receiver<()> {
        self.layers_added.subscribe()
    }

    pub(crate) fn add_memory(&self, memory: Memory) {
        lock(&self.inner).memories.insert(memory.id.clone(), memory);
    }

    /// A template that is new, or whose manifest has been committed again.
    pub(crate) fn add_template(&self, revision: u64, template: Template) {
        let (id, stored) = (template.id.clone(), StoredTemplate { template, revision });
        lock(&self.inner).templates.insert(id, stored);
    }

    pub(crate) fn has_base(&self, digest: &Digest) -> bool {
        lock(&self.inner).bases.contains_key(digest)
    }

    pub(crate) fn layer_driver(&self, id: &LayerId) -> Result<String, Error> {
        let inner = lock(&self.inner);
        let stored = inner.layers.get(id);
        let driver = stored.map(|stored| stored.layer.driver.clone());
        driver.ok_or_else(|| inner.absent("layer", &Object::Layer(id.clone()), id.as_str()))
    }

    pub(crate) fn memory(&self, id: &MemoryId) -> Result<Memory, Error> {
        let inner = lock(&self.inner);
        let memory = inner.memories.get(id).cloned();
        memory.ok_or_else(|| inner.absent("memory", &Object::Memory(id.clone()), id.as_str()))
    }

    /// The chain under a head that sits on `under`, for a disk of `size`.
    pub(crate) fn chain(&self, under: &Under, size: Bytes) -> Result<PinnedChain, Error> {
        let mut inner = lock(&self.inner);
        let chain = inner.chain(under, size)?;
        let layers = chain.layers.iter().cloned().map(Object::Layer);
        let base = chain.base.iter().cloned().map(Object::Base);
        let pin = self.pin_in(&mut inner, layers.chain(base).collect::<Vec<_>>());
        Ok(PinnedChain { chain, _pin: pin })
    }

    /// The deepest chain of those that are deeper than `bound`, whose layers a driver of `drivers` keeps, and that have
    /// none of the layers in `without`.
    pub(crate) fn deep_chain(
        &self,
        bound: usize,
        drivers: &BTreeSet<String>,
        without: &BTreeSet<LayerId>,
    ) -> Option<DeepChain> {
        let mut inner = lock(&self.inner);
        let links = inner.deepest(bound, drivers, without)?;
        let layers = links.iter().map(|link| link.stored.layer.id.clone());
        let layers: Vec<_> = layers.map(Object::Layer).collect();
        let pin = self.pin_in(&mut inner, layers);
        Some(DeepChain { links, _pin: pin })
    }

    // Templates.

    /// Takes a template name of a team for a template in the making.
    pub(crate) fn reserve_template_name(
        &self,
        team: &Team,
        name: &Name,
    ) -> Result<NameReservation, Error> {
        let mut inner = lock(&self.inner);
        let reserved = ("template", team.clone(), name.clone());
        let taken = inner
            .templates
            .values()
            .any(|template| (&template.team, &template.name) == (team, name));
        if taken || !inner.names_in_making.insert(reserved.clone()) {
            return Err(Error::NameTaken {
                kind: "template",
                name: name.clone(),
            });
        }
        Ok(NameReservation {
            inner: Arc::clone(&self.inner),
            taken: reserved,
        })
    }

    /// The templates that are seen: in the scope, or public.
    pub(crate) fn templates(&self, scope: &Scope) -> Vec<Template> {
        let inner = lock(&self.inner);
        let templates = inner.templates.values().map(|stored| &stored.template);
        templates
            .filter(|template| template.public || scope.owns(&template.team))
            .cloned()
            .collect()
    }

    /// A template as it is now, and how often its manifest has been committed.
    pub(crate) fn stored_template(&self, id: &TemplateId) -> Result<(u64, Template), Error> {
        let inner = lock(&self.inner);
        let stored = inner.templates.get(id);
        let found = stored.map(|it| (it.revision, it.template.clone()));
        found.ok_or_else(|| missing("template", id.as_str()))
    }

    /// Refuses to make a template public while another public one has its name.
    pub(crate) fn check_publishable(&self, template: &Template) -> Result<(), Error> {
        let inner = lock(&self.inner);
        let is_other = |it: &StoredTemplate| it.id != template.id && it.name == template.name;
        if inner.templates.values().any(|it| it.public && is_other(it)) {
            return Err(Error::NameTaken {
                kind: "public template",
                name: template.name.clone(),
            });
        }
        Ok(())
    }

    /// The teams that have a sandbox or a template.
    pub(crate) fn teams(&self) -> BTreeSet<Team> {
        let inner = lock(&self.inner);
        let templates = inner.templates.values().map(|it| it.team.clone());
        let sandboxes = inner.sandboxes.values();
        let sandboxes = sandboxes.map(|it| it.record.spec.team.clone());
        templates.chain(sandboxes).collect()
    }

    /// Finds a template that can be used by name, id or unique prefix of an id, and pins what it holds.
    pub(crate) fn template(&self, scope: &Scope, wanted: &str) -> Result<(Template, Pin), Error> {
        let (template, pin) = self.any_template(scope, wanted)?;
        match self.template_flaw(&template) {
            None => Ok((template, pin)),
            Some(why) => Err(unusable(format!("template {}", template.name), why)),
        }
    }

    /// Finds a template, whether or not it can be used.
    pub(crate) fn any_template(
        &self,
        scope: &Scope,
        wanted: &str,
    ) -> Result<(Template, Pin), Error> {
        self.find_template(scope, wanted, |it| it.public || scope.owns(&it.team))
    }

    /// Finds a template that may be changed, whether or not it can be used.
    pub(crate) fn own_template(
        &self,
        scope: &Scope,
        wanted: &str,
    ) -> Result<(Template, Pin), Error> {
        self.find_template(scope, wanted, |it| scope.owns(&it.team))
    }

    fn find_template(
        &self,
        scope: &Scope,
        wanted: &str,
        is_seen: impl Fn(&Template) -> bool,
    ) -> Result<(Template, Pin), Error> {
        let found = {
            let inner = lock(&self.inner);
            let seen = inner.templates.values().filter(|it| is_seen(it));
            let named = seen.map(|it| Named {
                id: it.id.as_str(),
                name: Some(&it.name),
                team: &it.team,
                value: &it.template,
            });
            let hint = "`icebox template ls` lists the templates there are";
            find("template", scope, wanted, named, hint)?.clone()
        };
        let pin = self.pin(content_roots(&found));
        // It may have been removed between the two locks; then what was pinned may be gone too.
        if lock(&self.inner).templates.contains_key(&found.id) {
            Ok((found, pin))
        } else {
            Err(missing("template", wanted))
        }
    }

    /// Forgets a template, unless a sandbox was created from it.
    pub(crate) fn forget_template(&self, scope: &Scope, id: &TemplateId) -> Result<(), Error> {
        let mut inner = lock(&self.inner);
        let mut users: Vec<String> = inner
            .sandboxes
            .values()
            .filter(|entry| entry.record.spec.template == *id && !entry.record.waits)
            .map(|entry| match scope.owns(&entry.record.spec.team) {
                true => format!("sandbox {}", display_name(&entry.record)),
                false => OTHERS.to_owned(),
            })
            .collect();
        users.sort();
        users.dedup();
        if !users.is_empty() {
            let what = inner
                .templates
                .get(id)
                .map_or_else(|| id.to_string(), |template| template.name.to_string());
            return Err(Error::InUse {
                what: format!("template {what}"),
                users,
            });
        }
        inner.templates.remove(id);
        Ok(())
    }

    // Sandboxes.

    /// What a team may have, from here on. Nothing that it has is taken away.
    pub(crate) fn set_quota(&self, team: Team, quota: Quota) {
        lock(&self.inner).quotas.insert(team, quota);
    }

    /// What a team has.
    pub(crate) fn holdings(&self, team: &Team) -> Holdings {
        lock(&self.inner).holdings(team)
    }

    /// Has a sandbox that is about to run count as running, unless its team may have no more that do.
    pub(crate) fn take_power(&self, sandbox: &SandboxId) -> Result<PowerTurn, Error> {
        let mut inner = lock(&self.inner);
        let entry = inner.sandboxes.get(sandbox);
        let record = Arc::clone(&entry.ok_or(Error::Destroyed)?.record);
        if !inner.counts_as_running(&record) {
            let more = Holdings {
                sandboxes: 0,
                disk_mib: 0,
                ..Holdings::of(&record.spec, true)
            };
            inner.check_quota(&record.spec.team, &more)?;
        }
        Ok(self.power_turn(&mut inner, sandbox))
    }

    fn power_turn(&self, inner: &mut MutexGuard<'_, Inner>, sandbox: &SandboxId) -> PowerTurn {
        *inner.starting.entry(sandbox.clone()).or_default() += 1;
        PowerTurn {
            inner: Arc::clone(&self.inner),
            sandbox: sandbox.clone(),
        }
    }

    /// Adds a sandbox in the making: from here on its name and slot are taken, and it counts as running. `record` gets the
    /// lowest free slot.
    pub(crate) fn admit(
        &self,
        mut record: Sandbox,
        gate: Gate,
        mailbox: Mailbox,
    ) -> Result<(Sandbox, PowerTurn), Error> {
        let mut inner = lock(&self.inner);
        inner.check_quota(&record.spec.team, &Holdings::of(&record.spec, true))?;
        inner.check_name(&record.spec.team, record.name.as_ref())?;
        let taken: BTreeSet<u16> = inner
            .sandboxes
            .values()
            .map(|entry| entry.record.slot.0)
            .collect();
        let free = (0..self.slots)
            .find(|slot| !taken.contains(slot))
            .ok_or_else(|| Error::Exhausted {
                message: format!("all {} network slots are in use", self.slots),
                hint: "destroy a sandbox (a paused one keeps its slot), or widen `network.prefix`"
                    .into(),
            })?;
        record.slot = Slot(free);
        inner.insert(record.clone(), BTreeMap::new(), gate, mailbox);
        let turn = self.power_turn(&mut inner, &record.id);
        Ok((record, turn))
    }

    /// The sandboxes that wait for somebody to ask for one, the oldest first.
    pub(crate) fn waiting(&self) -> Vec<Entry> {
        let inner = lock(&self.inner);
        let waiting = inner.sandboxes.values().filter(|it| it.record.waits);
        let mut waiting: Vec<_> = waiting.cloned().collect();
        waiting.sort_by_key(|entry| entry.record.created_at);
        waiting
    }

    /// Takes the sandbox that has waited longest for just this from all others who want one, and the name from all others
    /// who want that.
    pub(crate) fn claim(
        &self,
        wanted: &Spec,
        name: Option<&Name>,
    ) -> Result<Option<(Entry, Option<NameReservation>)>, Error> {
        let mut inner = lock(&self.inner);
        inner.check_name(&wanted.team, name)?;
        let entries = inner.sandboxes.values_mut();
        let fit = entries.filter(|entry| entry.waits_for(wanted));
        let Some(entry) = fit.min_by_key(|entry| entry.record.created_at) else {
            return Ok(None);
        };
        entry.claimed = true;
        let entry = entry.clone();
        let reserved = name.map(|name| {
            let taken = ("sandbox", wanted.team.clone(), name.clone());
            inner.names_in_making.insert(taken.clone());
            NameReservation {
                inner: Arc::clone(&self.inner),
                taken,
            }
        });
        Ok(Some((entry, reserved)))
    }

    /// Slots that the next sandboxes will get.
    pub(crate) fn next_slots(&self, count: usize) -> Vec<Slot> {
        let inner = lock(&self.inner);
        let taken: BTreeSet<u16> = inner
            .sandboxes
            .values()
            .map(|entry| entry.record.slot.0)
            .collect();
        (0..self.slots)
            .filter(|slot| !taken.contains(slot))
            .take(count)
            .map(Slot)
            .collect()
    }

    /// Adds a sandbox that was found at start.
    pub(crate) fn restore(
        &self,
        record: Sandbox,
        generations: BTreeMap<GenerationNo, Generation>,
        gate: Gate,
        mailbox: Mailbox,
    ) {
        lock(&self.inner).insert(record, generations, gate, mailbox);
    }

    pub(crate) fn set_record(&self, record: &Sandbox) {
        if let Some(entry) = lock(&self.inner).sandboxes.get_mut(&record.id) {
            entry
                .generations
                .retain(|number, _| record.generations.contains(number));
            entry.record = Arc::new(record.clone());
        }
    }

    pub(crate) fn add_generation(&self, sandbox: &SandboxId, generation: Generation) {
        if let Some(entry) = lock(&self.inner).sandboxes.get_mut(sandbox) {
            entry.generations.insert(generation.number, generation);
        }
    }

    pub(crate) fn set_busy(&self, sandbox: &SandboxId, busy: Option<&'static str>) {
        if let Some(entry) = lock(&self.inner).sandboxes.get_mut(sandbox) {
            entry.busy = busy;
        }
    }

    pub(crate) fn set_last_verb(&self, sandbox: &SandboxId, verb: LastVerb) {
        if let Some(entry) = lock(&self.inner).sandboxes.get_mut(sandbox) {
            entry.last_verb = Some(Arc::new(verb));
        }
    }

    /// Notes that a head is lost. Whether that is news.
    pub(crate) fn set_lost(&self, head: &HeadId, why: &str) -> bool {
        let mut inner = lock(&self.inner);
        let Some(entry) = inner.sandboxes.get_mut(&head.sandbox) else {
            return false;
        };
        let before = entry.lost.replace((head.number, why.to_owned()));
        before.is_none_or(|(number, _)| number != head.number)
    }

    /// The heads that guests write to through this driver.
    pub(crate) fn heads_in_use(&self, driver: &str) -> Vec<HeadId> {
        let inner = lock(&self.inner);
        let records = inner.sandboxes.values().map(|entry| &entry.record);
        records
            .filter(|record| record.rests == Rest::Running && record.spec.volume_driver == driver)
            .filter_map(|record| record.head())
            .collect()
    }

    pub(crate) fn set_stalled(&self, sandbox: &SandboxId, stalled: bool) {
        if let Some(entry) = lock(&self.inner).sandboxes.get_mut(sandbox) {
            entry.stalled = stalled;
        }
    }

    pub(crate) fn forget_sandbox(&self, sandbox: &SandboxId) {
        lock(&self.inner).sandboxes.remove(sandbox);
    }

    pub(crate) fn generation(
        &self,
        sandbox: &SandboxId,
        wanted: GenerationNo,
    ) -> Result<Generation, Error> {
        let inner = lock(&self.inner);
        let generation = inner.readable_generation(sandbox, wanted)?;
        match inner.generation_flaw(sandbox, generation) {
            None => Ok(generation.clone()),
            Some(why) => Err(unusable(format!("generation {wanted}"), why)),
        }
    }

    /// The disk of a generation, of which nothing else need be usable.
    pub(crate) fn generation_disk(
        &self,
        sandbox: &SandboxId,
        wanted: GenerationNo,
    ) -> Result<LayerId, Error> {
        let inner = lock(&self.inner);
        let generation = inner.readable_generation(sandbox, wanted)?;
        Ok(generation.capture.layer.clone())
    }

    pub(crate) fn sandboxes(&self) -> Vec<Entry> {
        lock(&self.inner).sandboxes.values().cloned().collect()
    }

    /// The sandboxes of `scope`, all as they are at one moment.
    pub(crate) fn look(&self, scope: &Scope) -> Vec<Seen> {
        let inner = lock(&self.inner);
        let entries = inner.sandboxes.values();
        let own = entries.filter(|it| scope.owns(&it.record.spec.team) && !it.is_hidden());
        own.map(|entry| inner.seen(entry)).collect()
    }

    /// One sandbox, found as [`sandbox`](Self::sandbox) finds it.
    pub(crate) fn look_at(&self, scope: &Scope, wanted: &str) -> Result<Seen, Error> {
        let inner = lock(&self.inner);
        inner.find(scope, wanted).map(|entry| inner.seen(entry))
    }

    /// Finds a sandbox by name, id or unique prefix of an id.
    pub(crate) fn sandbox(&self, scope: &Scope, wanted: &str) -> Result<Entry, Error> {
        lock(&self.inner).find(scope, wanted).cloned()
    }

    /// The sandbox that has this id, whosever it is.
    pub(crate) fn sandbox_of_id(&self, id: &SandboxId) -> Result<Entry, Error> {
        let inner = lock(&self.inner);
        let found = inner.sandboxes.get(id).cloned();
        found.ok_or_else(|| missing("sandbox", id.as_str()))
    }

    // Who needs what.

    /// Every template and sandbox, the oldest of each first, with everything that it needs beside itself. What is in the
    /// making needs nothing yet.
    pub(crate) fn owners(&self) -> Vec<Owner> {
        let inner = lock(&self.inner);
        let mut templates: Vec<_> = inner.templates.values().collect();
        templates.sort_by_key(|template| template.created_at);
        let mut sandboxes: Vec<_> = inner.sandboxes.values().collect();
        sandboxes.sort_by_key(|entry| entry.record.created_at);
        let templates = templates.into_iter().map(|template| Owner {
            object: Object::Template(template.id.clone()),
            name: format!("template {}", template.name),
            team: template.team.clone(),
            head: None,
            needs: inner.in_order(content_roots(template)),
        });
        let sandboxes = sandboxes.into_iter().map(|entry| {
            let record = &entry.record;
            let generations = entry.generations.values();
            let captures = generations.flat_map(|it| capture_roots(&it.capture));
            let intended = intended_layer(record);
            let opened = record.opened.iter().cloned().map(Object::Layer);
            let roots = record_roots(record)
                .into_iter()
                .chain(captures)
                .chain(opened);
            Owner {
                object: Object::Sandbox(record.id.clone()),
                name: format!("sandbox {}", display_name(record)),
                team: record.spec.team.clone(),
                head: record
                    .head()
                    .map(|head| (record.spec.volume_driver.clone(), head)),
                needs: inner.in_order(roots.filter(|root| Some(root) != intended.as_ref())),
            }
        });
        templates.chain(sandboxes).collect()
    }

    // Reachability.

    /// Bases, layers and memories that nothing reaches.
    pub(crate) fn unreachable(&self) -> Vec<Object> {
        lock(&self.inner).unreachable()
    }

    /// Forgets the objects that nothing reaches, and says which: from here on nobody can come to need them. They are
    /// named again by every later call until they are [removed](Self::removed).
    pub(crate) fn forget_unreachable(&self) -> Vec<Object> {
        let mut inner = lock(&self.inner);
        let unreachable = inner.unreachable();
        inner.condemned.extend(unreachable.iter().cloned());
        inner
            .flawed
            .retain(|object, _| !unreachable.contains(object));
        for object in &unreachable {
            match object {
                Object::Base(digest) => drop(inner.bases.remove(digest)),
                Object::Layer(id) => drop(inner.layers.remove(id)),
                Object::Memory(id) => drop(inner.memories.remove(id)),
                _ => {}
            }
        }
        unreachable
    }

    /// What keeps everything from being collected, if something does, and why it cannot be read.
    pub(crate) fn holds_back(&self) -> Option<String> {
        let inner = lock(&self.inner);
        let object = inner.holds_back()?;
        inner.flawed.get(object).cloned()
    }

    /// Which of the objects that exist on the host nobody knows. None while something that cannot be read may need them.
    pub(crate) fn strays(&self, found: impl IntoIterator<Item = Object>) -> Vec<Object> {
        let inner = lock(&self.inner);
        if inner.holds_back().is_some() {
            return Vec::new();
        }
        let is_known = |object: &Object| {
            inner.exists(object)
                || inner.flawed.contains_key(object)
                || inner.condemned.contains(object)
                || inner.pins.values().any(|pinned| pinned.contains(object))
        };
        let found = found.into_iter();
        found.filter(|object| !is_known(object)).collect()
    }

    // What cannot be used.

    /// An object that a start found and cannot read.
    pub(crate) fn add_flawed(&self, object: Object, why: String) {
        lock(&self.inner).flawed.insert(object, why);
    }

    /// Finds out what manifests refer to and does not exist. For the start, before anything is in the making.
    pub(crate) fn find_missing(&self) {
        let mut inner = lock(&self.inner);
        let intended: BTreeSet<Object> = inner
            .sandboxes
            .values()
            .flat_map(|entry| intended_layer(&entry.record))
            .collect();
        let missing: Vec<Object> = inner
            .referred_to()
            .into_iter()
            .filter(|object| !inner.exists(object) && !intended.contains(object))
            .collect();
        for object in missing {
            let why = format!("{object} is missing");
            inner.flawed.entry(object).or_insert(why);
        }
    }

    /// Why a template cannot be used, if so.
    pub(crate) fn template_flaw(&self, template: &Template) -> Option<String> {
        lock(&self.inner).flaw(content_roots(template))
    }

    /// Which generations of a sandbox cannot be used, and why.
    pub(crate) fn generation_flaws(&self, record: &Sandbox) -> BTreeMap<GenerationNo, String> {
        lock(&self.inner).generation_flaws(record)
    }

    /// Whether an object was forgotten and may still exist.
    pub(crate) fn is_condemned(&self, object: &Object) -> bool {
        lock(&self.inner).condemned.contains(object)
    }

    /// A forgotten object does not exist any more.
    pub(crate) fn removed(&self, object: &Object) {
        lock(&self.inner).condemned.remove(object);
    }
}

impl Inner {
    /// Refuses a name that another sandbox of the team has, or is to get.
    fn check_name(&self, team: &Team, name: Option<&Name>) -> Result<(), Error> {
        let Some(name) = name else { return Ok(()) };
        let mut records = self.of_team(team);
        let is_taken = records.any(|it| it.name.as_ref() == Some(name));
        let to_be = ("sandbox", team.clone(), name.clone());
        if is_taken || self.names_in_making.contains(&to_be) {
            return Err(Error::NameTaken {
                kind: "sandbox",
                name: name.clone(),
            });
        }
        Ok(())
    }

    fn find(&self, scope: &Scope, wanted: &str) -> Result<&Entry, Error> {
        let entries = self.sandboxes.values();
        let named = entries
            .filter(|it| scope.owns(&it.record.spec.team) && !it.is_hidden())
            .map(|entry| Named {
                id: entry.record.id.as_str(),
                name: entry.record.name.as_ref(),
                team: &entry.record.spec.team,
                value: entry,
            });
        let hint = "`icebox ls` lists the sandboxes there are";
        find("sandbox", scope, wanted, named, hint)
    }

    fn seen(&self, entry: &Entry) -> Seen {
        Seen {
            layers: self.depth(entry),
            unusable: self.generation_flaws(&entry.record),
            entry: entry.clone(),
        }
    }

    fn counts_as_running(&self, record: &Sandbox) -> bool {
        record.rests == Rest::Running || self.starting.contains_key(&record.id)
    }

    fn of_team<'a>(&'a self, team: &'a Team) -> impl Iterator<Item = &'a Sandbox> {
        let records = self.sandboxes.values().map(|entry| &*entry.record);
        records.filter(move |record| record.spec.team == *team)
    }

    fn holdings(&self, team: &Team) -> Holdings {
        self.of_team(team).fold(Holdings::default(), |sum, it| {
            sum.plus(Holdings::of(&it.spec, self.counts_as_running(it)))
        })
    }

    /// Refuses what would be more than a team may have, naming the limit and who has what it bounds.
    fn check_quota(&self, team: &Team, more: &Holdings) -> Result<(), Error> {
        let Some(quota) = self.quotas.get(team) else {
            return Ok(());
        };
        let Some(over) = quota.over(&self.holdings(team), more) else {
            return Ok(());
        };
        let users = self.of_team(team);
        let users = users.filter(|it| !over.of_running || self.counts_as_running(it));
        let mut users: Vec<_> = users.map(display_name).collect();
        users.sort();
        Err(Error::OverQuota {
            team: team.clone(),
            what: over.what,
            bound: over.bound,
            taken: over.taken,
            more: over.more,
            users,
        })
    }

    fn chain(&self, under: &Under, size: Bytes) -> Result<Chain, Error> {
        let mut layers = Vec::new();
        let mut next = under.clone();
        let base = loop {
            match next {
                Under::Base(base) => {
                    if let Some(why) = self.flaw([Object::Base(base.clone())]) {
                        return Err(unusable(Object::Base(base).to_string(), why));
                    }
                    break Some(base);
                }
                Under::Layer(id) => {
                    let stored = self.layers.get(&id).ok_or_else(|| {
                        self.absent("layer", &Object::Layer(id.clone()), id.as_str())
                    })?;
                    layers.push(id);
                    next = match (&stored.layer.parent, &stored.layer.base) {
                        (Some(parent), _) => Under::Layer(parent.clone()),
                        (None, Some(base)) => Under::Base(base.clone()),
                        (None, None) => break None,
                    };
                }
            }
        };
        Ok(Chain { layers, base, size })
    }

    fn deepest(
        &self,
        bound: usize,
        drivers: &BTreeSet<String>,
        without: &BTreeSet<LayerId>,
    ) -> Option<Vec<Link>> {
        // Without what is only kept because it is open: it goes soon, and nobody will read through it again.
        let roots = self.roots();
        let pinned = self.pins.values().flatten().cloned();
        let reached = self.closure(roots.iter().cloned().chain(pinned).collect());
        let reached: Vec<&StoredLayer> = reached
            .iter()
            .filter_map(|object| match object {
                Object::Layer(id) => self.layers.get(id),
                _ => None,
            })
            .collect();
        let deep = reached
            .iter()
            .filter(|tip| drivers.contains(&tip.layer.driver))
            .filter_map(|tip| self.line(tip))
            .filter(|line| line.len() > bound)
            .filter(|line| !line.iter().any(|stored| without.contains(&stored.layer.id)));
        let deepest = deep.max_by_key(Vec::len)?;
        let mut children: BTreeMap<&LayerId, usize> = BTreeMap::new();
        for parent in reached.iter().filter_map(|it| it.layer.parent.as_ref()) {
            *children.entry(parent).or_default() += 1;
        }
        let link = |stored: &StoredLayer| Link {
            shared: roots.contains(&Object::Layer(stored.layer.id.clone()))
                || children.get(&stored.layer.id).is_some_and(|it| *it > 1),
            stored: stored.clone(),
        };
        Some(deepest.into_iter().map(link).collect())
    }

    /// A layer and all that are under it. `None` if one cannot be used.
    fn line<'a>(&'a self, tip: &'a StoredLayer) -> Option<Vec<&'a StoredLayer>> {
        let mut line = vec![tip];
        let mut next = tip.layer.parent.as_ref();
        while let Some(id) = next {
            let stored = self.layers.get(id)?;
            line.push(stored);
            next = stored.layer.parent.as_ref();
        }
        Some(line)
    }

    fn insert(
        &mut self,
        record: Sandbox,
        generations: BTreeMap<GenerationNo, Generation>,
        gate: Gate,
        mailbox: Mailbox,
    ) {
        let id = record.id.clone();
        self.sandboxes.insert(
            id,
            Entry {
                record: Arc::new(record),
                generations,
                busy: None,
                last_verb: None,
                lost: None,
                stalled: false,
                claimed: false,
                gate,
                mailbox,
            },
        );
    }

    fn readable_generation(
        &self,
        sandbox: &SandboxId,
        wanted: GenerationNo,
    ) -> Result<&Generation, Error> {
        let entry = self
            .sandboxes
            .get(sandbox)
            .ok_or_else(|| missing("sandbox", sandbox.as_str()))?;
        entry.generations.get(&wanted).ok_or_else(|| {
            let object = Object::Generation(sandbox.clone(), wanted);
            match self.flawed.get(&object) {
                Some(why) => unusable(format!("generation {wanted}"), why.clone()),
                None => Error::NoGeneration {
                    wanted,
                    have: entry.generations.keys().copied().collect(),
                },
            }
        })
    }

    /// What the objects in `reached` need, they themselves included.
    fn closure(&self, reached: BTreeSet<Object>) -> BTreeSet<Object> {
        self.in_order(reached).into_iter().collect()
    }

    /// What `roots` need, they themselves included: each object once, and before what it needs.
    fn in_order(&self, roots: impl IntoIterator<Item = Object>) -> Vec<Object> {
        let mut reached = BTreeSet::new();
        let mut order: Vec<Object> = roots
            .into_iter()
            .filter(|root| reached.insert(root.clone()))
            .collect();
        let mut at = 0;
        while let Some(object) = order.get(at) {
            at += 1;
            let needs: Vec<Object> = match object {
                Object::Layer(id) => self
                    .layers
                    .get(id)
                    .map(|stored| layer_needs(&stored.layer))
                    .unwrap_or_default(),
                Object::Memory(id) => self
                    .memories
                    .get(id)
                    .and_then(|m| m.against.clone())
                    .map(Object::Memory)
                    .into_iter()
                    .collect(),
                _ => Vec::new(),
            };
            order.extend(
                needs
                    .into_iter()
                    .filter(|need| reached.insert(need.clone())),
            );
        }
        order
    }

    /// What manifests refer to, other than what is still in the making.
    fn referred_to(&self) -> BTreeSet<Object> {
        let mut roots = self.roots();
        let opened = self.sandboxes.values().flat_map(|it| &it.record.opened);
        roots.extend(opened.cloned().map(Object::Layer));
        self.closure(roots)
    }

    /// What manifests name themselves, other than layers that are only open.
    fn roots(&self) -> BTreeSet<Object> {
        let mut roots: BTreeSet<Object> = {
            let templates = self.templates.values();
            templates.flat_map(|it| content_roots(it)).collect()
        };
        for entry in self.sandboxes.values() {
            roots.extend(record_roots(&entry.record));
            roots.extend(
                entry
                    .generations
                    .values()
                    .flat_map(|generation| capture_roots(&generation.capture)),
            );
            let listed = entry.record.generations.iter();
            let listed = listed.map(|number| Object::Generation(entry.record.id.clone(), *number));
            roots.extend(listed);
        }
        roots
    }

    fn exists(&self, object: &Object) -> bool {
        match object {
            Object::Base(digest) => self.bases.contains_key(digest),
            Object::Layer(id) => self.layers.contains_key(id),
            Object::Memory(id) => self.memories.contains_key(id),
            Object::Generation(sandbox, number) => self
                .sandboxes
                .get(sandbox)
                .is_some_and(|entry| entry.generations.contains_key(number)),
            Object::Kernel(_) | Object::Template(_) | Object::Sandbox(_) => true,
        }
    }

    /// Why something that needs `roots` cannot be used, if so.
    fn flaw(&self, roots: impl IntoIterator<Item = Object>) -> Option<String> {
        if self.flawed.is_empty() {
            return None;
        }
        let needed = self.closure(roots.into_iter().collect());
        needed
            .iter()
            .find_map(|object| self.flawed.get(object).cloned())
    }

    fn generation_flaws(&self, record: &Sandbox) -> BTreeMap<GenerationNo, String> {
        if self.flawed.is_empty() {
            return BTreeMap::new();
        }
        let readable = self.sandboxes.get(&record.id).map(|it| &it.generations);
        let flaw = |number: &GenerationNo| match readable.and_then(|it| it.get(number)) {
            Some(generation) => self.generation_flaw(&record.id, generation),
            None => self.flaw([Object::Generation(record.id.clone(), *number)]),
        };
        let flaws = record.generations.iter();
        flaws
            .filter_map(|number| Some((*number, flaw(number)?)))
            .collect()
    }

    /// How many layers lie under a sandbox's disk.
    fn depth(&self, entry: &Entry) -> usize {
        let record = &entry.record;
        let head = record.holds.iter().find_map(|hold| match hold {
            Hold::Head { over, .. } => Some(over),
            _ => None,
        });
        let mut next = match (head, &record.rests) {
            (Some(Under::Layer(layer)), _) => Some(layer),
            (None, Rest::Paused { generation }) => {
                let generation = entry.generations.get(generation);
                generation.map(|it| &it.capture.layer)
            }
            _ => None,
        };
        let mut layers = 0;
        while let Some(stored) = next.and_then(|layer| self.layers.get(layer)) {
            layers += 1;
            next = stored.layer.parent.as_ref();
        }
        layers
    }

    fn generation_flaw(&self, sandbox: &SandboxId, generation: &Generation) -> Option<String> {
        let itself = Object::Generation(sandbox.clone(), generation.number);
        self.flaw(
            capture_roots(&generation.capture)
                .into_iter()
                .chain([itself]),
        )
    }

    fn absent(&self, kind: &'static str, object: &Object, id: &str) -> Error {
        match self.flawed.get(object) {
            Some(why) => unusable(object.to_string(), why.clone()),
            None => missing(kind, id),
        }
    }

    /// The first object that something reaches and that cannot be read: what it needs is not known.
    fn holds_back(&self) -> Option<&Object> {
        let reached = self.referred_to();
        self.flawed.keys().find(|object| reached.contains(object))
    }

    fn unreachable(&self) -> Vec<Object> {
        let condemned = self.condemned.iter().cloned();
        if self.holds_back().is_some() {
            return condemned.collect();
        }
        let mut reached = self.referred_to();
        reached.extend(self.pins.values().flatten().cloned());
        let reached = self.closure(reached);
        let bases = self.bases.keys().cloned().map(Object::Base);
        let layers = self.layers.keys().cloned().map(Object::Layer);
        let memories = self.memories.keys().cloned().map(Object::Memory);
        let flawed = self.flawed.keys().cloned();
        bases
            .chain(layers)
            .chain(memories)
            .chain(flawed)
            .filter(|object| !reached.contains(object))
            .chain(condemned)
            .collect()
    }
}

fn layer_needs(layer: &Layer) -> Vec<Object> {
    let parent = layer.parent.clone().map(Object::Layer);
    let base = layer.base.clone().map(Object::Base);
    parent.into_iter().chain(base).collect()
}

fn under_root(under: &Under) -> Object {
    match under {
        Under::Base(digest) => Object::Base(digest.clone()),
        Under::Layer(id) => Object::Layer(id.clone()),
    }
}

fn capture_roots(capture: &Capture) -> Vec<Object> {
    vec![
        Object::Layer(capture.layer.clone()),
        Object::Memory(capture.memory.clone()),
    ]
}

fn content_roots(template: &Template) -> Vec<Object> {
    match &template.content {
        TemplateContent::Image { base } => vec![Object::Base(base.clone())],
        TemplateContent::Snapshot { capture } => capture_roots(capture),
    }
}

/// The layer that an intent names, which need not exist yet.
fn intended_layer(record: &Sandbox) -> Option<Object> {
    record.intent.as_ref().map(|intent| match intent {
        Intent::Freeze { layer, .. } | Intent::SetAside { layer, .. } => {
            Object::Layer(layer.clone())
        }
    })
}

fn record_roots(record: &Sandbox) -> Vec<Object> {
    let heads = record.holds.iter().filter_map(|hold| match hold {
        Hold::Head { over, .. } => Some(under_root(over)),
        _ => None,
    });
    let intent = intended_layer(record);
    let branches = record
        .branches
        .iter()
        .map(|branch| Object::Layer(branch.layer.clone()));
    let memory = record.restored_from.iter().cloned().map(Object::Memory);
    heads.chain(intent).chain(branches).chain(memory).collect()
}

/// What a person calls a sandbox.
pub(crate) fn display_name(record: &Sandbox) -> String {
    if record.waits {
        let Spec { template_name, .. } = &record.spec;
        return format!("{} (warm, of {template_name})", record.id);
    }
    record
        .name
        .as_ref()
        .map_or_else(|| record.id.to_string(), ToString::to_string)
}

fn unusable(what: String, why: String) -> Error {
    Error::Unusable { what, why }
}

fn missing(kind: &'static str, wanted: &str) -> Error {
    Error::Unknown {
        kind,
        wanted: wanted.to_owned(),
        hint: format!("the {kind} was removed meanwhile"),
    }
}

/// Something that can be looked up.
struct Named<'a, T> {
    id: &'a str,
    name: Option<&'a Name>,
    team: &'a Team,
    value: T,
}

/// An exact id wins; then an exact name, the scope's own team's before others'; else a prefix of ids that only one has.
/// `<team>/<name>` means that team's.
fn find<'a, T>(
    kind: &'static str,
    scope: &Scope,
    wanted: &str,
    all: impl Iterator<Item = Named<'a, T>>,
    hint: &str,
) -> Result<T, Error> {
    let (of_team, plain) = match wanted.split_once('/') {
        Some((team, name)) => (Some(team), name),
        None => (None, wanted),
    };
    let own = scope.team();
    let (mut named, mut begun) = (Vec::new(), Vec::new());
    for Named {
        id,
        name,
        team,
        value,
    } in all
    {
        if of_team.is_some_and(|wanted| wanted != team.as_str()) {
            continue;
        }
        let is_named = name.is_some_and(|name| name.as_str() == plain);
        if id == plain || (is_named && *team == own) {
            return Ok(value);
        }
        let shown = || match name {
            Some(name) if *team == own => format!("{name} ({id})"),
            Some(name) => format!("{team}/{name} ({id})"),
            None => id.to_owned(),
        };
        if is_named {
            named.push((shown(), value));
        } else if !plain.is_empty() && id.starts_with(plain) {
            begun.push((shown(), value));
        }
    }
    let mut candidates = if named.is_empty() { begun } else { named };
    match candidates.len() {
        1 => Ok(candidates.swap_remove(0).1),
        0 => {
            let wanted = wanted.chars().take(80).collect();
            Err(Error::Unknown {
                kind,
                wanted,
                hint: hint.to_owned(),
            })
        }
        _ => Err(Error::Ambiguous {
            wanted: wanted.to_owned(),
            candidates: candidates.into_iter().map(|(shown, _)| shown).collect(),
        }),
    }
}

/// A driver that a record names and this host does not have.
pub(crate) fn no_driver(kind: &'static str, wanted: &str, have: &[&str]) -> Error {
    Error::Step {
        step: "finding the driver",
        source: HostError::new(
            crate::host::ErrorKind::Unsupported,
            format!("this host has no {kind} {wanted:?} that works"),
        )
        .hint(format!(
            "working here: {}; `icebox doctor` says why others do not",
            have.join(", ")
        )),
    }
}
