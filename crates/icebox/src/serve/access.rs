//! Who may come in: teams and their keys, what each team may have, and a log of what was changed by whom.
//!
//! ```text
//!   socket ── uid, and perhaps a team ──┐
//!   TCP ───── key ──► sha-256 ──► team ─┴─► Caller ──► Audited ──► Icebox ──► the engine, as the team sees it
//! ```
//! What is asked on every request is in memory; the [`Store`] is written when something changes. When a key was last used
//! is written once in [`USED_EVERY`], not with every request.

mod audited;
mod store;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use icebox_api::access::{Caller, Premises};
use icebox_api::key::{self, KeyHash};
use icebox_api::types::{AuditEntry, AuditRange, Key, MadeKey, TeamLimits};
use icebox_api::{ApiError, Daemon, ErrorCode};
use icebox_engine::id::{Name, Team};
use jiff::Timestamp;
use rand::RngExt as _;
use tokio::sync::Mutex;

use super::daemon::Icebox;
use audited::Audited;
use store::{KeptKey, Store};

pub(super) use store::{KeptTeam, StoreError};

/// How exactly it is known when a key was used last, in seconds.
const USED_EVERY: i64 = 300;
/// How many entries of the audit log are read at once, unless fewer are asked for.
const AUDIT_PAGE: u32 = 1000;
/// The name of the key that the environment gave.
pub(super) const GIVEN: &str = "environment";

/// A key, at hand for every request.
struct Held {
    kept: KeptKey,
    /// Seconds since 1970; 0 if never.
    used: AtomicI64,
}

/// What is asked on every request.
#[derive(Default)]
struct Register {
    teams: BTreeMap<String, KeptTeam>,
    keys: HashMap<KeyHash, Arc<Held>>,
}

/// Teams, keys and the audit log of one data directory.
pub(super) struct Access {
    store: Store,
    register: RwLock<Register>,
    /// One change at a time, in the store and in the register.
    changing: Mutex<()>,
}

impl Access {
    /// Reads what there is. Blocks. Without a directory everything is in memory.
    ///
    /// # Errors
    /// It is damaged, of a newer version, or cannot be read or written.
    pub(super) fn open(data: Option<&Path>) -> Result<Self, StoreError> {
        let store = Store::open(data)?;
        let teams = store.teams()?.into_iter();
        let keys = store.keys()?.into_iter();
        let register = Register {
            teams: teams.map(|it| (it.name.to_string(), it)).collect(),
            keys: keys.map(held).collect(),
        };
        Ok(Self {
            store,
            register: RwLock::new(register),
            changing: Mutex::new(()),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Register> {
        // Changed by single inserts and removes: a panic elsewhere leaves it whole.
        self.register.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Register> {
        let register = self.register.write();
        register.unwrap_or_else(PoisonError::into_inner)
    }

    async fn stored<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(done) => done.map_err(|error| ApiError::from_error(ErrorCode::Internal, &error)),
            Err(panic) => Err(ApiError::from_error(ErrorCode::Internal, &panic)),
        }
    }

    fn caller_of(&self, presented: &[u8]) -> Option<Caller> {
        let held = self.read().keys.get(&KeyHash::of(presented)).cloned()?;
        let (now, before) = (Timestamp::now(), held.used.load(Ordering::Relaxed));
        let seconds = now.as_second();
        let is_ours = seconds - before >= USED_EVERY
            && held
                .used
                .compare_exchange(before, seconds, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        let id = held.kept.key.id.clone();
        if is_ours {
            let (store, id) = (self.store.clone(), id.clone());
            // Nobody waits for it, and nothing depends on it.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = store.used(&id, now) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "when a key was used is not written down");
                }
            });
        }
        let team = held.kept.key.team.clone();
        Some(Caller::Key { id, team })
    }

    /// All teams, with how many keys each has.
    pub(super) fn teams(&self) -> Vec<(KeptTeam, u64)> {
        let register = self.read();
        let keys_of = |team: &KeptTeam| {
            let keys = register.keys.values();
            let keys = keys.filter(|it| it.kept.key.team == team.name.as_str());
            u64::try_from(keys.count()).unwrap_or(u64::MAX)
        };
        let teams = register.teams.values();
        teams.map(|team| (team.clone(), keys_of(team))).collect()
    }

