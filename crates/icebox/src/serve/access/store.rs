//! Teams, keys and the audit log in `SQLite`: `access.sqlite` in the data directory, private to the daemon's user.
//!
//! A key that was removed must stay so whatever happens to the host's power, so changes of teams and keys are synced. The
//! audit log is not: a commit survives a daemon that is killed, and costs no verb a flush of the file system that it shares
//! with sandboxes. Unlike the journal, a damaged file is not set aside and begun anew: who may come in is in it.

use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use icebox_api::key::KeyHash;
use icebox_api::types::{AuditEntry, Key, TeamLimits};
use icebox_engine::id::Team;
use icebox_host::database::{self, Format, OpenError};
use jiff::Timestamp;
use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};

/// The file, in the data directory.
const FILE: &str = "access.sqlite";

/// How many entries of the audit log are kept, the newest ones: some 20 MB.
const AUDIT_MAX: i64 = 100_000;
/// Between two removals of the oldest, in entries.
const AUDIT_TRIM: i64 = 500;

const FORMAT: Format = Format {
    version: 1,
    tables: "
        CREATE TABLE team (
            name TEXT PRIMARY KEY,
            created_at TEXT NOT NULL,
            sandboxes INTEGER,
            running INTEGER,
            cpu_count INTEGER,
            memory_mb INTEGER,
            disk_size_mb INTEGER
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE key (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            team TEXT NOT NULL REFERENCES team ON DELETE CASCADE,
            hash TEXT NOT NULL UNIQUE,
            mask TEXT NOT NULL,
            created_at TEXT NOT NULL,
            last_used TEXT
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE audit (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            at TEXT NOT NULL,
            actor TEXT NOT NULL,
            team TEXT,
            verb TEXT NOT NULL,
            target TEXT NOT NULL,
            outcome TEXT
        ) STRICT;
    ",
};

/// Why it could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(in crate::serve) enum StoreError {
    /// The file cannot be made.
    #[error("cannot make {}", path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    /// It is damaged, of a newer version, or cannot be read or written.
    #[error("cannot open the database of teams and keys")]
    Open(#[from] OpenError),
    /// It cannot be read or written any more.
    #[error("cannot {doing} the database of teams and keys")]
    Database {
        doing: &'static str,
        source: rusqlite::Error,
    },
}

fn failed(doing: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Database { doing, source }
}

/// A team as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::serve) struct KeptTeam {
    pub(in crate::serve) name: Team,
    pub(in crate::serve) created_at: Timestamp,
    pub(in crate::serve) limits: TeamLimits,
}

/// A key as it is kept.
#[derive(Clone, Debug)]
pub(super) struct KeptKey {
    pub(super) key: Key,
    pub(super) hash: KeyHash,
}

/// The database. Its methods block.
#[derive(Clone)]
pub(super) struct Store {
    connection: Arc<Mutex<Connection>>,
}

impl Store {
    /// Opens the database of a data directory, or makes it. Without one: in memory.
    pub(super) fn open(data: Option<&Path>) -> Result<Self, StoreError> {
        let mut path = PathBuf::from(":memory:");
        if let Some(data) = data {
            path = data.join(FILE);
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(data)
                .and_then(|()| {
                    // SQLite gives the files that it makes beside it the same mode.
                    OpenOptions::new()
                        .append(true)
                        .create(true)
                        .mode(0o600)
                        .open(&path)
                });
            made.map_err(|source| StoreError::File {
                path: path.clone(),
                source,
            })?;
        }
        let connection = database::open(&path, FORMAT)?;
        let made = "INSERT OR IGNORE INTO team (name, created_at) VALUES (?1, ?2)";
        let made = connection.execute(made, [Team::DEFAULT, &Timestamp::now().to_string()]);
        made.map_err(failed("write"))?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A transaction that a panic dropped was rolled back.
        let locked = self.connection.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change that must survive a loss of power.
    fn synced<T>(
        &self,
        doing: &'static str,
        change: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let connection = self.lock();
        let changed = (|| {
            connection.pragma_update(None, "synchronous", "FULL")?;
            let changed = change(&connection);
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            changed
        })();
        changed.map_err(failed(doing))
    }

    pub(super) fn teams(&self) -> Result<Vec<KeptTeam>, StoreError> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Vec<_>> {
            let select = "SELECT name, created_at, sandboxes, running, cpu_count, memory_mb, disk_size_mb \
                          FROM team ORDER BY name";
            let mut select = connection.prepare(select)?;
            let rows = select.query_map([], |row| {
                Ok(KeptTeam {
                    name: parsed(row, 0)?,
                    created_at: parsed(row, 1)?,
                    limits: TeamLimits {
                        sandboxes: unsigned(row, 2)?,
                        running: unsigned(row, 3)?,
                        cpu_count: unsigned(row, 4)?,
                        memory_mb: unsigned(row, 5)?,
                        disk_size_mb: unsigned(row, 6)?,
                    },
                })
            })?;
            rows.collect()
        };
        read().map_err(failed("read"))
    }

    /// Writes a team down, new or changed.
    pub(super) fn put_team(&self, team: &KeptTeam) -> Result<(), StoreError> {
        let limits = &team.limits;
        self.synced("write", |connection| {
            let upsert = "INSERT INTO team VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (name) DO UPDATE SET \
                          sandboxes = ?3, running = ?4, cpu_count = ?5, memory_mb = ?6, disk_size_mb = ?7";
            let values = params![
                team.name.as_str(),
                team.created_at.to_string(),
                limits.sandboxes.map(signed),
                limits.running.map(signed),
                limits.cpu_count.map(signed),
                limits.memory_mb.map(signed),
                limits.disk_size_mb.map(signed),
            ];
            connection.execute(upsert, values).map(drop)
        })
    }

    /// Removes a team and its keys.
    pub(super) fn remove_team(&self, team: &Team) -> Result<(), StoreError> {
        self.synced("write", |connection| {
            let delete = "DELETE FROM team WHERE name = ?1";
            connection.execute(delete, [team.as_str()]).map(drop)
        })
    }

    /// All keys, oldest first.
    pub(super) fn keys(&self) -> Result<Vec<KeptKey>, StoreError> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Vec<_>> {
            let select = "SELECT id, name, team, hash, mask, created_at, last_used FROM key \
                          ORDER BY created_at, id";
            let mut select = connection.prepare(select)?;
            let rows = select.query_map([], |row| {
                let last_used: Option<String> = row.get(6)?;
                Ok(KeptKey {
                    hash: parsed(row, 3)?,
                    key: Key {
                        id: row.get(0)?,
                        name: row.get(1)?,
                        team: row.get(2)?,
                        mask: row.get(4)?,
                        created_at: parsed(row, 5)?,
                        last_used: match last_used {
                            Some(_) => Some(parsed(row, 6)?),
                            None => None,
                        },
                    },
                })
            })?;
            rows.collect()
        };
        read().map_err(failed("read"))
    }

    /// Writes a new key down, in place of the one with id `instead_of`, if one is named.
    pub(super) fn add_key(
        &self,
        KeptKey { key, hash }: &KeptKey,
        instead_of: Option<&str>,
    ) -> Result<(), StoreError> {
        self.synced("write", |connection| {
            let begun = connection.unchecked_transaction()?;
            begun.execute("DELETE FROM key WHERE id = ?1", [instead_of])?;
            let insert = "INSERT INTO key VALUES (?1, ?2, ?3, ?4, ?5, ?6, NULL)";
            let created_at = key.created_at.to_string();
            let values = params![
                key.id,
                key.name,
                key.team,
                hash.to_text(),
                key.mask,
                created_at
            ];
            begun.execute(insert, values)?;
            begun.commit()
        })
    }

    pub(super) fn remove_key(&self, id: &str) -> Result<(), StoreError> {
        self.synced("write", |connection| {
            let delete = "DELETE FROM key WHERE id = ?1";
            connection.execute(delete, [id]).map(drop)
        })
    }

    /// Notes when a key was used.
    pub(super) fn used(&self, id: &str, at: Timestamp) -> Result<(), StoreError> {
        let update = "UPDATE key SET last_used = ?2 WHERE id = ?1";
        let updated = self.lock().execute(update, params![id, at.to_string()]);
        updated.map(drop).map_err(failed("write"))
    }

    /// Writes down that somebody asks for a change, and answers the entry's number.
    pub(super) fn begin_audit(
        &self,
        at: Timestamp,
        actor: &str,
        team: Option<&str>,
        verb: &str,
        target: &str,
    ) -> Result<i64, StoreError> {
        let connection = self.lock();
        let write = || {
            let insert =
                "INSERT INTO audit (at, actor, team, verb, target) VALUES (?1, ?2, ?3, ?4, ?5)";
            let mut insert = connection.prepare(insert)?;
            insert.execute(params![at.to_string(), actor, team, verb, target])?;
            let seq = connection.last_insert_rowid();
            if seq % AUDIT_TRIM == 0 {
                let oldest = seq - AUDIT_MAX;
                connection.execute("DELETE FROM audit WHERE seq <= ?1", [oldest])?;
            }
            Ok(seq)
        };
        write().map_err(failed("write"))
    }

    /// Writes down how that ended, and of what it was if that is known only now.
    pub(super) fn end_audit(
        &self,
        seq: i64,
        outcome: &str,
        target: Option<&str>,
    ) -> Result<(), StoreError> {
        let connection = self.lock();
        let write = || {
            let update =
                "UPDATE audit SET outcome = ?2, target = coalesce(?3, target) WHERE seq = ?1";
            let mut update = connection.prepare(update)?;
            update.execute(params![seq, outcome, target]).map(drop)
        };
        write().map_err(failed("write"))
    }

    /// Entries after `since`, of a team or of all, oldest first.
    /// The number of the last entry before the first one of this time or later; 0 if that is the oldest.
    pub(super) fn audited_before(&self, time: Timestamp) -> Result<u64, StoreError> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<u64> {
            let mut select = connection.prepare("SELECT seq, at FROM audit ORDER BY seq")?;
            let mut rows = select.query([])?;
            let mut before = 0;
            while let Some(row) = rows.next()? {
                // As text, times are not in order: they have as many digits as they need.
                if parsed::<Timestamp>(row, 1)? >= time {
                    break;
                }
                before = row.get::<_, i64>(0)?.unsigned_abs();
            }
            Ok(before)
        };
        read().map_err(failed("read"))
    }

    pub(super) fn audit(
        &self,
        since: u64,
        limit: u32,
        team: Option<&str>,
    ) -> Result<Vec<AuditEntry>, StoreError> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Vec<_>> {
            let select = "SELECT seq, at, actor, team, verb, target, outcome FROM audit \
                          WHERE seq > ?1 AND (?3 IS NULL OR team = ?3) ORDER BY seq LIMIT ?2";
            let mut select = connection.prepare(select)?;
            let rows = select.query_map(params![signed(since), limit, team], |row| {
                let seq: i64 = row.get(0)?;
                Ok(AuditEntry {
                    sequence: seq.unsigned_abs(),
                    time: parsed(row, 1)?,
                    actor: row.get(2)?,
                    team: row.get(3)?,
                    verb: row.get(4)?,
                    target: row.get(5)?,
                    outcome: row.get(6)?,
                })
            })?;
            rows.collect()
        };
        read().map_err(failed("read"))
    }
}

