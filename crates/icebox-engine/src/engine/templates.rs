//! Templates: importing, flattening, removing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::spec::check_geometry;
use super::{Engine, ask};
use crate::collect;
use crate::deadline::{self, within};
use crate::error::Error;
use crate::id::{Digest, Name, Team, TemplateId};
use crate::layout::{BASE_IMAGE, Object};
use crate::manifest;
use crate::manifest::v1::{self, Base, Template, TemplateContent};
use crate::panics::caught;
use crate::sandbox::{Chained, Frozen, Request, Shared, find_volume_driver};
use crate::steps::Steps;
use crate::unit::{Bytes, Geometry};

/// A new image template.
#[derive(Clone, Debug)]
pub struct ImageRequest {
    /// The template's name.
    pub name: Name,
    /// CPUs and memory of sandboxes that do not ask for others.
    pub geometry: Geometry,
    /// The kernel to boot.
    pub kernel: Digest,
    /// Variables for every command.
    pub env: BTreeMap<String, String>,
    /// Who runs commands, and where.
    pub login: v1::Login,
    /// Where it came from, in words.
    pub source: String,
}

impl Engine {
    /// Imports a raw disk image, which is moved from `image` (on the data directory's file system), as a template.
    ///
    /// # Errors
    /// `image` may be left where it was; nothing else is.
    pub async fn import_image(
        &self,
        image: &Path,
        request: ImageRequest,
    ) -> Result<Template, Error> {
        self.import_image_of(self.scope.team(), image, request)
            .await
    }

    async fn import_image_of(
        &self,
        team: Team,
        image: &Path,
        request: ImageRequest,
    ) -> Result<Template, Error> {
        self.require_room().await?;
        let image = image.to_owned();
        self.detached("importing an image", |engine| async move {
            engine.publish_image(team, &image, request).await
        })
        .await
    }

    async fn publish_image(
        &self,
        team: Team,
        image: &Path,
        request: ImageRequest,
    ) -> Result<Template, Error> {
        let catalog = &self.shared.catalog;
        let _reserved = catalog.reserve_template_name(&team, &request.name)?;
        check_geometry(request.geometry, u8::MAX, self.shared.config.max_mem_mib)?;
        let store = Arc::clone(&self.shared.host.store);
        let digest = within(deadline::SAVE, "hashing the image", store.digest(image)).await?;
        let size = within(
            deadline::STORE,
            "measuring the image",
            store.file_size(image),
        )
        .await?;
        if size.0 == 0 || !size.0.is_multiple_of(512) {
            return Err(Error::Invalid {
                message: format!("an image of {} bytes is not a disk", size.0),
                hint: "a disk is a whole number of sectors of 512 bytes".into(),
            });
        }
        // From before it is looked for until a template refers to it.
        let pin = self.shared.catalog.pin([Object::Base(digest.clone())]);
        self.publish_base(image, &digest, size).await?;
        let template = Template {
            id: TemplateId::random(),
            name: request.name,
            team,
            public: false,
            content: TemplateContent::Image { base: digest },
            geometry: request.geometry,
            disk_size: size,
            kernel: request.kernel,
            env: request.env,
            login: request.login,
            source: request.source,
            created_at: self.shared.now(),
            warm: 0,
        };
        let object = Object::Template(template.id.clone());
        let published = within(deadline::STORE, "publishing the template", async {
            store.stage(&object).await?;
            store
                .publish(&object, &manifest::encode(1, &template))
                .await
        });
        if let Err(error) = caught("publishing a template", published).await {
            self.discard(&object).await;
            return Err(error);
        }
        self.shared.catalog.add_template(1, template.clone());
        drop(pin);
        let detail = format!("{} from {}", template.name, template.source);
        let (team, kind) = (Some(&template.team), "template.created");
        let events = &self.shared.events;
        events.emit(team, None, kind, detail, &Steps::default());
        Ok(template)
    }

