//! What users know, and the comparison of it with what there is.

use std::collections::{BTreeMap, BTreeSet};

use icebox_engine::id::{GenerationNo, Name, SandboxId};
use icebox_engine::layout::Object;
use icebox_engine::manifest::v1::{Point, Rest};
use icebox_engine::{Engine, Error, Phase, SandboxView, Verb};
use icebox_sim::World;

use super::act::{Act, Ended, Trouble};
use super::{KEPT, Play};

/// What a user knows of a sandbox.
pub(crate) struct Known {
    pub(crate) id: SandboxId,
    pub(crate) rests: Phase,
    /// What its newest state holds.
    pub(crate) mark: u64,
    /// What its generations hold.
    pub(crate) generations: BTreeMap<GenerationNo, u64>,
    /// What the disks hold that were set aside.
    pub(crate) branches: BTreeMap<Name, u64>,
    /// It is paused when nothing has happened in it for a while, and nothing ever does by itself.
    pub(crate) idles: bool,
    /// It has been asked to go, and was not gone.
    pub(crate) going: bool,
}

/// What a user knows of all.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) sandboxes: Vec<Known>,
    /// Templates, and what they hold.
    pub(crate) templates: BTreeMap<Name, u64>,
    /// Those that have been asked to go, and may have.
    pub(crate) going: BTreeSet<Name>,
    /// For new names.
    pub(crate) made: u32,
}

/// Whether it is paused when nothing happens in it.
fn idles(view: &SandboxView) -> bool {
    view.record.lifetime.idle_seconds.is_some()
}

/// Where a sandbox rests a while after it came to `phase`.
fn rest_of(phase: Phase, idles: bool) -> Phase {
    match phase {
        Phase::Running if idles => Phase::Paused,
        phase => phase,
    }
}

/// Whether it was answered that it did not happen. A bug on the way leaves that open: a verb that has decided itself by its
/// one write has happened, whatever comes after it. What is there then holds what it should, as after any other verb.
fn is_refused(ended: &Ended) -> bool {
    match ended {
        Ended::Refused(error) => !matches!(error, Error::Internal { .. }),
        Ended::Well(_) | Ended::Unheard | Ended::Killed => false,
    }
}

impl Play {
    /// Compares what there is with what a user was told, and takes in what nobody could know.
    pub(super) fn compare(&mut self, engine: &Engine, act: &Act, trouble: Trouble, ended: &Ended) {
        let told = format!("{act:?} with {trouble:?} ended {ended:?}");
        let mut fresh: BTreeMap<_, _> = engine
            .list()
            .into_iter()
            .map(|view| (view.record.id.clone(), view))
            .collect();
        let mut known = std::mem::take(&mut self.model.sandboxes);
        let source = act
            .subject()
            .and_then(|id| known.iter().find(|known| known.id == *id));
        let source_mark = source.map(|known| known.mark);
        known.retain_mut(|known| {
            let is_subject = act.subject() == Some(&known.id);
            let removing = matches!(act, Act::Verb(Verb::Destroy, _)) && is_subject;
            match fresh.remove(&known.id) {
                None => {
                    assert!(removing || known.going, "{told}: {} has gone", known.id);
                    false
                }
                Some(view) => {
                    let gone = removing && matches!(ended, Ended::Well(_));
                    assert!(!gone, "{told}: {} is still there", known.id);
                    known.going |= removing;
                    let act = is_subject.then_some(act);
                    self.compare_one(known, &view, act, trouble, ended, &told);
                    true
                }
            }
        });
        let at_most = match act {
            Act::Create(..) => 1,
            Act::Fork(_, count) => usize::from(*count),
            _ => 0,
        };
        let made = match ended {
            Ended::Well(made) => fresh.len() == *made,
            // How far it had come nobody knows: what it had made counts, and is whole.
            Ended::Refused(Error::Internal { .. }) | Ended::Unheard | Ended::Killed => true,
            Ended::Refused(_) => fresh.is_empty(),
        };
        assert!(
            made && fresh.len() <= at_most,
            "{told}: there are also {:?}",
            fresh.keys()
        );
        for (id, view) in fresh {
            let mark = match act {
                Act::Create(template, _) => self.model.templates[template],
                _ => source_mark.unwrap(),
            };
            let first = view.record.generations.iter().map(|number| (*number, mark));
            let idles = idles(&view);
            let new = Known {
                rests: view.phase(),
                idles,
                mark,
                generations: first.collect(),
                branches: BTreeMap::new(),
                going: false,
                id,
            };
            assert_eq!(new.rests, rest_of(Phase::Running, idles), "{told}");
            self.look(&new, &told);
            known.push(new);
        }
        self.model.sandboxes = known;
        self.compare_templates(engine, act, ended, source_mark, &told);
    }

