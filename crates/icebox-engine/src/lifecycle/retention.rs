//! Retention: how much of its past a sandbox keeps. Nobody's verb.
//!
//! A generation is kept if it is among the newest so many and not older than so long; a branch likewise. Whatever they
//! say, it stays if it is in use: the sandbox rests at it, or its disk goes on from it, or forks are being made from it.
//! The newest generation always stays, so that there is a pause to go back to.
//!
//! The sandbox's task looks back between verbs: soon after every commit that adds to the past, and when something has
//! grown too old. The one commit takes all that goes off the list; what only that referred to is collected then.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::collect;
use crate::error::Error;
use crate::id::{GenerationNo, Name};
use crate::layout::Object;
use crate::manifest::v1::{Rest, Sandbox as Record};
use crate::sandbox::{Chained, Sandbox};
use crate::steps::Steps;

/// At most until the next look at what grows old: the wall clock may be set meanwhile.
const RAREST: Duration = Duration::from_hours(1);
/// From a look that could not do what it found to do, to the next.
const AGAIN: Duration = Duration::from_secs(30);

/// What a sandbox keeps.
#[derive(Clone, Copy, Debug)]
struct Keep {
    /// So many of the newest.
    newest: usize,
    /// Nothing that is older.
    not_older: Option<SignedDuration>,
}

/// What goes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outdated {
    generations: Vec<GenerationNo>,
    branches: Vec<Name>,
    /// When the next goes, if nothing is added.
    next: Option<Timestamp>,
}

/// What of a sandbox's past is not kept. `captured_at` says how old a generation is, if that can be read.
fn outdated(
    record: &Record,
    captured_at: impl Fn(GenerationNo) -> Option<Timestamp>,
    keep: Keep,
    now: Timestamp,
) -> Outdated {
    let mut outdated = Outdated::default();
    let mut goes = |rank: usize, made_at: Option<Timestamp>| {
        let end = keep.not_older.zip(made_at);
        let end = end.and_then(|(age, made_at)| made_at.checked_add(age).ok());
        if rank >= keep.newest || end.is_some_and(|end| end <= now) {
            return true;
        }
        outdated.next = outdated.next.into_iter().chain(end).min();
        false
    };
    let newest_first = record.generations.iter().rev().enumerate();
    outdated.generations = newest_first
        .filter(|(rank, number)| {
            let is_rested_at = record.rests
                == Rest::Paused {
                    generation: **number,
                };
            *rank > 0 && !is_rested_at && record.after != Some(**number)
        })
        .filter(|(rank, number)| goes(*rank, captured_at(**number)))
        .map(|(_, number)| *number)
        .collect();
    let newest_first = record.branches.iter().rev().enumerate();
    outdated.branches = newest_first
        .filter(|(rank, branch)| goes(*rank, Some(branch.created_at)))
        .map(|(_, branch)| branch.name.clone())
        .collect();
    outdated
}

impl Sandbox {
    /// Something was added to the past.
    pub(crate) fn look_back_soon(&mut self) {
        self.chores.look_back = Some(Instant::now());
    }

    /// Takes what is not kept off the list, and decides when to look again.
    pub(crate) async fn look_back(&mut self) {
        self.chores.look_back = None;
        let record = self.record();
        if record.rests == Rest::Nowhere {
            return;
        }
        let Ok(entry) = self.shared.catalog.sandbox_of_id(&record.id) else {
            return;
        };
        let captured_at = |number| {
            let generation = entry.generations.get(&number)?;
            Some(generation.capture.captured_at)
        };
        let now = self.shared.now();
        let mut gone = outdated(record, captured_at, self.keep(), now);
        let object = |number: GenerationNo| Object::Generation(record.id.clone(), number);
        let catalog = &self.shared.catalog;
        let found = gone.generations.len();
        gone.generations
            .retain(|number| !catalog.is_pinned(&object(*number)));
        let mut wait = gone.next.map(|next| {
            let wait = Duration::try_from(next.duration_since(now)).unwrap_or_default();
            wait.min(RAREST)
        });
        if gone.generations.len() < found {
            wait = wait.into_iter().chain([AGAIN]).min();
        }
        if !(gone.generations.is_empty() && gone.branches.is_empty())
            && let Err(error) = self.retire(&gone).await
        {
            tracing::warn!(sandbox = %self.id(), error = %Chained(&error), "its past stays as long as it is for now");
            wait = Some(AGAIN);
        }
        self.chores.look_back = wait.map(|wait| Instant::now() + wait);
    }