    async fn publish_base(&self, image: &Path, digest: &Digest, size: Bytes) -> Result<(), Error> {
        let object = Object::Base(digest.clone());
        // The same content may be published or collected by somebody else at this moment.
        let _collecting = self.shared.collecting.lock().await;
        if self.shared.catalog.has_base(digest) {
            return Ok(());
        }
        // A collection has failed to remove it, or does not know that it has.
        if self.shared.catalog.is_condemned(&object) {
            collect::remove(&self.shared, &object).await?;
        }
        let store = &self.shared.host.store;
        let base = Base {
            digest: digest.clone(),
            size,
            created_at: self.shared.now(),
        };
        let published = within(deadline::STORE, "publishing the image", async {
            store.stage(&object).await?;
            store.move_into_staging(image, &object, BASE_IMAGE).await?;
            store.publish(&object, &manifest::encode(1, &base)).await
        });
        if let Err(error) = caught("publishing an image", published).await {
            self.discard(&object).await;
            return Err(error);
        }
        self.shared.catalog.add_base(base);
        Ok(())
    }

    async fn discard(&self, object: &Object) {
        let store = &self.shared.host.store;
        let discarded = async {
            store.discard(object).await?;
            store.trash(object).await
        };
        if let Err(error) =
            within(deadline::STORE, "discarding what is not needed", discarded).await
        {
            tracing::warn!(%object, %error, "left for the next start to remove");
        }
    }

    /// Makes an image template of a sandbox's disk as it is now. The sandbox stands still for the freeze alone.
    pub async fn flatten(&self, wanted: &str, name: Name) -> Result<Template, Error> {
        let entry = self.with_room(wanted).await?;
        let team = &entry.record.spec.team;
        drop(self.shared.catalog.reserve_template_name(team, &name)?);
        self.detached("flattening", |engine| async move {
            let frozen = ask(&entry, Request::Freeze).await?;
            engine.write_flat(&entry.record, frozen, name).await
        })
        .await
    }

    async fn write_flat(
        &self,
        record: &v1::Sandbox,
        frozen: Frozen,
        name: Name,
    ) -> Result<Template, Error> {
        // A staging directory of its own: the name of no object that will be.
        let scratch = Object::Template(TemplateId::random());
        let store = &self.shared.host.store;
        let volumes = find_volume_driver(&self.shared.host, &record.spec.volume_driver)?;
        let source = format!("disk of {}", crate::catalog::display_name(record));
        let flat = async {
            let directory =
                within(deadline::STORE, "staging the image", store.stage(&scratch)).await?;
            let image = directory.join(BASE_IMAGE);
            within(
                deadline::FLATTEN,
                "writing the disk out",
                volumes.flatten(&frozen.chain, &image),
            )
            .await?;
            let spec = &record.spec;
            let (geometry, kernel) = (spec.geometry, spec.kernel.clone());
            let (env, login) = (spec.env.clone(), spec.login.clone());
            self.import_image_of(
                spec.team.clone(),
                &image,
                ImageRequest {
                    name,
                    geometry,
                    kernel,
                    env,
                    login,
                    source,
                },
            )
            .await
        };
        let flat = caught("writing a disk out", flat).await;
        self.discard(&scratch).await;
        flat
    }

    /// All templates that this handle finds and that can be used.
    #[must_use]
    pub fn templates(&self) -> Vec<Template> {
        let mut templates = self.shared.catalog.templates(&self.scope);
        templates.retain(|template| self.shared.catalog.template_flaw(template).is_none());
        templates
    }

    /// The templates of which something is missing or cannot be read, and what. They keep their names and what is left
    /// of them until they are removed.
    #[must_use]
    pub fn unusable_templates(&self) -> Vec<(Template, String)> {
        let catalog = &self.shared.catalog;
        let flawed = |template: Template| {
            let why = catalog.template_flaw(&template)?;
            Some((template, why))
        };
        let templates = catalog.templates(&self.scope).into_iter();
        templates.filter_map(flawed).collect()
    }

    /// One template, by name, id or unique prefix of an id.
    pub fn template(&self, wanted: &str) -> Result<Template, Error> {
        self.shared
            .catalog
            .template(&self.scope, wanted)
            .map(|(template, _)| template)
    }