    fn compare_one(
        &self,
        known: &mut Known,
        view: &SandboxView,
        act: Option<&Act>,
        trouble: Trouble,
        ended: &Ended,
        told: &str,
    ) {
        let (before, now) = (known.rests, view.phase());
        assert_eq!(view.busy, None, "{told}");
        assert_eq!(view.record.broken, None, "{told}");
        assert_eq!(view.record.intent, None, "{told}");
        assert_ne!(view.record.rests, Rest::Nowhere, "{told}");
        assert!(view.unusable.is_empty(), "{told}: {:?}", view.unusable);
        let idles = idles(view);
        assert!(
            idles == known.idles || matches!(act, Some(Act::Idle(..))),
            "{told}: its idle time has changed"
        );
        let after = act.map_or(before, |act| act.leads(before));
        // Whatever was done was long ago.
        let (before_it, after) = (rest_of(before, idles), rest_of(after, idles));
        let to = act.and_then(Act::goes_to);
        let mark_there = to.as_ref().map(|to| match to {
            Point::Generation(number) => known.generations[number],
            Point::Branch(name) => known.branches[name],
        });
        let ends = matches!(act, Some(Act::Crash(_) | Act::PowerOff(_)));
        let expected = match (act, ended) {
            _ if ends => now == Phase::Stopped,
            (None, _) => now == before_it,
            (Some(_), Ended::Well(_)) => now == after,
            // It may have gone there, and not on from there.
            (Some(Act::ResumeGeneration(..) | Act::Rollback(..)), _) => true,
            (Some(_), _) => now == before_it || now == after,
        };
        let ended_under_it = act.is_some() && matches!(trouble, Trouble::VmmEnds(_));
        let stopped = ended_under_it && now == Phase::Stopped;
        assert!(
            expected || stopped,
            "{told}: {} is {now}, and was {before}",
            known.id
        );
        // What was listed is kept, but for the oldest; what is new was captured just now.
        let listed = &view.record.generations;
        let newest = known.generations.keys().next_back().copied();
        let forgotten = match act {
            Some(Act::Forget(_, point)) => Some(point.clone()),
            _ => None,
        };
        assert!(
            newest.is_none_or(|newest| {
                listed.contains(&newest) || forgotten == Some(Point::Generation(newest))
            }),
            "{told}: {listed:?}"
        );
        known
            .generations
            .retain(|number, _| listed.contains(number));
        for number in listed {
            // A guest that went to a point was captured there, if it was.
            let captured = mark_there.unwrap_or(known.mark);
            known.generations.entry(*number).or_insert(captured);
        }
        let branches = view.record.branches.iter();
        let mut set_aside = false;
        for branch in branches.clone() {
            set_aside |= !known.branches.contains_key(&branch.name);
            let kept = *known
                .branches
                .entry(branch.name.clone())
                .or_insert(known.mark);
            let layer = Object::Layer(branch.layer.clone());
            let value = self
                .world
                .read(&layer)
                .unwrap_or_else(|error| panic!("{told}: {error}"));
            assert_eq!(
                World::mark_in(value),
                kept,
                "{told}: branch {}",
                branch.name
            );
        }
        let had = known.branches.len();
        known
            .branches
            .retain(|name, _| branches.clone().any(|branch| branch.name == *name));
        let kept = known.branches.len();
        let lost = usize::from(matches!(forgotten, Some(Point::Branch(_))));
        assert!(
            kept + lost >= had || kept >= KEPT,
            "{told}: a branch has gone"
        );
        if let (Some(point), Some(Ended::Well(_))) = (&forgotten, act.map(|_| ended)) {
            let there = match point {
                Point::Generation(number) => known.generations.contains_key(number),
                Point::Branch(name) => known.branches.contains_key(name),
            };
            assert!(!there, "{told}: {point} is still there");
        }
        let was_paused = before == Phase::Paused && now != Phase::Paused;
        let runs_there = matches!(act, Some(Act::ResumeGeneration(..))) && now == Phase::Running;
        if let Some(mark) = mark_there
            && (set_aside || was_paused || runs_there)
        {
            known.mark = mark;
        }
        if let Rest::Paused { generation } = view.record.rests {
            known.mark = known.generations[&generation];
        }
        known.rests = now;
        known.idles = idles;
        self.look(known, told);
    }

    /// A guest that runs holds what it should.
    fn look(&self, known: &Known, told: &str) {
        if known.rests == Phase::Running {
            let value = self.world.guest_value(&known.id);
            let value = value.unwrap_or_else(|error| panic!("{told}: {}: {error}", known.id));
            assert_eq!(World::mark_in(value), known.mark, "{told}: {}", known.id);
        }
    }

    fn compare_templates(
        &mut self,
        engine: &Engine,
        act: &Act,
        ended: &Ended,
        source_mark: Option<u64>,
        told: &str,
    ) {
        let mut there: Vec<_> = engine.templates().into_iter().map(|it| it.name).collect();
        let well = matches!(ended, Ended::Well(_));
        if let Some(name) = act.makes() {
            let made = there.contains(name);
            assert!(made || !well, "{told}: {name} is not there");
            assert!(!made || !is_refused(ended), "{told}: {name} is there");
            if made {
                self.model
                    .templates
                    .insert(name.clone(), source_mark.unwrap());
            }
        }
        if let Act::RemoveTemplate(name) = act {
            assert!(!well || !there.contains(name), "{told}: it is still there");
            if !matches!(ended, Ended::Refused(Error::InUse { .. })) {
                self.model.going.insert(name.clone());
            }
        }
        let gone = |name: &Name| self.model.going.contains(name) && !there.contains(name);
        self.model.templates.retain(|name, _| !gone(name));
        there.sort();
        let known: Vec<_> = self.model.templates.keys().cloned().collect();
        assert_eq!(there, known, "{told}");
    }

    /// Nothing went wrong: only what makes no sense may be refused.
    pub(super) fn may_be_refused(&self, act: &Act, error: &Error) -> bool {
        let before = |id: &SandboxId| {
            let known = self.model.sandboxes.iter().find(|known| known.id == *id);
            known.map(|known| known.rests)
        };
        match (act, error) {
            (Act::RemoveTemplate(_), Error::InUse { .. }) => true,
            (Act::Create(template, _), _) if self.model.going.contains(template) => true,
            // It was frozen so often that it must rest first.
            (_, Error::Exhausted { message, .. }) => message.contains("layers"),
            // It is paused there.
            (Act::Forget(id, _), Error::InUse { .. }) => before(id) == Some(Phase::Paused),
            _ => {
                let verb = act.verb().zip(act.subject().and_then(before));
                verb.is_some_and(|(verb, phase)| verb.from(phase).is_err())
            }
        }
    }
}
