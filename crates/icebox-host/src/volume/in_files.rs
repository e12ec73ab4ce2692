//! Drivers whose heads and layers are files of the data directory: one [`VolumeDriver`] over what differs between them.
//!
//! A driver says how a head is made and shown, how a chain becomes one image, and what else it can do, in methods that
//! block. What is asked of one sandbox's heads is done in its turn, on a thread that may block, whether or not the caller
//! waits for it.

use std::fmt::Debug;
use std::fs::File;
use std::path::Path;

use async_trait::async_trait;
use icebox_engine::host::{
    BlockDevice, Chain, Ensured, FreezeByHost, HostError, LiveFreeze, MergeLayers, Removed, Space,
    VolumeDriver, WatchHeads,
};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::{LAYER_DISK, Layout};
use icebox_engine::unit::Bytes;

use super::heads::{Heads, require_image};
use crate::fs;

/// What is different in a driver that keeps heads and layers in files. Clones are one driver.
pub trait Kind: Clone + Debug + Send + Sync + 'static {
    /// [`VolumeDriver::name`].
    const NAME: &'static str;
    /// The extension of its heads.
    const FORMAT: &'static str;
    /// [`VolumeDriver::layers_are_whole`].
    const LAYERS_ARE_WHOLE: bool;

    /// [`VolumeDriver::probe`], with scratch files in the data directory.
    fn probe(&self, data: &Path) -> Result<(), HostError>;

    /// [`VolumeDriver::live_freeze`].
    fn live_freeze(driver: &InFiles<Self>) -> LiveFreeze<'_>;

    /// [`VolumeDriver::watch`].
    fn watch(_driver: &InFiles<Self>) -> Option<&dyn WatchHeads> {
        None
    }

    /// [`VolumeDriver::merges_layers`].
    fn merges_layers(_driver: &InFiles<Self>) -> Option<&dyn MergeLayers> {
        None
    }

    /// Refuses an image that no head can be on.
    fn require_base(&self, image: &Path) -> Result<(), HostError> {
        require_image(image)
    }

    /// Refuses a chain that is not whole, and then is [`Heads::ensure`].
    fn ensure_head(
        &self,
        heads: &Heads,
        head: &HeadId,
        chain: &Chain,
    ) -> Result<Ensured, HostError>;

    /// [`VolumeDriver::attach`].
    fn attach(&self, heads: &Heads, head: &HeadId, chain: &Chain)
    -> Result<BlockDevice, HostError>;

    /// [`VolumeDriver::detach`].
    fn detach(&self, _head: &HeadId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    /// [`VolumeDriver::flush`].
    fn flush(&self, heads: &Heads, head: &HeadId) -> Result<(), HostError> {
        heads.flush(head)
    }

    /// [`VolumeDriver::flatten`].
    fn flatten(&self, layout: &Layout, chain: &Chain, out: &Path) -> Result<(), HostError>;

    /// Allocated bytes of a head's or a layer's file.
    fn usage(&self, file: &Path) -> Result<Bytes, HostError> {
        fs::allocated(file)
    }
}

/// A [`Kind`] that freezes by itself.
pub trait Freeze: Kind {
    /// [`FreezeByHost::freeze`].
    fn freeze(
        &self,
        heads: &Heads,
        from: &HeadId,
        to: &HeadId,
        staging: &Path,
    ) -> Result<(), HostError>;

    /// Called when it is known whether `from` has been frozen: whether `to` has come to be in its place.
    fn settle(
        &self,
        _heads: &Heads,
        _from: &HeadId,
        _to: &HeadId,
        _is_frozen: bool,
    ) -> Result<(), HostError> {
        Ok(())
    }
}

/// A [`Kind`] whose chains are merged.
pub trait Merge: Kind {
    /// [`MergeLayers::merge`], into `file`, which is empty and goes if this fails. `disk` is its name.
    fn merge(
        &self,
        layout: &Layout,
        run: &[LayerId],
        size: Bytes,
        file: &File,
        disk: &Path,
    ) -> Result<(), HostError>;

    /// [`MergeLayers::verify`], of `file`, of which nothing is cached.
    fn verify(
        &self,
        layout: &Layout,
        run: &[LayerId],
        size: Bytes,
        file: File,
        disk: &Path,
    ) -> Result<(), HostError>;
}

/// A driver that keeps heads and layers in files.
#[derive(Clone, Debug)]
pub struct InFiles<K> {
    heads: Heads,
    kind: K,
}

impl<K: Kind> InFiles<K> {
    pub(super) fn over(layout: Layout, kind: K) -> Self {
        Self {
            heads: Heads::new(layout, K::FORMAT),
            kind,
        }
    }

    /// Runs `work` on a thread that may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&K, &Heads) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let kind = self.kind.clone();
        self.heads.run(move |heads| work(&kind, heads)).await
    }

    /// Runs `work` on a thread that may block, after everything that was asked of this sandbox's heads before.
    async fn in_turn<T: Send + 'static>(
        &self,
        sandbox: &SandboxId,
        work: impl FnOnce(&K, &Heads) -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, HostError> {
        let kind = self.kind.clone();
        let work = move |heads: &Heads| work(&kind, heads);
        self.heads.in_turn(sandbox, work).await
    }
}