    pub(super) fn team(&self, team: &str) -> Result<KeptTeam, ApiError> {
        let found = self.read().teams.get(team).cloned();
        found.ok_or_else(|| {
            let shown: String = team.chars().take(80).collect();
            ApiError::new(ErrorCode::NotFound, format!("no team is called {shown:?}"))
                .hint("`icebox team ls` lists the teams there are; `icebox team create` makes one")
        })
    }

    pub(super) async fn create_team(
        &self,
        name: &str,
        limits: TeamLimits,
    ) -> Result<KeptTeam, ApiError> {
        let name: Team = name
            .parse()
            .map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))?;
        let _alone = self.changing.lock().await;
        if self.read().teams.contains_key(name.as_str()) {
            let message = format!("a team called {name} exists already");
            return Err(ApiError::new(ErrorCode::AlreadyExists, message)
                .hint("choose another name, or change that one: `icebox team set`"));
        }
        self.put_team(KeptTeam {
            name,
            created_at: Timestamp::now(),
            limits,
        })
        .await
    }

    pub(super) async fn change_team(
        &self,
        name: &str,
        limits: impl FnOnce(TeamLimits) -> TeamLimits,
    ) -> Result<KeptTeam, ApiError> {
        let _alone = self.changing.lock().await;
        let before = self.team(name)?;
        let limits = limits(before.limits);
        self.put_team(KeptTeam { limits, ..before }).await
    }

    async fn put_team(&self, team: KeptTeam) -> Result<KeptTeam, ApiError> {
        let written = team.clone();
        self.stored(move |store| store.put_team(&written)).await?;
        let name = team.name.to_string();
        self.write().teams.insert(name, team.clone());
        Ok(team)
    }

    /// Removes a team unless it `has` something still, which is asked when its keys let nobody in any more.
    pub(super) async fn remove_team(
        &self,
        name: &str,
        has: impl FnOnce(&Team) -> Option<String>,
    ) -> Result<(), ApiError> {
        let _alone = self.changing.lock().await;
        let team = self.team(name)?;
        if team.name.is_default() {
            let message = "the default team cannot be removed";
            return Err(ApiError::new(ErrorCode::Invalid, message)
                .hint("remove its keys, if nobody is to use it: `icebox key ls`"));
        }
        let of_team: HashMap<_, _> = {
            let mut register = self.write();
            let keys = std::mem::take(&mut register.keys).into_iter();
            let is_its = |(_, held): &(KeyHash, Arc<Held>)| held.kept.key.team == name;
            let (of_team, others) = keys.partition(is_its);
            register.keys = others;
            of_team
        };
        let removed = match has(&team.name) {
            None => {
                let name = team.name.clone();
                self.stored(move |store| store.remove_team(&name)).await
            }
            Some(what) => {
                let message = format!("team {name} has {what}");
                Err(ApiError::new(ErrorCode::InUse, message)
                    .hint(format!("remove them first: `icebox --team {name} ls`")))
            }
        };
        let mut register = self.write();
        match removed {
            Ok(()) => drop(register.teams.remove(name)),
            Err(_) => register.keys.extend(of_team),
        }
        removed
    }

    /// The keys of a team, or of all, oldest first.
    pub(super) async fn keys(&self, team: Option<&str>) -> Result<Vec<Key>, ApiError> {
        let keys = self.stored(Store::keys).await?.into_iter();
        Ok(keys
            .map(|kept| kept.key)
            .filter(|key| team.is_none_or(|team| team == key.team))
            .collect())
    }

    /// Makes a key. It is told this once.
    pub(super) async fn create_key(&self, team: &str, name: &str) -> Result<MadeKey, ApiError> {
        let name: Name = name
            .parse()
            .map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))?;
        let secret = key::generate();
        let _alone = self.changing.lock().await;
        let kept = self.keep(team, name.as_str(), &secret, None).await?;
        Ok(MadeKey { key: secret, kept })
    }

    /// Has `secret` be a key of the default team, in place of the one that was given so before.
    pub(super) async fn give_key(&self, secret: &str) -> Result<(), ApiError> {
        let _alone = self.changing.lock().await;
        let before = {
            let register = self.read();
            if register.keys.contains_key(&KeyHash::of(secret)) {
                return Ok(());
            }
            let mut keys = register.keys.values();
            let is_given = |it: &&Arc<Held>| it.kept.key.name == GIVEN;
            keys.find(is_given).map(|it| it.kept.clone())
        };
        let instead_of = before.as_ref().map(|it| it.key.id.as_str());
        self.keep(Team::DEFAULT, GIVEN, secret, instead_of).await?;
        if let Some(before) = before {
            self.write().keys.remove(&before.hash);
        }
        Ok(())
    }

    /// Whether nobody has a key.
    pub(super) fn has_no_keys(&self) -> bool {
        self.read().keys.is_empty()
    }

    async fn keep(
        &self,
        team: &str,
        name: &str,
        secret: &str,
        instead_of: Option<&str>,
    ) -> Result<Key, ApiError> {
        /// Of a key of ours: `e2b_` and 16 of its 160 bits.
        const SHOWN: usize = 8;
        self.team(team)?;
        let shown: String = secret.chars().take(SHOWN).collect();
        let kept = KeptKey {
            hash: KeyHash::of(secret),
            key: Key {
                id: new_id(),
                name: name.to_owned(),
                team: team.to_owned(),
                mask: format!("{shown}…"),
                created_at: Timestamp::now(),
                last_used: None,
            },
        };
        let (written, instead_of) = (kept.clone(), instead_of.map(ToOwned::to_owned));
        self.stored(move |store| store.add_key(&written, instead_of.as_deref()))
            .await?;
        let key = kept.key.clone();
        let (hash, held) = held(kept);
        self.write().keys.insert(hash, held);
        Ok(key)
    }

    /// Removes a key of a team, or of any.
    pub(super) async fn remove_key(&self, team: Option<&str>, id: &str) -> Result<(), ApiError> {
        let _alone = self.changing.lock().await;
        let found = {
            let register = self.read();
            let mut keys = register.keys.values().map(|held| &held.kept);
            let wanted =
                |it: &&KeptKey| it.key.id == id && team.is_none_or(|team| team == it.key.team);
            keys.find(wanted).map(|kept| kept.hash.clone())
        };
        let hash = found.ok_or_else(|| {
            let shown: String = id.chars().take(80).collect();
            ApiError::new(ErrorCode::NotFound, format!("no key has the id {shown:?}"))
                .hint("`icebox key ls` lists the keys there are")
        })?;
        let id = id.to_owned();
        self.stored(move |store| store.remove_key(&id)).await?;
        self.write().keys.remove(&hash);
        Ok(())
    }

    /// What was changed and who asked for it.
    pub(super) async fn audit(
        &self,
        team: Option<&str>,
        range: AuditRange,
    ) -> Result<Vec<AuditEntry>, ApiError> {
        let team = team.map(ToOwned::to_owned);
        let limit = range.limit.unwrap_or(AUDIT_PAGE).min(AUDIT_PAGE);
        self.stored(move |store| {
            let since = match range.from {
                Some(from) => range.since.max(store.audited_before(from)?),
                None => range.since,
            };
            store.audit(since, limit, team.as_deref())
        })
        .await
    }
}

fn held(kept: KeptKey) -> (KeyHash, Arc<Held>) {
    let used = kept.key.last_used.map_or(0, Timestamp::as_second);
    let held = Held {
        used: AtomicI64::new(used),
        kept,
    };
    (held.kept.hash.clone(), Arc::new(held))
}

/// An id that cannot be taken for a sandbox's or a template's.
fn new_id() -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    let drawn = (0..12).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    std::iter::once('k').chain(drawn).collect()
}

/// What the daemon's servers serve.
pub(super) struct House {
    pub(super) icebox: Icebox,
}

impl Premises for House {
    fn caller_of_key(&self, presented: &[u8]) -> Option<Caller> {
        self.icebox.access.caller_of(presented)
    }

    fn require_team(&self, team: &str) -> Result<(), ApiError> {
        self.icebox.access.team(team).map(drop)
    }

    fn seen_by(&self, caller: &Caller) -> Arc<dyn Daemon> {
        let mut icebox = self.icebox.clone();
        if let Some(team) = caller.team() {
            // Every caller's team was a team's name when the caller was made, so this parses.
            let team = team.parse().unwrap_or_default();
            icebox.engine = icebox.engine.of_team(team);
        }
        Arc::new(Audited::new(icebox, caller))
    }
}
