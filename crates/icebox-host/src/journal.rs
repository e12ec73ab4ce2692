//! The journal as a [database](crate::database): `journal.sqlite` in the data directory, with its `-wal` beside it.
//!
//! Bounded by itself: the newest [`EVENTS_MAX`] events, and samples of the last two days. A file that is no database is
//! set aside and said so, since nothing but history is in it; one of a newer version is refused (INV-44).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use icebox_engine::host::{ErrorKind, HostError, Journal, Kept};
use icebox_engine::id::SandboxId;
use icebox_engine::{Event, Sample};
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::blocking::blocking;
use crate::database::{self, Format, OpenError};

/// The file, in the data directory.
pub const JOURNAL: &str = "journal.sqlite";

/// How many events are kept, the newest ones: some 15 MB.
pub const EVENTS_MAX: u64 = 50_000;
/// For how long samples are kept, in seconds.
const SAMPLES_MAX: u32 = 2 * 24 * 3600;
/// Between two removals of what is too old, in seconds; and in events.
const TRIM_SAMPLES: u32 = 3600;
const TRIM_EVENTS: u64 = 500;

const FORMAT: Format = Format {
    version: 1,
    tables: "
        CREATE TABLE event (
            seq INTEGER PRIMARY KEY,
            body TEXT NOT NULL
        ) STRICT;
        CREATE TABLE sample (
            sandbox TEXT NOT NULL,
            at INTEGER NOT NULL,
            seconds INTEGER NOT NULL,
            cpu_permille INTEGER NOT NULL,
            memory_kib INTEGER NOT NULL,
            disk_read INTEGER NOT NULL,
            disk_written INTEGER NOT NULL,
            network_in INTEGER NOT NULL,
            network_out INTEGER NOT NULL,
            PRIMARY KEY (sandbox, at)
        ) STRICT, WITHOUT ROWID;
    ",
};

/// The journal of one data directory.
pub struct SqliteJournal {
    database: Arc<Mutex<Database>>,
}

struct Database {
    connection: Connection,
    /// When samples that are too old were removed last, by the newest sample then.
    trimmed_at: u32,
}

impl SqliteJournal {
    /// Opens the journal of a data directory, or makes it. Blocks.
    ///
    /// # Errors
    /// It belongs to a newer version, or cannot be read or written. One that is damaged is no error: it is set aside.
    pub fn open(data: &Path) -> Result<Self, HostError> {
        let path = data.join(JOURNAL);
        let mut opened = database::open(&path, FORMAT);
        if let Err(OpenError::Damaged { source, .. }) = &opened {
            let aside = set_aside(&path)?;
            tracing::error!(error = %source, aside = %aside.display(), "the journal is damaged; a new one begins");
            opened = database::open(&path, FORMAT);
        }
        let connection = opened.map_err(not_opened)?;
        let database = Database {
            connection,
            trimmed_at: 0,
        };
        Ok(Self {
            database: Arc::new(Mutex::new(database)),
        })
    }

    async fn with<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&mut Database) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, HostError> {
        let database = Arc::clone(&self.database);
        blocking(move || work(&mut lock(&database)).map_err(|error| failed(doing, error))).await
    }
}

fn lock(database: &Mutex<Database>) -> MutexGuard<'_, Database> {
    // A transaction that a panic dropped was rolled back.
    database.lock().unwrap_or_else(PoisonError::into_inner)
}

fn not_opened(error: OpenError) -> HostError {
    match error {
        OpenError::TooNew { .. } => HostError::new(ErrorKind::Unsupported, error.to_string())
            .hint("install the newer version again"),
        OpenError::Damaged { path, source } | OpenError::Failed { path, source } => {
            failed("open", source).hint(format!("the journal is {}", path.display()))
        }
    }
}

/// Moves a damaged database out of the way, over one that was damaged before.
fn set_aside(path: &Path) -> Result<PathBuf, HostError> {
    let aside = path.with_extension("sqlite.damaged");
    fs::rename(path, &aside)
        .map_err(|error| HostError::io(format!("set aside {}", path.display()), error))?;
    for beside in ["sqlite-wal", "sqlite-shm"] {
        crate::fs::remove_remains(&path.with_extension(beside));
    }
    Ok(aside)
}

fn failed(doing: &str, error: rusqlite::Error) -> HostError {
    use rusqlite::ErrorCode::DiskFull;
    let kind = match error.sqlite_error_code() {
        Some(DiskFull) => ErrorKind::Exhausted,
        _ => ErrorKind::Other,
    };
    HostError::new(kind, format!("{doing} the journal")).caused_by(error)
}

