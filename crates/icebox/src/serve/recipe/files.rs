//! Archives that builds copy files from. A client asks whether one is there by the hash that it makes of its files, and
//! else puts it where it is told to, without a key: the way there is the secret, and good for one archive and a while.

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
use icebox_engine::id::Digest;
use tokio::io::AsyncWriteExt as _;

use super::lock;

/// How long an archive may take to come.
const ADMITTED: Duration = Duration::from_secs(3600);
/// How long archives are kept that no build asks for any more.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

pub(in crate::serve) struct Files {
    directory: PathBuf,
    admitted: Mutex<BTreeMap<String, (Digest, Instant)>>,
}

impl Files {
    pub(super) fn new(data: &Path) -> Self {
        Self {
            directory: data.join("cache/build-files"),
            admitted: Mutex::default(),
        }
    }

    /// Where the archive is that has this hash, if it is.
    pub(super) fn find(&self, hash: &str) -> Result<Option<PathBuf>, ApiError> {
        let path = self.path(&digest(hash)?);
        Ok(path.is_file().then_some(path))
    }

    /// `None` if the archive is there; else what its way begins with.
    pub(in crate::serve) fn admit(&self, hash: &str) -> Result<Option<String>, ApiError> {
        let digest = digest(hash)?;
        let path = self.path(&digest);
        if path.is_file() {
            // Its time begins anew. If that fails it is sent again some day.
            let now = std::fs::File::options().append(true).open(&path);
            now.and_then(|file| file.set_modified(SystemTime::now()))
                .ok();
            return Ok(None);
        }
        let way: String = Secret::random().expose().to_owned();
        let mut admitted = lock(&self.admitted);
        admitted.retain(|_, (_, since)| since.elapsed() < ADMITTED);
        admitted.insert(way.clone(), (digest, Instant::now()));
        Ok(Some(way))
    }

    /// Takes an archive. What breaks off leaves nothing.
    pub(in crate::serve) async fn put(
        &self,
        way: &str,
        mut content: BoxStream<io::Result<Bytes>>,
    ) -> Result<(), ApiError> {
        let admitted = lock(&self.admitted).get(way).cloned();
        let digest = admitted
            .filter(|(_, since)| since.elapsed() < ADMITTED)
            .map(|(digest, _)| digest)
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, "nothing is to be put here"))?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => ApiError::from_error(ErrorCode::Exhausted, &error),
            io::ErrorKind::TimedOut => ApiError::from_error(ErrorCode::Timeout, &error)
                .status(StatusCode::REQUEST_TIMEOUT)
                .hint("the archive stopped coming: send it again"),
            _ => ApiError::from_error(ErrorCode::Internal, &error),
        };
        self.prune();
        let stored = async {
            tokio::fs::create_dir_all(&self.directory).await?;
            let temporary = tempfile::NamedTempFile::new_in(&self.directory)?;
            let mut file = tokio::fs::File::from_std(temporary.reopen()?);
            while let Some(piece) = content.next().await {
                file.write_all(&piece?).await?;
            }
            file.sync_all().await?;
            temporary.persist(self.path(&digest))?;
            io::Result::Ok(())
        };
        stored.await.map_err(failed)?;
        lock(&self.admitted).remove(way);
        Ok(())
    }

    /// Removes what nobody has asked for in a long time.
    fn prune(&self) {
        let entries = std::fs::read_dir(&self.directory);
        for entry in entries.into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|it| it.modified());
            let age = modified.ok().and_then(|it| it.elapsed().ok());
            if age.is_some_and(|age| age > KEPT)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::warn!(%error, file = %entry.path().display(), "an old archive stays");
            }
        }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.as_str())
    }
}

fn digest(hash: &str) -> Result<Digest, ApiError> {
    hash.parse()
        .map_err(|error| ApiError::from_error(ErrorCode::Invalid, &error))
}
