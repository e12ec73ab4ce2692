//! Archives that builds copy files from. A client asks whether one is there by the hash that it makes of its files, and
//! else puts it where it is told to, without a key: the way there is the secret, and good for one archive and a while.
//!
//! Nothing holds an archive against its hash, which is of files and not of the archive. So each team has its own: what one
//! has sent is in nobody else's builds.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::StatusCode;
use icebox_api::{ApiError, BoxStream, ErrorCode};
use icebox_engine::host::Secret;
use icebox_engine::id::{Digest, Team};
use tokio::io::AsyncWriteExt as _;

use super::lock;

/// How long an archive may take to come.
const ADMITTED: Duration = Duration::from_secs(3600);
/// How many archives of a team may be on their way.
const ADMITTED_MAX: usize = 1000;
/// The largest archive.
const ARCHIVE_MAX: u64 = 4 << 30;
/// How long archives are kept that no build asks for any more.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

pub(in crate::serve) struct Files {
    directory: PathBuf,
    archive_max: u64,
    admitted: Mutex<BTreeMap<String, Admitted>>,
}

/// An archive that is to come.
#[derive(Clone)]
struct Admitted {
    team: Team,
    digest: Digest,
    since: Instant,
}

impl Files {
    pub(super) fn new(data: &Path) -> Self {
        Self {
            directory: data.join("cache/build-files"),
            archive_max: ARCHIVE_MAX,
            admitted: Mutex::default(),
        }
    }

    /// Where the archive of a team is that has this hash, if it is.
    pub(super) fn find(&self, team: &Team, hash: &str) -> Result<Option<PathBuf>, ApiError> {
        let path = self.path(team, &digest(hash)?);
        Ok(path.is_file().then_some(path))
    }

    /// `None` if the archive is there; else what its way begins with.
    pub(in crate::serve) fn admit(
        &self,
        team: &Team,
        hash: &str,
    ) -> Result<Option<String>, ApiError> {
        let digest = digest(hash)?;
        let path = self.path(team, &digest);
        if path.is_file() {
            // Its time begins anew. If that fails it is sent again some day.
            let now = std::fs::File::options().append(true).open(&path);
            now.and_then(|file| file.set_modified(SystemTime::now()))
                .ok();
            return Ok(None);
        }
        let way: String = Secret::random().expose().to_owned();
        let mut admitted = lock(&self.admitted);
        admitted.retain(|_, it| it.since.elapsed() < ADMITTED);
        if admitted.values().filter(|it| it.team == *team).count() >= ADMITTED_MAX {
            let message = format!("{ADMITTED_MAX} archives are to come already");
            return Err(ApiError::new(ErrorCode::LimitReached, message)
                .hint("send those first, or wait an hour"));
        }
        let coming = Admitted {
            team: team.clone(),
            digest,
            since: Instant::now(),
        };
        admitted.insert(way.clone(), coming);
        Ok(Some(way))
    }

