//! A volume driver proves itself: everything that it is for, once, on a scratch disk.
//!
//! ```text
//!   base ── head: write 1 ── freeze ── write 2 ──> the head reads 2, a fork of the layer reads 1, the base is as it was
//! ```
//! That is more than a driver's own [`probe`](VolumeDriver::probe) looks at, which says what is missing in words that help;
//! this says that what is there does its work. Where the VMM freezes, nothing can be written without one: there the disk
//! goes through its stations empty, and what the base holds is read through them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use icebox_engine::host::{BlockDevice, Chain, ErrorKind, HostError, LiveFreeze, VolumeDriver};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{Layout, Object};
use icebox_engine::unit::Bytes;
use tempfile::TempDir;

use crate::blocking::blocking;
use crate::fs::{self, failed};

/// Of the scratch disk.
const SIZE: Bytes = Bytes::mib(4);
/// What is written and read at a time.
const BLOCK: usize = 64 << 10;
/// What the blocks hold.
const BASE: u8 = 0x11;
const FIRST: u8 = 0x22;
const SECOND: u8 = 0x33;

/// A data directory of its own, on the file system of the real one; it goes when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    layout: Layout,
    _directory: TempDir,
}

impl Scratch {
    /// Makes one in `data`. Blocks. What a killed process leaves of it is removed with what it left of builds.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(data: &Path) -> Result<Self, HostError> {
        let staging = data.join("staging");
        let parent = if staging.is_dir() { &staging } else { data };
        let directory = tempfile::Builder::new()
            .prefix("build-probe-")
            .tempdir_in(parent)
            .map_err(|error| failed("make a scratch directory in", parent, error))?;
        let layout = Layout::new(directory.path().join("data"), directory.path().join("run"));
        for area in ["bases", "layers", "sandboxes", "staging"] {
            let area = layout.data().join(area);
            std::fs::create_dir_all(&area)
                .map_err(|error| failed("make directory", &area, error))?;
        }
        Ok(Self {
            layout,
            _directory: directory,
        })
    }

    /// Where everything in it is: make the driver for this.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

/// Runs `driver`, which was made for `scratch`, through everything that it is for.
///
/// # Errors
/// The step that failed, with its cause, or what was read instead of what had been written.
pub async fn exercise(driver: &dyn VolumeDriver, scratch: &Scratch) -> Result<(), HostError> {
    let disks = Disks {
        driver,
        layout: &scratch.layout,
        base: Digest::from_bytes([BASE; 32]),
        head: SandboxId::random(),
        fork: SandboxId::random(),
        layer: LayerId::random(),
    };
    let worked = disks.live().await;
    let gone = disks.remove().await;
    worked.and(gone)
}

struct Disks<'a> {
    driver: &'a dyn VolumeDriver,
    layout: &'a Layout,
    base: Digest,
    head: SandboxId,
    fork: SandboxId,
    layer: LayerId,
}