    async fn retire(&mut self, gone: &Outdated) -> Result<(), Error> {
        if self.record().broken.is_some() || self.ledger.in_doubt() {
            return Err(Error::Invalid {
                message: "it is broken, or its manifest is in doubt".into(),
                hint: "`icebox inspect` says which".into(),
            });
        }
        self.unlist(&gone.generations, &gone.branches).await?;
        let generations = gone.generations.iter().map(|it| format!("generation {it}"));
        let branches = gone.branches.iter().map(|it| format!("branch {it}"));
        let said: Vec<_> = generations.chain(branches).collect();
        self.emit("sandbox.retired", said.join(", "), &Steps::default());
        Ok(())
    }

    /// What the sandbox was asked to keep, or what all are.
    fn keep(&self) -> Keep {
        let (asked, config) = (&self.record().spec.history, &self.shared.config);
        let newest = asked.keep.map_or(config.keep, |keep| keep as usize);
        let not_older = asked.keep_for_secs.map(Duration::from_secs);
        let not_older = not_older.or(config.keep_for);
        Keep {
            newest: newest.max(1),
            not_older: not_older.and_then(|age| SignedDuration::try_from(age).ok()),
        }
    }

    /// Commits the record without these, and removes what only they referred to.
    pub(crate) async fn unlist(
        &mut self,
        generations: &[GenerationNo],
        branches: &[Name],
    ) -> Result<(), Error> {
        self.update(|record| {
            record.generations.retain(|it| !generations.contains(it));
            record.branches.retain(|it| !branches.contains(&it.name));
        })
        .await?;
        for number in generations {
            self.making(vec![Object::Generation(self.id().clone(), *number)]);
        }
        self.discard_unnamed().await;
        collect::soon(&self.shared);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;
    use crate::manifest::v1::Branch;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn days_ago(days: i64) -> Timestamp {
        NOW - SignedDuration::from_hours(24 * days)
    }

    /// Generation n is 10 - n days old; so is branch disk-n.
    fn record(generations: &[u32], branches: &[u32]) -> Record {
        let fixture = include_bytes!("../manifest/fixtures/v1-sandbox.json");
        let object = Object::Sandbox("iaaaaaaaaaaaaaaaaaaaa".parse().unwrap());
        let (_, mut record) = manifest::decode::<Record>(&object, Some(fixture)).unwrap();
        record.generations = generations.iter().copied().map(GenerationNo).collect();
        let branch = |number: &u32| Branch {
            name: format!("disk-{number}").parse().unwrap(),
            layer: crate::id::LayerId::random(),
            after: None,
            created_at: days_ago(10 - i64::from(*number)),
        };
        record.branches = branches.iter().map(branch).collect();
        record
    }

    fn gone(record: &Record, newest: usize, days: Option<i64>) -> (Vec<u32>, Vec<String>) {
        let not_older = days.map(|days| SignedDuration::from_hours(24 * days));
        let captured_at = |number: GenerationNo| Some(days_ago(10 - i64::from(number.0)));
        let gone = outdated(record, captured_at, Keep { newest, not_older }, NOW);
        let branches = gone.branches.iter().map(ToString::to_string);
        (
            gone.generations.iter().map(|it| it.0).collect(),
            branches.collect(),
        )
    }

    #[test]
    fn the_newest_so_many_are_kept_of_generations_and_of_branches() {
        let record = record(&[1, 2, 3, 4], &[5, 6, 7]);
        assert_eq!(
            gone(&record, 2, None),
            (vec![2, 1], vec!["disk-5".to_owned()])
        );
        assert_eq!(gone(&record, 9, None), (vec![], vec![]));
    }

    #[test]
    fn what_is_too_old_goes_however_few_there_are() {
        let record = record(&[1, 2, 7, 8], &[3, 9]);
        assert_eq!(
            gone(&record, 9, Some(5)),
            (vec![2, 1], vec!["disk-3".to_owned()])
        );
        // But for the newest generation.
        assert_eq!(gone(&record, 9, Some(1)).0, [7, 2, 1]);
    }

    #[test]
    fn what_is_in_use_stays() {
        let mut record = record(&[1, 2, 3, 4, 5], &[]);
        record.after = Some(GenerationNo(2));
        assert_eq!(gone(&record, 1, Some(1)).0, [4, 3, 1]);
        record.rests = Rest::Paused {
            generation: GenerationNo(1),
        };
        assert_eq!(gone(&record, 1, Some(1)).0, [4, 3]);
    }

    #[test]
    fn the_next_look_is_when_the_next_grows_too_old() {
        let record = record(&[6, 7, 9], &[8]);
        let keep = Keep {
            newest: 9,
            not_older: Some(SignedDuration::from_hours(24 * 4)),
        };
        let captured_at = |number: GenerationNo| Some(days_ago(10 - i64::from(number.0)));
        let found = outdated(&record, captured_at, keep, NOW);
        assert_eq!(found.generations, [GenerationNo(6)]);
        assert_eq!(found.next, Some(days_ago(-1)));
    }
}
