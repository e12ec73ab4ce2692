//! The API key of the TCP listener: kept as a hash, in a file that only the daemon's user may read.

use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use icebox_api::key::{self, KeyHash};

use crate::failure::Failure;

/// Names the key; never an option, since everybody can read a process's arguments.
pub(super) const VARIABLE: &str = "ICEBOX_API_KEY";

/// Too short to be a secret below this.
const KEY_MIN: usize = 16;

/// The key that is in force, and the key itself if it was made just now: it is never shown again.
pub(super) struct Key {
    pub(super) hash: KeyHash,
    pub(super) made: Option<String>,
}

/// The key from the environment; else the one whose hash is in `data/api-key`; else a new one.
///
/// # Errors
/// The given key is too weak, or the file is damaged or cannot be written; or a key would have to be made and this
/// process's output goes `in_journal`.
pub(super) fn load(data: &Path, given: Option<&str>, in_journal: bool) -> Result<Key, Failure> {
    let path = data.join("api-key");
    if let Some(given) = given {
        if given.len() < KEY_MIN || !given.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Failure::new(format!("the key in {VARIABLE} is not usable")).hint(format!(
                "a key has at least {KEY_MIN} printable characters; leave {VARIABLE} unset to have one made"
            )));
        }
        let hash = KeyHash::of(given);
        store(data, &path, &hash)?;
        return Ok(Key { hash, made: None });
    }
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let hash = text.parse().map_err(|error| {
                Failure::because(format!("{} is damaged", path.display()), &error)
                    .hint("remove it to have a new key made")
            })?;
            Ok(Key { hash, made: None })
        }
        // What is shown there is kept, for many to read.
        Err(error) if error.kind() == io::ErrorKind::NotFound && in_journal => Err(Failure::new(
            "there is no API key yet, and one that is made now would be shown to the system's log",
        )
        .hint(format!(
            "set {VARIABLE} for the service, or run `icebox serve --listen` once in a terminal"
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let made = key::generate();
            let hash = KeyHash::of(&made);
            store(data, &path, &hash)?;
            Ok(Key {
                hash,
                made: Some(made),
            })
        }
        Err(error) => Err(Failure::because(
            format!("cannot read {}", path.display()),
            &error,
        )),
    }
}

fn store(data: &Path, path: &Path, hash: &KeyHash) -> Result<(), Failure> {
    let write = || {
        // A simulation has no data directory yet.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data)?;
        let mut file = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .tempfile_in(data)?;
        file.write_all(hash.to_text().as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        io::Result::Ok(())
    };
    write().map_err(|error| {
        Failure::because(
            format!("cannot keep the API key in {}", path.display()),
            &error,
        )
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn inv_43_a_key_is_shown_once_and_kept_as_a_private_hash() {
        let data = tempfile::tempdir().expect("a directory");
        assert!(
            load(data.path(), None, true).is_err(),
            "not into the system's log"
        );
        let first = load(data.path(), None, false).expect("a new key");
        let made = first.made.expect("made just now");
        let file = data.path().join("api-key");
        let mode = std::fs::metadata(&file)
            .expect("the file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let kept = std::fs::read_to_string(&file).expect("the file");
        assert!(!kept.contains(&made[4..]));
        let again = load(data.path(), None, false).expect("the same key");
        assert!(again.made.is_none());
        assert!(again.hash.admits(made.as_bytes()));
    }

    #[test]
    fn a_given_key_replaces_the_kept_one_and_a_weak_one_does_not() {
        let data = tempfile::tempdir().expect("a directory");
        assert!(load(data.path(), Some("short"), false).is_err());
        assert!(!data.path().join("api-key").exists());
        load(data.path(), Some("0123456789abcdef"), false).expect("long enough");
        let kept = load(data.path(), None, false).expect("kept");
        assert!(kept.hash.admits(b"0123456789abcdef"));
    }
}