    /// Takes an archive. What breaks off leaves nothing.
    pub(in crate::serve) async fn put(
        &self,
        way: &str,
        mut content: BoxStream<io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        let admitted = lock(&self.admitted).get(way).cloned();
        let Admitted { team, digest, .. } = admitted
            .filter(|it| it.since.elapsed() < ADMITTED)
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, "nothing is to be put here"))?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => ApiError::from_error(ErrorCode::Exhausted, &error),
            io::ErrorKind::FileTooLarge => ApiError::from_error(ErrorCode::Invalid, &error)
                .status(StatusCode::PAYLOAD_TOO_LARGE)
                .hint(format!("an archive has at most {} GiB", ARCHIVE_MAX >> 30)),
            io::ErrorKind::TimedOut => ApiError::from_error(ErrorCode::Timeout, &error)
                .status(StatusCode::REQUEST_TIMEOUT)
                .hint("the archive stopped coming: send it again"),
            _ => ApiError::from_error(ErrorCode::Internal, &error),
        };
        self.prune();
        let stored = async {
            let path = self.path(&team, &digest);
            let directory = path.parent().unwrap_or(&self.directory);
            tokio::fs::create_dir_all(directory).await?;
            let temporary = tempfile::NamedTempFile::new_in(directory)?;
            let mut file = tokio::fs::File::from_std(temporary.reopen()?);
            let mut room = self.archive_max;
            while let Some(piece) = content.next().await {
                let piece = piece?;
                let left = room.checked_sub(piece.len() as u64);
                room = left.ok_or(io::ErrorKind::FileTooLarge)?;
                file.write_all(&piece).await?;
            }
            file.sync_all().await?;
            temporary.persist(&path)?;
            io::Result::Ok(())
        };
        stored.await.map_err(failed)?;
        lock(&self.admitted).remove(way);
        Ok(())
    }

    /// Removes what nobody has asked for in a long time.
    fn prune(&self) {
        let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
        let teams = entries(&self.directory).map(|it| it.path());
        // Beside them is what earlier daemons had for all teams together.
        let archives = entries(&self.directory).chain(teams.flat_map(|team| entries(&team)));
        for entry in archives.filter(|it| it.file_type().is_ok_and(|it| it.is_file())) {
            let modified = entry.metadata().and_then(|it| it.modified());
            let age = modified.ok().and_then(|it| it.elapsed().ok());
            if age.is_some_and(|age| age > KEPT)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::warn!(%error, file = %entry.path().display(), "an old archive stays");
            }
        }
    }

    /// A team's name and a hash are single components of paths.
    fn path(&self, team: &Team, digest: &Digest) -> PathBuf {
        self.directory.join(team.as_str()).join(digest.as_str())
    }
}

fn digest(hash: &str) -> Result<Digest, ApiError> {
    hash.parse()
        .map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn pieces(of: &[&'static str]) -> BoxStream<io::Result<Bytes>> {
        let pieces: Vec<_> = of.iter().map(|it| Ok(Bytes::from(*it))).collect();
        stream::iter(pieces).boxed()
    }

    #[tokio::test]
    async fn inv_42_what_a_team_sends_is_in_nobody_elses_builds() {
        let data = tempfile::tempdir().expect("a directory");
        let files = Files::new(data.path());
        let (team, other) = (Team::default(), "other".parse().expect("a team"));
        let hash = "a".repeat(64);
        let way = files
            .admit(&team, &hash)
            .expect("a hash")
            .expect("not there");
        files
            .put(&way, pieces(&["con", "tent"]))
            .await
            .expect("taken");
        let path = files.find(&team, &hash).expect("a hash").expect("there");
        assert_eq!(std::fs::read(path).expect("there"), b"content");
        assert_eq!(files.admit(&team, &hash).expect("a hash"), None);
        assert_eq!(files.find(&other, &hash).expect("a hash"), None);
        assert!(files.admit(&other, &hash).expect("a hash").is_some());
        // The way was good for one.
        assert!(files.put(&way, pieces(&["other"])).await.is_err());
    }

    #[tokio::test]
    async fn archives_have_a_size_and_a_number_and_leave_nothing_when_they_break_off() {
        let data = tempfile::tempdir().expect("a directory");
        let files = Files {
            archive_max: 5,
            ..Files::new(data.path())
        };
        let team = Team::default();
        let hash = "a".repeat(64);
        let way = files
            .admit(&team, &hash)
            .expect("a hash")
            .expect("not there");
        let refused = files.put(&way, pieces(&["123", "456"])).await;
        let refused = refused.expect_err("too large").into_body();
        assert_eq!(refused.code, 413);
        assert_eq!(files.find(&team, &hash).expect("a hash"), None);
        let directory = files.directory.join(team.as_str());
        assert_eq!(std::fs::read_dir(directory).expect("there").count(), 0);
        files
            .put(&way, pieces(&["123", "45"]))
            .await
            .expect("taken");
        for n in 0..ADMITTED_MAX {
            files.admit(&team, &format!("{n:064x}")).expect("admitted");
        }
        assert!(files.admit(&team, &"b".repeat(64)).is_err());
        let other = "other".parse().expect("a team");
        files.admit(&other, &hash).expect("not their concern");
    }
}