    /// One template, and why it cannot be used, if so.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn inspect_template(&self, wanted: &str) -> Result<(Template, Option<String>), Error> {
        let catalog = &self.shared.catalog;
        let (template, _pin) = catalog.any_template(&self.scope, wanted)?;
        let flaw = self.shared.catalog.template_flaw(&template);
        Ok((template, flaw))
    }

    /// Lets every team create sandboxes from a template, or its own alone. Sandboxes that exist are not affected.
    ///
    /// # Errors
    /// It is another team's, or another public template has its name: among public ones a name means one thing.
    pub async fn publish_template(&self, wanted: &str, public: bool) -> Result<Template, Error> {
        let catalog = &self.shared.catalog;
        let (template, pin) = catalog.own_template(&self.scope, wanted)?;
        self.detached("publishing a template", |engine| async move {
            let published = engine.write_publicity(template, public).await;
            drop(pin);
            published
        })
        .await
    }

    async fn write_publicity(&self, template: Template, public: bool) -> Result<Template, Error> {
        let Shared {
            catalog,
            events,
            publishing,
            ..
        } = &*self.shared;
        let _alone = publishing.lock().await;
        if public {
            catalog.check_publishable(&template)?;
        }
        let (_, before) = catalog.stored_template(&template.id)?;
        if before.public == public {
            return Ok(before);
        }
        let change = |template: &mut Template| template.public = public;
        let after = self.commit_template(&template.id, change).await?;
        let kind = match public {
            true => "template.published",
            false => "template.unpublished",
        };
        let name = after.name.to_string();
        events.emit(Some(&after.team), None, kind, name, &Steps::default());
        Ok(after)
    }

    /// Changes what a template's manifest says, apart from other such changes.
    pub(super) async fn rewrite_template(
        &self,
        id: &TemplateId,
        change: impl FnOnce(&mut Template),
    ) -> Result<Template, Error> {
        let _alone = self.shared.publishing.lock().await;
        self.commit_template(id, change).await
    }

    /// As that, with [`Shared::publishing`] held.
    async fn commit_template(
        &self,
        id: &TemplateId,
        change: impl FnOnce(&mut Template),
    ) -> Result<Template, Error> {
        let Shared { catalog, host, .. } = &*self.shared;
        let (revision, mut template) = catalog.stored_template(id)?;
        change(&mut template);
        let (object, revision) = (Object::Template(id.clone()), revision + 1);
        let manifest = manifest::encode(revision, &template);
        let committed = host.store.commit(&object, &manifest);
        within(
            deadline::STORE,
            "writing the template's manifest",
            committed,
        )
        .await?;
        catalog.add_template(revision, template.clone());
        Ok(template)
    }

    /// Removes a template. What only it needed goes with it.
    ///
    /// # Errors
    /// It is another team's, or sandboxes that were created from it exist: they are named.
    pub async fn remove_template(&self, wanted: &str) -> Result<Template, Error> {
        let catalog = &self.shared.catalog;
        let (template, pin) = catalog.own_template(&self.scope, wanted)?;
        self.detached("removing a template", |engine| async move {
            // Otherwise nobody makes one that waits.
            let is_warm = template.warm > 0 || engine.waiting(&template.id) > 0;
            let alone = match is_warm {
                true => Some(engine.shared.warming.lock().await),
                false => None,
            };
            let removed = engine.trash_template(template).await;
            if let Ok(template) = &removed
                && let Err(error) = engine.cool(&template.id, 0).await
            {
                tracing::error!(template = %template.id, error = %Chained(&error), "what waited is left to be removed");
                engine.shared.warmth.send_replace(());
            }
            drop(alone);
            drop(pin);
            engine.collect_soon();
            removed
        })
        .await
    }

    async fn trash_template(&self, template: Template) -> Result<Template, Error> {
        let catalog = &self.shared.catalog;
        let _alone = self.shared.publishing.lock().await;
        let (revision, template) = catalog.stored_template(&template.id)?;
        catalog.forget_template(&self.scope, &template.id)?;
        let object = Object::Template(template.id.clone());
        let trashed = within(
            deadline::STORE,
            "removing the template",
            self.shared.host.store.trash(&object),
        );
        if let Err(error) = caught("removing a template", trashed).await {
            catalog.add_template(revision, template);
            return Err(error);
        }
        self.shared.events.emit(
            Some(&template.team),
            None,
            "template.removed",
            template.name.to_string(),
            &Steps::default(),
        );
        Ok(template)
    }
}
