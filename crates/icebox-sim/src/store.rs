//! A store in memory.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use icebox_engine::host::{ErrorKind, HostError, Removed, Space, Store, StoredDocument};
use icebox_engine::id::Digest;
use icebox_engine::layout::Object;
use icebox_engine::unit::Bytes;

use crate::world::{File, World, object_path, staging_path};

pub(crate) struct SimStore {
    world: World,
}

impl SimStore {
    pub(crate) fn new(world: World) -> Self {
        Self { world }
    }
}

fn removed(was_there: bool) -> Removed {
    if was_there {
        Removed::Removed
    } else {
        Removed::AlreadyAbsent
    }
}

#[async_trait]
impl Store for SimStore {
    async fn load(&self) -> Result<Vec<StoredDocument>, HostError> {
        let state = self.world.lock();
        let documents = state
            .objects
            .iter()
            .map(|(object, directory)| StoredDocument {
                object: object.clone(),
                manifest: directory.manifest.clone(),
            });
        Ok(documents.collect())
    }

    async fn commit(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        state.objects.entry(object.clone()).or_default().manifest = Some(manifest.to_vec());
        Ok(())
    }

    async fn stage(&self, object: &Object) -> Result<PathBuf, HostError> {
        let mut state = self.world.lock();
        state.tick();
        state
            .staging
            .insert(object.clone(), crate::world::Directory::default());
        Ok(staging_path(object))
    }

    async fn staged(&self, object: &Object) -> Result<PathBuf, HostError> {
        let mut state = self.world.lock();
        state.tick();
        state.staging.entry(object.clone()).or_default();
        Ok(staging_path(object))
    }

    async fn publish(&self, object: &Object, manifest: &[u8]) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        if let Object::Generation(sandbox, _) = object
            && !state
                .objects
                .contains_key(&Object::Sandbox(sandbox.clone()))
        {
            return Err(HostError::new(
                ErrorKind::NotFound,
                format!("{object} has no sandbox"),
            ));
        }
        // After a crash between the two, `staged` has made an empty directory again.
        let repeated = state.objects.contains_key(object)
            && state
                .staging
                .get(object)
                .is_none_or(|directory| directory.files.is_empty());
        if repeated {
            state.staging.remove(object);
            return Ok(());
        }
        let Some(mut directory) = state.staging.remove(object) else {
            return Err(HostError::new(
                ErrorKind::NotFound,
                format!("{object} is not staged"),
            ));
        };
        directory.manifest = Some(manifest.to_vec());
        state.objects.insert(object.clone(), directory);
        Ok(())
    }

    async fn discard(&self, object: &Object) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        Ok(removed(state.staging.remove(object).is_some()))
    }

    async fn trash(&self, object: &Object) -> Result<Removed, HostError> {
        let mut state = self.world.lock();
        state.tick();
        if let Object::Layer(layer) = object
            && let Some(user) = state.vms.iter().find(|(_, vm)| vm.opened.contains(layer))
        {
            let gone = format!("{object} went while the VMM of {} had it open", user.0);
            state.taken_away.push(gone);
        }
        let was_there = state.objects.remove(object).is_some();
        if was_there {
            state.trash.insert(object.clone());
        }
        if let Object::Sandbox(gone) = object {
            state
                .objects
                .retain(|other, _| !matches!(other, Object::Generation(id, _) if id == gone));
        }
        Ok(removed(was_there))
    }

    async fn empty_trash(&self) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        state.trash.clear();
        Ok(())
    }

    async fn list_staging(&self) -> Result<Vec<Object>, HostError> {
        Ok(self.world.lock().staging.keys().cloned().collect())
    }

    async fn digest(&self, file: &Path) -> Result<Digest, HostError> {
        match self.world.lock().read(file)? {
            File::Image { content, .. } => {
                let mut bytes = [0; 32];
                bytes[..8].copy_from_slice(&content.to_be_bytes());
                Ok(Digest::from_bytes(bytes))
            }
            other => Err(HostError::new(
                ErrorKind::Invalid,
                format!("{other:?} is no image"),
            )),
        }
    }

    async fn file_size(&self, file: &Path) -> Result<Bytes, HostError> {
        match self.world.lock().read(file)? {
            File::Image { size, .. } => Ok(size),
            _ => Ok(Bytes(4096)),
        }
    }

    async fn move_into_staging(
        &self,
        file: &Path,
        object: &Object,
        as_file: &str,
    ) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let content = state.read(file)?;
        if state.loose_files.remove(file).is_none() {
            let (directory, name) = state.directory_of(file)?;
            directory.files.remove(&name);
        }
        state.write(&staging_path(object).join(as_file), content)
    }

    async fn allocated(&self, object: &Object) -> Result<Bytes, HostError> {
        let state = self.world.lock();
        let own = |of: &Object| {
            let files = state
                .objects
                .get(of)
                .map_or(0, |directory| directory.files.len());
            4096 * (1 + files as u64)
        };
        let within = state.objects.keys().filter(|other| match (object, other) {
            (Object::Sandbox(id), Object::Generation(of, _)) => id == of,
            _ => false,
        });
        Ok(Bytes(own(object) + within.map(own).sum::<u64>()))
    }

    async fn space(&self) -> Result<Space, HostError> {
        Ok(self.world.lock().space("the simulated file system"))
    }

    fn path(&self, object: &Object, file: &str) -> PathBuf {
        object_path(object, file)
    }

    async fn copy_into_staging(
        &self,
        from: &Object,
        file: &str,
        to: &Object,
    ) -> Result<(), HostError> {
        let mut state = self.world.lock();
        state.tick();
        let content = state.read(&object_path(from, file))?;
        state.write(&staging_path(to).join(file), content)
    }
}
