//! Root images: one ext4 filesystem in a sparse file, made without mounting anything.
//!
//! Whatever the source, the result is a raw image in staging together with its digest, the SHA-256 of all its bytes. Two
//! builds of one recipe seldom give the same digest: packages move on, and `mke2fs` before 1.47.1 stores the time at
//! which a file was staged. What can be fixed is fixed: the filesystem's UUID and hash seed come from the recipe.

mod debian;
mod dir;
mod ext4;
mod image;
mod tar;

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use icebox_engine::id::Digest;
use tempfile::TempDir;

use super::{
    ImageError, Io, Places, Progress,
    digest::{digest_of, digest_of_file},
    staging::sync_parent,
};

/// Where a root image's content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Packages of a Debian release, with a user `user` (uid 1000, home /home/user; may use sudo without a password
    /// where sudo is included).
    Debian {
        /// The release's code name, for example `bookworm`.
        suite: String,
        /// Packages beside the required ones.
        include: Vec<String>,
    },
    /// A tar archive of a root directory, plain or compressed with gzip, xz or zstd. It may come from anywhere: what
    /// would leave the root or is a device is refused.
    Tar(PathBuf),
    /// A directory of the host, taken as it is. Needs root to keep owners.
    Dir(PathBuf),
    /// A raw image of one ext4 filesystem, checked and copied.
    Image(PathBuf),
}

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Where the content comes from.
    pub source: Source,
    /// The size of the filesystem in bytes, rounded up to whole MiB. `None` is [`DEFAULT_SIZE`] or what the content
    /// needs and a quarter, whichever is more; for an image, the size it has.
    pub size: Option<u64>,
}

/// The size of a root image that nobody asked another size for: 1 GiB. It costs only what is written.
pub const DEFAULT_SIZE: u64 = 1 << 30;
/// The smallest filesystem with a journal that is of any use: 16 MiB.
pub const MIN_SIZE: u64 = 16 << 20;
/// The largest root image: 4 TiB, well within ext4's 16 TiB for 4 KiB blocks.
pub const MAX_SIZE: u64 = 4 << 40;

/// A finished root image, still in staging: dropping it removes it.
#[derive(Debug)]
pub struct RootImage {
    staging: TempDir,
    path: PathBuf,
    /// The digest of the whole image, holes read as zeros.
    pub digest: Digest,
    /// The image's length.
    pub virtual_bytes: u64,
    /// What it occupies on disk.
    pub allocated_bytes: u64,
}

impl RootImage {
    /// The image file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the image, moves it to `dest` on the same filesystem (replacing what is there), and syncs `dest`'s directory.
    /// Blocks while its data is written out.
    ///
    /// # Errors
    /// Syncing or moving failed; the image is removed then.
    pub fn persist(self, dest: &Path) -> Result<(), ImageError> {
        File::open(&self.path)
            .and_then(|file| file.sync_all())
            .at("sync", &self.path)?;
        fs::rename(&self.path, dest).at("move the root image to", dest)?;
        sync_parent(dest)?;
        let staging = self.staging.path().to_owned();
        self.staging.close().at("remove", &staging)
    }
}

/// Builds a root image. Blocks: a Debian release takes tens of seconds.
///
/// # Errors
/// The recipe names what does not exist or is damaged, a tool fails, or there is no room. Nothing is left in staging.
pub fn build(
    places: &Places,
    recipe: &Recipe,
    progress: &dyn Progress,
) -> Result<RootImage, ImageError> {
    let size = recipe.size.map(checked_size).transpose()?;
    let staging = places.stage("rootfs")?;
    let path = staging.path().join("root.ext4");
    match &recipe.source {
        Source::Debian { suite, include } => {
            let release = debian::Release::new(suite, include)?;
            let tree = staging.path().join("tree");
            release.install(places, &tree, progress)?;
            ext4::make(&tree, &path, size, &release.identity(), progress)?;
        }
        Source::Tar(archive) => {
            let tree = staging.path().join("tree");
            let limit = size.unwrap_or(MAX_SIZE);
            tar::unpack(archive, &tree, limit, progress)?;
            ext4::make(&tree, &path, size, &identity("tar", archive), progress)?;
        }
        Source::Dir(tree) => {
            dir::check(tree)?;
            ext4::make(tree, &path, size, &identity("dir", tree), progress)?;
        }
        Source::Image(image) => image::copy(image, &path, size, progress)?,
    }
    let tree = staging.path().join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).at("remove", &tree)?;
    }
    let digest = digest_of_file(&path, progress)?;
    let metadata = fs::metadata(&path).at("look at", &path)?;
    Ok(RootImage {
        staging,
        path,
        digest,
        virtual_bytes: metadata.len(),
        allocated_bytes: metadata.blocks() * 512,
    })
}

fn identity(kind: &str, path: &Path) -> Digest {
    digest_of(format!("{kind}\0{}", path.display()).as_bytes())
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn checked_size(bytes: u64) -> Result<u64, ImageError> {
    if (MIN_SIZE..=MAX_SIZE).contains(&bytes) {
        Ok(mib(bytes) << 20)
    } else {
        Err(ImageError::SizeOutOfRange {
            size_mib: mib(bytes),
            min_mib: mib(MIN_SIZE),
            max_mib: mib(MAX_SIZE),
        })
    }
}