#[async_trait]
impl<K: Kind> VolumeDriver for InFiles<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    async fn probe(&self) -> Result<(), HostError> {
        self.run(|kind, heads| kind.probe(heads.layout().data()))
            .await
    }

    fn live_freeze(&self) -> LiveFreeze<'_> {
        K::live_freeze(self)
    }

    fn watch(&self) -> Option<&dyn WatchHeads> {
        K::watch(self)
    }

    fn layers_are_whole(&self) -> bool {
        K::LAYERS_ARE_WHOLE
    }

    fn merges_layers(&self) -> Option<&dyn MergeLayers> {
        K::merges_layers(self)
    }

    /// A base needs nothing beside its image, which the engine imports before it asks for heads.
    async fn ensure_base(&self, base: &Digest) -> Result<Ensured, HostError> {
        let base = base.clone();
        self.run(move |kind, heads| kind.require_base(&heads.layout().base_image(&base)))
            .await?;
        Ok(Ensured::AlreadyPresent)
    }

    async fn remove_base(&self, _base: &Digest) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn ensure_head(&self, head: &HeadId, chain: &Chain) -> Result<Ensured, HostError> {
        let (sandbox, head, chain) = (&head.sandbox, head.clone(), chain.clone());
        self.in_turn(sandbox, move |kind, heads| {
            kind.ensure_head(heads, &head, &chain)
        })
        .await
    }

    async fn remove_head(&self, head: &HeadId) -> Result<Removed, HostError> {
        let (sandbox, head) = (&head.sandbox, head.clone());
        self.in_turn(sandbox, move |_, heads| heads.remove(&head))
            .await
    }

    async fn attach(&self, head: &HeadId, chain: &Chain) -> Result<BlockDevice, HostError> {
        let (sandbox, head, chain) = (&head.sandbox, head.clone(), chain.clone());
        self.in_turn(sandbox, move |kind, heads| {
            kind.attach(heads, &head, &chain)
        })
        .await
    }

    async fn detach(&self, head: &HeadId) -> Result<Removed, HostError> {
        let (sandbox, head) = (&head.sandbox, head.clone());
        self.in_turn(sandbox, move |kind, _| kind.detach(&head))
            .await
    }

    async fn flush(&self, head: &HeadId) -> Result<(), HostError> {
        let (sandbox, head) = (&head.sandbox, head.clone());
        self.in_turn(sandbox, move |kind, heads| kind.flush(heads, &head))
            .await
    }

    async fn seal(&self, head: &HeadId, staging: &Path) -> Result<(), HostError> {
        let (sandbox, head, staging) = (&head.sandbox, head.clone(), staging.to_owned());
        self.in_turn(sandbox, move |_, heads| heads.seal(&head, &staging))
            .await
    }

    async fn flatten(&self, chain: &Chain, out: &Path) -> Result<(), HostError> {
        let (chain, out) = (chain.clone(), out.to_owned());
        self.run(move |kind, heads| kind.flatten(heads.layout(), &chain, &out))
            .await
    }

    async fn head_usage(&self, head: &HeadId) -> Result<Bytes, HostError> {
        let head = head.clone();
        self.run(move |kind, heads| kind.usage(&heads.path(&head)))
            .await
    }

    async fn space(&self) -> Result<Option<Space>, HostError> {
        Ok(None)
    }

    async fn list_heads(&self) -> Result<Vec<HeadId>, HostError> {
        self.run(|_, heads| heads.list()).await
    }

    /// A layer is a file in its directory.
    async fn remove_layer(&self, _layer: &LayerId) -> Result<Removed, HostError> {
        Ok(Removed::AlreadyAbsent)
    }

    async fn layer_usage(&self, layer: &LayerId) -> Result<Bytes, HostError> {
        let layer = layer.clone();
        self.run(move |kind, heads| kind.usage(&heads.layout().layer_disk(&layer)))
            .await
    }

    async fn list_layers(&self) -> Result<Vec<LayerId>, HostError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl<K: Freeze> FreezeByHost for InFiles<K> {
    async fn freeze(&self, from: &HeadId, to: &HeadId, staging: &Path) -> Result<(), HostError> {
        let sandbox = &from.sandbox;
        let (from, to, staging) = (from.clone(), to.clone(), staging.to_owned());
        self.in_turn(sandbox, move |kind, heads| {
            kind.freeze(heads, &from, &to, &staging)
        })
        .await
    }

    async fn is_frozen(&self, from: &HeadId, to: &HeadId) -> Result<bool, HostError> {
        let sandbox = &from.sandbox;
        let (from, to) = (from.clone(), to.clone());
        self.in_turn(sandbox, move |kind, heads| {
            let frozen = !fs::exists(&heads.path(&from))? && fs::exists(&heads.path(&to))?;
            kind.settle(heads, &from, &to, frozen)?;
            Ok(frozen)
        })
        .await
    }
}

#[async_trait]
impl<K: Merge> MergeLayers for InFiles<K> {
    async fn merge(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.run(move |kind, heads| {
            fs::create_whole(&disk, |file| {
                kind.merge(heads.layout(), &run, size, file, &disk)
            })
        })
        .await
    }

    async fn verify(&self, run: &[LayerId], size: Bytes, staging: &Path) -> Result<(), HostError> {
        let (run, disk) = (run.to_owned(), staging.join(LAYER_DISK));
        self.run(move |kind, heads| {
            let file = fs::open_file(&disk)?;
            fs::forget_cached(&file);
            kind.verify(heads.layout(), &run, size, file, &disk)
        })
        .await
    }
}