fn sample(row: &rusqlite::Row<'_>) -> rusqlite::Result<Sample> {
    Ok(Sample {
        at: row.get(0)?,
        seconds: row.get(1)?,
        cpu_permille: row.get(2)?,
        memory_kib: row.get(3)?,
        disk_read: row.get(4)?,
        disk_written: row.get(5)?,
        network_in: row.get(6)?,
        network_out: row.get(7)?,
    })
}

/// SQLite's integers have a sign. Numbers of events do not come near the end of it.
fn signed(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}

fn unsigned(seq: Option<i64>) -> u64 {
    seq.and_then(|seq| u64::try_from(seq).ok()).unwrap_or(0)
}

#[async_trait]
impl Journal for SqliteJournal {
    async fn newest(&self) -> Result<u64, HostError> {
        self.with("read", |database| {
            let newest = "SELECT max(seq) FROM event";
            let newest = database.connection.query_row(newest, [], |row| row.get(0));
            newest.map(unsigned)
        })
        .await
    }

    async fn append(&self, events: &[Event]) -> Result<(), HostError> {
        let mut rows = Vec::with_capacity(events.len());
        for event in events {
            let body = serde_json::to_string(event).map_err(|error| {
                HostError::new(ErrorKind::Other, "write an event down").caused_by(error)
            })?;
            rows.push((event.seq, body));
        }
        self.with("write", move |database| {
            let begun = database.connection.transaction()?;
            let mut trim = None;
            {
                let insert = "INSERT OR REPLACE INTO event (seq, body) VALUES (?1, ?2)";
                let mut insert = begun.prepare(insert)?;
                for (seq, body) in &rows {
                    insert.execute(params![signed(*seq), body])?;
                    if seq % TRIM_EVENTS == 0 {
                        trim = Some(seq.saturating_sub(EVENTS_MAX));
                    }
                }
            }
            if let Some(oldest) = trim {
                begun.execute("DELETE FROM event WHERE seq <= ?1", [signed(oldest)])?;
            }
            begun.commit()
        })
        .await
    }

    async fn read(&self, from: u64, limit: usize) -> Result<Kept, HostError> {
        self.with("read", move |database| {
            let oldest = "SELECT min(seq) FROM event";
            let connection = &database.connection;
            let oldest = connection.query_row(oldest, [], |row| row.get(0))?;
            let select = "SELECT body FROM event WHERE seq >= ?1 ORDER BY seq LIMIT ?2";
            let mut select = connection.prepare(select)?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let bodies = select.query_map(params![signed(from), limit], |row| {
                let body: String = row.get(0)?;
                serde_json::from_str(&body).map_err(|error| {
                    let kind = rusqlite::types::Type::Text;
                    rusqlite::Error::FromSqlConversionFailure(0, kind, error.into())
                })
            })?;
            Ok(Kept {
                events: bodies.collect::<rusqlite::Result<_>>()?,
                oldest: unsigned(oldest),
            })
        })
        .await
    }

    async fn append_samples(&self, samples: &[(SandboxId, Sample)]) -> Result<(), HostError> {
        let samples = samples.to_vec();
        self.with("write", move |database| {
            let newest = samples.iter().map(|(_, sample)| sample.at).max();
            let newest = newest.unwrap_or_default();
            let begun = database.connection.transaction()?;
            {
                let insert =
                    "INSERT OR REPLACE INTO sample VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
                let mut insert = begun.prepare(insert)?;
                for (sandbox, it) in &samples {
                    insert.execute(params![
                        sandbox.as_str(),
                        it.at,
                        it.seconds,
                        it.cpu_permille,
                        it.memory_kib,
                        it.disk_read,
                        it.disk_written,
                        it.network_in,
                        it.network_out
                    ])?;
                }
            }
            if newest.abs_diff(database.trimmed_at) >= TRIM_SAMPLES {
                let oldest = newest.saturating_sub(SAMPLES_MAX);
                begun.execute("DELETE FROM sample WHERE at < ?1", [oldest])?;
                database.trimmed_at = newest;
            }
            begun.commit()
        })
        .await
    }

    async fn samples(&self, sandbox: &SandboxId, since: u32) -> Result<Vec<Sample>, HostError> {
        let sandbox = sandbox.to_string();
        self.with("read", move |database| {
            let select = "SELECT at, seconds, cpu_permille, memory_kib, disk_read, disk_written, network_in, \
                          network_out FROM sample WHERE sandbox = ?1 AND at >= ?2 ORDER BY at";
            let mut select = database.connection.prepare(select)?;
            let rows = select.query_map(params![sandbox, since], sample)?;
            rows.collect()
        })
        .await
    }

