//! `SQLite` databases in a data directory: one process's own, of one version, and there on a full disk, too.
//!
//! A commit is not synced unless who commits asks for it (`PRAGMA synchronous = FULL`): it survives a daemon that is
//! killed and costs no verb a flush of the file system that it shares with sandboxes. What the power takes is at most the
//! last commits; the database is whole either way (`SQLite`: `synchronous=NORMAL` with a write-ahead log).

use std::path::{Path, PathBuf};

use rusqlite::{Connection, TransactionBehavior};

/// One data directory has one daemon, so a database has one connection: with the lock that says so, `SQLite` keeps the
/// index of its write-ahead log in memory. In a file beside the log, which is made anew at each start, a daemon could not
/// start on a full disk.
///
/// A page cache of 256 KiB: the daemon's memory is for sandboxes. Log and cache are kept small by frequent checkpoints.
const SETTINGS: &str = "
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    PRAGMA wal_autocheckpoint = 256;
    PRAGMA cache_size = -256;
    PRAGMA temp_store = MEMORY;
    PRAGMA foreign_keys = ON;
";

/// What a database holds.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// The version of the tables, in `user_version`: 1 or more.
    pub version: i64,
    /// The statements that make them.
    pub tables: &'static str,
}

/// Why a database was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A newer version has made it (INV-44).
    #[error("{} has format {found}, and this build knows {known}", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The one that was asked for.
        known: i64,
    },
    /// It is no database, or not a whole one.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rusqlite::Error,
    },
    /// It cannot be read or written, or another process has it open.
    #[error("cannot open {}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
}

/// Opens a database, or makes it with its tables. Blocks.
///
/// Made in one transaction: who is killed in it leaves an empty database, which the next one fills.
///
/// # Errors
/// See [`OpenError`].
pub fn open(path: &Path, format: Format) -> Result<Connection, OpenError> {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let failed = |source: rusqlite::Error| {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) => OpenError::Damaged { path, source },
            _ => OpenError::Failed { path, source },
        }
    };
    let (connection, found) = connect(path, format).map_err(failed)?;
    if found > format.version {
        return Err(OpenError::TooNew {
            path: path.to_owned(),
            found,
            known: format.version,
        });
    }
    Ok(connection)
}

/// A connection, and the version of what it is to.
fn connect(path: &Path, format: Format) -> rusqlite::Result<(Connection, i64)> {
    let mut connection = Connection::open(path)?;
    connection.execute_batch(SETTINGS)?;
    let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = begun.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        begun.execute_batch(format.tables)?;
        begun.pragma_update(None, "user_version", format.version)?;
    }
    begun.commit()?;
    Ok((connection, version))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;

    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    use super::*;

    const FORMAT: Format = Format {
        version: 3,
        tables: "CREATE TABLE word (word TEXT NOT NULL) STRICT",
    };

    fn words(connection: &Connection) -> Vec<String> {
        let mut select = connection.prepare("SELECT word FROM word").unwrap();
        let words = select.query_map([], |row| row.get(0)).unwrap();
        words.collect::<Result<_, _>>().unwrap()
    }

    /// A file system of a megabyte.
    struct Small(tempfile::TempDir);

    impl Small {
        fn new() -> Self {
            let small = Self(tempfile::tempdir().unwrap());
            let options = c"size=1m";
            mount(
                "none",
                small.0.path(),
                "tmpfs",
                MountFlags::empty(),
                Some(options),
            )
            .expect("these tests run as root");
            small
        }

        fn fill(&self) {
            let mut filler = File::create(self.0.path().join("filler")).unwrap();
            while filler.write_all(&[1; 4096]).is_ok() {}
        }
    }

    impl Drop for Small {
        fn drop(&mut self) {
            unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
        }
    }

    #[test]
    fn inv_28_a_database_opens_on_a_full_disk_with_all_that_was_committed() {
        let before = Small::new();
        let connection = open(&before.0.path().join("db"), FORMAT).unwrap();
        connection
            .execute("INSERT INTO word VALUES ('kept')", [])
            .unwrap();
        // As a killed process leaves it: its log is not part of the database yet.
        let after = Small::new();
        for name in ["db", "db-wal"] {
            fs::copy(before.0.path().join(name), after.0.path().join(name)).unwrap();
        }
        drop(connection);
        assert!(fs::metadata(after.0.path().join("db-wal")).unwrap().len() > 0);
        after.fill();
        let connection = open(&after.0.path().join("db"), FORMAT).unwrap();
        assert_eq!(words(&connection), ["kept"]);
        let full = connection.execute("INSERT INTO word VALUES ('lost')", []);
        assert!(full.is_err(), "there is no room for it");
        drop(connection);
        // As one that was asked to end leaves it: without a log.
        fs::remove_file(after.0.path().join("filler")).unwrap();
        drop(open(&after.0.path().join("db"), FORMAT).unwrap());
        after.fill();
        let connection = open(&after.0.path().join("db"), FORMAT).unwrap();
        assert_eq!(words(&connection), ["kept"]);
    }

    #[test]
    fn a_database_has_one_user() {
        let data = tempfile::tempdir().unwrap();
        let path = data.path().join("db");
        let first = open(&path, FORMAT).unwrap();
        assert!(matches!(open(&path, FORMAT), Err(OpenError::Failed { .. })));
        drop(first);
        open(&path, FORMAT).unwrap();
    }

    #[test]
    fn inv_44_a_newer_or_damaged_database_is_told_from_one_that_cannot_be_read() {
        let data = tempfile::tempdir().unwrap();
        let path = data.path().join("db");
        let newer = Connection::open(&path).unwrap();
        newer.execute_batch("PRAGMA user_version = 7").unwrap();
        drop(newer);
        let refused = open(&path, FORMAT).unwrap_err();
        assert!(matches!(refused, OpenError::TooNew { found: 7, .. }));
        let told = refused.to_string();
        assert!(
            told.contains("format 7") && told.contains("knows 3"),
            "{told}"
        );
        fs::write(&path, vec![b'x'; 8192]).unwrap();
        let refused = open(&path, FORMAT).unwrap_err();
        assert!(matches!(refused, OpenError::Damaged { .. }), "{refused}");
        let refused = open(&data.path().join("none/db"), FORMAT).unwrap_err();
        assert!(matches!(refused, OpenError::Failed { .. }), "{refused}");
    }
}