impl Disks<'_> {
    fn head(&self, number: u32) -> HeadId {
        HeadId {
            sandbox: self.head.clone(),
            number,
        }
    }

    fn fork(&self) -> HeadId {
        HeadId {
            sandbox: self.fork.clone(),
            number: 0,
        }
    }

    /// What is under a head over the base, or over the layer.
    fn chain(&self, frozen: bool) -> Chain {
        let stands_alone = frozen && self.driver.layers_are_whole();
        Chain {
            layers: frozen.then(|| self.layer.clone()).into_iter().collect(),
            base: (!stands_alone).then(|| self.base.clone()),
            size: SIZE,
        }
    }

    async fn live(&self) -> Result<(), HostError> {
        let image = self.layout.base_image(&self.base);
        for directory in [
            self.layout.object(&Object::Base(self.base.clone())),
            self.layout.object(&Object::Sandbox(self.head.clone())),
            self.layout.object(&Object::Sandbox(self.fork.clone())),
        ] {
            fs::ensure_directory(&directory)?;
        }
        fill(image.clone()).await?;
        self.driver.ensure_base(&self.base).await?;
        let below = self.chain(false);
        self.driver.ensure_head(&self.head(0), &below).await?;
        let device = self.driver.attach(&self.head(0), &below).await?;
        self.write(&device, FIRST).await?;
        self.driver.flush(&self.head(0)).await?;
        self.freeze(&below).await?;

        let above = self.chain(true);
        let device = self.driver.attach(&self.head(1), &above).await?;
        self.write(&device, SECOND).await?;
        self.driver.flush(&self.head(1)).await?;
        self.driver.ensure_head(&self.fork(), &above).await?;
        let forked = self.driver.attach(&self.fork(), &above).await?;
        self.expect(&device, [SECOND, BASE], "what was written last")
            .await?;
        self.expect(&forked, [FIRST, BASE], "what was frozen")
            .await?;
        self.expect_file(&image, [BASE, BASE], "the base").await?;
        let flat = self.layout.data().join("flat");
        self.driver.flatten(&above, &flat).await?;
        let first = match self.is_written() {
            true => FIRST,
            false => BASE,
        };
        self.expect_file(&flat, [first, BASE], "the layer, written out")
            .await
    }

    /// Whether somebody can write to a head here: not if that is only for a VMM.
    fn is_written(&self) -> bool {
        matches!(self.driver.live_freeze(), LiveFreeze::ByHost(_))
    }

    async fn freeze(&self, below: &Chain) -> Result<(), HostError> {
        let object = Object::Layer(self.layer.clone());
        let staging = self.layout.staging(&object);
        fs::ensure_directory(&staging)?;
        match self.driver.live_freeze() {
            LiveFreeze::ByHost(host) => {
                host.freeze(&self.head(0), &self.head(1), &staging).await?;
            }
            LiveFreeze::ByVmm => {
                let mut above = below.clone();
                above.layers.insert(0, self.layer.clone());
                self.driver.ensure_head(&self.head(1), &above).await?;
                self.driver.seal(&self.head(0), &staging).await?;
            }
        }
        fs::rename_to_new(&staging, &self.layout.object(&object))
    }

    async fn write(&self, device: &BlockDevice, byte: u8) -> Result<(), HostError> {
        let BlockDevice::Raw { path } = device else {
            return Ok(());
        };
        let path = path.clone();
        blocking(move || {
            OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|file| {
                    file.write_all_at(&[byte; BLOCK], 0)?;
                    file.sync_all()
                })
                .map_err(|error| failed("write to the scratch disk", &path, error))
        })
        .await
    }

    async fn expect(
        &self,
        device: &BlockDevice,
        bytes: [u8; 2],
        what: &str,
    ) -> Result<(), HostError> {
        match device {
            BlockDevice::Raw { path } => self.expect_file(path, bytes, what).await,
            // Read when it is written out.
            BlockDevice::Qcow2 { .. } => Ok(()),
        }
    }

    /// Reads the first block and one in the middle.
    async fn expect_file(&self, path: &Path, bytes: [u8; 2], what: &str) -> Result<(), HostError> {
        let (path, what) = (path.to_owned(), what.to_owned());
        blocking(move || {
            let read = |error| failed("read the scratch disk", &path, error);
            let file = File::open(&path).map_err(read)?;
            for (at, expected) in [0, SIZE.0 / 2].into_iter().zip(bytes) {
                let mut block = [0; BLOCK];
                file.read_exact_at(&mut block, at).map_err(read)?;
                if block != [expected; BLOCK] {
                    return Err(HostError::new(
                        ErrorKind::Unsupported,
                        format!("a scratch disk does not hold what it should: {what} read differently at {at}"),
                    )
                    .hint("the storage of the data directory is not to be trusted: look at `dmesg`"));
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes everything off the host, as far as each step goes.
    async fn remove(&self) -> Result<(), HostError> {
        let mut first = Ok(());
        for head in [self.fork(), self.head(1), self.head(0)] {
            let detached = self.driver.detach(&head).await;
            let removed = self.driver.remove_head(&head).await;
            first = first.and(detached.and(removed).map(drop));
        }
        let layer = self.driver.remove_layer(&self.layer).await;
        let base = self.driver.remove_base(&self.base).await;
        first.and(layer.map(drop)).and(base.map(drop))
    }
}

async fn fill(image: std::path::PathBuf) -> Result<(), HostError> {
    blocking(move || {
        let file = fs::create_file(&image)?;
        let blocks = SIZE.0 / BLOCK as u64;
        (0..blocks)
            .try_for_each(|number| file.write_all_at(&[BASE; BLOCK], number * BLOCK as u64))
            .and_then(|()| file.sync_all())
            .map_err(|error| failed("write the scratch image", &image, error))
    })
    .await
}