    async fn forget_samples(&self, sandbox: &SandboxId) -> Result<(), HostError> {
        let sandbox = sandbox.to_string();
        self.with("write", move |database| {
            let any = "SELECT 1 FROM sample WHERE sandbox = ?1 LIMIT 1";
            let connection = &database.connection;
            let any = connection.query_row(any, [&sandbox], |_| Ok(()));
            if any.optional()?.is_some() {
                connection.execute("DELETE FROM sample WHERE sandbox = ?1", [&sandbox])?;
            }
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64) -> Event {
        Event {
            seq,
            at: "2026-01-02T03:04:05.678901Z".parse().unwrap(),
            sandbox: seq.is_multiple_of(2).then(sandbox),
            team: seq.is_multiple_of(3).then(Default::default),
            kind: "sandbox.paused".into(),
            detail: format!("'{seq}'"),
            steps: vec![("drain".into(), seq)],
        }
    }

    fn sandbox() -> SandboxId {
        "iaaaaaaaaaaaaaaaaaaaa".parse().unwrap()
    }

    fn at(at: u32) -> Sample {
        Sample {
            at,
            seconds: 60,
            cpu_permille: 1,
            memory_kib: 2,
            disk_read: 3,
            disk_written: 4,
            network_in: u32::MAX,
            network_out: 6,
        }
    }

    #[tokio::test]
    async fn inv_49_events_survive_who_wrote_them_and_the_oldest_go() {
        let data = tempfile::tempdir().unwrap();
        let journal = SqliteJournal::open(data.path()).unwrap();
        assert_eq!(journal.newest().await.unwrap(), 0);
        assert_eq!(journal.read(1, 10).await.unwrap(), Kept::default());
        let all: Vec<_> = (1..=EVENTS_MAX + 700).map(event).collect();
        for batch in all.chunks(10_000) {
            journal.append(batch).await.unwrap();
        }
        // As a killed daemon leaves it.
        let killed = tempfile::tempdir().unwrap();
        for name in [JOURNAL, "journal.sqlite-wal"] {
            fs::copy(data.path().join(name), killed.path().join(name)).unwrap();
        }
        let next = SqliteJournal::open(killed.path()).unwrap();
        assert_eq!(next.newest().await.unwrap(), EVENTS_MAX + 700);
        let kept = next.read(3, 2).await.unwrap();
        assert_eq!(kept.oldest, 501);
        assert_eq!(kept.events, [event(501), event(502)]);
        let last = next.read(EVENTS_MAX + 700, 10).await.unwrap();
        assert_eq!(last.events, [event(EVENTS_MAX + 700)]);
    }

    #[tokio::test]
    async fn samples_are_kept_for_two_days_or_as_long_as_their_sandbox() {
        let data = tempfile::tempdir().unwrap();
        let journal = SqliteJournal::open(data.path()).unwrap();
        let times = [1, SAMPLES_MAX, SAMPLES_MAX + TRIM_SAMPLES + 1];
        for time in times {
            let samples = [(sandbox(), at(time))];
            journal.append_samples(&samples).await.unwrap();
        }
        let kept = journal.samples(&sandbox(), 0).await.unwrap();
        assert_eq!(kept, [at(times[1]), at(times[2])]);
        assert_eq!(
            journal.samples(&sandbox(), times[2]).await.unwrap().len(),
            1
        );
        journal.forget_samples(&sandbox()).await.unwrap();
        assert_eq!(journal.samples(&sandbox(), 0).await.unwrap(), []);
    }

    #[tokio::test]
    async fn what_is_damaged_is_set_aside() {
        let data = tempfile::tempdir().unwrap();
        let path = data.path().join(JOURNAL);
        fs::write(&path, vec![b'x'; 8192]).unwrap();
        let journal = SqliteJournal::open(data.path()).unwrap();
        journal.append(&[event(1)]).await.unwrap();
        let aside = fs::read(data.path().join("journal.sqlite.damaged")).unwrap();
        assert_eq!(aside, vec![b'x'; 8192]);
    }

    #[test]
    fn inv_44_a_newer_journal_is_refused_naming_both_versions() {
        let data = tempfile::tempdir().unwrap();
        let newer = Connection::open(data.path().join(JOURNAL)).unwrap();
        newer.execute_batch("PRAGMA user_version = 7").unwrap();
        drop(newer);
        let error = SqliteJournal::open(data.path()).err().unwrap().to_string();
        assert!(
            error.contains("format 7") && error.contains("knows 1"),
            "{error}"
        );
    }
}