fn parsed<T: std::str::FromStr>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: String = row.get(column)?;
    text.parse().map_err(|error: T::Err| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into())
    })
}

/// SQLite's integers have a sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<u64>> {
    let number: Option<i64> = row.get(column)?;
    Ok(number.map(|number| u64::try_from(number).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use icebox_api::key;

    use super::*;

    fn kept(id: &str, team: &str, key: &str) -> KeptKey {
        KeptKey {
            hash: KeyHash::of(key),
            key: Key {
                id: id.to_owned(),
                name: "ci".to_owned(),
                team: team.to_owned(),
                mask: "e2b_00…".to_owned(),
                created_at: Timestamp::UNIX_EPOCH,
                last_used: None,
            },
        }
    }

    #[test]
    fn inv_43_keys_are_kept_as_hashes_in_a_private_file() {
        let data = tempfile::tempdir().unwrap();
        let secret = key::generate();
        let store = Store::open(Some(data.path())).unwrap();
        store
            .add_key(&kept("k1", Team::DEFAULT, &secret), None)
            .unwrap();
        let mut files = 0;
        for file in std::fs::read_dir(data.path()).unwrap() {
            let file = file.unwrap();
            let mode = file.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file:?}");
            let bytes = std::fs::read(file.path()).unwrap();
            let found = bytes
                .windows(secret.len() - 4)
                .any(|it| it == &secret.as_bytes()[4..]);
            assert!(!found, "{file:?}");
            files += 1;
        }
        assert_eq!(files, 2, "the database and its log");
        drop(store);
        let again = Store::open(Some(data.path())).unwrap();
        assert_eq!(again.keys().unwrap()[0].hash, KeyHash::of(&secret));
    }

    #[test]
    fn a_team_goes_with_its_keys_and_the_log_stays() {
        let store = Store::open(None).unwrap();
        let acme = KeptTeam {
            name: "acme".parse().unwrap(),
            created_at: Timestamp::UNIX_EPOCH,
            limits: TeamLimits {
                running: Some(3),
                ..TeamLimits::default()
            },
        };
        store.put_team(&acme).unwrap();
        assert_eq!(store.teams().unwrap()[0], acme);
        store.add_key(&kept("k1", "acme", "one"), None).unwrap();
        store
            .add_key(&kept("k2", "acme", "two"), Some("k1"))
            .unwrap();
        store.used("k2", Timestamp::UNIX_EPOCH).unwrap();
        let keys = store.keys().unwrap();
        assert_eq!(keys.len(), 1);
        assert_eq!(keys[0].key.last_used, Some(Timestamp::UNIX_EPOCH));
        let at = Timestamp::UNIX_EPOCH;
        let audited = store.begin_audit(at, "key:k2", Some("acme"), "sandbox.create", "");
        store
            .end_audit(audited.unwrap(), "done", Some("i1"))
            .unwrap();
        store
            .begin_audit(at, "local:0", None, "team.remove", "acme")
            .unwrap();
        store.remove_team(&acme.name).unwrap();
        assert!(store.keys().unwrap().is_empty());
        assert_eq!(store.teams().unwrap().len(), 1, "the default one");
        let all = store.audit(0, 10, None).unwrap();
        assert_eq!((all[0].target.as_str(), all[0].sequence), ("i1", 1));
        assert_eq!(all[0].outcome.as_deref(), Some("done"));
        assert_eq!(all[1].outcome, None, "it did not end");
        assert_eq!(store.audit(0, 10, Some("acme")).unwrap(), all[..1]);
        assert_eq!(store.audit(1, 10, None).unwrap(), all[1..]);
        let second = jiff::SignedDuration::from_secs(1);
        assert_eq!(store.audited_before(at - second).unwrap(), 0);
        assert_eq!(store.audited_before(at).unwrap(), 0);
        assert_eq!(store.audited_before(at + second).unwrap(), 2);
    }

    #[test]
    fn inv_44_a_newer_database_is_refused_and_a_damaged_one_is_not_begun_anew() {
        let data = tempfile::tempdir().unwrap();
        let newer = Connection::open(data.path().join(FILE)).unwrap();
        newer.execute_batch("PRAGMA user_version = 7").unwrap();
        drop(newer);
        let refused = || Store::open(Some(data.path())).map(drop).unwrap_err();
        let newer = refused();
        assert!(matches!(newer, StoreError::Open(OpenError::TooNew { .. })));
        std::fs::write(data.path().join(FILE), vec![b'x'; 8192]).unwrap();
        let damaged = refused();
        assert!(matches!(
            damaged,
            StoreError::Open(OpenError::Damaged { .. })
        ));
    }
}
